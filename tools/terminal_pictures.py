"""Take the pictures of the terminal that the documents show: `dpo-cli watch` and `dpo-cli chat` after `make repro`.

python tools/terminal_pictures.py
"""

from __future__ import annotations

import asyncio
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

from textual.app import App
from textual.pilot import Pilot
from textual.widgets import Input

from dpo_cli.cli.console import ConsoleReporter
from dpo_cli.core.load_params import load_params
from dpo_cli.core.paths import PARAMS
from dpo_cli.evaluation.chat import Chat
from dpo_cli.labeling.chat_terminal import ChatTerminal
from dpo_cli.labeling.chat_votes import ChatVotes
from dpo_cli.report.watch_terminal import WatchTerminal

ROOT = Path(__file__).resolve().parent.parent
SAID = ("Greet Olga and Tina in the evening.", "Name three fruits.")


def main() -> None:
    """Write docs/images/watch.svg and chat.svg; to be run in the repository's root."""
    _write("watch", asyncio.run(_picture(WatchTerminal("train"), "dpo-cli watch", 34, ())))
    chat = Chat(load_params(PARAMS, []), None, ConsoleReporter())
    with tempfile.TemporaryDirectory() as folder, ChatVotes(Path(folder), "human:anna") as votes:
        _write("chat", asyncio.run(_picture(ChatTerminal(chat, votes, None, 0.0), "dpo-cli chat", 24, SAID)))


async def _picture(app: App[None], title: str, height: int, said: Sequence[str]) -> str:
    async with app.run_test(size=(100, height)) as pilot:
        await pilot.pause(0.5)
        for number, text in enumerate(said):
            await _say(app, pilot, text)
            await pilot.press(*(["j", "enter"] if number == 0 else []))
        return app.export_screenshot(title=title)


async def _say(app: App[None], pilot: Pilot[None], text: str) -> None:
    app.query_one(Input).value = text
    await pilot.press("enter")
    await app.workers.wait_for_complete()
    await pilot.pause(0.2)


def _write(name: str, svg: str) -> None:
    """Without the fonts that a browser would load: its own are as good."""
    path = ROOT / "docs" / "images" / f"{name}.svg"
    svg = re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL)
    path.write_text("\n".join(line.rstrip() for line in svg.splitlines()) + "\n", encoding="utf-8")
    print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
