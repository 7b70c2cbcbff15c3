"""Figures of the held-out pairs: margins, calibration, accuracy by kind of pair."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from dpo_cli.core import paths
from dpo_cli.evaluation.report.drawing import DASHED, INK, LINE, MUTED, A, B, Chart, Key, draw, short_label
from dpo_cli.evaluation.report.inputs import Inputs, Row, Table

_MOST_KINDS = 12
_ROW_INCHES, _HEAD_INCHES = 0.235, 0.62
_BIN_SHARE = 0.16
_LONGER_KEY = "take the longer"


def draw_pairs(inputs: Inputs) -> list[Chart]:
    """The figures that there are numbers for."""
    metrics = inputs.metrics["evaluate"]
    by = {kind: [row for row in inputs.accuracy_by if row["kind"] == kind] for kind in ("length", "source")}
    charts = [
        _margins(inputs.margins),
        _reliability(inputs.reliability, metrics),
        _accuracy_by("length", by["length"], {}, metrics["longer_accuracy"]),
        _accuracy_by("source", by["source"], _longer_by_source(inputs.pairs), metrics["longer_accuracy"])
        if len(by["source"]) > 1
        else None,
    ]
    return [chart for chart in charts if chart is not None]


def _source(name: str) -> str:
    return (paths.report_dir("evaluate") / f"{name}.csv").as_posix()


def _margins(margins: Table) -> Chart:
    """The distribution of held-out margins, those below zero apart."""
    middles, percents = margins["margin"], [100 * share for share in margins["share"]]
    width = 0.86 * (middles[1] - middles[0]) if len(middles) > 1 else 1.0

    def paint(axes: Axes) -> None:
        axes.axvline(0, color=MUTED, linewidth=0.8, linestyle=DASHED)
        axes.bar(middles, percents, width, color=[A if middle > 0 else B for middle in middles])
        axes.xaxis.set_major_locator(MaxNLocator(7))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel("margin, nats")

    return Chart(
        "margins",
        "Margins of held-out pairs, % of pairs",
        "Most of the mass should lie right of zero; a long left tail is pairs that the model now gets firmly wrong.",
        _source("margins"),
        [Key("chosen preferred", "a bar"), Key("rejected preferred", "b bar")],
        draw("margins", paint),
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
        "Is the reward as sure as it is right? %",
        "How often the preferred answer is the chosen one. Below the diagonal the reward is too sure, above it too"
        " modest; bars are pairs in each bin.",
        _source("reliability"),
        [
            Key("accuracy with interval", "a dot", f"error {100 * error:.1f} points" if error is not None else ""),
            Key("calibrated", "muted dash"),
        ],
        draw("reliability", paint),
    )


def _accuracy_by(
    kind: Literal["length", "source"], found: Sequence[Row], longer: Mapping[str, float], longer_overall: float
) -> Chart | None:
    """A line for each kind of pair: accuracy with its interval, beside what "take the longer" gives."""
    rows = [row for row in found if math.isfinite(row["accuracy"])]
    if not rows:
        return None
    left_out = 0
    if len(rows) > _MOST_KINDS:
        kept = sorted(rows, key=lambda row: -row["num_pairs"])[:_MOST_KINDS]
        left_out = len(rows) - len(kept)
        rows = [row for row in rows if row in kept]

    def paint(axes: Axes) -> None:
        axes.axvline(50, color=LINE, linewidth=0.9)
        axes.axvline(100 * longer_overall, color=B, linewidth=0.9, linestyle=DASHED)
        for place, row in enumerate(rows):
            axes.plot([100 * row["low"], 100 * row["high"]], [place, place], color=A, linewidth=1)
            axes.plot(100 * row["accuracy"], place, marker="o", markersize=4.5, color=A, zorder=3)
            if row["label"] in longer:
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
        axes.set_yticks(
            range(len(rows)),
            [short_label(row["label"]).replace("-", "\N{MINUS SIGN}") for row in rows]
            if kind == "length"
            else [short_label(row["label"]) for row in rows],
        )
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.grid(axis="x", color=LINE, linewidth=0.6)
        axes.tick_params(axis="y", labelcolor=INK)
        axes.margins(y=0.12 if len(rows) > 3 else 0.3)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel("accuracy, %")

    titles = {"length": "Accuracy by chosen less rejected tokens", "source": "Accuracy by source"}
    captions = {
        "length": "A reward of length alone is right where the chosen answer is longer and wrong where it is shorter.",
        "source": "A source at one half taught nothing, or its labels are noise; at the right its pairs.",
    }
    slug = f"accuracy-{kind}"
    return Chart(
        slug,
        titles[kind],
        captions[kind] + (f" The {left_out} smallest are left out." if left_out else ""),
        _source("accuracy_by"),
        [
            Key("accuracy with interval", "a dot"),
            Key(
                f"{_LONGER_KEY}, all pairs" if kind == "length" or not longer else _LONGER_KEY,
                "b dash",
                f"{100 * longer_overall:.1f}%",
            ),
        ],
        draw(slug, paint, _HEAD_INCHES + _ROW_INCHES * max(len(rows), 5)),
    )


def _longer_by_source(pairs: Sequence[Row]) -> dict[str, float]:
    """How often the longer answer is the chosen one, equal lengths one half, by source."""
    found: dict[str, list[float]] = {}
    for row in pairs:
        difference = row["chosen_tokens"] - row["rejected_tokens"]
        found.setdefault(row["source"], []).append(0.5 + 0.5 * ((difference > 0) - (difference < 0)))
    return {source: sum(values) / len(values) for source, values in found.items()}
