"""How figures are drawn: equal numbers give equal bytes, and colors are classes that a style sheet fills in.

A chart is an ``<svg>`` element that takes the page's colors and has its title and key as HTML beside it;
``standalone`` makes of it a file of its own, with title, key and colors for light and dark.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dpo_cli.report.steps import Role

WIDTH_INCHES, HEIGHT_INCHES = 4.0, 2.35
_FONT_POINTS = 9.5

# Stand-ins that no figure uses otherwise; a style sheet says what they are in light and in dark.
_STAND_INS = {"#01fe01": "muted", "#01fe02": "line", "#01fe03": "a", "#01fe04": "b", "#01fe05": "ink"}
MUTED, LINE, A, B, INK = _STAND_INS
COLORS: dict[Role, str] = {"a": A, "b": B, "muted": MUTED}
COLOR_NAMES = (*_STAND_INS.values(), "card")
LIGHT = dict(zip(COLOR_NAMES, ("#62676d", "#e4e4df", "#1f6fb2", "#b35617", "#1d1f22", "#ffffff"), strict=True))
DARK = dict(zip(COLOR_NAMES, ("#9da3aa", "#31363b", "#6fb1ec", "#eb9a5c", "#e7e7e3", "#1b1e21"), strict=True))

DASHED = (0, (3, 3))
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))
_LONGEST_LABEL = 26

_MARGIN, _TITLE_LINE, _KEY_LINE = 10, 20, 14
_TITLE_SIZE, _KEY_SIZE, _LETTER = 12, 9, 4.9
_SCREEN = 4 / 3  # pixels a point


@dataclass(frozen=True)
class Key:
    """An entry of a figure's key.

    Attributes:
        label: What it stands for.
        mark: Classes of its mark: a role, and ``train`` (thin line), ``eval`` (line with points), ``dot``, ``dash``,
            ``bar`` or ``wash`` (a pale area).
        last: A number worth reading off, as text; often none.
    """

    label: str
    mark: str
    last: str = ""


@dataclass(frozen=True)
class Chart:
    """One figure.

    Attributes:
        slug: Its name in ids and files.
        title: What is shown, with its unit.
        caption: What to look for, in a sentence or two.
        source: The file that holds its numbers.
        keys: What the marks mean.
        paint: Draws on the axes.
        height: In inches.
    """

    slug: str
    title: str
    caption: str
    source: Path
    keys: Sequence[Key]
    paint: Callable[[Axes], None]
    height: float = HEIGHT_INCHES

    @cached_property
    def svg(self) -> str:
        """An ``<svg>`` element; the page's element ``<slug>-title`` is its name."""
        return draw(self.slug, self.paint, self.height)


def draw(slug: str, paint: Callable[[Axes], None], height: float) -> str:
    """Draw one figure as an ``<svg>`` element."""
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # the reader's fonts draw the text
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {
                "svg.hashsalt": slug,
                "svg.fonttype": "none",
                "font.size": _FONT_POINTS,
                "axes.unicode_minus": True,
                "text.parse_math": False,
            }
        )
        figure = Figure(figsize=(WIDTH_INCHES, height), layout="constrained")
        axes = figure.add_subplot()
        _calm(axes)
        paint(axes)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata=_NO_METADATA)
    return _for_page(buffer.getvalue(), slug)


def level_line(axes: Axes, level: float) -> None:
    """A dashed horizontal line to compare with."""
    axes.axhline(level, color=MUTED, linewidth=0.8, linestyle=DASHED)


def scale_axes(axes: Axes, label: str, num_ticks: int = 5, *, integer: bool = False) -> None:
    """Name the horizontal axis, and put a few ticks on both."""
    axes.xaxis.set_major_locator(MaxNLocator(num_ticks, integer=integer))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel(label)


def short_label(text: str, longest: int = _LONGEST_LABEL) -> str:
    """A name from the data as a label: one line, printable, not too long."""
    line = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    longest = min(longest, _LONGEST_LABEL)
    return line if len(line) <= longest else f"{line[: longest - 1]}\N{HORIZONTAL ELLIPSIS}"


