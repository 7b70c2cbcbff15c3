"""``dpo-cli label --terminal`` in a pseudo-terminal: votes, undo, Ctrl-C, a kill and another day lose nothing.

Answers say how good they are, so the test knows what each vote must be, whatever the shown order.
"""

from __future__ import annotations

import codecs
import json
import os
import re
import select
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dpo_cli.judging.votes import read_rows, read_votes

fcntl, pty, termios = (pytest.importorskip(name) for name in ("fcntl", "pty", "termios"))  # not on Windows

_TOKEN = re.compile(
    r"\x1b\[(\d+);(\d+)H|\x1b\[[\d;?<>=]*\$?[A-Za-z]|\x1b\][^\x07]*\x07|[^\x1b]"
)  # go to a place, any other control, a sign
HEIGHT, WIDTH = 24, 60


class Seat:
    """A rater at a terminal, of which as much is emulated as it takes to read what stands where."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self._pty, inner = pty.openpty()
        fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", HEIGHT, WIDTH, 0, 0))
        command = [sys.executable, "-m", "dpo_cli", "-C", str(folder), "label", "items.jsonl", "--out", "votes"]
        self.process = subprocess.Popen(
            [*command, "--terminal", "--rater", "anna", *arguments],
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
        rows = (self._cells.get(row, {}) for row in range(1, HEIGHT + 1))
        return ["".join(row.get(column, " ") for column in range(1, WIDTH + 1)) for row in rows]

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

    def wait_for(self, check: Callable[[], bool]) -> None:
        """Until it holds of a screen on which nothing moves."""
        deadline = time.monotonic() + 30
        self._is_quiet = False
        while not (self._is_quiet and check()):
            assert self.read(0.1), "\n".join(self.lines)
            assert time.monotonic() < deadline, "\n".join(self.lines)

    def question(self, done: int) -> tuple[str, list[int]]:
        """Prompt and how good the answers are, as shown, when so many votes are done."""
        found: list[str] = []

        def is_shown() -> bool:
            screen = "\n".join(self.lines)
            prompts = re.findall(r"prompt (\d+)", screen)
            found[:] = re.findall(r"(?m)^ (\d+) good (\d)␛\[31m", screen)
            return f" {done} done" in screen and [number for number, _ in found] == prompts * 2 != []

        self.wait_for(is_shown)
        return found[0][0], [int(level) for _, level in found]

    def press(self, *keys: str) -> None:
        for key in keys:
            time.sleep(0.12)  # a key that comes again sooner is held down
            os.write(self._pty, key.encode())

    def end(self) -> int:
        """What the process says when it is gone."""
        while self.read(0.05) and self.process.poll() is None:
            pass
        return self.process.wait(timeout=30)


def test_twenty_votes_with_undo_ctrl_c_a_kill_and_two_returns(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"prompt {row} <script>", "completions": [f"{row} good {level}\x1b[31m" for level in range(2)]}
        for row in range(21)
    ]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    meant: dict[str, tuple[str, int | None]] = {}
    special = {3: ("t", "tie"), 9: ("b", "both bad"), 15: ("s", "skip")}
    seat = Seat(tmp_path, "--repeats", "0")
    try:
        for turn in range(20):
            prompt, levels = seat.question(turn)
            if turn == 5:
                seat.press("t")
                seat.question(turn + 1)
                seat.press("u")
                assert seat.question(turn) == (prompt, levels)  # asked again, in the same order
            if turn == 8:
                seat.press("\x03")
                assert seat.end() == 0
            if turn == 14:
                seat.process.send_signal(signal.SIGKILL)
                assert seat.end() == -signal.SIGKILL
            if turn in (8, 14):
                seat = Seat(tmp_path)
                assert seat.question(turn) == (prompt, levels)
            key, vote = special.get(turn, ("f" if levels[0] else "j", "better"))
            is_strong = vote == "better" and turn % 2 == 0
            seat.press(*(["1", "3"] if is_strong else []), key)
            meant[prompt] = vote, 3 if is_strong else None
        seat.question(20)
        seat.press("q")
        assert seat.end() == 0
    finally:
        seat.process.kill()
    said = {}
    for _, row in read_rows(tmp_path / "votes/anna.jsonl"):
        better = [answer[0]["content"].split("\x1b")[0].endswith("1") for answer in row["completions"]]
        vote = row["vote"]
        if vote in ("A", "B"):
            vote = "better" if better["AB".index(vote)] else "worse"
        said[row["prompt"][0]["content"].split()[1]] = vote, row["strength"]
    assert said == meant
    assert len(read_votes(tmp_path / "votes/anna.jsonl")) == 19  # all but what was skipped
