"""Take the pictures of the terminal that the documents show: `dpo-cli watch` and `dpo-cli chat` after `make repro`.

python tools/terminal_pictures.py
"""

from __future__ import annotations

import asyncio
import re
import tempfile
from pathlib import Path

from textual.app import App
from textual.widgets import Input

from dpo_cli.cli.console import ConsoleReporter
from dpo_cli.core.load_params import load_params
from dpo_cli.core.paths import PARAMS
from dpo_cli.evaluation.chat import Chat
from dpo_cli.labeling.chat_terminal import ChatTerminal
from dpo_cli.labeling.chat_votes import ChatVotes
from dpo_cli.report.watch_terminal import WatchTerminal

ROOT = Path(__file__).resolve().parent.parent
SAID = "Greet Kate and Oscar in the morning."


def main() -> None:
    """Write docs/images/watch.svg and chat.svg; to be run in the repository's root."""
    _write("watch", asyncio.run(_picture(WatchTerminal("train"), "dpo-cli watch", 34, "")))
    chat = Chat(load_params(PARAMS, []), None, ConsoleReporter())
    with tempfile.TemporaryDirectory() as folder, ChatVotes(Path(folder), "human:anna") as votes:
        _write("chat", asyncio.run(_picture(ChatTerminal(chat, votes, None, 0.7), "dpo-cli chat", 16, SAID)))


async def _picture(app: App[None], title: str, height: int, said: str) -> str:
    """The screen; with what is said first, the answers to it and a vote for the tuned model's."""
    async with app.run_test(size=(100, height)) as pilot:
        await pilot.pause(0.5)
        if said:
            app.query_one(Input).value = said
            await pilot.press("enter")
            await app.workers.wait_for_complete()
            await pilot.press("j")
            await pilot.pause(0.2)
        return app.export_screenshot(title=title)


def _write(name: str, svg: str) -> None:
    """Without the fonts that a browser would load: its own are as good."""
    path = ROOT / "docs" / "images" / f"{name}.svg"
    svg = re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL)
    path.write_text("\n".join(line.rstrip() for line in svg.splitlines()) + "\n", encoding="utf-8")
    print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
