"""Curves drawn with the dots of Braille characters, for a terminal: each character has two columns of four dots."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from rich.text import Text

from dpo_cli.report.inputs import Row
from dpo_cli.report.steps import Curve, Role, points_of, thinned

COLORS: dict[Role, str] = {"muted": "bright_black", "a": "cyan", "b": "yellow"}
_BLANK = 0x2800
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""The bit of the dot in a row and a column of a character."""
_LABEL = 7
_SCALE = 1e-9


def plot(curve: Curve, steps: Sequence[Row], width: int, height: int) -> list[Text]:
    """Draw a curve: its title with last values, the lines, and the steps below.

    Args:
        curve: Which.
        steps: The table.
        width: Of each line of text, in columns, at least 20.
        height: Lines of text, at least 4.

    Returns:
        So many lines, or none where the curve has no point.
    """
    lines = [(line, points) for line in curve.series if (points := points_of(steps, line.column))]
    if not lines:
        return []
    columns, rows = width - _LABEL - 2, height - 2
    first, last = (pick(point[0] for _, points in lines for point in points) for pick in (min, max))
    values = [value for _, points in lines for _, value in points] + ([] if curve.level is None else [curve.level])
    low, high = min(values), max(values)
    span = max(high - low, _SCALE * max(abs(high), 1.0))
    cells: list[list[tuple[int, str]]] = [[(_BLANK, "")] * columns for _ in range(rows)]

    def place(step: float, value: float) -> tuple[int, int]:
        """Column and row of a dot."""
        across = (step - first) / max(last - first, 1)
        return round(across * (2 * columns - 1)), round((high - value) / span * (4 * rows - 1))

    def mark(x: int, y: int, color: str) -> None:
        bits, _ = cells[y // 4][x // 2]
        cells[y // 4][x // 2] = (bits | _DOTS[y % 4][x % 2], color)

    if curve.level is not None:
        for x in range(0, 2 * columns, 4):
            mark(x, place(first, curve.level)[1], COLORS["muted"])
    for line, points in lines:
        for x, y in _dots([place(*point) for point in thinned(points)]):
            mark(x, y, COLORS[line.role])
    labels = [_number(high), *[""] * (rows - 2), _number(low)] if rows > 1 else [_number(high)]
    found = [_title(curve, steps, width)]
    for label, row in zip(labels, cells, strict=True):
        text = Text(f"{label:>{_LABEL}} ", "bright_black")
        for character, color in row:
            text.append(chr(character), color)
        found.append(text)
    axis = f"{last:.0f}".rjust(columns - len(f"{first:.0f}"))
    found.append(Text(f"{'':{_LABEL}} {first:.0f}{axis}", "bright_black"))
    for text in found:
        text.truncate(width, pad=True)
    return found


def _title(curve: Curve, steps: Sequence[Row], width: int) -> Text:
    """The title with the last value of each color, held out where there is one; names of lines where there is room."""
    latest: dict[Role, tuple[str, float]] = {}
    for line in curve.series:
        if points := points_of(steps, line.column):
            latest[line.role] = (line.label or line.column.rpartition("/")[2], points[-1][1])
    title, _, unit = curve.title.partition(", ")
    text = Text()
    for has_names, has_unit in itertools.product((True, False), (True, False)):
        text = Text(title, "bold")
        if unit and has_unit:
            text.append(f", {unit}", "not bold")
        for role, (name, value) in latest.items():
            text.append(f"  {name} {_number(value)}" if has_names else f" {_number(value)}", f"not bold {COLORS[role]}")
        if text.cell_len <= width:
            break
    return text


def _dots(places: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """All dots on the way from one place to the next."""
    yield places[0]
    for (x0, y0), (x1, y1) in itertools.pairwise(places):
        length = max(abs(x1 - x0), abs(y1 - y0), 1)
        for part in range(1, length + 1):
            yield x0 + round((x1 - x0) * part / length), y0 + round((y1 - y0) * part / length)


def _number(value: float) -> str:
    """In seven columns at most."""
    text = f"{value:.3f}" if 0.001 <= abs(value) < 100 or value == 0 else f"{value:.1e}"
    return f"{value:.0f}" if 100 <= abs(value) < 1e5 else text.replace("e-0", "e-").replace("e+0", "e")
