"""A conversation with several models in the terminal (Textual): answers beside each other as they come, and votes.

Every model gets the same conversation. After each turn it goes on from the answer that is chosen, so two answers to a
turn are always answers to one prompt, and can be voted on.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
import time
from collections.abc import Sequence
from typing import ClassVar, Protocol

from rich.console import RenderableType
from rich.text import Text
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Grid, Vertical, VerticalScroll
from textual.events import Key as KeyPress
from textual.events import Resize
from textual.widgets import Input, Static

from dpo_cli.core.errors import DpoCliError, MachineError
from dpo_cli.core.text import visible
from dpo_cli.data.schema import Message, Messages, assistant, user
from dpo_cli.data.votes import BOTH_BAD, TIED, A, B
from dpo_cli.evaluation.chat import Hear
from dpo_cli.judging.answers import Answer
from dpo_cli.labeling.chat_votes import ChatVotes
from dpo_cli.labeling.terminal import is_right_to_left, readable

_NARROWEST = 30
_REFRESH_S = 0.1
"""An answer that comes is drawn so often at most."""
_GAP = 2
_VOTES = {"f": A, "j": B, "t": TIED, "b": BOTH_BAD}
_HINT = "Say something, or /system TEXT   /temperature T   /new   /quit"


class Speakers(Protocol):
    """Those who answer, as :class:`~dpo_cli.evaluation.chat.Chat` does; the last two can be voted on."""

    names: Sequence[str]

    def answer(self, name: str, messages: Messages, temperature: float, number: int, hear: Hear) -> Answer:
        """What one of them says."""
        ...


def chat_in_terminal(speakers: Speakers, votes: ChatVotes, system: str | None, temperature: float) -> None:
    """Talk until the user quits.

    Raises:
        MachineError: The terminal cannot be used.
    """
    app = ChatTerminal(speakers, votes, system, temperature)
    app.run(mouse=False)  # so that texts can be selected as anywhere else
    if app.return_code:
        raise MachineError("the terminal version failed, see above; all votes are on the disk")


class ChatTerminal(App[None]):
    """A conversation.

    Args:
        speakers: Who answers.
        votes: Where votes go.
        system: The system message; None: there is none.
        temperature: Of the answers; 0 takes the likeliest token each time.
    """

    ENABLE_COMMAND_PALETTE = False
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("ctrl+c", "quit", priority=True),
        Binding("escape", "stop", priority=True),
        Binding("tab", "switch", priority=True),
    ]
    CSS = """
    #top, #notice, #keys { padding: 0 1; height: auto; }
    #main { scrollbar-size-vertical: 1; padding: 0 1; }
    #main Static { height: auto; }
    .turn { padding: 0 0 1 0; }
    .answers { grid-gutter: 0 2; grid-rows: auto; height: auto; padding: 0 0 1 0; }
    .answer { height: auto; border-top: solid ansi_bright_black; border-title-style: bold; }
    .chosen { border-top: heavy ansi_cyan; }
    #said { border: none; border-top: solid ansi_bright_black; height: 2; padding: 0 1; }
    """

    def __init__(self, speakers: Speakers, votes: ChatVotes, system: str | None, temperature: float) -> None:
        super().__init__(ansi_color=True)
        self.theme = "ansi-dark"
        self._speakers, self._votes = speakers, votes
        self._system, self._temperature = system, temperature
        self._turns: Messages = []
        self._answers: dict[str, Answer] = {}
        self._cards: dict[str, Vertical] = {}
        self._chosen = self._speakers.names[-1]
        self._number = 0
        self._is_busy = False
        self._vote = ""
        self._stop = threading.Event()
        self._ended_at = 0.0
        self._top, self._notice, self._keys = (Static(id=name) for name in ("top", "notice", "keys"))
        self._main, self._said = VerticalScroll(id="main"), Input(id="said", placeholder=_HINT)

    def compose(self) -> ComposeResult:
        """What is on the screen."""
        yield from (self._top, self._main, self._notice, self._said, self._keys)

    async def on_mount(self) -> None:
        """Begin a conversation."""
        with contextlib.suppress(NotImplementedError):  # on Windows
            for number in (signal.SIGINT, signal.SIGTERM):
                asyncio.get_running_loop().add_signal_handler(number, self.exit)
        await self._begin()

    def on_unmount(self) -> None:
        """Nobody hears what is still said."""
        self._stop.set()

    def on_resize(self, event: Resize) -> None:
        """Arrange the answers anew."""
        self._arrange()

    # --- the conversation -----------------------------------------------------------------------

    @property
    def _messages(self) -> Messages:
        before: list[Message] = [] if self._system is None else [{"role": "system", "content": self._system}]
        return [*before, *self._turns]

    async def _begin(self) -> None:
        """Forget what was said."""
        self._turns, self._answers, self._cards = [], {}, {}
        await self._main.remove_children()
        if self._system is not None:
            await self._main.mount(_turn("system", self._system))
        self._show()
        self._said.focus()

    async def on_input_submitted(self, event: Input.Submitted) -> None:
        """Ask all models, or do what a command says."""
        text = event.value.strip()
        if not text or self._is_busy:
            return
        self._said.clear()
        self._tell("")
        if text.startswith("/"):
            await self._command(*text[1:].partition(" ")[::2])
            return
        if self._answers:
            self._turns.append(assistant(self._answers[self._chosen].text))
        self._turns.append(user(text))
        await self._main.mount(_turn("user", text))
        await self._ask(0)

    async def _command(self, name: str, value: str) -> None:
        if name == "quit":
            self.exit()
        elif name == "new":
            await self._begin()
        elif name == "system":
            self._system = value.strip() or None
            await self._begin()
        elif name == "temperature":
            try:
                number = float(value)
            except ValueError:
                number = -1.0
            if 0 <= number <= 10:
                self._temperature = number
            else:
                self._tell(f"/temperature takes a number from 0 to 10, got {value!r}")
            self._show()
        else:
            self._tell(f"There is no /{visible(name)}. {_HINT}")

    async def _ask(self, number: int) -> None:
        """Let every model answer the conversation; a number above 0 is another try at it."""
        for card in self._cards.values() if number else ():
            await card.remove()
        self._answers, self._number, self._is_busy, self._vote = {}, number, True, ""
        self._chosen = self._speakers.names[-1]
        self._cards = {name: Vertical(Static(), classes="answer") for name in self._speakers.names}
        await self._main.mount(Grid(*self._cards.values(), classes="answers"))
        self._main.focus()  # what is typed meanwhile is neither said nor a vote
        self._tell("")
        self._arrange()
        self._show()
        self._stop.clear()
        self.run_worker(self._answer, thread=True, exclusive=True)

    def _answer(self) -> None:
        """In a thread of its own: one model after the other, since they share their weights."""
        try:
            for name in self._speakers.names:
                drawn_at = 0.0

                def hear(text: str, name: str = name) -> bool:
                    nonlocal drawn_at
                    if time.monotonic() - drawn_at > _REFRESH_S and not self._stop.is_set():
                        drawn_at = time.monotonic()
                        self.call_from_thread(self._draw, name, Text(visible(text)))
                    return self._stop.is_set()

                found = self._speakers.answer(name, self._messages, self._temperature, self._number, hear)
                if not self.is_running:
                    return
                self._answers[name] = found
                self.call_from_thread(self._draw, name, readable(visible(found.text)))
            self.call_from_thread(self._finish, "")
        except (DpoCliError, RuntimeError, OSError) as error:
            if self.is_running:
                self.call_from_thread(self._finish, visible(str(error)))

    def _draw(self, name: str, text: RenderableType) -> None:
        self._cards[name].query_one(Static).update(text)
        self._show()
        self._main.scroll_end(animate=False)

    def _finish(self, problem: str) -> None:
        self._is_busy, self._ended_at = False, time.monotonic()
        if problem:  # the turn is taken back, so that something else can be said
            self._turns.pop()
            self._answers, self._cards = {}, {}
            self.query(".answers").last().remove()
            self._said.focus()
        self._tell(problem)
        self._arrange()
        self._show()

    # --- showing --------------------------------------------------------------------------------

    def _show(self) -> None:
        names = ", ".join(self._speakers.names)
        num_votes = self._votes.num_votes
        stands = f"{names}   T = {self._temperature:g}   {num_votes} vote{'' if num_votes == 1 else 's'}"
        self._top.update(Text(stands, "bold"))
        first, second = self._pair
        for number, (name, card) in enumerate(self._cards.items(), 1):
            letter = {first: "A · ", second: "B · "}.get(name, "")
            answer = self._answers.get(name)
            size = f" · {answer.num_tokens} tokens{'' if answer.finished else ', cut off'}" if answer else ""
            card.border_title = f"{number} · {letter}{name}{size}"
            card.set_class(bool(self._answers) and name == self._chosen, "chosen")
        keys = [("Esc", "stop", "")] if self._is_busy else []
        if self._answers and not self._is_busy:
            keys = [
                ("F", f"{first} is better", A), ("J", f"{second} is better", B), ("T", "tie", TIED),
                ("B", "both bad", BOTH_BAD), ("U", "undo", ""), ("R", "again", ""), ("1-9", "choose", ""),
                ("Enter", "go on", ""),
            ]  # fmt: skip
        line = Text()
        for key, name, vote in keys:
            line.append_text(
                Text.assemble((key, "bold cyan"), f" {name}", style="reverse" if vote and vote == self._vote else "")
            )
            line.append(" " * _GAP)
        line.append("Ctrl-C", "bold cyan").append(" quit")
        self._keys.update(line)

    def _arrange(self) -> None:
        """Put answers beside each other where there is room."""
        texts = [answer.text for answer in self._answers.values()]
        room = 1 if any(map(is_right_to_left, texts)) else max(1, self.size.width // _NARROWEST)
        for grid in self.query(".answers").results(Grid):
            grid.styles.grid_size_columns = min(len(self._speakers.names), room)

    def _tell(self, text: str) -> None:
        self._notice.update(Text(text, "bold"))
        self._notice.display = bool(text)

    # --- keys -----------------------------------------------------------------------------------

    @property
    def _pair(self) -> tuple[str, str]:
        """The reference and the tuned model."""
        first, second = self._speakers.names[-2:]
        return first, second

    def action_stop(self) -> None:
        """End the answers here."""
        self._stop.set()

    def action_switch(self) -> None:
        """From the line that is written to the answers, and back."""
        (self._main if self.focused is self._said else self._said).focus()

    async def on_key(self, event: KeyPress) -> None:
        """What a key does while nothing is written."""
        key = (event.character or event.key).lower()
        if self.focused is self._said or self._is_busy:
            return
        if event.key == "enter":
            self._said.focus()
        elif self._answers and key in _VOTES:
            self._keep(_VOTES[key])
        elif self._answers and key == "r":
            if self._temperature:
                await self._ask(self._number + 1)
            else:
                self._tell("At temperature 0 it would be the same again; say /temperature 0.7")
        elif key == "u":
            self._tell("The last vote is taken back" if self._votes.undo() else "There is no vote to take back")
            self._vote = ""
            self._show()
        elif key.isdecimal() and 1 <= int(key) <= len(self._answers):
            self._chosen = self._speakers.names[int(key) - 1]
            self._show()

    def _keep(self, vote: str) -> None:
        """Keep a vote; the conversation goes on from the better answer."""
        first, second = self._pair
        shown = (first, self._answers[first]), (second, self._answers[second])
        try:
            self._votes.keep(vote, shown, time.monotonic() - self._ended_at)
        except (DpoCliError, OSError) as error:
            self._tell(f"Not saved: {visible(str(error))}")
            return
        self._vote = vote
        self._chosen = {A: first, B: second}.get(vote, self._chosen)
        self._tell("")
        self._show()


def _turn(role: str, text: str) -> Static:
    return Static(Text.assemble((f"{role}  ", "dim"), visible(text)), classes="turn")
