"""What ``dpo-cli compare`` prints: settings and metrics side by side, and win rates of every two models."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dpo_cli.cli.console import open_console
from dpo_cli.evaluation.differences import Difference, Scalar
from dpo_cli.evaluation.flags import percent, percent_interval
from dpo_cli.statistics.bootstrap import Estimate, ends

if TYPE_CHECKING:
    from dpo_cli.evaluation.compare import ExperimentComparison
    from dpo_cli.evaluation.head_to_head import HeadToHead

_NARROWEST = 40
_GAP = 2
_WIDEST_NAME = 20


@dataclass(frozen=True)
class _Column:
    """A column: its title and a cell an experiment, each as lines."""

    title: list[str]
    cells: list[list[str]]

    @property
    def width(self) -> int:
        return max(Text(line).cell_len for lines in (self.title, *self.cells) for line in lines)


def print_comparison(found: ExperimentComparison, console: Console | None = None) -> None:
    """Print tables no wider than the terminal, then the notes.

    Args:
        found: What to print.
        console: Where; None: standard output.
    """
    console = console or open_console()
    names = _Column(["experiment"], [[experiment.name] for experiment in found.experiments])
    name_width = min(names.width, _WIDEST_NAME)
    room = max(console.width, _NARROWEST) - name_width
    columns = [_param_column(found, path) for path in found.params]
    columns += [_metric_column(found, name) for name in found.metrics]
    for block in _blocks(columns, room):
        table = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0), header_style="bold", show_edge=False)
        table.add_column(Text("\n" + names.title[0]), overflow="fold", width=name_width)
        for column in block:
            table.add_column(Text("\n".join(column.title)), overflow="fold", max_width=room - _GAP)
        for row, name in enumerate(names.cells):
            table.add_row(Text(name[0]), *(_cell(column.cells[row]) for column in block))
        console.print()
        console.print(table)
    confidence = found.sampling.confidence
    baseline = found.experiments[0].name
    console.print()
    if any(each.low is not None for differences in found.differences.values() for each in differences):
        console.print(
            Text(
                f"In brackets the difference from {baseline} and its paired {100 * confidence:g}% interval"
                f" ({found.sampling.draws} draws of prompts). * leaves out 0; by chance one in"
                f" {round(1 / (1 - confidence))} does."
            )
        )
    else:
        console.print(Text(f"In brackets the difference from {baseline}."))
    for note in found.notes:
        console.print(Text(f"- {note}"))


def _blocks(columns: Sequence[_Column], room: int) -> list[list[_Column]]:
    """Columns in as few tables as have room for them, in their order."""
    blocks: list[list[_Column]] = [[]]
    used = 0
    for column in columns:
        width = min(column.width, room - _GAP) + _GAP
        if blocks[-1] and used + width > room:
            blocks.append([])
            used = 0
        blocks[-1].append(column)
        used += width
    return blocks


def _cell(lines: Sequence[str]) -> Text:
    return Text("\n".join(lines), style="bold" if lines[-1].endswith("*") else "")


def _param_column(found: ExperimentComparison, path: str) -> _Column:
    return _Column(_title(path), [[_text(experiment.params.get(path))] for experiment in found.experiments])


def _metric_column(found: ExperimentComparison, name: str) -> _Column:
    values = [_text(experiment.metrics.get(name)) for experiment in found.experiments]
    differences = [None, *found.differences[name]]
    return _Column(_title(name), [_lines(value, each) for value, each in zip(values, differences, strict=True)])


def _title(path: str) -> list[str]:
    section, _, name = path.partition(".")
    return [f"{section}.", name] if name else ["", section]


def _text(value: Scalar) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _lines(value: str, found: Difference | None) -> list[str]:
    if found is None or found.value is None:
        return [value]
    if found.low is None or found.high is None:
        return [value, f"({found.value:+.3g})"] if found.value else [value]
    digits = _decimals(found)
    middle, low, high = (f"{end:+.{digits}f}" if end else "0" for end in (found.value, found.low, found.high))
    return [f"{value} ({middle})", f"[{low}, {high}]{'*' if found.leaves_out_zero else ''}"]


def _decimals(found: Difference) -> int:
    """Decimals that show two digits of half the interval, or three of the difference where it has no width."""
    assert found.low is not None
    assert found.high is not None
    assert found.value is not None
    half = (found.high - found.low) / 2
    size, digits = (half, 2) if half > 0 else (abs(found.value), 3)
    return 0 if size == 0 else min(6, max(0, digits - 1 - math.floor(math.log10(size))))


def print_head_to_head(found: HeadToHead, console: Console | None = None) -> None:
    """Print win rates of rows over columns, and strengths."""
    console = console or open_console()
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold", show_edge=False)
    table.add_column(Text("win rate of"), overflow="fold")
    for name in found.models:
        table.add_column(Text(f"over {name}"), overflow="fold")
    if found.strengths is not None:
        table.add_column("strength, logits")
    for first in found.models:
        cells = [
            "-" if first == second else f"{percent(rate.value)}\n{percent_interval([rate.low, rate.high])}"
            for second in found.models
            for rate in ([found.win_rate(first, second)] if first != second else [_SAME])
        ]
        if found.strengths is not None:
            strength = found.strengths[first]
            anchor = first == found.models[0]
            interval = "" if anchor or ends(strength) is None else f"\n[{strength.low:+.2f}, {strength.high:+.2f}]"
            cells.append("0" if anchor else f"{strength.value:+.2f}{interval}")
        table.add_row(Text(first), *map(Text, cells))
    console.print()
    console.print(table)
    console.print()
    left_out = f", {found.num_left_out} that not all have are left out" if found.num_left_out else ""
    orders = ", in both orders," if found.reads else ""
    console.print(Text(f"Judged by {found.judge}{orders} on {found.num_prompts} prompts{left_out}."))
    console.print(
        Text(
            f"Strengths by Bradley-Terry, {found.models[0]} being 0."
            if found.strengths is not None
            else f"No strengths: {found.why}."
        )
    )


_SAME = Estimate(0.5, 0.5, 0.5)
