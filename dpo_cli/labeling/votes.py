"""A rater's votes as a file: JSON lines, appended and on the disk before anybody is told that a vote counts.

What a vote says on a pair stands in :mod:`dpo_cli.judging.votes`, which reads these files, too. A line is never
changed: a vote is taken back by a later line with ``vote: undone`` that says which one it supersedes. All fields:

``number`` counts the rater's lines from 0. ``key`` is the asker's own for the vote, so that one that is sent twice
counts once. ``mode`` is pair, ranking or thumbs. ``prompt`` and ``completions`` are messages, the completions in the
order in which they were shown. ``vote``: on a pair A, B, tie or both bad, of a ranking the ranks of the completions as
shown (1 is best, equal is tied), for thumbs up or down; or skip, or undone. ``strength`` is 1 (a little better) to 3
(much better), or null. ``seconds`` passed before the vote. ``guideline`` is the first part of the SHA-256 of the text
that raters went by. ``drawn`` says why the item was asked: random, uncertain, repeat (shown before, now flipped), or
adjudication (people disagree on it), or chat (answers that a rater asked for himself, knowing who wrote them); null if
another tool asked. ``by`` is person or judge. ``at`` is the time, UTC;
null if that tool does not say.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, Literal, Self

import orjson
from filelock import FileLock, Timeout

from dpo_cli.core.errors import DataError, MachineError, ParamsError
from dpo_cli.data.schema import text_of
from dpo_cli.data.votes import BOTH_BAD, DOWN, SKIPPED, TIED, UP, A, B, is_torn, unended_line
from dpo_cli.labeling.items import Item, Mode
from dpo_cli.labeling.order import Asked

By = Literal["person", "judge"]
MOST_STRENGTH = 3
PERSON = "human"
"""The kind of all people as raters, as in human:anna; a judge is called what it is."""

_NAME = re.compile(r"[\w][\w.-]{0,39}")
_NOT_IN_NAMES = re.compile(r"[^\w.-]+")
_JUDGE_FILE = "judge-"


class BadVote(Exception):
    """A vote that does not answer the question at hand; ``is_late``: it was asked anew or answered meanwhile."""

    def __init__(self, problem: str, *, is_late: bool = False) -> None:
        super().__init__(problem)
        self.is_late = is_late


def person(name: str) -> str:
    """The rater that a person's name stands for.

    Raises:
        ParamsError: It cannot be a file's name.
    """
    if not _NAME.fullmatch(name) or name.startswith(_JUDGE_FILE):
        raise ParamsError(
            f"--rater must be a short name of letters, digits, _ and -, which does not begin with {_JUDGE_FILE},"
            f" got {name[:60]!r}"
        )
    return f"{PERSON}:{name}"


def file_of(folder: Path, rater: str) -> Path:
    """Where a rater's votes are."""
    kind, _, name = rater.partition(":")
    return folder / f"{name if kind == PERSON else _JUDGE_FILE + _NOT_IN_NAMES.sub('-', rater)}.jsonl"


