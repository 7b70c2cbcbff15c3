"""The prompt browser's data: which samples are on the page, and how they are packed into it.

Packed, a sample is a JSON object of texts and numbers that the page's script reads. Of an answer's tokens it has the
lengths and log(pi / pi_ref); their texts are parts of the answer's.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dpo_cli.core import paths
from dpo_cli.report.style import SHADES, scale_of

Sample = Mapping[str, Any]

MOST_SAMPLES, MOST_BYTES = 500, 2_500_000

_RATIO_STEP = 0.01


@dataclass(frozen=True)
class Browser:
    """What the prompt browser shows.

    Attributes:
        data: The samples as the text of a ``<script type="application/json">``.
        num_shown: Samples on the page.
        counts: Prompts by outcome: win, tie, loss, none.
        scale: The ratio with the full color, nats; None where no sample has log-ratios.
        file: Where all samples are.
    """

    data: str
    num_shown: int
    counts: dict[str, int]
    scale: float | None
    file: str

    @property
    def num_prompts(self) -> int:
        """Samples there are."""
        return sum(self.counts.values())

    @property
    def outcomes(self) -> list[str]:
        """Prompts by outcome in words, such as ``wins 80``; empty where no judge compared."""
        words = {"win": "wins", "tie": "ties", "loss": "loses"}
        return [f"{word} {self.counts[name]}" for name, word in words.items() if self.counts[name]]


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
    file = (paths.report_dir("evaluate") / paths.SAMPLES).as_posix()
    head = _safe_json({"scale": scale, "shades": SHADES, "step": _RATIO_STEP, "file": file})
    lines = ",".join(text + "\n" for _, text in sorted(packed))
    found = Counter(map(outcome_of, samples))
    return Browser(
        data=f'{head[:-1]},"samples":[\n{lines}]}}',
        num_shown=len(packed),
        counts={name: found[name] for name in ("win", "tie", "loss", "none")},
        scale=scale,
        file=file,
    )


def outcome_of(sample: Sample) -> str:
    """win, tie or loss of the tuned model against SFT; none where there is no verdict."""
    win = sample.get("win")
    if win is None:
        return "none"
    return "win" if win > 0.5 else "loss" if win < 0.5 else "tie"


def _comes_first(sample: Sample) -> bool:
    return outcome_of(sample) == "loss" or sample.get("consistent") is False


def _pack(sample: Sample) -> dict[str, Any]:
    tuned = dict(sample["dpo"])
    if log_ratios := tuned.pop("heat", None):
        tuned["heat"] = pack_log_ratios(tuned["text"], log_ratios)
    names = ("id", "prompt", "chosen", "rejected", "win", "win_chosen", "consistent", "kl")
    kept = {name: sample[name] for name in names if sample.get(name) is not None}
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
