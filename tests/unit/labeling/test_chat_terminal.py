"""The chat in the terminal: answers as they come, a conversation that goes on from the chosen one, keys that vote."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from textual.pilot import Pilot
from textual.widgets import Input, Static

from dpo_cli.core.errors import DataError
from dpo_cli.data.schema import Messages
from dpo_cli.evaluation.chat import Hear
from dpo_cli.judging.answers import Answer
from dpo_cli.labeling.chat_terminal import ChatTerminal
from dpo_cli.labeling.chat_votes import ChatVotes
from dpo_cli.labeling.votes import lines_of

Drive = Callable[[ChatTerminal, Pilot[None], "Parrots"], Awaitable[None]]


class Parrots:
    """Each says its name and what it heard last, word by word; asked for ``forever``, it does not end."""

    names = ("base", "sft", "dpo")

    def __init__(self) -> None:
        self.asked: list[tuple[str, Messages, float, int]] = []

    def answer(self, name: str, messages: Messages, temperature: float, number: int, hear: Hear) -> Answer:
        self.asked.append((name, [*messages], temperature, number))
        said = messages[-1]["content"]
        if said == "refused":
            raise DataError("the prompt: is refused")
        text, is_over = "", False
        while not is_over and (said == "forever" or not text):
            text += f"{name} {said} {number} "
            is_over = hear(text)
            time.sleep(0.01)
        return Answer.of_text("id", messages, text.strip())


def talk(folder: Path, drive: Drive, system: str | None = None, size: tuple[int, int] = (100, 30)) -> list[Any]:
    """Drive a conversation; what the votes' file then holds."""

    async def go(votes: ChatVotes) -> None:
        parrots = Parrots()
        app = ChatTerminal(parrots, votes, system, 0.0)
        async with app.run_test(size=size) as pilot:
            await pilot.pause()
            await drive(app, pilot, parrots)

    with ChatVotes(folder, "human:anna") as votes:
        asyncio.run(go(votes))
    return list(lines_of(folder / "anna.jsonl"))


async def say(app: ChatTerminal, pilot: Pilot[None], text: str) -> None:
    app.query_one(Input).value = text
    app.query_one(Input).focus()
    await pilot.press("enter")
    await app.workers.wait_for_complete()
    await pilot.pause()


def titles(app: ChatTerminal) -> list[str]:
    return [str(card.border_title) for card in app.query(".answer")]


def shown(app: ChatTerminal, id: str) -> str:
    return str(app.query_one(f"#{id}", Static).content)


def test_the_conversation_goes_on_from_the_better_answer(tmp_path: Path) -> None:
    async def drive(app: ChatTerminal, pilot: Pilot[None], parrots: Parrots) -> None:
        await say(app, pilot, "hi")
        assert [title.rpartition(" · ")[0] for title in titles(app)] == ["1 · base", "2 · A · sft", "3 · B · dpo"]
        await pilot.press("f")
        assert "1 vote" in shown(app, "top")
        await pilot.press("enter")
        await say(app, pilot, "more")
        _, messages, _, _ = parrots.asked[-1]
        assert [message["content"] for message in messages] == ["Be kind.", "hi", "sft hi 0", "more"]
        await pilot.press("1", "enter")  # from the base model's
        await say(app, pilot, "end")
        assert parrots.asked[-1][1][4]["content"] == "base more 0"
        await pilot.press("j", "u")
        assert "1 vote" in shown(app, "top")

    rows = talk(tmp_path, drive, "Be kind.")
    assert [row["vote"] for row in rows] == ["A", "B", "undone"]
    assert [len(row["prompt"]) for row in rows[:2]] == [2, 6]


def test_commands_change_temperature_and_system_message_and_begin_anew(tmp_path: Path) -> None:
    async def drive(app: ChatTerminal, pilot: Pilot[None], parrots: Parrots) -> None:
        await say(app, pilot, "hi")
        await pilot.press("r")
        assert "At temperature 0 it would be the same again" in shown(app, "notice")
        await say(app, pilot, "/temperature 0.7")
        assert "T = 0.7" in shown(app, "top")
        await say(app, pilot, "/temperature hot")
        assert "/temperature takes a number from 0 to 10, got 'hot'" in shown(app, "notice")
        await say(app, pilot, "/what")
        assert "There is no /what" in shown(app, "notice")
        await pilot.press("tab", "r")
        await app.workers.wait_for_complete()
        assert parrots.asked[-1][2:] == (0.7, 1)
        assert len(titles(app)) == 3, "in place of the first try"
        await say(app, pilot, "/system Be brief.")
        await say(app, pilot, "hi")
        assert [message["content"] for message in parrots.asked[-1][1]] == ["Be brief.", "hi"]
        await say(app, pilot, "/system")
        await say(app, pilot, "hi")
        assert [message["content"] for message in parrots.asked[-1][1]] == ["hi"]

    assert talk(tmp_path, drive) == []


def test_an_answer_without_an_end_is_seen_as_it_comes_and_stopped(tmp_path: Path) -> None:
    async def drive(app: ChatTerminal, pilot: Pilot[None], parrots: Parrots) -> None:
        app.query_one(Input).value = "forever"
        await pilot.press("enter")
        seen: list[str] = []
        for _ in range(200):
            await pilot.pause(0.02)
            text = str(app.query(".answer").first().query_one(Static).content)
            if text and text not in seen:
                seen.append(text)
            if len(seen) > 3:
                break
        assert seen == sorted(seen, key=len)
        assert len(seen) > 3
        await pilot.press("escape")
        await app.workers.wait_for_complete()
        await pilot.pause()
        assert [name for name, *_ in parrots.asked] == ["base", "sft", "dpo"]

    talk(tmp_path, drive)


def test_a_prompt_that_is_refused_is_taken_back(tmp_path: Path) -> None:
    async def drive(app: ChatTerminal, pilot: Pilot[None], parrots: Parrots) -> None:
        await say(app, pilot, "refused")
        assert "the prompt: is refused" in shown(app, "notice")
        assert titles(app) == []
        await say(app, pilot, "hi")
        assert [message["content"] for message in parrots.asked[-1][1]] == ["hi"]

    talk(tmp_path, drive)


@pytest.mark.parametrize(("width", "across"), [(40, 1), (70, 2), (100, 3)])
def test_answers_stand_beside_each_other_where_there_is_room(tmp_path: Path, width: int, across: int) -> None:
    async def drive(app: ChatTerminal, pilot: Pilot[None], parrots: Parrots) -> None:
        await say(app, pilot, "hi")
        assert len({card.region.x for card in app.query(".answer")}) == across

    talk(tmp_path, drive, size=(width, 30))
