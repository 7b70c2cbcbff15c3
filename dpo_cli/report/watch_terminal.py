"""Curves of a training in the terminal (Textual), as it goes on, with what they say and the time left.

It reads the disk and nothing else, so it works over ssh, and neither slows nor stops what it watches. Colors are the
terminal's own.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from typing import ClassVar

from rich.console import Group
from rich.table import Table
from rich.text import Text
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.events import Resize
from textual.widgets import Static

from dpo_cli.core.errors import DpoCliError, MachineError
from dpo_cli.core.progress import Status
from dpo_cli.core.text import visible
from dpo_cli.report.plot import COLORS, plot
from dpo_cli.report.readings import readings
from dpo_cli.report.steps import CURVES
from dpo_cli.report.watched import Watched, find_logs, read_log

_INTERVAL_S = 1.0
_SHARE = 0.1
"""Of its time, at most, that it computes."""
_NARROWEST, _LOWEST, _TALLEST = 40, 7, 16
"""Columns of a figure, and its lines."""
_GAP = 2
_MARKS: dict[Status, tuple[str, str]] = {
    "good": ("✓", "green"),
    "warn": ("!", "yellow"),
    "bad": ("✕", "bold red"),
    "plain": ("·", "bright_black"),
}


def watch_in_terminal(stage: str | None) -> None:
    """Show a training until the user quits.

    Args:
        stage: Which; None: the newest.

    Raises:
        MachineError: The terminal cannot be used.
    """
    app = WatchTerminal(stage)
    app.run(mouse=False)  # so that texts can be selected as anywhere else
    if app.return_code:
        raise MachineError("the terminal version failed, see above; what it watched is not affected")


class WatchTerminal(App[None]):
    """Shows one training at a time.

    Args:
        stage: Which; None: the newest.
    """

    ENABLE_COMMAND_PALETTE = False
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("ctrl+c,q", "quit", priority=True),
        Binding("tab,s", "next_stage", priority=True),
    ]
    CSS = """
    #top, #readings, #keys { padding: 0 1; height: auto; }
    #main { padding: 0 1; scrollbar-size-vertical: 1; }
    #readings { border-top: solid ansi_bright_black; max-height: 40%; }
    #keys { color: ansi_bright_black; }
    """

    def __init__(self, stage: str | None) -> None:
        super().__init__(ansi_color=True)
        self.theme = "ansi-dark"
        self._stage = stage
        self._shown: Watched | None = None
        self._stages: list[str] = []
        self._top, self._curves, self._readings, self._keys = (
            Static(id=name) for name in ("top", "curves", "readings", "keys")
        )
        self._main = VerticalScroll(self._curves, id="main")

    def compose(self) -> ComposeResult:
        """What is on the screen."""
        yield from (self._top, self._main, self._readings, self._keys)

    def on_mount(self) -> None:
        """Begin to look at the disk."""
        with contextlib.suppress(NotImplementedError):  # on Windows
            for number in (signal.SIGINT, signal.SIGTERM):
                asyncio.get_running_loop().add_signal_handler(number, self.exit)
        self._main.focus()
        self._look()

    def on_resize(self, event: Resize) -> None:
        """Draw it as large as there is room."""
        self._draw()

    def action_next_stage(self) -> None:
        """Show the next training that there is a log of."""
        if self._stages:
            shown = self._shown.stage if self._shown else None
            place = self._stages.index(shown) + 1 if shown in self._stages else 0
            self._stage = self._stages[place % len(self._stages)]
            self._update()

    def _look(self) -> None:
        begun = time.monotonic()
        self._update()
        self.set_timer(max(_INTERVAL_S, (time.monotonic() - begun) / _SHARE), self._look)

    def _update(self) -> None:
        """Read what is on the disk."""
        logs = find_logs()
        self._stages = [stage for stage in CURVES if stage in logs]
        stage = self._stage or next(iter(logs), None)
        notice = ""
        if stage is not None and stage in logs:
            try:
                self._shown = read_log(stage, logs[stage]) or self._shown
            except (DpoCliError, OSError) as error:
                notice = visible(str(error))
        self._draw(notice)

    def _draw(self, notice: str = "") -> None:
        shown, width = self._shown, self.size.width - 3
        if shown is None:
            what = self._stage or "a training"
            self._top.update(Text(notice or f"Waiting for {what} to begin", "bold"))
        else:
            self._top.update(Group(Text(notice or shown.headline, "bold"), self._bar(shown, width)))
            self._readings.update(_table(shown))
            self.call_after_refresh(self._draw_figures)  # when it is known how much room is left
        keys = ["Q quit", "↑ ↓ scroll"]
        if others := [stage for stage in self._stages if shown is None or stage != shown.stage]:
            keys.insert(0, f"Tab {', '.join(others)}")
        legend = Text.assemble(("training", COLORS["muted"]), "  ", ("held out", COLORS["a"]), "  ")
        self._keys.update(legend + Text("   ".join(keys), "bright_black"))

    @staticmethod
    def _bar(shown: Watched, width: int) -> Text:
        part = round(width * shown.step / max(shown.num_steps, 1))
        return Text("━" * part, "cyan") + Text("━" * (width - part), "bright_black")

    def _draw_figures(self) -> None:
        """All curves, as many beside each other as there is room for, as high as all of them fit."""
        shown, width = self._shown, self.size.width - 3
        if shown is None:
            return
        across = max(1, min(3, width // _NARROWEST))
        each = (width - _GAP * (across - 1)) // across
        curves = [curve for curve in CURVES[shown.stage] if plot(curve, shown.steps, each, _LOWEST)]
        num_rows = max(1, -(-len(curves) // across))
        height = min(_TALLEST, max(_LOWEST, self._main.size.height // num_rows))
        plots = [plot(curve, shown.steps, each, height) for curve in curves]
        rows = [plots[start : start + across] for start in range(0, len(plots), across)]
        gap = Text(" " * _GAP)
        self._curves.update(Text("\n").join(gap.join(line) for row in rows for line in zip(*row, strict=True)))


def _table(shown: Watched) -> Table | Text:
    """What the curves say."""
    found = readings(shown.stage, shown.steps)
    if not found:
        return Text("Too few steps to say anything", "bright_black")
    table = Table.grid(padding=(0, 1))
    for finding in found:
        mark, style = _MARKS[finding.status]
        table.add_row(Text(mark, style), Text(finding.name, style), f"{finding.value}: {finding.meaning}")
    return table
