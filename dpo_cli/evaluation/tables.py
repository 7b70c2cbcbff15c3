"""What an evaluation found, as tables in CSV: what the report's figures and ``dvc plots`` are drawn from."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from dpo_cli.evaluation.held_out import HeldOutPair, PairFigures
from dpo_cli.judging.win_rate import ComparisonResult
from dpo_cli.statistics.bootstrap import Estimate, Sampling
from dpo_cli.statistics.calibration import Bin, half_ties

PAIRS = (
    "id",
    "prompt",
    "chosen_reward",
    "rejected_reward",
    "margin",
    "loss",
    "chosen_tokens",
    "rejected_tokens",
    "source",
)
MARGINS = ("margin", "share")
RELIABILITY = ("low", "high", "num_pairs", "probability", "accuracy", "accuracy_low", "accuracy_high")
ACCURACY_BY = ("kind", "label", "num_pairs", "accuracy", "low", "high")
TEMPERATURES = (
    "temperature", "opponent", "num_prompts", "win_rate", "low", "high", "tie_rate", "policy_tokens", "opponent_tokens",
)  # fmt: skip
FRONTIER = ("scale", "kl", "kl_low", "kl_high", "win_rate", "low", "high", "reward_gain")
LENGTH = ("length_difference", "num_prompts", "win_rate", "low", "high")

_MARGIN_BINS = 40
_LENGTH_BINS = 5
_MOST_SOURCES = 12


def csv_text(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Rows as CSV under a header; numbers to 9 digits, None and NaN empty."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([_cell(value) for value in row] for row in rows)
    return stream.getvalue()


def _cell(value: Any) -> Any:
    if isinstance(value, float):
        return "" if np.isnan(value) else f"{value:.9g}"
    return "" if value is None else value


def pair_rows(
    figures: Sequence[PairFigures], pairs: Mapping[str, HeldOutPair], sources: Mapping[str, str]
) -> list[tuple[Any, ...]]:
    """Every held-out pair, in the order of the ids (:data:`PAIRS`)."""
    return [(*vars(row).values(), *pairs[row.id].num_tokens, sources[row.id]) for row in figures]


def margin_rows(margins: Sequence[float]) -> list[tuple[Any, ...]]:
    """The distribution of margins: middle of the bin, share of the pairs."""
    counts, edges = np.histogram(margins, bins=_MARGIN_BINS)
    middles = (edges[:-1] + edges[1:]) / 2
    return [(f"{middle:.6g}", f"{count / len(margins):.6g}") for middle, count in zip(middles, counts, strict=True)]


def reliability_rows(bins: Sequence[Bin]) -> list[tuple[Any, ...]]:
    """How sure the implicit reward is, and how often it is right (:data:`RELIABILITY`)."""
    return [
        (
            each.low,
            each.high,
            each.num_pairs,
            each.probability,
            each.accuracy.value,
            each.accuracy.low,
            each.accuracy.high,
        )
        for each in bins
    ]


def accuracy_rows(
    figures: Sequence[PairFigures], pairs: Mapping[str, HeldOutPair], sources: Mapping[str, str], sampling: Sampling
) -> list[tuple[Any, ...]]:
    """Reward accuracy by the difference in length, chosen less rejected, and by source (:data:`ACCURACY_BY`)."""
    differences = np.array([pairs[row.id].num_tokens[0] - pairs[row.id].num_tokens[1] for row in figures])
    right = half_ties(np.array([row.margin for row in figures]))
    groups = [row.group for row in figures]

    def row(kind: str, label: str, places: Sequence[int]) -> tuple[Any, ...]:
        found = sampling.rate([float(right[place]) for place in places], [groups[place] for place in places])
        return kind, label, len(places), found.value, found.low, found.high

    rows = [row("length", _range(differences[places]), places) for places in quantile_bins(differences)]
    by_source: dict[str, list[int]] = {}
    for place, figure in enumerate(figures):
        by_source.setdefault(sources[figure.id], []).append(place)
    largest = sorted(by_source, key=lambda name: (-len(by_source[name]), name))[:_MOST_SOURCES]
    return rows + [row("source", name, by_source[name]) for name in largest]


def quantile_bins(values: np.ndarray, number: int = _LENGTH_BINS) -> list[list[int]]:
    """Places of values in bins of about equal numbers, ascending; equal values lie in one bin."""
    edges = np.unique(np.quantile(values, np.arange(1, number) / number))
    bins = np.searchsorted(edges, values, side="left")
    return [np.flatnonzero(bins == each).tolist() for each in sorted(set(bins.tolist()))]


def _range(values: np.ndarray) -> str:
    low, high = int(values.min()), int(values.max())
    return f"{low:+d}" if low == high else f"{low:+d} to {high:+d}"


def temperature_row(temperature: float, opponent: str, result: ComparisonResult) -> tuple[Any, ...]:
    """A point of the curve of win rates (:data:`TEMPERATURES`)."""
    return (
        temperature,
        opponent,
        len(result.wins),
        result.win_rate.value,
        result.win_rate.low,
        result.win_rate.high,
        result.tie_rate,
        *(
            float(np.mean([answers[id].num_tokens for id in result.comparisons]))
            for answers in (result.ours, result.theirs)
        ),
    )


def frontier_row(
    scale: float, kl: Estimate, result: ComparisonResult | None, reward_gain: float | None
) -> tuple[Any, ...]:
    """A point of the frontier (:data:`FRONTIER`); the SFT model itself has no result."""
    rate = result.win_rate if result else Estimate(0.5, 0.5, 0.5)
    return scale, kl.value, kl.low, kl.high, rate.value, rate.low, rate.high, reward_gain


def length_rows(result: ComparisonResult, sampling: Sampling) -> list[tuple[Any, ...]]:
    """Win rate by how much longer the policy's answer is, tokens (:data:`LENGTH`)."""
    wins = result.wins
    ids = list(wins)
    differences = np.array([result.ours[id].num_tokens - result.theirs[id].num_tokens for id in ids])
    rows: list[tuple[Any, ...]] = []
    for places in quantile_bins(differences):
        inside = [ids[place] for place in places]
        found = sampling.rate([wins[id] for id in inside], [result.ours[id].group for id in inside])
        rows.append((float(differences[places].mean()), len(inside), found.value, found.low, found.high))
    return rows
