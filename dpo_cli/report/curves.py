"""Figures of training: losses, accuracy, margin and rewards against the step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from matplotlib.axes import Axes

from dpo_cli.report.figures import COLORS, B, Chart, Key, level_line, scale_axes
from dpo_cli.report.inputs import Inputs, Row, steps_file
from dpo_cli.report.steps import (
    DPO_CURVES,
    LOSS,
    REWARDS,
    SFT_LOSS,
    Curve,
    Points,
    Series,
    displaced,
    points_of,
    thinned,
)

_MOST_MARKERS = 60


def training_charts(inputs: Inputs) -> list[Chart | None]:
    """All curves of training, the most telling first; SFT's only where there was SFT."""
    start = inputs.metrics["train"]["step0_loss"]
    return [
        *curve_charts(DPO_CURVES, inputs.train_steps, steps_file("train"), start),
        *curve_charts([SFT_LOSS], inputs.sft_steps, steps_file("sft")),
    ]


def curve_charts(
    curves: Sequence[Curve], steps: Sequence[Row], source: Path, start: float | None = None
) -> list[Chart | None]:
    """Curves of a table; None where there is no point.

    Args:
        curves: Which.
        steps: The table.
        source: Its file.
        start: The preference loss before any step.
    """
    return [_chart(replace(curve, level=start) if curve is LOSS else curve, steps, source) for curve in curves]


def _chart(curve: Curve, steps: Sequence[Row], source: Path) -> Chart | None:
    lines = [(line, points) for line in curve.series if (points := points_of(steps, line.column))]
    if not lines:
        return None
    shaded = displaced(steps) if curve is REWARDS else []

    def paint(axes: Axes) -> None:
        for low, high in shaded:
            axes.axvspan(low, high, color=B, alpha=0.12, linewidth=0)
        if curve.level is not None:
            level_line(axes, curve.level)
        for line, points in lines:
            _draw_line(axes, line, points)
        scale_axes(axes, "step", integer=True)

    keys = [Key(line.label, f"{line.role} {line.pace}", _last(line, points)) for line, points in lines if line.label]
    if shaded:
        keys.append(Key("displacement", "b wash"))
    return Chart(curve.slug, curve.title, curve.caption, source, keys, paint)


def _last(line: Series, points: Points) -> str:
    return f"{points[-1][1]:.3f}".replace("-", "\N{MINUS SIGN}") if line.pace == "eval" else ""


def _draw_line(axes: Axes, line: Series, points: Points) -> None:
    marker = "o" if len(points) <= _MOST_MARKERS else None
    points = thinned(points)
    steps, values = [step for step, _ in points], [value for _, value in points]
    color = COLORS[line.role]
    if line.pace == "train":
        axes.plot(steps, values, color=color, linewidth=0.9, alpha=0.55)
    else:
        axes.plot(steps, values, color=color, linewidth=1.6, marker=marker, markersize=3.2, zorder=3)
