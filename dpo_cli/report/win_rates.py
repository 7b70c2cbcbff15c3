"""Figures of the win rate (against KL, temperature, difference of lengths), and of how far raters agree."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from dpo_cli.core import paths
from dpo_cli.report.figures import (
    COLORS,
    DASHED,
    HEIGHT_INCHES,
    INK,
    MUTED,
    A,
    Chart,
    Key,
    Role,
    level_line,
    scale_axes,
    short_label,
)
from dpo_cli.report.inputs import Inputs, Row, evaluation_table

_EVEN = 50.0
_EVEN_KEY = Key("as good", "muted dash")
_OPPONENTS: Mapping[str, tuple[str, Role]] = {"sft": ("against SFT", "a"), "chosen": ("against chosen", "b")}
_SMALLEST_POINT, _LARGEST_POINT = 2.5, 7.0

_MOST_METHODS, _MOST_KINDS = 6, 8
_CELL_INCHES, _HEAD_INCHES = 0.6, 0.3
_PALEST, _FULL = 0.04, 0.6
_COEFFICIENTS = {"cohen_kappa": "κ", "fleiss_kappa": "κ", "krippendorff_alpha": "α"}


def win_rate_charts(inputs: Inputs) -> list[Chart | None]:
    """The figures that there are numbers for."""
    return [
        _frontier(
            inputs.frontier,
            "win_rate",
            "frontier",
            "Win rate against KL, %",
            "The points are the model with a multiple of what training changed: 0 is SFT, 1 the model itself."
            " A point further left that wins as much, or one that wins more, would have been the better step.",
        ),
        _frontier(
            inputs.frontier,
            "reward_gain",
            "reward-frontier",
            "Gain in reward against KL",
            "Mean reward of the same answers, less that of SFT's. Where it falls while KL rises, the update goes too"
            " far.",
        ),
        _temperatures(inputs.temperatures),
    ]


def judge_charts(inputs: Inputs) -> list[Chart | None]:
    """Whether the judge pays for length, and a heat map of raters for each method and baseline."""
    methods = [method for method in (inputs.agreement or {}).get("methods", []) if method["pairs"]]
    maps = [_agreement(number, method) for number, method in enumerate(methods[:_MOST_METHODS], 1)]
    return [_lengths(inputs.lengths, inputs.metrics["evaluate"]), *maps]


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


def _frontier(frontier: Sequence[Row], column: str, slug: str, title: str, caption: str) -> Chart | None:
    """A column against KL: points joined in the order of their scales, each with its scale beside it."""
    rows = [row for row in frontier if math.isfinite(row[column]) and math.isfinite(row["kl"])]
    rows.sort(key=lambda row: row["scale"])
    if len(rows) < 2:
        return None
    is_rate = column == "win_rate"
    kls, values = [row["kl"] for row in rows], [(100 if is_rate else 1) * row[column] for row in rows]

    def paint(axes: Axes) -> None:
        if is_rate:
            level_line(axes, _EVEN)
        axes.plot(kls, values, color=A, linewidth=0.9, alpha=0.55)
        for row, kl, value in zip(rows, kls, values, strict=True):
            is_model = row["scale"] == 1
            axes.plot(kl, value, marker="o", markersize=6 if is_model else 3.6, color=A, zorder=3)
            axes.annotate(
                "SFT" if row["scale"] == 0 else f"{row['scale']:g}",
                (kl, value),
                xytext=(5, -10),
                textcoords="offset points",
                color=INK if is_model else MUTED,
                weight="bold" if is_model else "normal",
                fontsize=8.5,
            )
        axes.margins(x=0.08, y=0.16)
        if is_rate:
            x, y = _bars(rows, "kl", "kl_low", "kl_high"), _bars(rows, "win_rate", "low", "high", 100)
            axes.errorbar(kls, values, xerr=x, yerr=y, fmt="none", ecolor=A, elinewidth=0.9, alpha=0.6)
        scale_axes(axes, "KL from SFT, nats a sequence")

    keys = [Key("scale of the update", "a dot"), *([_EVEN_KEY] if is_rate else [])]
    return Chart(slug, title, caption, evaluation_table("frontier"), keys, paint)


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
        scale_axes(axes, "sampling temperature")

    return Chart(
        "temperatures",
        "Win rate against temperature, %",
        "A model that is better at one temperature alone was tuned to it; the bands are intervals.",
        evaluation_table("temperatures"),
        [*(Key(_OPPONENTS[name][0], f"{_OPPONENTS[name][1]} eval") for name in lines), _EVEN_KEY],
        paint,
    )


def _lengths(lengths: Sequence[Row], metrics: Mapping[str, Any]) -> Chart | None:
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
        scale_axes(axes, "tokens more than SFT's answer", 6, integer=True)

    keys = [Key("prompts, by number", "a dot")]
    if fitted:
        keys.append(Key("fitted", "b train"))
    return Chart(
        "length",
        "Win rate against length difference, %",
        "A steep rise means that the judge pays for length."
        + (" Where the fitted curve crosses 0 is the length-controlled win rate." if fitted else ""),
        evaluation_table("length"),
        [*keys, _EVEN_KEY],
        paint,
    )


def _length_curve(metrics: Mapping[str, Any], low: float, high: float) -> tuple[np.ndarray, np.ndarray] | None:
    """P(win) = sigma(theta + phi tanh(d / scale)) with sigma(theta) the controlled win rate, in percent."""
    controlled, effect, scale = (metrics.get(name) for name in ("win_rate_lc", "length_effect", "length_scale"))
    if controlled is None or effect is None or not scale or not 0 < controlled < 1:
        return None
    places = np.linspace(low, high, 81)
    logits = math.log(controlled / (1 - controlled)) + effect * np.tanh(places / scale)
    return places, 100 / (1 + np.exp(-logits))


# --- raters against each other --------------------------------------------------------------


def _agreement(number: int, method: Mapping[str, Any]) -> Chart:
    kinds = list(method["win_rates"])[:_MOST_KINDS]
    cells: dict[tuple[int, int], Mapping[str, Any]] = {}
    for pair in method["pairs"]:
        if pair["first"] in kinds and pair["second"] in kinds:
            first, second = kinds.index(pair["first"]), kinds.index(pair["second"])
            cells[first, second] = cells[second, first] = pair

    def paint(axes: Axes) -> None:
        for row, column in itertools.product(range(len(kinds)), repeat=2):
            _cell(axes, row, column, cells.get((row, column)))
        axes.set_xlim(-0.5, len(kinds) - 0.5)
        axes.set_ylim(len(kinds) - 0.5, -0.5)
        axes.set_xticks(range(len(kinds)), [short_label(kind, max(5, 44 // len(kinds))) for kind in kinds])
        axes.set_yticks(range(len(kinds)), [short_label(kind) for kind in kinds])
        axes.tick_params(labelcolor=INK)
        axes.spines["bottom"].set_visible(False)
        axes.grid(visible=False)

    names = f"{short_label(method['method'])} against {short_label(method['baseline'])}"
    return Chart(
        f"agreement-{number}",
        f"Agreement, {names}, %",
        "Share of pairs of votes on the same answers that agree, with its interval and the coefficient that corrects"
        " for chance; on the diagonal the raters of one kind with each other.",
        paths.metrics_file("agreement"),
        [],
        paint,
        max(HEIGHT_INCHES, _HEAD_INCHES + _CELL_INCHES * len(kinds)),
    )


def _cell(axes: Axes, row: int, column: int, pair: Mapping[str, Any] | None) -> None:
    if pair is None:
        axes.annotate("\N{EN DASH}", (column, row), ha="center", va="center", color=MUTED)
        return
    value = pair["agreement"]["value"]
    # one half is what two raters reach who know nothing; below it the cell stays pale
    strength = _PALEST + (_FULL - _PALEST) * max(0.0, 2 * value - 1)
    axes.add_patch(Rectangle((column - 0.47, row - 0.45), 0.94, 0.9, color=A, alpha=strength, linewidth=0))
    axes.annotate(f"{100 * value:.0f}", (column, row - 0.14), ha="center", va="bottom", color=INK, weight="bold")
    low, high = pair["agreement"]["low"], pair["agreement"]["high"]
    lines = [f"[{100 * low:.0f}, {100 * high:.0f}]"] if low is not None and high is not None else []
    for name, label in _COEFFICIENTS.items():
        if (pair.get(name) or {}).get("value") is not None:
            lines.append(f"{label} {pair[name]['value']:.2f}")
    text = "\n".join(lines).replace("-", "\N{MINUS SIGN}")
    axes.annotate(text, (column, row - 0.1), ha="center", va="top", color=INK, fontsize=8)
