"""The same questions in the terminal (Textual), with the keys of the page, over the same engine.

Texts of models are shown as text: Markdown and code readable, tags, links and control characters as they are written.
A line of the terminal holds one answer alone where one of them is written from right to left, since terminals turn
whole lines. Colors are the terminal's own.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import signal
import time
import unicodedata
from typing import Any, ClassVar

from markdown_it import MarkdownIt
from rich.console import Group, JustifyMethod, RenderableType
from rich.markdown import Heading, Markdown, MarkdownElement
from rich.table import Table
from rich.text import Text
from rich.theme import Theme
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Grid, Vertical, VerticalScroll
from textual.events import Key as KeyPress
from textual.events import Resize
from textual.screen import ModalScreen
from textual.widgets import Static

from dpo_cli.core.errors import MachineError
from dpo_cli.core.text import visible
from dpo_cli.data.votes import A, B
from dpo_cli.labeling.engine import Engine
from dpo_cli.labeling.items import Mode
from dpo_cli.labeling.keys import KEYS, NOT_RANKED, NOTE, STRENGTHS, Key, help_of
from dpo_cli.labeling.state import state_of
from dpo_cli.labeling.votes import BadVote

_NARROWEST = 40
"""Columns of an answer that stands beside others."""
_HELD_S = 0.1
"""A key that comes again sooner is held down; it votes once."""
_LONGEST_BAR = 20
_GAP = 3


def vote_in_terminal(engine: Engine, rater: str) -> None:
    """Ask a rater who has joined, until he quits.

    Raises:
        MachineError: The terminal cannot be used.
    """
    app = Terminal(engine, rater)
    app.run(mouse=False)  # so that texts can be selected as anywhere else
    if app.return_code:
        raise MachineError("the terminal version failed, see above; all votes are on the disk")


class _Heading(Heading):
    LEVEL_ALIGN: ClassVar[dict[str, JustifyMethod]] = {}  # all at the left


class _Markdown(Markdown):
    elements: ClassVar[dict[str, type[MarkdownElement]]] = Markdown.elements | {"heading_open": _Heading}


def readable(text: str) -> RenderableType:
    """Markdown for the terminal. Nothing of the text is hidden: tags, links, pictures and entities stay as written."""
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    parser.disable(["link", "image", "autolink", "html_inline", "html_block", "entity", "escape", "reference"])
    parser.disable(["lheading", "hr"])
    if not text.strip():
        return Text("(an empty text)", "italic dim")
    found = _Markdown("", code_theme="ansi_dark", hyperlinks=False)
    found.parsed = parser.parse(text)
    for token in found.parsed:
        for child in token.children or []:
            if child.type == "softbreak":  # lines end where the author ended them
                child.type = "hardbreak"
    return found


def is_right_to_left(text: str) -> bool:
    """Whether some of it is written from right to left."""
    return not text.isascii() and any(unicodedata.bidirectional(character) in ("R", "AL") for character in text)


class _Help(ModalScreen[None]):
    BINDINGS: ClassVar[list[BindingType]] = [(key, "dismiss", "") for key in ("escape", "q", "question_mark")]

    def __init__(self, mode: Mode, guideline: str) -> None:
        super().__init__()
        self._mode: Mode = mode
        self._guideline = guideline

    def compose(self) -> ComposeResult:
        rows = Table.grid(padding=(0, 2))
        for key, about in [*help_of(self._mode), ("↑ ↓", "scroll, as page keys do"), ("Q", "quit")]:
            rows.add_row(Text(key, "bold", justify="right", no_wrap=True), about)
        guideline = [readable(self._guideline), ""] if self._guideline else []
        with VerticalScroll():
            yield Static(
                Group(Text("How to vote", "bold"), "", *guideline, rows, "", NOTE, "", Text("Esc closes", "dim"))
            )


class Terminal(App[None]):
    """Asks one rater.

    Args:
        engine: Asks, and keeps votes.
        rater: Who has joined it.
    """

    ENABLE_COMMAND_PALETTE = False
    BINDINGS: ClassVar[list[BindingType]] = [Binding("ctrl+c", "quit", priority=True)]
    CSS = """
    #top, #notice, #keys { padding: 0 1; height: auto; }
    #keys { border-top: solid ansi_bright_black; }
    #main { scrollbar-size-vertical: 1; }
    #prompt { padding: 1; height: auto; }
    #answers { padding: 0 1; grid-gutter: 1 2; grid-rows: auto; height: auto; }
    .answer { height: auto; border-top: solid ansi_bright_black; border-title-style: bold; }
    .ranked { border-top: heavy ansi_cyan; }
    _Help { align: center middle; }
    _Help VerticalScroll { width: 90%; max-width: 76; height: auto; max-height: 90%; padding: 0 2; }
    _Help VerticalScroll { border: round ansi_bright_black; }
    """

    def __init__(self, engine: Engine, rater: str) -> None:
        super().__init__(ansi_color=True)
        self.theme = "ansi-dark"
        self.console.push_theme(Theme({"markdown.code": "cyan", "markdown.block_quote": "dim"}))
        self._engine, self._rater = engine, rater
        self._state: dict[str, Any] = {}
        self._strength: int | None = None
        self._ranks: list[int | None] = []
        self._cards: list[Vertical] = []
        self._is_tying = False
        self._shown_at = self._pressed_at = 0.0
        self._pressed = ""
        self._top, self._notice, self._prompt, self._choices = (
            Static(id=name) for name in ("top", "notice", "prompt", "keys")
        )
        self._answers = Grid(id="answers")
        self._main = VerticalScroll(self._prompt, self._answers, id="main")

    def compose(self) -> ComposeResult:
        """What is on the screen."""
        yield from (self._top, self._notice, self._main, self._choices)

    async def on_mount(self) -> None:
        """Ask the first question."""
        with contextlib.suppress(NotImplementedError):  # on Windows
            for number in (signal.SIGINT, signal.SIGTERM):
                asyncio.get_running_loop().add_signal_handler(number, self.exit)
        self._main.focus()
        await self._show()

    def on_resize(self, event: Resize) -> None:
        """Arrange the answers anew."""
        if self._state:
            self._show_progress()
            self._arrange(event.size.width)
            self._show_choices()

    # --- showing --------------------------------------------------------------------------------

    async def _show(self, notice: str = "") -> None:
        self._state = state = state_of(self._engine, self._rater)
        question = state["question"]
        self._strength, self._is_tying = None, False
        self._ranks = [None] * len(question["answers"]) if question and state["mode"] == "ranking" else []
        with self.batch_update():
            self._tell(notice or state["progress"]["hint"])
            self._show_progress()
            self._prompt.update(_turns(question["prompt"]) if question else _end())
            await self._answers.remove_children()
            self._cards = [_card(text) for text in (question["answers"] if question else [])]
            await self._answers.mount_all(self._cards)
            self._arrange(self.size.width)
            self._show_choices()
        self._main.scroll_home(animate=False)
        self._shown_at = time.monotonic()

    def _show_progress(self) -> None:
        progress = self._state["progress"]
        width = min(_LONGEST_BAR, self.size.width // 6)
        part = round(width * progress["done"] / max(1, progress["done"] + progress["left"]))
        bar = Text("━" * part, "cyan") + Text("━" * (width - part), "bright_black")
        self._top.update(bar + Text(f"  {progress['figures']}", "default"))

    def _show_choices(self) -> None:
        """What is chosen so far, and the keys."""
        for place, card in enumerate(self._cards):
            mode = self._state["mode"]
            name = "AB"[place] if mode == "pair" else str(place + 1) if mode == "ranking" else "Answer"
            rank = self._ranks[place] if self._ranks else None
            card.border_title = f"{name} · rank {rank}" if rank else name
            card.set_class(rank is not None, "ranked")
        is_asking = self._state["question"] is not None
        keys = [(each.key, each.name, each.act == "tie" and self._is_tying) for each in self._keys()]
        if not is_asking:
            keys = [each for each in keys if each[0] == "U"]
        shown = self._lines([*keys, ("?", "Help", False), ("Q", "Quit", False)])
        if self._state["mode"] == "pair" and is_asking:
            strengths = enumerate(STRENGTHS, 1)
            shown += self._lines([(str(number), name, number == self._strength) for number, name in strengths])
        self._choices.update(Group(*shown))

    def _lines(self, keys: list[tuple[str, str, bool]]) -> list[Text]:
        """Keys with their names, those that are pressed inverse, as many in a line as there is room for."""
        lines: list[Text] = []
        for key, name, is_pressed in keys:
            found = Text.assemble((key, "bold cyan"), f" {name}", style="reverse" if is_pressed else "")
            if lines and lines[-1].cell_len + found.cell_len + _GAP < self.size.width - 2:
                lines[-1].append(" " * _GAP).append_text(found)
            else:
                lines.append(Text().append_text(found))
        return lines

    def _arrange(self, width: int) -> None:
        """Put answers beside each other where there is room."""
        question = self._state["question"]
        answers = question["answers"] if question else [""]
        room = 1 if any(map(is_right_to_left, answers)) else max(1, width // _NARROWEST)
        self._answers.styles.grid_size_columns = min(len(answers), room)

    def _tell(self, text: str) -> None:
        self._notice.update(Text(text, "bold"))
        self._notice.display = bool(text)

    # --- keys -----------------------------------------------------------------------------------

    def _keys(self) -> tuple[Key, ...]:
        return KEYS[self._state["mode"]]

    async def on_key(self, event: KeyPress) -> None:
        """Do what the key does."""
        key = "Enter" if event.key == "enter" else (event.character or event.key).upper()
        now = time.monotonic()
        is_held = key == self._pressed and now - self._pressed_at < _HELD_S
        self._pressed, self._pressed_at = key, now
        if is_held or not self._state or len(self.screen_stack) > 1:
            return
        if key == "Q":
            self.exit()
        elif key == "?":
            event.prevent_default()  # or the help takes it, too, and closes
            self.push_screen(_Help(self._state["mode"], visible(self._engine.guideline)))
        elif key == " ":
            self._main.scroll_page_down()
        elif known := next((each for each in self._keys() if each.key.upper() == key.upper()), None):
            await self._do(known)
        elif key.isdecimal() and self._state["question"]:
            self._digit(int(key))

    async def _do(self, key: Key) -> None:
        if key.act == "undo":
            await self._keep(None)
        elif not self._state["question"]:
            return
        elif key.vote is not None:
            await self._keep(key.vote)
        elif key.act == "save":
            if None in self._ranks:
                self._tell(NOT_RANKED)
            else:
                await self._keep(self._ranks)
        else:
            self._is_tying = key.act == "tie" and not self._is_tying and any(self._ranks)
            if key.act == "clear":
                self._ranks = [None] * len(self._ranks)
            self._show_choices()

    def _digit(self, number: int) -> None:
        if self._state["mode"] == "pair" and 1 <= number <= len(STRENGTHS):
            self._strength = None if self._strength == number else number
        elif 1 <= number <= len(self._ranks):
            self._rank(number - 1)
        self._show_choices()

    def _rank(self, place: int) -> None:
        """Give an answer the next rank, or the last one again; one that has a rank loses it, and others move up."""
        last = max((rank for rank in self._ranks if rank), default=0)
        taken = self._ranks[place] is not None
        self._ranks[place] = None if taken else last if self._is_tying and last else last + 1
        self._is_tying = False
        levels = sorted({rank for rank in self._ranks if rank})
        self._ranks = [rank and levels.index(rank) + 1 for rank in self._ranks]

    async def _keep(self, vote: Any) -> None:
        """Keep a vote, or take back the last one (None), and go on."""
        number, key = self._state["number"], secrets.token_hex(12)
        try:
            if vote is None:
                self._engine.undo(self._rater, number, key)
            else:
                strength = self._strength if vote in (A, B) else None
                seconds = time.monotonic() - self._shown_at
                self._engine.vote(self._rater, number, key, vote, strength=strength, seconds=seconds)
        except (BadVote, OSError) as error:
            self._tell(f"Not saved: {visible(str(error))}. Press the key again.")
            return
        await self._show()


def _turns(prompt: list[dict[str, str]]) -> RenderableType:
    shown: list[RenderableType] = []
    for turn in prompt:
        if shown:
            shown.append("")
        if len(prompt) > 1:
            shown.append(Text(turn["role"], "dim"))
        shown.append(readable(turn["text"]))
    return Group(*shown)


def _end() -> RenderableType:
    return Group(Text("Nothing is left to vote on", "bold"), "", "Thank you. All your votes are saved; Q quits.")


def _card(text: str) -> Vertical:
    return Vertical(Static(readable(text)), classes="answer")
