"""Figures of the held-out pairs: margins, calibration, accuracy by kind of pair."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes

from dpo_cli.report.figures import (
    DASHED,
    HEIGHT_INCHES,
    INK,
    LINE,
    MUTED,
    A,
    B,
    Chart,
    Key,
    scale_axes,
    short_label,
)
from dpo_cli.report.inputs import Inputs, Row, evaluation_table

_MOST_SOURCES = 6
_ROW_INCHES, _HEAD_INCHES = 0.215, 0.6
_BIN_SHARE = 0.16


def pair_charts(inputs: Inputs) -> list[Chart | None]:
    """The figures that there are numbers for."""
    metrics = inputs.metrics["evaluate"]
    return [
        _margins(inputs.margins),
        _reliability(inputs.reliability, metrics),
        _accuracy_by(inputs.accuracy_by, _longer_by_source(inputs.pairs), metrics.get("longer_accuracy", 0.5)),
    ]


def _margins(rows: Sequence[Row]) -> Chart | None:
    """The distribution of held-out margins, those below zero apart."""
    if not rows:
        return None
    middles = [row["margin"] for row in rows]
    width = 0.86 * (middles[1] - middles[0]) if len(middles) > 1 else 1.0

    def paint(axes: Axes) -> None:
        axes.axvline(0, color=MUTED, linewidth=0.8, linestyle=DASHED)
        colors = [A if middle > 0 else B for middle in middles]
        axes.bar(middles, [100 * row["share"] for row in rows], width, color=colors)
        scale_axes(axes, "margin, nats", 7)

    return Chart(
        "margins",
        "Margins of held-out pairs, % of pairs",
        "Most of the mass should lie right of zero; a long left tail means pairs that the model now gets"
        " clearly wrong.",
        evaluation_table("margins"),
        [Key("chosen preferred", "a bar"), Key("rejected preferred", "b bar")],
        paint,
    )


def _reliability(reliability: Sequence[Row], metrics: Mapping[str, Any]) -> Chart | None:
    rows = [row for row in reliability if row["num_pairs"] > 0 and math.isfinite(row["accuracy"])]
    if not rows:
        return None
    lowest = min(50.0, *(100 * row["accuracy_low"] for row in rows if math.isfinite(row["accuracy_low"])))
    most = max(row["num_pairs"] for row in rows)

    def paint(axes: Axes) -> None:
        floor = lowest - (100 - lowest) * (_BIN_SHARE + 0.1)
        axes.plot([50, 100], [50, 100], color=MUTED, linewidth=0.8, linestyle=DASHED)
        places = [100 * row["probability"] for row in rows]
        heights = [(100 - lowest) * _BIN_SHARE * row["num_pairs"] / most for row in rows]
        axes.bar(places, heights, 2.2, bottom=floor, color=LINE)
        for place, height, row in zip(places, heights, rows, strict=True):
            axes.annotate(
                f"{row['num_pairs']:.0f}",
                (place, floor + height),
                xytext=(0, 1.5),
                textcoords="offset points",
                ha="center",
                color=MUTED,
                fontsize=7,
            )
            axes.plot([place, place], [100 * row["accuracy_low"], 100 * row["accuracy_high"]], color=A, linewidth=1)
            axes.plot(place, 100 * row["accuracy"], marker="o", markersize=4.5, color=A)
        axes.set_ylim(floor, 102)
        axes.set_xlim(49, 101.5)
        axes.set_yticks([tick for tick in (0, 20, 40, 50, 60, 70, 80, 90, 100) if tick >= lowest][-6:])
        axes.set_xticks([50, 60, 70, 80, 90, 100])
        axes.set_xlabel("σ(|margin|), %")

    error = metrics.get("calibration_error")
    return Chart(
        "reliability",
        "Reliability of the reward, %",
        "How often the answer that the reward prefers is the chosen one. Below the diagonal the reward is too sure,"
        " above it too modest; bars are pairs in each bin.",
        evaluation_table("reliability"),
        [
            Key("accuracy", "a dot", f"error {100 * error:.1f} points" if error is not None else ""),
            Key("calibrated", "muted dash"),
        ],
        paint,
    )


def _accuracy_by(found: Sequence[Row], longer: Mapping[str, float], longer_overall: float) -> Chart | None:
    """A line for each kind of pair: accuracy with its interval, beside what "take the longer" gives."""
    known = [row for row in found if math.isfinite(row["accuracy"])]
    lengths, sources = ([row for row in known if row["kind"] == kind] for kind in ("length", "source"))
    if len(sources) < 2:
        sources = []  # it would be the accuracy of all pairs
    shown = sorted(sources, key=lambda row: -row["num_pairs"])[:_MOST_SOURCES]
    places = [*range(len(lengths)), *(len(lengths) + 0.6 * bool(lengths) + number for number in range(len(shown)))]
    rows = [*lengths, *shown]
    if not rows:
        return None
    labels = [row["label"].replace("-", "\N{MINUS SIGN}") for row in lengths]
    labels += [row["label"] for row in shown]

    def paint(axes: Axes) -> None:
        axes.axvline(50, color=LINE, linewidth=0.9)
        axes.axvline(100 * longer_overall, color=B, linewidth=0.9, linestyle=DASHED)
        for place, row in zip(places, rows, strict=True):
            axes.plot([100 * row["low"], 100 * row["high"]], [place, place], color=A, linewidth=1)
            axes.plot(100 * row["accuracy"], place, marker="o", markersize=4.5, color=A, zorder=3)
            if row["kind"] == "source" and row["label"] in longer:
                axes.plot(100 * longer[row["label"]], place, marker="|", markersize=8, markeredgewidth=1.6, color=B)
            axes.annotate(
                f"{row['num_pairs']:,.0f}",
                (1.02, place),
                xycoords=("axes fraction", "data"),
                va="center",
                color=MUTED,
                fontsize=8,
                annotation_clip=False,
            )
        scale_axes(axes, "accuracy, %")
        axes.set_yticks(places, [short_label(label) for label in labels])
        axes.set_ylim(places[-1] + 0.6, -0.6)
        axes.grid(visible=False, axis="y")
        axes.grid(axis="x", color=LINE, linewidth=0.6)
        axes.tick_params(axis="y", labelcolor=INK)

    caption = "By tokens of the chosen answer less the rejected one" if lengths else ""
    caption += (", and by source" if lengths else "By source") if shown else ""
    caption += "; at the right the number of pairs."
    caption += " A reward of length alone is right where the chosen answer is longer and wrong where it is shorter."
    if len(shown) < len(sources):
        caption += f" {len(sources) - len(shown)} smaller sources are left out."
    return Chart(
        "accuracy-by",
        "Accuracy by kind of pair, %",
        caption,
        evaluation_table("accuracy_by"),
        [Key("accuracy", "a dot"), Key("take the longer", "b dash", f"{100 * longer_overall:.1f}%")],
        paint,
        max(HEIGHT_INCHES, _HEAD_INCHES + _ROW_INCHES * len(rows)),
    )


def _longer_by_source(pairs: Sequence[Row]) -> dict[str, float]:
    """How often the longer answer is the chosen one, equal lengths one half, by source."""
    found: dict[str, list[float]] = {}
    for row in pairs:
        difference = row["chosen_tokens"] - row["rejected_tokens"]
        found.setdefault(row["source"], []).append(0.5 + 0.5 * ((difference > 0) - (difference < 0)))
    return {source: sum(values) / len(values) for source, values in found.items()}
