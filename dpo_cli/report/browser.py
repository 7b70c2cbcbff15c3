"""The prompt browser's data: which samples are on the page, and how they are packed into it.

Packed, a sample is a JSON object of texts and numbers that the page's script reads. Its heat is three strings:
the answer's tokens joined, where they are not the answer itself, the length of each token, and log(pi / pi_ref) of
each, both as digits to the base 90.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dpo_cli.core import paths
from dpo_cli.report.shades import SHADES, scale_of

Sample = Mapping[str, Any]

MOST_SAMPLES, MOST_BYTES = 500, 2_300_000

# Printable letters that neither JSON nor HTML escapes; the script has the same.
DIGITS = "".join(chr(code) for code in range(35, 127) if chr(code) not in "<\\")
_BASE = len(DIGITS)
_RATIO_STEP = 0.01
_NO_RATIO, _ZERO_RATIO = 0, _BASE**2 // 2


@dataclass(frozen=True)
class Browser:
    """What the prompt browser shows.

    Attributes:
        data: The samples as the text of a ``<script type="application/json">``.
        num_shown: Samples on the page.
        num_prompts: Samples there are.
        outcomes: Prompts by outcome in words, such as ``wins 80``; empty where no judge compared.
        counts: Prompts by outcome.
        scale: The ratio with the full colour, nats; None where no sample has heat.
        file: Where all samples are.
    """

    data: str
    num_shown: int
    num_prompts: int
    outcomes: list[str]
    counts: dict[str, int]
    scale: float | None
    file: str


def make_browser(samples: Sequence[Sample]) -> Browser:
    """Choose samples and pack them.

    Losses and verdicts that depend on the order of the answers come first, then the others in the order of their
    ids, which is random, until the page has enough of them.
    """
    packed: list[tuple[str, str]] = []
    ratios: list[float] = []
    total = 0
    for sample in sorted(samples, key=lambda sample: (not _comes_first(sample), sample["id"])):
        text = _safe_json(_pack(sample))
        total += len(text.encode())
        if packed and (total > MOST_BYTES or len(packed) == MOST_SAMPLES):
            break
        packed.append((sample["id"], text))
        ratios += [ratio for _, ratio in sample["dpo"].get("heat") or () if ratio is not None]
    scale = scale_of(ratios) if ratios else None
    counts = {name: sum(outcome_of(sample) == name for sample in samples) for name in ("win", "tie", "loss", "none")}
    head = _safe_json({"scale": scale, "shades": SHADES, "step": _RATIO_STEP, "file": _file()})
    words = {"win": "wins", "tie": "ties", "loss": "loses"}
    return Browser(
        data=f'{head[:-1]},"samples":[\n{",".join(_lines(text for _, text in sorted(packed)))}]}}',
        num_shown=len(packed),
        num_prompts=len(samples),
        outcomes=[f"{words[name]} {count}" for name, count in counts.items() if name in words and count]
        if counts["none"] < len(samples)
        else [],
        counts=counts,
        scale=scale,
        file=_file(),
    )


def outcome_of(sample: Sample) -> str:
    """win, tie or loss of the tuned model against SFT; none where there is no verdict."""
    win = sample.get("win")
    if win is None:
        return "none"
    return "win" if win > 0.5 else "loss" if win < 0.5 else "tie"


def _comes_first(sample: Sample) -> bool:
    return outcome_of(sample) == "loss" or sample.get("consistent") is False


def _file() -> str:
    return (paths.report_dir("evaluate") / paths.SAMPLES).as_posix()


def _lines(texts: Iterable[str]) -> list[str]:
    return [f"{text}\n" for text in texts]


def _pack(sample: Sample) -> dict[str, Any]:
    tuned = dict(sample["dpo"])
    heat = tuned.pop("heat", None)
    if heat:
        tuned["heat"] = pack_heat(tuned["text"], heat)
    kept = {
        name: sample[name]
        for name in ("id", "prompt", "chosen", "rejected", "win", "win_chosen", "consistent", "kl")
        if sample.get(name) is not None
    }
    return kept | {"sft": sample["sft"], "dpo": tuned}


def pack_heat(answer: str, heat: Sequence[tuple[str, float | None]]) -> dict[str, str]:
    """The tokens of an answer and their log(pi / pi_ref), as short strings.

    Args:
        answer: Its text.
        heat: Text and ratio in nats of each token.

    Returns:
        ``lengths`` of the tokens in UTF-16 units, one digit each, or more where a token has 89 units or more;
        ``ratios``, two digits each; and ``rest``, what the tokens have behind the answer's text (the token that ends
        the turn), or ``text``, all that they are, where they do not begin with it.
    """
    joined = "".join(token for token, _ in heat)
    packed = {"rest": joined[len(answer) :]} if joined.startswith(answer) else {"text": joined}
    return packed | {
        "lengths": "".join(_length_digits(len(token.encode("utf-16-le", "surrogatepass")) // 2) for token, _ in heat),
        "ratios": "".join(_ratio_digits(ratio) for _, ratio in heat),
    }


def _length_digits(length: int) -> str:
    whole, rest = divmod(length, _BASE - 1)
    return DIGITS[-1] * whole + DIGITS[rest]


def _ratio_digits(ratio: float | None) -> str:
    if ratio is None or not math.isfinite(ratio):
        number = _NO_RATIO
    else:
        number = min(max(round(ratio / _RATIO_STEP) + _ZERO_RATIO, 1), _BASE**2 - 1)
    return DIGITS[number // _BASE] + DIGITS[number % _BASE]


def _safe_json(value: Any) -> str:
    """JSON that no HTML parser reads as markup, with a mark in place of half a surrogate pair."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
