"""Take the pictures of `dpo-cli watch` that the documents show, of the committed training.

python tools/terminal_pictures.py
"""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

from textual.app import App

from dpo_cli.report.watch_terminal import WatchTerminal

ROOT = Path(__file__).resolve().parent.parent
SIZE = (100, 34)


def main() -> None:
    """Write docs/images/watch.svg; to be run in the repository's root."""
    _write("watch", asyncio.run(_picture(WatchTerminal("train"), "dpo-cli watch")))


async def _picture(app: App[None], title: str) -> str:
    async with app.run_test(size=SIZE) as pilot:
        await pilot.pause(0.5)
        return app.export_screenshot(title=title)


def _write(name: str, svg: str) -> None:
    """Without the fonts that a browser would load: its own are as good."""
    path = ROOT / "docs" / "images" / f"{name}.svg"
    svg = re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL)
    path.write_text("\n".join(line.rstrip() for line in svg.splitlines()) + "\n", encoding="utf-8")
    print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
