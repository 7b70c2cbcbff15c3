"""``dpo-cli label --terminal`` in a pseudo-terminal: votes, undo, Ctrl-C, a kill and another day lose nothing.

Answers say how good they are, so the test knows what each vote must be, whatever the shown order.
"""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

from dpo_cli.judging.votes import read_rows, read_votes
from tests.pseudo_terminal import PseudoTerminal


class Seat(PseudoTerminal):
    """A rater at a terminal."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        command = ("label", "items.jsonl", "--out", "votes", "--terminal", "--rater", "anna", *arguments)
        super().__init__(folder, *command, width=60, height=24)

    def question(self, done: int) -> tuple[str, list[int]]:
        """Prompt and how good the answers are, as shown, when so many votes are done."""
        found: list[str] = []

        def is_shown() -> bool:
            prompts = re.findall(r"prompt (\d+)", self.text)
            found[:] = re.findall(r"(?m)^ (\d+) good (\d)␛\[31m", self.text)
            return f" {done} done" in self.text and [number for number, _ in found] == prompts * 2 != []

        self.wait_for(is_shown)
        return found[0][0], [int(level) for _, level in found]


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
