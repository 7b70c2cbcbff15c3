"""Figures of the win rate: against KL, against temperature, against the difference of lengths."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from dpo_cli.core import paths
from dpo_cli.report.figures import COLORS, DASHED, INK, MUTED, A, Chart, Key, Role, draw, level_line
from dpo_cli.report.inputs import Inputs, Row

_EVEN = 50.0
_EVEN_KEY = Key("as good", "muted dash")
_OPPONENTS: Mapping[str, tuple[str, Role]] = {"sft": ("against SFT", "a"), "chosen": ("against chosen", "b")}
_SMALLEST_POINT, _LARGEST_POINT = 2.5, 7.0


def draw_win_rates(inputs: Inputs) -> list[Chart]:
    """The figures that there are numbers for."""
    charts = [
        _frontier(inputs.frontier),
        _reward_frontier(inputs.frontier),
        _temperatures(inputs.temperatures),
    ]
    return [chart for chart in charts if chart is not None]


def missing_win_rates(inputs: Inputs) -> list[tuple[str, str]]:
    """Figures without numbers, and the setting that makes them."""
    if "win_rate" not in inputs.metrics["evaluate"]:
        return [("Win rates", "evaluate.judge")]
    missing = []
    if len(inputs.frontier) < 2:
        missing.append(("Win rate against KL", "evaluate.scales"))
    if not inputs.temperatures:
        missing.append(("Win rate against temperature", "evaluate.temperatures"))
    return missing


def _source(name: str) -> str:
    return (paths.report_dir("evaluate") / f"{name}.csv").as_posix()


def _frontier(frontier: Sequence[Row]) -> Chart | None:
    rows = _known(frontier, "win_rate")
    if len(rows) < 2:
        return None

    def paint(axes: Axes) -> None:
        level_line(axes, _EVEN)
        _line_of_scales(axes, rows, [100 * row["win_rate"] for row in rows])
        axes.errorbar(
            [row["kl"] for row in rows],
            [100 * row["win_rate"] for row in rows],
            xerr=_bars(rows, "kl", "kl_low", "kl_high"),
            yerr=_bars(rows, "win_rate", "low", "high", 100),
            fmt="none",
            ecolor=A,
            elinewidth=0.9,
            alpha=0.6,
        )
        axes.set_xlabel("KL from SFT, nats a sequence")

    return Chart(
        "frontier",
        "Win rate against KL, %",
        "The points are the model with a multiple of what training changed: 0 is SFT, 1 the model itself."
        " A point further left that wins as much, or one that wins more, would have been the better step.",
        _source("frontier"),
        [Key("scale of the update", "a dot"), _EVEN_KEY],
        draw("frontier", paint),
    )


def _reward_frontier(frontier: Sequence[Row]) -> Chart | None:
    rows = _known(frontier, "reward_gain")
    if len(rows) < 2:
        return None

    def paint(axes: Axes) -> None:
        _line_of_scales(axes, rows, [row["reward_gain"] for row in rows])
        axes.set_xlabel("KL from SFT, nats a sequence")

    return Chart(
        "reward-frontier",
        "Gain in reward against KL",
        "Mean reward of the same answers, less that of SFT's. Where it falls while KL rises, the update goes too far.",
        _source("frontier"),
        [Key("scale of the update", "a dot")],
        draw("reward-frontier", paint),
    )


def _known(frontier: Sequence[Row], value: str) -> list[Row]:
    """Points that have a value and a KL, in the order of their scales."""
    rows = [row for row in frontier if math.isfinite(row[value]) and math.isfinite(row["kl"])]
    return sorted(rows, key=lambda row: row["scale"])


def _line_of_scales(axes: Axes, rows: Sequence[Row], values: Sequence[float]) -> None:
    """Points joined in the order of their scales, each with its scale beside it; the model itself is filled."""
    kls = [row["kl"] for row in rows]
    axes.plot(kls, values, color=A, linewidth=0.9, alpha=0.55)
    for row, kl, value in zip(rows, kls, values, strict=True):
        is_model = row["scale"] == 1
        axes.plot(kl, value, marker="o", markersize=6 if is_model else 3.6, color=A, zorder=3)
        label = "SFT" if row["scale"] == 0 else f"{row['scale']:g}"
        axes.annotate(
            label,
            (kl, value),
            xytext=(5, -10),
            textcoords="offset points",
            color=INK if is_model else MUTED,
            weight="bold" if is_model else "normal",
            fontsize=8.5,
        )
    axes.margins(x=0.08, y=0.16)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_locator(MaxNLocator(5))


def _bars(rows: Sequence[Row], value: str, low: str, high: str, factor: float = 1) -> np.ndarray:
    """Lengths of the interval's halves, 0 where there is no interval: [2, rows]."""
    values, lows, highs = (np.array([row[name] for row in rows], dtype=float) for name in (value, low, high))
    return factor * np.nan_to_num(np.maximum(np.stack([values - lows, highs - values]), 0))


