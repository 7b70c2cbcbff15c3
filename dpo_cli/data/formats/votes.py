"""Votes on answers, as ``dpo-cli label`` writes them: one file a rater, one row a vote.

All votes on an item, of all files of a source, are counted together, in the row of the first of them; the others are
left out as ``counted_together``. On a pair the answer with more votes is chosen, and the numbers of votes are the
scores; ties and ``both bad`` count for neither side, and equal numbers are a tie. A ranking has the order of the mean
ranks over its raters. A thumb becomes a single answer, good or bad (:mod:`dpo_cli.data.formats.unpaired`), by the
majority. Where there is an adjudication, it alone counts. Votes that say nothing of the answers (skipped, taken back,
asked again to check the rater) are left out, each by its name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from dpo_cli.data.formats.base import Format, Reading
from dpo_cli.data.formats.prompts import read_prompt
from dpo_cli.data.formats.rankings import ranks_of_scores, read_completions
from dpo_cli.data.problem import RowProblem, kind_of
from dpo_cli.data.reading.base import OnBytes, Record
from dpo_cli.data.schema import Messages, PreferenceExample, RankingExample, RawRow, content_id, text_of
from dpo_cli.data.votes import ADJUDICATED, BOTH_BAD, DOWN, REPEATED, SKIPPED, TIED, UNDONE, UP, A, B, with_standing

_Choice = int | str | tuple[int, ...]
"""A vote whatever the shown order: on a pair the place of the better answer among the two in alphabetical order, a tie
or both bad; of a ranking the ranks of the answers in alphabetical order; of a thumb up or down."""

_WORDS = {("pair", 2): (TIED, BOTH_BAD), ("thumbs", 1): (UP, DOWN)}
"""Votes that mean the same whatever the shown order, by the mode and the number of answers."""


@dataclass(frozen=True)
class _Counted:
    """In place of a row's vote: the votes of all raters on its item, or the one that adjudicates it."""

    choices: tuple[_Choice, ...]


@dataclass(frozen=True)
class _LeftOut:
    """In place of a row's vote: why it makes no row of its own."""

    reason: str
    detail: str


class _Ballot(NamedTuple):
    """What a row votes on, with the answers in alphabetical order, and how."""

    mode: str
    prompt: Messages
    answers: list[Messages]
    choices: tuple[_Choice, ...]


def _ballot_of(row: RawRow, reading: Reading) -> _Ballot:
    """A row as a ballot.

    Raises:
        RowProblem: It says nothing of the answers, or is malformed.
    """
    vote, mode = row.get("vote"), str(row.get("mode") or "pair")
    if isinstance(vote, _LeftOut):
        raise RowProblem(vote.reason, vote.detail)
    if vote == UNDONE:
        raise RowProblem("undone", "takes back an earlier vote")
    if vote == SKIPPED:
        raise RowProblem("skipped", "says nothing of the answers: its rater skipped the item")
    if row.get("drawn") == REPEATED:
        raise RowProblem("repeat", "was asked again, to compare the rater with himself; the first vote counts")
    prompt = read_prompt(row, reading)
    shown = read_completions(row, prompt, reading, fewest=1 if mode == "thumbs" else 2)
    order = sorted(range(len(shown)), key=lambda place: text_of(shown[place]))
    choices = vote.choices if isinstance(vote, _Counted) else (_choice(mode, vote, order),)
    return _Ballot(mode, prompt, [shown[place] for place in order], choices)


def _choice(mode: str, vote: Any, order: Sequence[int]) -> _Choice:
    num = len(order)
    if mode == "pair" and num == 2 and vote in (A, B):
        return order.index(0 if vote == A else 1)
    if vote in _WORDS.get((mode, num), ()):
        return str(vote)
    if mode == "ranking" and isinstance(vote, list) and len(vote) == num and all(type(rank) is int for rank in vote):
        return tuple(vote[place] for place in order)
    if mode not in ("pair", "ranking", "thumbs"):
        raise RowProblem("unknown_mode", "has a 'mode' that is none of pair, ranking and thumbs")
    raise RowProblem(
        "unknown_vote",
        "'vote' must be A, B, tie or both bad on two completions, up or down on one, or of a ranking the rank of each"
        f" completion, got {kind_of(vote)} on {num} of them",
    )


def _read(row: RawRow, reading: Reading) -> PreferenceExample | RankingExample:
    ballot = _ballot_of(row, reading)
    return {"pair": _read_pair, "ranking": _read_ranking, "thumbs": _read_thumb}[ballot.mode](ballot)


