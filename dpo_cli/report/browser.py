"""The prompt browser's data: which samples are on the page, and how they are packed into it.

Packed, a sample is a JSON object of texts and numbers that the page's script reads. Of an answer's tokens it has the
lengths and log(pi / pi_ref); their texts are parts of the answer's.
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

MOST_SAMPLES, MOST_BYTES = 500, 2_500_000

_RATIO_STEP = 0.01


@dataclass(frozen=True)
class Browser:
    """What the prompt browser shows.

    Attributes:
        data: The samples as the text of a ``<script type="application/json">``.
        num_shown: Samples on the page.
        num_prompts: Samples there are.
        outcomes: Prompts by outcome in words, such as ``wins 80``; empty where no judge compared.
        counts: Prompts by outcome.
        scale: The ratio with the full color, nats; None where no sample has log-ratios.
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
    log_ratios = tuned.pop("heat", None)
    if log_ratios:
        tuned["heat"] = pack_log_ratios(tuned["text"], log_ratios)
    kept = {
        name: sample[name]
        for name in ("id", "prompt", "chosen", "rejected", "win", "win_chosen", "consistent", "kl")
        if sample.get(name) is not None
    }
    return kept | {"sft": sample["sft"], "dpo": tuned}


def pack_log_ratios(answer: str, tokens: Sequence[tuple[str, float | None]]) -> dict[str, Any]:
    """The tokens of an answer and their log(pi / pi_ref), without the answer's text.

    Args:
        answer: Its text.
        tokens: Text and ratio in nats of each.

    Returns:
        ``lengths`` of the tokens in UTF-16 units; ``ratios``, hundredths of a nat, null where there is none; and
        ``rest``, what the tokens have behind the answer's text (the token that ends the turn), or ``text``, all that
        they are, where they do not begin with it.
    """
    joined = "".join(text for text, _ in tokens)
    packed: dict[str, Any] = {"rest": joined[len(answer) :]} if joined.startswith(answer) else {"text": joined}
    return packed | {
        "lengths": [len(text.encode("utf-16-le", "surrogatepass")) // 2 for text, _ in tokens],
        "ratios": [
            None if ratio is None or not math.isfinite(ratio) else round(ratio / _RATIO_STEP) for _, ratio in tokens
        ],
    }


def _safe_json(value: Any) -> str:
    """JSON that no HTML parser reads as markup, with a mark in place of half a surrogate pair."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