def standalone(chart: Chart) -> str:
    """The chart as an SVG file: title and key above, colors for light and dark, nothing loaded."""
    view = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', chart.svg)
    if view is None:
        raise ValueError(f"{chart.slug}: the drawing has no viewBox")
    width, height = float(view[1]), float(view[2])
    rows = _key_rows(chart.keys, width)
    head = _TITLE_LINE + _KEY_LINE * len(rows)
    box = (-_MARGIN, -head - _MARGIN, width + 2 * _MARGIN, height + head + 2 * _MARGIN)
    keys = "".join(
        _key(key, x, -head + _TITLE_LINE + _KEY_LINE * line) for line, row in enumerate(rows) for x, key in row
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{" ".join(f"{number:g}" for number in box)}"'
        f' width="{box[2] * _SCREEN:g}" height="{box[3] * _SCREEN:g}" role="img">'
        f"<title>{escape(chart.title)}</title><desc>{escape(chart.caption)}</desc><style>{_style()}</style>"
        f'<rect class="fill-card" x="{box[0]:g}" y="{box[1]:g}" width="{box[2]:g}" height="{box[3]:g}"/>'
        f'<text class="fill-ink" x="0" y="{-head + 10:g}" style="font-size: {_TITLE_SIZE}px; font-weight: 600">'
        f"{escape(chart.title)}</text>{keys}{chart.svg[chart.svg.index('>') + 1 :]}\n"
    )


# --- the element in the page ----------------------------------------------------------------


def _calm(axes: Axes) -> None:
    """Leave a base line, horizontal grid lines and small gray numbers."""
    axes.spines[["top", "left", "right"]].set_visible(False)
    axes.spines["bottom"].set_color(LINE)
    axes.grid(axis="y", color=LINE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, length=0)
    axes.xaxis.label.set_color(MUTED)
    axes.yaxis.label.set_color(MUTED)
    axes.margins(x=0.02)


def _for_page(document: str, slug: str) -> str:
    """Turn matplotlib's document into an element of the page: no prologue, no own colors, fonts or ids to clash."""
    svg = document[document.index("<svg") :]
    view = re.search(r'viewBox="[^"]*"', svg)
    svg = f'<svg role="img" aria-labelledby="{slug}-title" {view[0] if view else ""}' + svg[svg.index(">") :]
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    svg = re.sub(r' style="([^"<>]*)"', _colors_as_classes, svg)
    svg = re.sub(r' (?:d|x|y|transform)="[^"<>]*"', _rounded, svg)
    svg = svg.replace("xlink:href", "href")
    return re.sub(r"\s*\n\s*", " ", svg).strip()


def _rounded(attribute: re.Match[str]) -> str:
    """Hundredths of a point are enough."""
    return re.sub(r"\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}", attribute[0])


def _colors_as_classes(style: re.Match[str]) -> str:
    kept, classes = [], []
    for declaration in filter(None, (each.strip() for each in style[1].split(";"))):
        name, _, value = declaration.partition(": ")
        if value in _STAND_INS:
            classes.append(f"{name}-{_STAND_INS[value]}")
        else:
            kept.append(declaration)
    found = f' class="{" ".join(classes)}"' if classes else ""
    return found + (f' style="{"; ".join(kept)}"' if kept else "")


# --- the file of its own --------------------------------------------------------------------


def _style() -> str:
    def rules(colors: Mapping[str, str]) -> str:
        return "".join(
            f".{how}-{name}{{{how}:{color}}}" for name, color in colors.items() for how in ("fill", "stroke")
        )

    return f"text{{font-family:system-ui,sans-serif}}{rules(LIGHT)}@media(prefers-color-scheme:dark){{{rules(DARK)}}}"


def _key_rows(keys: Sequence[Key], width: float) -> list[list[tuple[float, Key]]]:
    """Keys in lines that fit, each with its place; the width of letters is a guess."""
    rows: list[list[tuple[float, Key]]] = []
    x = 0.0
    for key in keys:
        needed = 20 + _LETTER * (len(key.label) + len(key.last) + 1)
        if not rows or x + needed > width:
            rows.append([])
            x = 0.0
        rows[-1].append((x, key))
        x += needed + 10
    return rows


def _key(key: Key, x: float, y: float) -> str:
    role, _, mark = key.mark.partition(" ")
    line = f'<path class="stroke-{role}" d="M{x:g} {y:g}h14" stroke-width="{0.9 if mark == "train" else 1.6}"'
    marks = {
        "bar": f'<rect class="fill-{role}" x="{x + 3:g}" y="{y - 4:g}" width="8" height="8" rx="1.5"/>',
        "wash": f'<rect class="fill-{role}" fill-opacity=".2" x="{x + 3:g}" y="{y - 4:g}" width="8" height="8"/>',
        "dot": f'<circle class="fill-{role}" cx="{x + 7:g}" cy="{y:g}" r="3"/>',
        "dash": f'{line} stroke-dasharray="3 3"/>',
        "train": f"{line}/>",
        "eval": f'{line}/><circle class="fill-{role}" cx="{x + 7:g}" cy="{y:g}" r="2.4"/>',
    }
    last = f' <tspan class="fill-ink" font-weight="600">{escape(key.last)}</tspan>' if key.last else ""
    place = f'x="{x + 19:g}" y="{y + 3:g}" font-size="{_KEY_SIZE}"'
    return f'{marks[mark]}<text class="fill-muted" {place}>{escape(key.label)}{last}</text>'
