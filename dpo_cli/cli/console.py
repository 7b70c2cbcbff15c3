"""The terminal: progress bars where there is one, a plain line per interval where there is none.

Progress and notes go to standard error, results to standard output, so that a pipe gets the
results alone.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderHook, RenderResult
from rich.measure import Measurement
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.segment import Segment
from rich.table import Column, Table
from rich.text import Text

from dpo_cli.core.progress import Meter, Status
from dpo_cli.core.text import duration, in_one_line, printable

_PLAIN_INTERVAL_S = 10.0
_COLORS: dict[Status, tuple[str, str]] = {
    "good": ("green", "green"),
    "warn": ("amber", "yellow"),
    "bad": ("red", "bold red"),
    "plain": ("", ""),
}
"""Of a line of a verdict: the word before it, which a pipe or a terminal without colors shows, too, and its style."""


def open_console(*, stderr: bool = False) -> Console:
    """A console on which nothing that is printed can steer the terminal."""
    console = Console(stderr=stderr, highlight=False)
    console.push_render_hook(_PrintableHook())
    return console


def plain_table(**settings: Any) -> Table:
    """A table without lines."""
    return Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold", show_edge=False, **settings)


class _PrintableHook(RenderHook):
    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [_Printable(renderable) for renderable in renderables]


class _Printable:
    """Something to print, with the control characters in its texts spelled out."""

    def __init__(self, renderable: ConsoleRenderable) -> None:
        self._renderable = renderable

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for segment in console.render(self._renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement.get(console, options, self._renderable)


class ConsoleReporter:
    """Prints what a stage reports.

    Args:
        show_tables: Print summaries; off where the results are printed as JSON.
    """

    def __init__(self, *, show_tables: bool = True) -> None:
        self._notes = open_console(stderr=True)
        self._results = open_console()
        self._show_tables = show_tables

    def say(self, text: str) -> None:
        """One line the user should see."""
        self._notes.print(Text(in_one_line(text)), soft_wrap=True)

    def warn(self, text: str) -> None:
        """One line the user should act on or know of."""
        self._notes.print(Text.assemble(("warning: ", "bold yellow"), in_one_line(text)), soft_wrap=True)

    @contextmanager
    def meter(self, label: str, total: int, unit: str) -> Iterator[Meter]:
        """A bar on a terminal, else a line every ten seconds and one at the end."""
        if not self._notes.is_terminal:
            meter, is_done = _PlainMeter(self, label, total, unit), False
            try:
                yield meter
                is_done = True
            finally:
                meter.end(is_done=is_done)
            return
        columns: list[ProgressColumn | str] = [
            TextColumn("{task.description}", markup=False, table_column=Column(overflow="ellipsis", no_wrap=True)),
            BarColumn(bar_width=12),
            _StateColumn(unit),
            TextColumn("{task.fields[note]}", markup=False, table_column=Column(no_wrap=True)),
        ]
        with Progress(*columns, console=self._notes) as progress:
            yield _BarMeter(progress, progress.add_task(in_one_line(label), total=total, note=""))

    def table(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        """Print a summary."""
        if not self._show_tables:
            return
        self._print_table(Text(title, "bold"), [(Text(name), Text(value)) for name, value in rows], "dim")

    def verdict(self, headline: str, status: Status, rows: Sequence[tuple[Status, str, str]]) -> None:
        """Print a judgment; each line says its color in words, too."""
        if not self._show_tables:
            return
        lines = []
        for each, name, value in rows:
            word, style = _COLORS[each]
            lines.append((Text(word, style), Text(name, style or "dim"), Text(value)))
        self._print_table(Text(headline, f"bold {_COLORS[status][1]}"), lines, "")

    def _print_table(self, title: Text, rows: Sequence[Sequence[Text]], style: str) -> None:
        table = Table(show_header=False, box=None)
        for _ in rows[0][:-1] if rows else ():
            table.add_column(style=style, no_wrap=True)
        table.add_column(overflow="fold")
        for row in rows:
            table.add_row(*row)
        self._results.print()
        self._results.print(title)
        self._results.print(table)


class _BarMeter:
    def __init__(self, progress: Progress, task: int) -> None:
        self._progress = progress
        self._task = task

    def advance(self, amount: int) -> None:
        self._progress.advance(self._task, amount)  # type: ignore[arg-type]

    def note(self, text: str) -> None:
        self._progress.update(self._task, note=in_one_line(text))  # type: ignore[arg-type]


class _StateColumn(ProgressColumn):
    """Done and total with the rate, and what is left while it runs: ``40/129 steps, 6.2/s 6 s passed, 14 s left``."""

    def __init__(self, unit: str) -> None:
        super().__init__(table_column=Column(no_wrap=True))
        self._unit = unit

    def render(self, task: Task) -> Text:
        total = None if task.total is None else int(task.total)
        rate = f", {_rate(task.speed, self._unit)}" if task.speed else ""
        done = f"{_amount(int(task.completed), total, self._unit)}{rate}"
        passed = duration((task.finished_time if task.finished else task.elapsed) or 0)
        if task.finished:
            return Text(f"{done} in {passed}")
        left = "" if task.time_remaining is None else f", {duration(task.time_remaining)} left"
        return Text(f"{done} {passed} passed{left}")


class _PlainMeter:
    """Says how far the work is, at most once an interval."""

    def __init__(self, reporter: ConsoleReporter, label: str, total: int, unit: str) -> None:
        self._reporter = reporter
        self._label = label
        self._total = total
        self._unit = unit
        self._done = 0
        self._note = ""
        self._begun = self._said = time.monotonic()
        self._timer = threading.Timer(_PLAIN_INTERVAL_S, self._begin)
        self._timer.daemon = True
        self._timer.start()

    def _begin(self) -> None:
        """Nothing is done after the first interval: say that work is under way."""
        if self._total and not self._done:
            self._said = time.monotonic()
            self._say("")

    def advance(self, amount: int) -> None:
        self._done += amount
        now = time.monotonic()
        if now - self._said >= _PLAIN_INTERVAL_S and self._done < self._total:
            self._said = now
            rate = self._done / (now - self._begun)
            left = (self._total - self._done) / rate
            self._say(f", {_rate(rate, self._unit)}, {duration(left)} left")

    def note(self, text: str) -> None:
        self._note = text

    def end(self, *, is_done: bool) -> None:
        """No more is said of it, but that the work is done, where it is."""
        self._timer.cancel()
        if is_done:
            self._say(f" in {duration(time.monotonic() - self._begun)}")

    def _say(self, rest: str) -> None:
        note = f", {self._note}" if self._note else ""
        self._reporter.say(f"{self._label}: {_amount(self._done, self._total, self._unit)}{rest}{note}")


def _amount(done: int, total: int | None, unit: str) -> str:
    if unit == "bytes":
        return _number(done, unit) if total is None else f"{_number(done, unit)} of {_number(total, unit)}"
    return f"{done}/{total} {unit}" if total is not None else f"{done} {unit}"


def _rate(per_second: float, unit: str) -> str:
    """How fast; where one takes longer than a second, how long that is."""
    if unit == "bytes" or per_second >= 1 or not per_second:
        return f"{_number(per_second, unit)}/s"
    seconds = 1 / per_second
    took = f"{seconds:.1f} s" if seconds < 10 else duration(seconds)
    return f"{took} a {unit.removesuffix('s')}"


def _number(value: float, unit: str) -> str:
    if unit != "bytes":
        return f"{value:.1f}" if value < 100 else f"{value:.0f}"
    for name in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {name}" if name == "B" else f"{value:.1f} {name}"
        value /= 1024
    return f"{value:.1f} GiB"