class VoteFile:
    """The file of one rater's votes, which nobody else writes while it is open.

    Attributes:
        num_torn: Bytes of a last line that a kill had torn; they are in a file beside it that ends with .torn.

    Raises:
        MachineError: Another process writes it.
        DataError: It is damaged elsewhere than at its end.
    """

    def __init__(self, folder: Path, rater: str, by: By) -> None:
        self.rater, self.by = rater, by
        self.path = file_of(folder, rater)
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(folder / f".{self.path.name}.lock")
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise MachineError(
                f"{self.path}: another dpo-cli writes {rater}'s votes; stop it, or wait for it"
            ) from None
        self.num_torn = self._mend()
        self._file: IO[bytes] | None = None  # there is none before the first vote: an empty file would be no table

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let others write it."""
        if self._file is not None and not self._file.closed:
            os.fsync(self._file.fileno())
            self._file.close()
        self._lock.release()

    def append(self, row: Mapping[str, Any], *, is_synced: bool = True) -> None:
        """Write a line, of now if it does not say of when.

        When this returns, a person's is on the disk, unless it is not synced: what can be had again need not be. A
        judge can be asked again.
        """
        at = row.get("at", datetime.now(UTC).isoformat(timespec="seconds"))
        told = {**row, "rater": self.rater, "by": self.by, "at": at}
        data = json.dumps(told, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        if self._file is None:
            self._file = self.path.open("ab", buffering=0)
            _sync_folder(self.path.parent)
        file = self._file
        begin = os.fstat(file.fileno()).st_size
        try:
            if file.write(data) != len(data):
                raise OSError(28, "No space left on device", str(self.path))
            if self.by == "person" and is_synced:
                os.fsync(file.fileno())
        except OSError:
            file.truncate(begin)  # nobody is told that it counts, and the next one begins a line
            raise

    def _mend(self) -> int:
        """End the last line, or set it aside where it is torn."""
        if not self.path.exists() or not (line := unended_line(self.path)):
            return 0
        if not is_torn(line):
            with self.path.open("ab") as file:
                file.write(b"\n")
            return 0
        with self.path.with_name(f"{self.path.name}.torn").open("ab") as file:
            file.write(line + b"\n")
            file.flush()
            os.fsync(file.fileno())
        with self.path.open("r+b") as file:
            file.truncate(self.path.stat().st_size - len(line))
            os.fsync(file.fileno())
        return len(line)


def lines_of(path: Path) -> Iterator[dict[str, Any]]:
    """All whole lines of a rater's file, in order; none where he has not voted, and so has no file.

    Raises:
        DataError: One is no vote, or not the next one of the same rater.
    """
    rater = None
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file):
            if not line.endswith(b"\n") and is_torn(line):
                return
            try:
                row = orjson.loads(line)
                rater = rater or row["rater"]
                is_next = row["number"] == number and row["rater"] == rater
            except (ValueError, KeyError, TypeError):
                row, is_next = {}, False
            if not is_next:
                raise DataError(
                    f"{path}, line {number + 1}: not vote {number} of {rater}; votes are only appended by dpo-cli:"
                    " restore the file, or move it away"
                )
            yield row


def row_of(
    item: Item, asked: Asked, mode: Mode, guideline_version: str | None, said: Mapping[str, Any]
) -> dict[str, Any]:
    """The line of a vote.

    Args:
        item: What was shown.
        asked: Why, and in which order.
        mode: What was asked.
        guideline_version: By which the rater went.
        said: ``key``, ``vote``, ``strength`` and ``seconds``.
    """
    seconds = said["seconds"]
    row: dict[str, Any] = {
        "number": asked.number,
        "key": said["key"],
        "mode": mode,
        "item_id": item.id,
        "prompt_id": item.prompt_id,
        "vote": said["vote"],
    }
    if mode == "pair":
        method, baseline = item.authors
        row |= {"method": method, "baseline": baseline, "a_is": item.authors[asked.order[0]]}
    return row | {
        "strength": said["strength"],
        "seconds": None if seconds is None else round(seconds, 3),
        "guideline": guideline_version,
        "drawn": asked.drawn,
        "supersedes": None,
        "prompt": item.prompt,
        "completions": [item.completions[place] for place in asked.order],
    }


def _sync_folder(folder: Path) -> None:
    """Put a new file's name on the disk, where the system can."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def is_choice(mode: str, vote: Any, num_answers: int) -> bool:
    """Whether something is a vote in this mode: skip is one in all of them."""
    if vote == SKIPPED:
        return True
    if mode == "ranking":
        is_list = isinstance(vote, list) and len(vote) == num_answers
        return is_list and all(type(rank) is int and 1 <= rank <= num_answers for rank in vote)
    return isinstance(vote, str) and vote in ((A, B, TIED, BOTH_BAD) if mode == "pair" else (UP, DOWN))


def result_of(vote: Any, order: Sequence[int]) -> int:
    """A vote as a number, whatever the shown order, so that equal numbers agree; -1: it says nothing.

    On a pair 0, 1 or 2: for the first answer of the item, a tie, for the second one. Of a ranking the place of its best
    answer in the item, from 1, or 0 where several are. For thumbs 0 or 1.
    """
    if vote == SKIPPED:
        return -1
    if isinstance(vote, list):
        best = [place for place, rank in zip(order, vote, strict=False) if rank == min(vote)]
        return best[0] + 1 if len(best) == 1 else 0
    if vote in (A, B):
        first = order[0] if order else 0
        return 0 if (vote == A) == (first == 0) else 2
    return 0 if vote == UP else 1


def order_of(row: Mapping[str, Any]) -> tuple[int, ...]:
    """The places in the item of a vote's answers, as they were shown."""
    if row["mode"] == "pair":
        return (0, 1) if row["a_is"] == row["method"] else (1, 0)
    texts = [text_of(each) for each in row["completions"]]
    return tuple(sorted(texts).index(text) for text in texts)


def num_results(mode: str, most_answers: int) -> int:
    """How many results there are of votes on items with so many answers."""
    return max(3, most_answers + 1) if mode == "ranking" else 3
