"""Figures of training: losses, accuracy, margin and rewards against the step."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from matplotlib.axes import Axes

from dpo_cli.report.figures import COLORS, B, Chart, Key, Role, level_line, scale_axes
from dpo_cli.report.inputs import Inputs, Row, steps_file

Pace = Literal["train", "eval"]
Points = Sequence[tuple[float, float]]

_CHOSEN = "rewards/chosen"
_MOST_BUCKETS, _MOST_MARKERS = 250, 60


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


def training_charts(inputs: Inputs) -> list[Chart | None]:
    """All curves of training, the most telling first; SFT's only where there was SFT."""
    steps = inputs.train_steps
    return [
        _curve(
            "loss",
            "Preference loss",
            "Both should fall; held-out loss that rises while training loss falls is over-fitting."
            " The dashed line is the loss before any step.",
            steps,
            _train_and_held_out("loss"),
            level=inputs.metrics["train"]["step0_loss"],
        ),
        _curve(
            "accuracy",
            "Reward accuracy, share of pairs",
            "The share of pairs whose chosen answer has the higher reward should climb away from one half,"
            " the dashed line.",
            steps,
            _train_and_held_out("rewards/accuracies"),
            level=0.5,
        ),
        _curve(
            "margin",
            "Reward margin, nats",
            "Chosen less rejected reward should rise from zero; training far above held-out means memorized pairs.",
            steps,
            _train_and_held_out("rewards/margins"),
            level=0.0,
        ),
        _curve(
            "rewards",
            "Chosen and rejected reward, nats",
            "The two curves should diverge. Where the mean chosen reward is below zero (displacement, shaded),"
            " good answers became less likely, too: common with DPO, and not a failure in itself.",
            steps,
            [
                Series("", _CHOSEN, "a", "train"),
                Series("chosen", f"eval_{_CHOSEN}", "a", "eval"),
                Series("", "rewards/rejected", "b", "train"),
                Series("rejected", "eval_rewards/rejected", "b", "eval"),
            ],
            level=0.0,
            shaded=displaced(steps),
        ),
        _curve(
            "entropy",
            "Entropy of the next token, nats",
            "A steep fall means that the model grows sure of one way to answer.",
            steps,
            _train_and_held_out("entropy"),
        ),
        _curve(
            "gradient",
            "Gradient norm",
            "It should settle; spikes that do not pass call for a lower learning rate.",
            steps,
            [Series("training", "grad_norm", "muted", "train")],
        ),
        _curve(
            "sft",
            "SFT loss, nats a token",
            "Fine-tuning before DPO should flatten out, with the held-out loss not yet rising.",
            inputs.sft_steps,
            _train_and_held_out("loss"),
        ),
    ]


def displaced(steps: Sequence[Row]) -> list[tuple[float, float]]:
    """The stretches of steps on which the mean chosen reward is below zero: from, to.

    Held-out means are taken where there are two or more, since a batch's mean jumps about.
    """
    points = _points(steps, f"eval_{_CHOSEN}")
    if len(points) < 2:
        points = _points(steps, _CHOSEN)
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


def _train_and_held_out(column: str) -> list[Series]:
    return [
        Series("training", column, "muted", "train"),
        Series("held out", f"eval_{column}", "a", "eval"),
    ]


def _curve(
    slug: str,
    title: str,
    caption: str,
    steps: Sequence[Row],
    series: Sequence[Series],
    *,
    level: float | None = None,
    shaded: Sequence[tuple[float, float]] = (),
) -> Chart | None:
    """Columns against the step, with a dashed line at ``level``; None where there is no point."""
    lines = [(line, points) for line in series if (points := _points(steps, line.column))]
    if not lines:
        return None

    def paint(axes: Axes) -> None:
        for low, high in shaded:
            axes.axvspan(low, high, color=B, alpha=0.12, linewidth=0)
        if level is not None:
            level_line(axes, level)
        for line, points in lines:
            _draw_line(axes, line, points)
        scale_axes(axes, "step", integer=True)

    keys = [Key(line.label, f"{line.role} {line.pace}", _last(line, points)) for line, points in lines if line.label]
    if shaded:
        keys.append(Key("displacement", "b wash"))
    return Chart(slug, title, caption, steps_file("sft" if slug == "sft" else "train"), keys, paint)


def _points(steps: Sequence[Row], column: str) -> list[tuple[float, float]]:
    """Step and value wherever the column has a finite value."""
    return [(row["step"], row[column]) for row in steps if math.isfinite(row.get(column, math.nan))]


def _last(line: Series, points: Points) -> str:
    return f"{points[-1][1]:.3f}".replace("-", "\N{MINUS SIGN}") if line.pace == "eval" else ""


def thinned(points: Points) -> Points:
    """What a figure can show of a long series: the least and the largest value of each of many short stretches."""
    length = math.ceil(len(points) / _MOST_BUCKETS)
    if length < 3:
        return points
    stretches = [points[start : start + length] for start in range(0, len(points), length)]
    extremes = [{min(each, key=lambda point: point[1]), max(each, key=lambda point: point[1])} for each in stretches]
    return [point for each in extremes for point in sorted(each)]


def _draw_line(axes: Axes, line: Series, points: Points) -> None:
    marker = "o" if len(points) <= _MOST_MARKERS else None
    points = thinned(points)
    steps, values = [step for step, _ in points], [value for _, value in points]
    color = COLORS[line.role]
    if line.pace == "train":
        axes.plot(steps, values, color=color, linewidth=0.9, alpha=0.55)
    else:
        axes.plot(steps, values, color=color, linewidth=1.6, marker=marker, markersize=3.2, zorder=3)
