"""The terminal version: votes by its keys mean what was meant, and texts are readable, whole and in their place."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console
from textual.pilot import Pilot
from textual.widgets import Static

from dpo_cli.labeling import terminal
from dpo_cli.labeling.engine import Engine
from dpo_cli.labeling.items import Account, ItemStore, Mode, read_items
from dpo_cli.labeling.settings import Settings
from dpo_cli.labeling.terminal import Terminal, readable
from dpo_cli.labeling.votes import lines_of

ANNA = "human:anna"
ENGLISH = [["worse", "better"]] * 3
Drive = Callable[[Terminal, Pilot[None]], Awaitable[None]]


@pytest.fixture(autouse=True)
def quick_fingers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "_HELD_S", 0)


def run(
    folder: Path,
    drive: Drive,
    answers: list[list[str]] = ENGLISH,
    mode: Mode = "pair",
    size: tuple[int, int] = (100, 30),
) -> list[dict[str, Any]]:
    """Let somebody vote; what his file then holds."""
    rows = [{"prompt": f"prompt {number}", "completions": each} for number, each in enumerate(answers)]
    path = folder / "items.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    store = ItemStore(read_items(path, mode, 1, 0, Account()), folder / "votes")

    async def vote(engine: Engine) -> None:
        app = Terminal(engine, ANNA)
        async with app.run_test(size=size) as pilot:
            await pilot.pause()
            await drive(app, pilot)

    with Engine(store, Settings(mode=mode, repeats=0), folder / "votes", guideline="Be *fair*.") as engine:
        engine.join(ANNA)
        asyncio.run(vote(engine))
    return list(lines_of(folder / "votes/anna.jsonl"))


def shown(app: Terminal) -> list[str]:
    """The answers as they stand on the screen."""
    return [_text(card.query_one(Static)).strip() for card in app.query(".answer")]


def _text(static: Static) -> str:
    console = Console(width=100, color_system=None)
    with console.capture() as capture:
        console.print(static.content)
    return capture.get()


def chosen(row: dict[str, Any]) -> str:
    return row["completions"]["AB".index(row["vote"])][0]["content"].strip()


def test_keys_vote_with_strength_and_undo_asks_again(tmp_path: Path) -> None:
    async def drive(app: Terminal, pilot: Pilot[None]) -> None:
        first = shown(app)
        await pilot.press("2", "3", "j" if first[1] == "better" else "f")
        await pilot.press("t", "u")
        await pilot.press("question_mark", "t")  # is no vote while the help is open
        assert "How to vote" in _text(app.screen.query_one(Static))
        assert "Be fair." in _text(app.screen.query_one(Static))
        await pilot.press("escape", "1", "1", "F" if shown(app)[0] == "better" else "J", "s")
        await pilot.pause()
        assert shown(app) == []
        assert "3 done · 0 to go" in _text(app.query_one("#top", Static))
        await pilot.press("f", "1")  # nothing is asked
        await pilot.press("u", "b", "q")

    rows = run(tmp_path, drive)
    assert [chosen(row) for row in rows if row["vote"] in "AB"] == ["better", "better"]
    assert [row["strength"] for row in rows if row["vote"] in "AB"] == [3, None]
    assert [row["vote"] for row in rows if row["vote"] not in "AB"] == ["tie", "undone", "skip", "undone", "both bad"]
    assert rows[3]["item_id"] == rows[1]["item_id"]
    assert all(0 <= row["seconds"] < 60 for row in rows if row["vote"] != "undone")


def test_a_ranking_by_numbers_with_ties(tmp_path: Path) -> None:
    async def drive(app: Terminal, pilot: Pilot[None]) -> None:
        key = {text: str(place + 1) for place, text in enumerate(shown(app))}
        await pilot.press(key["a"], "r", key["b"], key["a"], "enter")
        assert "every answer" in _text(app.query_one("#notice", Static))
        await pilot.press(key["b"], key["b"], "t", key["c"])  # b gives its rank to a and takes the next, as c does
        await pilot.press("enter")

    [row] = run(tmp_path, drive, [["a", "b", "c"]], "ranking")
    ranks = {answer[0]["content"]: rank for answer, rank in zip(row["completions"], row["vote"], strict=True)}
    assert ranks == {"a": 1, "b": 2, "c": 2}


def test_thumbs(tmp_path: Path) -> None:
    async def drive(app: Terminal, pilot: Pilot[None]) -> None:
        for _ in range(4):
            await pilot.press("j" if shown(app) == ["better"] else "f")

    rows = run(tmp_path, drive, [["worse", "better"], ["better", "worse again"]], "thumbs")
    assert {row["completions"][0][0]["content"]: row["vote"] for row in rows} == {
        "better": "up",
        "worse": "down",
        "worse again": "down",
    }


@pytest.mark.parametrize(
    ("answers", "width", "is_beside"),
    [(["a", "b"], 100, True), (["a", "b"], 60, False), (["مرحبا", "b"], 100, False), (["早上好", "您早"], 100, True)],
)
def test_answers_stand_beside_each_other_where_there_is_room(
    tmp_path: Path, answers: list[str], width: int, is_beside: bool
) -> None:
    async def drive(app: Terminal, pilot: Pilot[None]) -> None:
        first, second = (card.region for card in app.query(".answer"))
        assert (first.y == second.y) is is_beside
        await pilot.resize_terminal(60, 30)
        await pilot.pause()
        first, second = (card.region for card in app.query(".answer"))
        assert first.y < second.y

    assert not run(tmp_path, drive, [answers], size=(width, 30))


def test_a_long_answer_scrolls_and_the_next_question_begins_at_its_top(tmp_path: Path) -> None:
    async def drive(app: Terminal, pilot: Pilot[None]) -> None:
        main = app.query_one("#main")
        assert main.max_scroll_y > 100
        await pilot.press("pagedown", "space", "down")
        await pilot.pause(0.5)
        assert main.scroll_y > 20
        await pilot.press("t")
        await pilot.pause(0.1)
        assert main.scroll_y == 0

    long = "\n\n".join(["many words"] * 100)
    run(tmp_path, drive, [[f"{long} {place}", "short"] for place in range(2)], size=(60, 24))


def test_nothing_of_a_text_is_hidden_and_no_line_is_too_wide() -> None:
    raw = "<b>tag</b> &amp; [link](http://x.y) ![picture](x.png) <http://x.y> \\* [ref]: /hidden"
    text = (
        f"# Head\n{raw}\n<script>alert(1)</script>\n---\n* **bold** {'早上好' * 30}\n\n"
        "```python\nif x:\n    y()\n```\n\n| n | time |\n|---|---|\n| 1 | 2 s |\n\n[ref]: /hidden\n\nمرحبا يا صديقي"
    )
    console = Console(width=40, color_system=None)
    with console.capture() as capture:
        console.print(readable(text))
    lines = capture.get().splitlines()
    assert max(map(cell_len, lines)) <= 40
    found = "".join(capture.get().split())
    for part in (
        "Head",
        raw,
        "<script>alert(1)</script>---",
        f"bold{'早上好' * 30}",
        "[ref]: /hidden",
        "مرحبا يا صديقي",
    ):
        assert part.replace(" ", "") in found
    assert "**" not in found
    assert "     y()" in [line.rstrip() for line in lines]  # code keeps its indentation
    assert "<script>alert(1)</script>" in [line.rstrip() for line in lines]  # and a line its end


def test_a_vote_that_cannot_be_written_is_said_and_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def drive(app: Terminal, pilot: Pilot[None]) -> None:
        before = shown(app)
        with monkeypatch.context() as patch:
            patch.setattr(Engine, "vote", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left")))
            await pilot.press("t")
        assert "Not saved" in _text(app.query_one("#notice", Static))
        assert shown(app) == before
        await pilot.press("t")

    assert [row["vote"] for row in run(tmp_path, drive)] == ["tie"]


def test_a_key_that_is_held_down_votes_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "_HELD_S", 60)

    async def drive(app: Terminal, pilot: Pilot[None]) -> None:
        await pilot.press("t", "t", "t", "b")

    assert [row["vote"] for row in run(tmp_path, drive)] == ["tie", "both bad"]
