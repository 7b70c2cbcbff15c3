"""``dpo-cli chat`` in a pseudo-terminal, with the models of a finished project: it ends with votes that can be read."""

from __future__ import annotations

import shutil
from pathlib import Path

from dpo_cli.judging.votes import read_rows, read_votes
from dpo_cli.statistics.agreement import WIN
from tests.pseudo_terminal import PseudoTerminal

MOST_TRIES = 40


def test_two_turns_with_a_vote_on_each(finished: Path, tmp_path: Path) -> None:
    project = tmp_path / "project"
    shutil.copytree(finished, project, ignore=shutil.ignore_patterns(".dvc", ".git"))
    settings = ("--temperature", "1", "--set", "evaluate.max_new_tokens=48")
    seat = PseudoTerminal(project, "chat", "--rater", "anna", *settings, height=50)

    def vote(number: int) -> None:
        """Say that the tuned model's answer is better, after another try where the two cannot be voted on."""
        for _ in range(MOST_TRIES):
            seat.wait_for(lambda: "dpo is better" in seat.text and seat.text.count(" tokens") == 3 * number)
            seat.press("j")
            seat.wait_for(lambda: f"{number} vote" in seat.lines[0] or "Not saved" in seat.text)
            if f"{number} vote" in seat.lines[0]:
                return
            seat.press("r")
            seat.wait_for(lambda: "Not saved" not in seat.text)  # and the keys are those of answers that come

    try:
        seat.wait_for(lambda: "base, sft, dpo   T = 1   0 votes" in seat.text, 120)
        for turn, prompt in enumerate(("Greet Olga and Tina in the evening.", "Greet Bob."), 1):
            seat.press(*prompt, "\r")
            vote(turn)
            seat.press("\r")
        seat.press(*"/quit", "\r")
        assert seat.end() == 0
    finally:
        seat.process.kill()
    path = project / "data/votes/chat/anna.jsonl"
    assert [(vote.method, vote.baseline, vote.result) for vote in read_votes(path)] == [("dpo", "sft", WIN)] * 2
    first, second = [row for _, row in read_rows(path)]
    assert [message["role"] for message in second["prompt"]] == ["user", "assistant", "user"]
    assert second["prompt"][1] == first["completions"][1][0], "it goes on from the better answer"
