"""Who is asked what next, and what became of the votes so far.

All raters go through the items in one order, so that those who share items meet: half of it at random, half uncertain
ones first. An item on which people disagree is asked of one more of them before others. Which answer is shown first
depends on a stored seed, the item and the rater, so a rater who comes back sees the same. Memory holds a few bytes an
item and rater; a step looks at one item, or at those that others have finished since the last one.
"""

from __future__ import annotations

import hashlib
import random
from array import array
from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from dpo_cli.core.errors import DataError
from dpo_cli.data.votes import ADJUDICATED, REPEATED, UNDONE, A, B
from dpo_cli.labeling.items import ItemStore
from dpo_cli.labeling.order import Asked, Drawn, is_repeat, item_order, shown_order
from dpo_cli.labeling.progress import Progress, progress_of
from dpo_cli.labeling.settings import Settings
from dpo_cli.labeling.votes import (
    MOST_STRENGTH,
    BadVote,
    By,
    VoteFile,
    file_of,
    is_choice,
    lines_of,
    num_results,
    order_of,
    result_of,
    row_of,
)

_UNCERTAIN, _RANDOM = "uncertain", "random"

FEWEST_BETWEEN = 10
"""Questions between an item and its coming again: fewer, and the rater remembers it."""
_PACE_OF = 20
_LONGEST_KEY = 64


class _Rater:
    """What is known of one rater: a few numbers for each of his votes, and a byte for each item."""

    def __init__(self, name: str, by: By, num_items: int) -> None:
        self.name, self.by = name, by
        self.file: VoteFile | None = None
        self.seen, self.adjudicated = np.zeros((2, num_items), dtype=bool)
        self.num_rows = 0
        self.last_key = ""
        self.numbers, self.indices, self.results = array("q"), array("q"), array("b")  # of votes that stand
        self.drawn: list[Drawn] = []
        self.repeated: set[int] = set()
        self.repeatable: deque[int] = deque()  # items that may come again, the earliest first
        self.seconds: deque[float] = deque(maxlen=_PACE_OF)
        self.position = self.contested_position = 0
        self.undone: tuple[int, Drawn] | None = None
        self.asked: Asked | None = None


