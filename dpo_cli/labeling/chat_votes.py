"""Votes on the answers of a chat, in a file as ``dpo-cli label`` writes it."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Self

from dpo_cli.core.errors import DataError
from dpo_cli.data.schema import assistant, content_id
from dpo_cli.data.votes import UNDONE
from dpo_cli.judging.answers import Answer
from dpo_cli.judging.votes import item_id
from dpo_cli.labeling.items import Item
from dpo_cli.labeling.order import Asked
from dpo_cli.labeling.votes import VoteFile, lines_of, row_of

CHAT = "chat"
"""What ``drawn`` says of them."""


class ChatVotes:
    """Keeps a rater's votes; each is on the disk when it is kept.

    Args:
        folder: Of the votes.
        rater: Who.

    Attributes:
        path: The rater's file.
        num_votes: Votes of this session that stand.

    Raises:
        MachineError: Another process writes the file.
        DataError: It is damaged.
    """

    def __init__(self, folder: Path, rater: str) -> None:
        self._file = VoteFile(folder, rater, "person")
        self.path = self._file.path
        self.num_votes = 0
        self._number = 0
        self._items: dict[str, int] = {}  # the vote that stands on each
        self._mine: list[tuple[str, int | None]] = []  # this session's items, with the vote that was there before
        by_number: dict[int, str] = {}
        for row in lines_of(self.path):
            self._number += 1
            if row["vote"] == UNDONE:
                self._items.pop(by_number.get(row["supersedes"], ""), None)
            else:
                self._items[row["item_id"]] = row["number"]
                by_number[row["number"]] = row["item_id"]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def keep(self, vote: str, shown: tuple[tuple[str, Answer], tuple[str, Answer]], seconds: float) -> None:
        """Keep a vote on two answers to one conversation; an earlier one on the same two no longer stands.

        Args:
            vote: A, B, tie or both bad.
            shown: The reference's answer, which was shown as A, and the tuned model's, as B, each with its name.
            seconds: Since both were there.

        Raises:
            DataError: The answers are alike, or one was cut off: a pair would teach that it ends there.
        """
        (baseline, first), (method, second) = shown
        if first.text == second.text:
            raise DataError("both answers are alike: there is nothing to vote on")
        if cut := [name for name, answer in shown if not answer.finished]:
            raise DataError(f"the answer of {' and '.join(cut)} was cut off, so there is nothing to vote on")
        item = Item(
            item_id(first.asked, second.text, first.text),
            content_id(first.messages),
            first.messages,
            [[assistant(second.text)], [assistant(first.text)]],
            (method, baseline),
        )
        said = {"key": secrets.token_hex(12), "vote": vote, "strength": None, "seconds": seconds}
        before = self._items.get(item.id)
        row = row_of(item, Asked(self._number, 0, (1, 0), CHAT), "pair", None, said)
        self._file.append(row | {"supersedes": before})
        self._items[item.id] = self._number
        self._mine.append((item.id, before))
        self._number += 1
        self.num_votes += before is None or all(id != item.id for id, _ in self._mine[:-1])

    def undo(self) -> bool:
        """Take back the last vote of this session that stands; False: there is none."""
        if not self._mine:
            return False
        id, _ = self._mine.pop()
        self._file.append(
            {
                "number": self._number,
                "key": secrets.token_hex(12),
                "mode": "pair",
                "vote": UNDONE,
                "supersedes": self._items.pop(id),
            }
        )
        self._number += 1
        self._mine = [each for each in self._mine if each[0] != id]
        self.num_votes -= 1
        return True