def _read_pair(ballot: _Ballot) -> PreferenceExample:
    counts = Counter(ballot.choices)
    first, second = counts[0], counts[1]
    if first == second:
        told = f"{first} votes for each answer, {counts[TIED]} for a tie, {counts[BOTH_BAD]} for both bad"
        if 2 * counts[BOTH_BAD] > len(ballot.choices):
            raise RowProblem("both_bad", f"has no better answer: {told}")
        raise RowProblem("tie", f"is a tie: {told}")
    better = int(second > first)
    numbers = float(max(first, second)), float(min(first, second))
    return PreferenceExample(ballot.prompt, ballot.answers[better], ballot.answers[1 - better], *numbers)


def _read_ranking(ballot: _Ballot) -> RankingExample:
    each = [ranks for ranks in ballot.choices if isinstance(ranks, tuple)]
    sums = [sum(ranks) for ranks in zip(*each, strict=True)]  # of equally many raters: in the order of the means
    ranks = ranks_of_scores([-total for total in sums])
    order = sorted(range(len(ranks)), key=lambda place: ranks[place])
    return RankingExample(ballot.prompt, [ballot.answers[place] for place in order], sorted(ranks))


def _read_thumb(ballot: _Ballot) -> PreferenceExample:
    num_up, num_down = ballot.choices.count(UP), ballot.choices.count(DOWN)
    if num_up == num_down:
        raise RowProblem("contradiction", f"is called good by {num_up} of its raters, and bad by as many")
    [answer] = ballot.answers
    sides = (answer, []) if num_up > num_down else ([], answer)
    return PreferenceExample(ballot.prompt, *sides)


class Tally:
    """The votes of several files, by item: each rater's first one on it.

    Memory holds a few numbers a vote, and no texts.

    Args:
        paths: The files.
        within: Where the list of rows is in them, if not at the top level.

    Raises:
        DataError: A file cannot be read.
    """

    def __init__(self, paths: Sequence[Path], within: str = "") -> None:
        self._within = within
        # by item and rater; None: whoever adjudicates
        self._votes: dict[str, dict[str | None, tuple[tuple[Path, int], _Choice]]] = {}
        for path in paths:
            for record, stands in with_standing(path, within=within):
                if stands and (found := _item_of(record.value)):
                    item, rater, choice = found
                    self._votes.setdefault(item, {}).setdefault(rater, ((path, record.row), choice))

    def records(self, path: Path, on_bytes: OnBytes = lambda _: None) -> Iterator[Record]:
        """All rows of one of the files, the first vote on each item with those of all raters in its place."""
        for record, stands in with_standing(path, on_bytes, self._within):
            if isinstance(record.value, dict) and (vote := self._told(path, record, stands)) is not None:
                yield record._replace(value={**record.value, "vote": vote})
            else:
                yield record

    def _told(self, path: Path, record: Record, stands: bool) -> _Counted | _LeftOut | None:
        """What stands in place of a vote; None: the vote itself, since it says nothing or is malformed."""
        if not stands:
            return None if record.value.get("vote") == UNDONE else _LeftOut("taken_back", "was taken back by its rater")
        if (found := _item_of(record.value)) is None:
            return None
        item, rater, _ = found
        votes = self._votes[item]
        (file, row), _ = next(iter(votes.values()))
        if votes[rater][0] != (path, record.row):
            file, row = votes[rater][0]
            who = rater or "an adjudicator"
            detail = f"is a second vote of {who} on an item, after row {row} of {file.as_posix()}; take one out"
            return _LeftOut("voted_twice", detail)
        if (file, row) != (path, record.row):
            return _LeftOut("counted_together", f"is counted together with row {row} of {file.as_posix()}")
        counted = [votes[None]] if None in votes else votes.values()
        return _Counted(tuple(choice for _, choice in counted))


def _item_of(row: Any) -> tuple[str, str | None, _Choice] | None:
    """The item that a row votes on, its rater (None: who adjudicates) and the vote; None: none can be had of it."""
    try:
        ballot = _ballot_of(row, Reading()) if isinstance(row, dict) else None
        if ballot is None:
            return None
        item = f"{ballot.mode} {content_id(ballot.prompt, *ballot.answers)}"
    except (RowProblem, UnicodeEncodeError):
        return None
    return item, None if row.get("drawn") == ADJUDICATED else str(row.get("rater")), ballot.choices[0]


VOTES = Format(
    name="votes",
    fields="item_id, rater and vote on a prompt's completions",
    names=dict.fromkeys(
        ("item_id", "rater", "vote", "mode", "prompt", "completions", "number", "supersedes", "drawn"), ()
    ),
    needs=(("item_id", "rater", "vote", "prompt", "completions"),),
    read=_read,
    note=lambda row, reading: "all votes on an item are counted together, in the row of the first of them",
)