class Engine:
    """Asks raters, and keeps what they say.

    Args:
        items: What is asked.
        settings: How.
        folder: Of the votes.
        guideline: What raters go by, as text; empty where there is none.
        adjudicates: Whether one who joins votes on what people disagree on, and on nothing else.
    """

    def __init__(
        self, items: ItemStore, settings: Settings, folder: Path, guideline: str = "", *, adjudicates: bool = False
    ) -> None:
        self.items, self.settings, self.folder = items, settings, folder
        self.guideline, self.adjudicates = guideline, adjudicates
        self.guideline_version = hashlib.sha256(guideline.encode()).hexdigest()[:12] if guideline else None
        self.num_unknown = 0
        self._order, self._is_uncertain = item_order(items, settings)
        self._rank = np.empty_like(self._order)
        self._rank[self._order] = np.arange(len(items))
        self._index = {id: index for index, id in enumerate(items.ids)}
        num = num_results(settings.mode, int(items.sizes.max(initial=0)))
        self._results = np.zeros((len(items), num), dtype=np.int16)  # how many people's votes have each
        self._voters = np.zeros(len(items), dtype=np.int16)
        self._num_adjudications = np.zeros(len(items), dtype=np.int16)
        self._contested: list[int] = []
        self._raters: dict[str, _Rater] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for rater in self._raters.values():
            if rater.file is not None:
                rater.file.close()

    def join(self, rater: str, by: By = "person") -> VoteFile:
        """Let a rater vote, who goes on where he left off.

        Raises:
            MachineError: His votes are being written by another process.
            DataError: His file is damaged, or holds votes of another mode.
        """
        self._raters[rater] = mine = _Rater(rater, by, len(self.items))
        mine.file = file = VoteFile(self.folder, rater, by)
        for row in lines_of(file.path):
            self._replay(mine, row)
        return file

    def count_absent(self) -> list[str]:
        """Count the votes of people who are not here, after the others have joined; returns who they are.

        Raises:
            DataError: A file is damaged, or holds votes of another mode.
        """
        present = {file_of(self.folder, rater) for rater in self._raters}
        absent = []
        for path in sorted(set(self.folder.glob("*.jsonl")) - present):
            mine: _Rater | None = None
            for row in lines_of(path):
                if row["by"] != "person":
                    break
                mine = mine or _Rater(row["rater"], row["by"], len(self.items))
                self._replay(mine, row)
            if mine is not None:
                absent.append(mine.name)
        return absent

    def _replay(self, mine: _Rater, row: Mapping[str, Any]) -> None:
        if row["vote"] == UNDONE:
            if row["supersedes"] not in mine.numbers:
                raise DataError(
                    f"{file_of(self.folder, mine.name)}, line {row['number'] + 1}: takes back vote {row['supersedes']},"
                    " which does not stand; restore the file, or move it away"
                )
            self._take_back(mine, mine.numbers.index(row["supersedes"]))
        else:
            if row["mode"] != self.settings.mode:
                raise DataError(
                    f"{file_of(self.folder, mine.name)}: votes of mode {row['mode']}; name another folder with --out"
                )
            index = self._index.get(row["item_id"], -1)
            self.num_unknown += index < 0
            self._count(mine, row["number"], index, result_of(row["vote"], order_of(row)), row["drawn"], row["seconds"])
        mine.num_rows, mine.last_key = row["number"] + 1, row["key"]
        mine.asked = None

    # --- asking -------------------------------------------------------------------------------

    def ask(self, rater: str) -> Asked | None:
        """The rater's question, the same until it is answered; None: nothing is left."""
        mine = self._raters[rater]
        if mine.asked is None and (found := self._next(mine)) is not None:
            index, drawn = found
            mine.asked = Asked(mine.num_rows, index, self._shown_as(rater, index, drawn), drawn)
        return mine.asked

    def next_number(self, rater: str) -> int:
        """The number of the rater's next line, which a vote or an undoing must name."""
        return self._raters[rater].num_rows

    def _next(self, mine: _Rater) -> tuple[int, Drawn] | None:
        if mine.undone is not None and self._is_own(mine.undone[1]):
            return mine.undone
        if self.adjudicates:
            index = self._first_left(mine)
            return None if index is None else (index, ADJUDICATED)
        seed, number = self.settings.seed, len(mine.numbers)
        is_again = is_repeat(seed, mine.name, number, self.settings.repeats)
        if is_again and (index := self._to_repeat(mine)) is not None:
            return index, REPEATED
        if (
            random.Random(f"{seed} {mine.name} {number}").random() < 0.5
            and (index := self._next_contested(mine)) is not None
        ):
            return index, _UNCERTAIN
        while mine.position < len(self._order):
            index = int(self._order[mine.position])
            if self._is_open(mine, index, self.settings.overlap):
                return index, _UNCERTAIN if self._is_uncertain[index] else _RANDOM
            mine.position += 1
        if (index := self._next_contested(mine)) is not None:
            return index, _UNCERTAIN
        index = self._first_left(mine)  # shown to somebody who does not answer
        return None if index is None else (index, _UNCERTAIN if self._is_uncertain[index] else _RANDOM)

    def _first_left(self, mine: _Rater) -> int | None:
        left = self._left(mine)
        return int(left[np.argmin(self._rank[left])]) if len(left) else None

    def _is_open(self, mine: _Rater, index: int, wanted: int) -> bool:
        """Whether the item waits for this rater: not for a judge's sake, who sees all."""
        if mine.seen[index]:
            return False
        if mine.by == "judge":
            return True
        waiting = sum(
            other.asked is not None and other.asked.index == index and other is not mine and other.by == "person"
            for other in self._raters.values()
        )
        return self._voters[index] + waiting < wanted

    def _next_contested(self, mine: _Rater) -> int | None:
        while mine.contested_position < len(self._contested):
            index = self._contested[mine.contested_position]
            if self._is_contested(index) and self._is_open(mine, index, self.settings.overlap + 1):
                return index
            mine.contested_position += 1
        return None

    def _is_contested(self, index: int) -> bool:
        return int(np.count_nonzero(self._results[index])) > 1 and not self._num_adjudications[index]

    def _to_repeat(self, mine: _Rater) -> int | None:
        while mine.repeatable and mine.repeatable[0] in mine.repeated:
            mine.repeatable.popleft()
        is_due = len(mine.repeatable) > FEWEST_BETWEEN
        return mine.repeatable[0] if is_due else None

    def _shown_as(self, rater: str, index: int, drawn: str) -> tuple[int, ...]:
        id, size = self.items.ids[index], int(self.items.sizes[index])
        return shown_order(self.settings.seed, rater, id, size, is_flipped=drawn in (REPEATED, ADJUDICATED))

    # --- answers ------------------------------------------------------------------------------

    def vote(
        self, rater: str, number: int, key: str, vote: Any, *, strength: int | None = None, seconds: float | None = None
    ) -> None:
        """Keep the answer to the rater's question; sent twice, it counts once.

        Args:
            rater: Who.
            number: Of the question.
            key: The asker's own for this vote.
            vote: As a votes file has it, but undone.
            strength: 1 to 3, of A or B.
            seconds: Since the question was shown.

        Raises:
            BadVote: It is none, or not of the question that the rater has.
        """
        mine = self._raters[rater]
        if self._is_known(mine, number, key):
            return
        asked = self.ask(rater)
        if asked is None or number != asked.number:
            raise BadVote("this question was answered elsewhere", is_late=True)
        if not is_choice(self.settings.mode, vote, len(asked.order)):
            raise BadVote(f"no vote on {self.settings.mode}")
        if strength is not None and (
            type(strength) is not int or not 1 <= strength <= MOST_STRENGTH or vote not in (A, B)
        ):
            raise BadVote(f"strength must be 1 to {MOST_STRENGTH}, of A or B")
        if seconds is not None and not (isinstance(seconds, int | float) and 0 <= seconds < float("inf")):
            raise BadVote("seconds must be a number")
        self._keep(mine, asked, {"key": key, "vote": vote, "strength": strength, "seconds": seconds})

    def all_for_judge(self, rater: str) -> list[Asked]:
        """What a judge has not voted on, in order, and then what comes again: a judge answers in any order."""
        mine = self._raters[rater]
        first = [int(index) for index in self._order if not mine.seen[index]]
        again = [
            int(index)
            for index in self._order
            if index not in mine.repeated
            and random.Random(f"{self.settings.seed} {rater} {index}").random() < self.settings.repeats
        ]
        drawn: dict[bool, Drawn] = {True: _UNCERTAIN, False: _RANDOM}
        return [
            Asked(-1, index, self._shown_as(rater, index, ""), drawn[self._is_uncertain[index]]) for index in first
        ] + [Asked(-1, index, self._shown_as(rater, index, REPEATED), REPEATED) for index in again]

    def keep_judgment(self, rater: str, asked: Asked, vote: Any) -> None:
        """Keep what a judge said to one of these."""
        mine = self._raters[rater]
        assert is_choice(self.settings.mode, vote, len(asked.order))
        asked = replace(asked, number=mine.num_rows)
        self._keep(mine, asked, {"key": str(asked.number), "vote": vote, "strength": None, "seconds": None})

    def _keep(self, mine: _Rater, asked: Asked, said: Mapping[str, Any]) -> None:
        self._append(mine, row_of(self.items[asked.index], asked, self.settings.mode, self.guideline_version, said))
        mine.num_rows, mine.last_key = asked.number + 1, said["key"]
        mine.asked = mine.undone = None
        self._count(mine, asked.number, asked.index, result_of(said["vote"], asked.order), asked.drawn, said["seconds"])

    def undo(self, rater: str, number: int, key: str) -> bool:
        """Take back the rater's last vote that stands, and ask it again; False: there is none.

        Raises:
            BadVote: Another vote came meanwhile.
        """
        mine = self._raters[rater]
        if self._is_known(mine, number, key):
            return True
        if number != mine.num_rows:
            raise BadVote("another vote came meanwhile", is_late=True)
        if not mine.numbers or not self._is_own(mine.drawn[-1]):
            return False
        self._append(
            mine,
            {"number": number, "key": key, "mode": self.settings.mode, "vote": UNDONE, "supersedes": mine.numbers[-1]},
        )
        mine.num_rows, mine.last_key = number + 1, key
        self._take_back(mine)
        return True

    def _is_own(self, drawn: Drawn) -> bool:
        """Whether a vote is of the kind that is asked for here: adjudications are apart from all others."""
        return (drawn == ADJUDICATED) == self.adjudicates

    @staticmethod
    def _is_known(mine: _Rater, number: Any, key: Any) -> bool:
        is_key = isinstance(key, str) and key.isascii() and 0 < len(key) <= _LONGEST_KEY
        if not is_key or type(number) is not int:
            raise BadVote("a vote needs a number and a key")
        return number == mine.num_rows - 1 and key == mine.last_key

    @staticmethod
    def _append(mine: _Rater, row: Mapping[str, Any]) -> None:
        assert mine.file is not None  # who is absent is not asked
        mine.file.append(row)

    # --- counting -----------------------------------------------------------------------------

    def _count(self, mine: _Rater, number: int, index: int, result: int, drawn: Drawn, seconds: float | None) -> None:
        mine.numbers.append(number)
        mine.indices.append(index)
        mine.results.append(result)
        mine.drawn.append(drawn)
        mine.undone = None
        if seconds is not None:
            mine.seconds.append(seconds)
        if index < 0:
            return
        if drawn == REPEATED:
            mine.repeated.add(index)
            return
        if drawn == ADJUDICATED:
            mine.adjudicated[index] = True
            self._num_adjudications[index] += result >= 0
            return
        mine.seen[index] = True
        if result >= 0:
            mine.repeatable.append(index)
            self._add(mine, index, result, 1)

    def _take_back(self, mine: _Rater, place: int = -1) -> None:
        mine.numbers.pop(place)
        index, result, drawn = mine.indices.pop(place), mine.results.pop(place), mine.drawn.pop(place)
        mine.asked = None
        if index < 0:
            return
        mine.undone = index, drawn
        if drawn == REPEATED:
            mine.repeated.discard(index)
            return
        if drawn == ADJUDICATED:
            mine.adjudicated[index] = False
            self._num_adjudications[index] -= result >= 0
            return
        mine.seen[index] = False
        if result >= 0:
            if mine.repeatable and mine.repeatable[-1] == index:
                mine.repeatable.pop()
            self._add(mine, index, result, -1)
            for other in self._raters.values():  # it is open to others again
                other.position = min(other.position, int(self._rank[index]))

    def _add(self, mine: _Rater, index: int, result: int, by: int) -> None:
        if mine.by == "judge":
            return
        was_contested = self._is_contested(index)
        self._results[index, result] += by
        self._voters[index] += by
        if by > 0 and not was_contested and self._is_contested(index):
            self._contested.append(index)

    # --- progress -----------------------------------------------------------------------------

    def progress(self, rater: str) -> Progress:
        """How far the rater is."""
        mine = self._raters[rater]
        left = len(self._left(mine))
        if self.adjudicates:
            return progress_of(int(mine.adjudicated.sum()), left, mine.seconds, 0, None)
        # only items drawn at random say how often all others would be won
        results = self._results[~self._is_uncertain] if self.items.are_compared else None
        return progress_of(len(mine.numbers), left, mine.seconds, self.settings.repeats, results)

    def count_shared(self) -> tuple[int, int]:
        """Items that two people have voted on, and those of them on which they disagree, adjudicated or not."""
        return int(np.count_nonzero(self._voters > 1)), int(self._are_contested().sum())

    def _are_contested(self) -> np.ndarray:
        return np.count_nonzero(self._results, axis=1) > 1

    def _left(self, mine: _Rater) -> np.ndarray:
        """Items that wait for the rater."""
        if self.adjudicates:
            return np.flatnonzero(self._are_contested() & (self._num_adjudications == 0) & ~mine.adjudicated)
        return np.flatnonzero(~mine.seen & ((mine.by == "judge") | (self._voters < self.settings.overlap)))
