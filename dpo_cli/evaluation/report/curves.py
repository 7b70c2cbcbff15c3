"""The figures of the report as inline SVG: equal numbers give equal bytes, colours come from the page."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dpo_cli.evaluation.report.inputs import Inputs, Table

Role = Literal["a", "b", "muted"]
Pace = Literal["train", "eval"]

_SIZE_INCHES = (4.6, 2.5)
_FONT_POINTS = 10
# Stand-ins that no figure uses otherwise; the page's style sheet decides on light or dark.
_CSS_COLOURS = {"#01fe01": "--muted", "#01fe02": "--line", "#01fe03": "--a", "#01fe04": "--b"}
_MUTED, _LINE, _A, _B = _CSS_COLOURS
_ROLE_COLOURS: dict[Role, str] = {"a": _A, "b": _B, "muted": _MUTED}
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


@dataclass(frozen=True)
class Series:
    """One line of a figure.

    Attributes:
        label: Its name in the key.
        column: Its column of the table.
        role: Which of the page's two accents it has, or its grey.
        pace: train is logged often and drawn thin; eval is rare, held out, and drawn with points.
    """

    label: str
    column: str
    role: Role
    pace: Pace


@dataclass(frozen=True)
class Key:
    """An entry of a figure's key.

    Attributes:
        label: What it stands for.
        mark: Classes of its mark: role and pace, or ``bar``.
        last: The last held-out value, as text; empty where a single value says little.
    """

    label: str
    mark: str
    last: str = ""


@dataclass(frozen=True)
class Curve:
    """One figure.

    Attributes:
        slug: Its name in ids.
        title: What is shown, with its unit.
        caption: What to look for, in one sentence.
        keys: What the marks mean.
        svg: An ``<svg>`` element.
    """

    slug: str
    title: str
    caption: str
    keys: list[Key]
    svg: str


def draw_curves(inputs: Inputs) -> list[Curve]:
    """All figures, the most telling first; SFT's only where there was SFT."""
    steps = inputs.train_steps
    curves = [
        _line_curve(
            "loss",
            "Preference loss",
            "Both should fall; held-out loss that rises while training loss falls is over-fitting."
            " The dashed line is the loss before any step.",
            steps,
            _train_and_held_out("loss"),
            level=inputs.metrics["train"]["step0_loss"],
        ),
        _line_curve(
            "accuracy",
            "Reward accuracy, share of pairs",
            "The share of pairs whose chosen answer has the higher reward should climb away from one half,"
            " the dashed line.",
            steps,
            _train_and_held_out("rewards/accuracies"),
            level=0.5,
        ),
        _line_curve(
            "margin",
            "Reward margin, nats",
            "Chosen less rejected reward should rise from zero; training far above held-out means pairs"
            " learned by heart.",
            steps,
            _train_and_held_out("rewards/margins"),
            level=0.0,
        ),
        _line_curve(
            "rewards",
            "Chosen and rejected reward, nats",
            "The two should part; when even the chosen line sinks below zero, good answers became less likely too.",
            steps,
            [
                Series("chosen, training", "rewards/chosen", "a", "train"),
                Series("chosen, held out", "eval_rewards/chosen", "a", "eval"),
                Series("rejected, training", "rewards/rejected", "b", "train"),
                Series("rejected, held out", "eval_rewards/rejected", "b", "eval"),
            ],
            level=0.0,
        ),
        _histogram(inputs.margins),
    ]
    if inputs.sft_steps["step"]:
        curves.append(
            _line_curve(
                "sft",
                "SFT loss, nats a token",
                "Fine-tuning before DPO should flatten out, with the held-out loss not yet rising.",
                inputs.sft_steps,
                _train_and_held_out("loss"),
            )
        )
    return curves


def _train_and_held_out(column: str) -> list[Series]:
    return [
        Series("training", column, "muted", "train"),
        Series("held out", f"eval_{column}", "a", "eval"),
    ]


