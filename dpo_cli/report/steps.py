"""Which curves a training has, and the points that are drawn of them: on the page, and in the terminal."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from dpo_cli.report.inputs import Row

Role = Literal["a", "b", "muted"]
Pace = Literal["train", "eval"]
Points = Sequence[tuple[float, float]]

_CHOSEN = "rewards/chosen"
_MOST_BUCKETS = 250


@dataclass(frozen=True)
class Series:
    """One line of a figure.

    Attributes:
        label: Its name in the key; empty where the held-out line beside it says enough.
        column: Its column of the table.
        role: Which of the page's two accents it has, or its gray.
        pace: train is logged often and drawn thin; eval is rare, held out, and drawn with points.
    """

    label: str
    column: str
    role: Role
    pace: Pace


@dataclass(frozen=True)
class Curve:
    """One figure: columns against the step.

    Attributes:
        slug: Its name in ids and files.
        title: What is shown, with its unit.
        caption: What to look for, in a sentence or two.
        series: The lines.
        level: Where a dashed line is, to compare with.
    """

    slug: str
    title: str
    caption: str
    series: Sequence[Series]
    level: float | None = None


def _train_and_held_out(column: str) -> list[Series]:
    return [
        Series("training", column, "muted", "train"),
        Series("held out", f"eval_{column}", "a", "eval"),
    ]


def _training(column: str) -> list[Series]:
    return [Series("training", column, "muted", "train")]


LOSS = Curve(
    "loss",
    "Preference loss",
    "Both should fall; held-out loss that rises while training loss falls is over-fitting."
    " The dashed line is the loss before any step.",
    _train_and_held_out("loss"),
)
_ACCURACY = Curve(
    "accuracy",
    "Reward accuracy, share of pairs",
    "The share of pairs whose chosen answer has the higher reward should climb away from one half, the dashed line.",
    _train_and_held_out("rewards/accuracies"),
    level=0.5,
)
_MARGIN = Curve(
    "margin",
    "Reward margin, nats",
    "Chosen less rejected reward should rise from zero; training far above held-out means memorized pairs.",
    _train_and_held_out("rewards/margins"),
    level=0.0,
)
REWARDS = Curve(
    "rewards",
    "Chosen and rejected reward, nats",
    "The two curves should diverge. Where the mean chosen reward is below zero (displacement, shaded),"
    " good answers became less likely, too: common with DPO, and not a failure in itself.",
    [
        Series("", _CHOSEN, "a", "train"),
        Series("chosen", f"eval_{_CHOSEN}", "a", "eval"),
        Series("", "rewards/rejected", "b", "train"),
        Series("rejected", "eval_rewards/rejected", "b", "eval"),
    ],
    level=0.0,
)
_ENTROPY = Curve(
    "entropy",
    "Entropy of the next token, nats",
    "A steep fall means that the model grows sure of one way to answer.",
    _train_and_held_out("entropy"),
)
_GRADIENT = Curve(
    "gradient",
    "Gradient norm",
    "It should settle; spikes that do not pass call for a lower learning rate.",
    _training("grad_norm"),
)
SFT_LOSS = Curve(
    "sft",
    "SFT loss, nats a token",
    "Fine-tuning before DPO should flatten out, with the held-out loss not yet rising.",
    _train_and_held_out("loss"),
)
DPO_CURVES = (LOSS, _ACCURACY, _MARGIN, REWARDS, _ENTROPY, _GRADIENT)
CURVES: dict[str, Sequence[Curve]] = {
    "base": (Curve("loss", "Loss, nats a token", "It should fall, and flatten out.", _training("loss")), _GRADIENT),
    "sft": (
        SFT_LOSS,
        Curve(
            "token-accuracy",
            "Tokens that are the likeliest, share",
            "The share of the answers' tokens that the model would say itself should rise.",
            _train_and_held_out("mean_token_accuracy"),
        ),
        _ENTROPY,
        _GRADIENT,
    ),
    "train": DPO_CURVES,
    "reward": (LOSS, _ACCURACY, _MARGIN, _GRADIENT),
    "ppo": (
        Curve("score", "Reward of the answers", "It should rise.", _training("objective/scores")),
        Curve(
            "kl",
            "KL from the reference, nats a sequence",
            "It may rise with the reward; KL that rises while the reward stands still buys nothing.",
            _training("objective/kl"),
        ),
        replace(_ENTROPY, series=_training("objective/entropy")),
        _GRADIENT,
    ),
}
"""Of each stage that trains, the most telling first."""


def points_of(steps: Sequence[Row], column: str) -> list[tuple[float, float]]:
    """Step and value wherever the column has a finite value."""
    return [(row["step"], row[column]) for row in steps if math.isfinite(row.get(column, math.nan))]


def displaced(steps: Sequence[Row]) -> list[tuple[float, float]]:
    """The stretches of steps on which the mean chosen reward is below zero: from, to.

    Held-out means are taken where there are two or more, since a batch's mean jumps about.
    """
    points = points_of(steps, f"eval_{_CHOSEN}")
    if len(points) < 2:
        points = points_of(steps, _CHOSEN)
    spans: list[tuple[float, float]] = []
    for (start, before), (end, after) in itertools.pairwise(points):
        if before >= 0 and after >= 0:
            continue
        crossing = start + (end - start) * before / (before - after) if before != after else start
        low = start if before < 0 else crossing
        high = end if after < 0 else crossing
        if spans and spans[-1][1] == low:
            low = spans.pop()[0]
        spans.append((low, high))
    return spans


def thinned(points: Points) -> Points:
    """What a figure can show of a long series: the least and the largest value of each of many short stretches."""
    length = math.ceil(len(points) / _MOST_BUCKETS)
    if length < 3:
        return points
    stretches = [points[start : start + length] for start in range(0, len(points), length)]
    extremes = [{min(each, key=lambda point: point[1]), max(each, key=lambda point: point[1])} for each in stretches]
    return [point for each in extremes for point in sorted(each)]