def _temperatures(temperatures: Sequence[Row]) -> Chart | None:
    lines = {
        opponent: sorted(
            (row for row in temperatures if row["opponent"] == opponent and math.isfinite(row["win_rate"])),
            key=lambda row: row["temperature"],
        )
        for opponent in _OPPONENTS
    }
    lines = {opponent: rows for opponent, rows in lines.items() if rows}
    if not lines:
        return None

    def paint(axes: Axes) -> None:
        level_line(axes, _EVEN)
        for opponent, rows in lines.items():
            color = COLORS[_OPPONENTS[opponent][1]]
            places = [row["temperature"] for row in rows]
            lows, highs = ([100 * row[name] for row in rows] for name in ("low", "high"))
            axes.fill_between(places, lows, highs, color=color, alpha=0.16, linewidth=0)
            values = [100 * row["win_rate"] for row in rows]
            axes.plot(places, values, color=color, linewidth=1.6, marker="o", markersize=3.6)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel("sampling temperature")

    return Chart(
        "temperatures",
        "Win rate against temperature, %",
        "A model that is better at one temperature alone was tuned to it; the bands are intervals.",
        _source("temperatures"),
        [*(Key(_OPPONENTS[name][0], f"{_OPPONENTS[name][1]} eval") for name in lines), _EVEN_KEY],
        draw("temperatures", paint),
    )


def draw_lengths(lengths: Sequence[Row], metrics: Mapping[str, Any]) -> Chart | None:
    """Whether the judge pays for length: win rate by length difference, with the fitted curve; None without numbers."""
    rows = [row for row in lengths if math.isfinite(row["win_rate"])]
    if not rows:
        return None
    places = [row["length_difference"] for row in rows]
    fitted = _length_curve(metrics, min(places), max(places))

    def paint(axes: Axes) -> None:
        level_line(axes, _EVEN)
        axes.axvline(0, color=MUTED, linewidth=0.8, linestyle=DASHED)
        values = [100 * row["win_rate"] for row in rows]
        axes.errorbar(
            places, values, yerr=_bars(rows, "win_rate", "low", "high", 100), fmt="none", ecolor=A, elinewidth=0.9
        )
        most = max(row["num_prompts"] for row in rows)
        for place, value, row in zip(places, values, rows, strict=True):
            size = _SMALLEST_POINT + (_LARGEST_POINT - _SMALLEST_POINT) * math.sqrt(row["num_prompts"] / most)
            axes.plot(place, value, marker="o", markersize=size, color=A)
        if fitted:
            axes.plot(*fitted, color=COLORS["b"], linewidth=1.4)
        axes.margins(x=0.05)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel("tokens more than SFT's answer")

    keys = [Key("prompts, by number", "a dot")]
    if fitted:
        keys.append(Key("fitted", "b train"))
    return Chart(
        "length",
        "Win rate against length difference, %",
        "A steep rise means that the judge pays for length."
        + (" Where the fitted curve crosses 0 is the length-controlled win rate." if fitted else ""),
        _source("length"),
        [*keys, _EVEN_KEY],
        draw("length", paint),
    )


def _length_curve(metrics: Mapping[str, Any], low: float, high: float) -> tuple[np.ndarray, np.ndarray] | None:
    """P(win) = sigma(theta + phi tanh(d / scale)) with sigma(theta) the controlled win rate, in percent."""
    controlled, effect, scale = (metrics.get(name) for name in ("win_rate_lc", "length_effect", "length_scale"))
    if controlled is None or effect is None or not scale or not 0 < controlled < 1:
        return None
    places = np.linspace(low, high, 81)
    logits = math.log(controlled / (1 - controlled)) + effect * np.tanh(places / scale)
    return places, 100 / (1 + np.exp(-logits))