def _line_curve(
    slug: str, title: str, caption: str, table: Table, series: Sequence[Series], level: float | None = None
) -> Curve:
    """Columns of a table against the step, with a dashed line at ``level``."""
    keys = []

    def draw(axes: Axes) -> None:
        if level is not None:
            axes.axhline(level, color=_MUTED, linewidth=0.8, linestyle=(0, (3, 3)))
        for line in series:
            points = _points(table, line.column)
            keys.append(Key(line.label, f"{line.role} {line.pace}", _last(line, points)))
            _draw_line(axes, line, points)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel("step")

    return Curve(slug, title, caption, svg=_svg(slug, draw), keys=keys)


def _points(table: Table, column: str) -> list[tuple[float, float]]:
    """Step and value wherever the column has a finite value."""
    pairs = zip(table["step"], table[column], strict=True)
    return [(step, value) for step, value in pairs if math.isfinite(value)]


def _last(line: Series, points: Sequence[tuple[float, float]]) -> str:
    return f"{points[-1][1]:.3f}".replace("-", "\N{MINUS SIGN}") if line.pace == "eval" and points else ""


def _draw_line(axes: Axes, line: Series, points: Sequence[tuple[float, float]]) -> None:
    steps, values = [step for step, _ in points], [value for _, value in points]
    colour = _ROLE_COLOURS[line.role]
    if line.pace == "train":
        axes.plot(steps, values, color=colour, linewidth=0.9, alpha=0.55)
    else:
        axes.plot(steps, values, color=colour, linewidth=1.6, marker="o", markersize=3.2, zorder=3)


def _histogram(margins: Table) -> Curve:
    """The distribution of held-out margins, those below zero apart."""
    middles, percents = margins["margin"], [100 * share for share in margins["share"]]
    width = 0.86 * (middles[1] - middles[0]) if len(middles) > 1 else 1.0

    def draw(axes: Axes) -> None:
        axes.axvline(0, color=_MUTED, linewidth=0.8, linestyle=(0, (3, 3)))
        axes.bar(middles, percents, width, color=[_A if middle > 0 else _B for middle in middles])
        axes.xaxis.set_major_locator(MaxNLocator(7))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel("margin, nats")

    return Curve(
        "margins",
        "Margins of held-out pairs, % of pairs",
        "Most of the mass should lie right of zero; a long left tail is pairs that the model now gets firmly wrong.",
        [Key("chosen preferred", "a bar"), Key("rejected preferred", "b bar")],
        _svg("margins", draw),
    )


def _svg(slug: str, draw: Callable[[Axes], None]) -> str:
    """Draw one figure as an ``<svg>`` element; the page's element ``<slug>-title`` is its name."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {"svg.hashsalt": slug, "svg.fonttype": "none", "font.size": _FONT_POINTS, "axes.unicode_minus": True}
        )
        figure = Figure(figsize=_SIZE_INCHES, layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        _calm(axes)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata=_NO_METADATA)
    return _for_page(buffer.getvalue(), slug)


def _calm(axes: Axes) -> None:
    """Leave a base line, horizontal grid lines and small grey numbers."""
    axes.spines[["top", "left", "right"]].set_visible(False)
    axes.spines["bottom"].set_color(_LINE)
    axes.grid(axis="y", color=_LINE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_MUTED, length=0)
    axes.xaxis.label.set_color(_MUTED)
    axes.margins(x=0.02)


def _for_page(document: str, slug: str) -> str:
    """Turn matplotlib's document into an element of the page: no prologue, no own colours, fonts or ids to clash."""
    svg = document[document.index("<svg") :]
    view = re.search(r'viewBox="[^"]*"', svg)
    svg = f'<svg role="img" aria-labelledby="{slug}-title" {view[0] if view else ""}' + svg[svg.index(">") :]
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    svg = svg.replace("xlink:href", "href")
    for stand_in, name in _CSS_COLOURS.items():
        svg = svg.replace(stand_in, f"var({name})")
    return re.sub(r"\s*\n\s*", " ", svg).strip()
