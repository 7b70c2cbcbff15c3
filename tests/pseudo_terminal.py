"""A command at a pseudo-terminal, of which as much is emulated as it takes to read what stands where."""

from __future__ import annotations

import codecs
import os
import re
import select
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

fcntl, pty, termios = (pytest.importorskip(name) for name in ("fcntl", "pty", "termios"))  # not on Windows

_TOKEN = re.compile(
    r"\x1b\[(\d+);(\d+)H|\x1b\[[\d;?<>=]*\$?[A-Za-z]|\x1b\][^\x07]*\x07|[^\x1b]"
)  # go to a place, any other control, a sign


class PseudoTerminal:
    """Runs ``dpo-cli`` in a project folder, at a terminal of its own."""

    def __init__(self, folder: Path, *arguments: str, width: int = 100, height: int = 30) -> None:
        self._pty, inner = pty.openpty()
        self._size = width, height
        fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "dpo_cli", "-C", str(folder), *arguments],
            stdin=inner,
            stdout=inner,
            stderr=inner,
            start_new_session=True,
            env={name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
            | {"TERM": "xterm-256color"},
        )
        os.close(inner)
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._cells: dict[int, dict[int, str]] = {}
        self._row = self._column = 1
        self._rest = ""
        self._is_quiet = False

    @property
    def lines(self) -> list[str]:
        """What is on the screen."""
        width, height = self._size
        rows = (self._cells.get(row, {}) for row in range(1, height + 1))
        return ["".join(row.get(column, " ") for column in range(1, width + 1)) for row in rows]

    @property
    def text(self) -> str:
        """All of it."""
        return "\n".join(self.lines)

    def read(self, seconds: float) -> bool:
        """Take in what is written; False: the terminal is closed."""
        self._is_quiet = not select.select([self._pty], [], [], seconds)[0]
        if self._is_quiet:
            return True
        try:
            text = self._rest + self._decoder.decode(os.read(self._pty, 1 << 16))
        except OSError:
            return False
        position = 0
        while match := _TOKEN.match(text, position):
            position = match.end()
            self._take(match)
        self._rest = text[position:]
        return True

    def _take(self, match: re.Match[str]) -> None:
        sign = match[0]
        if match[1]:
            self._row, self._column = int(match[1]), int(match[2])
        elif sign == "\r":
            self._column = 1
        elif sign == "\n":
            self._row += 1
        elif len(sign) == 1:
            self._cells.setdefault(self._row, {})[self._column] = sign
            self._column += 1

    def wait_for(self, check: Callable[[], bool], seconds: float = 30) -> None:
        """Until it holds of a screen on which nothing moves."""
        deadline = time.monotonic() + seconds
        self._is_quiet = False
        while not (self._is_quiet and check()):
            assert self.read(0.1), self.text
            assert time.monotonic() < deadline, self.text

    def press(self, *keys: str) -> None:
        for key in keys:
            time.sleep(0.12)  # a key that comes again sooner is held down
            os.write(self._pty, key.encode())

    def end(self) -> int:
        """What the process says when it is gone."""
        while self.read(0.05) and self.process.poll() is None:
            pass
        return self.process.wait(timeout=30)
