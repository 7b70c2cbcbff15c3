"""Votes of judges and people on pairs of answers: the table that agreement is computed from."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dpo_cli.core.errors import DataError
from dpo_cli.data.reading.base import Record
from dpo_cli.data.reading.files import read_records
from dpo_cli.statistics.agreement import LOSS, TIE, WIN, Vote

COLUMNS = ("item_id", "prompt_id", "method", "baseline", "rater", "vote", "a_is")

_VOTES = ("A", "B", "tie")
_NAMED = 8


def read_votes(*paths: Path) -> list[Vote]:
    """The votes of files: CSV, TSV, parquet or JSON.

    Raises:
        DataError: It cannot be read, a column is missing, a value is none of those allowed, a rater voted twice on an
            item, or an item has two prompts, be it in one file or in two. All problems in one go, each with file, row
            and remedy.
    """
    for path in paths:
        if not path.exists():
            raise DataError(f"{path} is missing; name a file with the columns {', '.join(COLUMNS)}")
        if paths.count(path) > 1:
            raise DataError(f"{path} is named twice; its votes would count twice")
    return parse_votes({path.as_posix(): read_records(path) for path in paths})


def parse_votes(files: Mapping[str, Iterable[Record]]) -> list[Vote]:
    """Records as votes.

    Args:
        files: Objects with :data:`COLUMNS` (others are passed over) by the name of their file, for messages.

    Raises:
        DataError: See :func:`read_votes`.
    """
    named = ", ".join(files)
    votes: list[Vote] = []
    problems: list[str] = []
    voted: dict[tuple[str, str, str, str], str] = {}
    prompts: dict[tuple[str, str, str], tuple[str, str]] = {}
    for file, record in ((file, record) for file, records in files.items() for record in records):
        row = record.value
        here = f"row {record.row}" if record.line is None else f"line {record.line}"
        place = f"{file}, {here}"
        if not isinstance(row, dict):
            raise DataError(f"{place}: not a row of a table; it must have the columns {', '.join(COLUMNS)}")
        if missing := [name for name in COLUMNS if name not in row]:
            raise DataError(_missing(file, missing, row))
        found = _vote(row)
        if isinstance(found, str):
            problems.append(f"{place}: {found}")
            continue
        item = (found.method, found.baseline, found.item)
        if (first := voted.setdefault((*item, found.rater), place)) is not place:
            problems.append(
                f"{place}: {found.rater} voted on item {found.item} of {found.method} already, in"
                f" {first.removeprefix(f'{file}, ')};"
                " keep one of the two, or give the raters names of their own, as in human:anna and human:bo"
            )
        prompt, first = prompts.setdefault(item, (found.prompt, place))
        if prompt != found.prompt:
            problems.append(
                f"{place}: item {found.item} of {found.method} has prompt {found.prompt}, but {prompt} in"
                f" {first.removeprefix(f'{file}, ')}; an item is two answers to one prompt: mend prompt_id or item_id"
            )
        votes.append(found)
    if problems:
        rest = len(problems) - _NAMED
        raise DataError([*problems[:_NAMED], *([f"{named}: {rest} more such problems"] if rest > 0 else [])])
    if not votes:
        raise DataError(f"{named} has no rows; it must hold a vote a row: {', '.join(COLUMNS)}")
    return votes


def _missing(file: str, missing: list[str], row: Mapping[str, Any]) -> str:
    near = [name for each in missing for name in difflib.get_close_matches(each, [*row], n=1)]
    hint = f"rename {' and '.join(near)}" if near else f"a votes file has {', '.join(COLUMNS)}"
    return f"{file}: no column {' and no '.join(missing)}, got {', '.join(map(str, row))}; {hint}"


def _vote(row: Mapping[str, Any]) -> Vote | str:
    """A row as a vote, or what is wrong with it."""
    texts = {name: "" if row[name] is None else str(row[name]).strip() for name in COLUMNS}
    if empty := [name for name, text in texts.items() if not text]:
        return f"{' and '.join(empty)} {'is' if len(empty) == 1 else 'are'} empty; fill in, or leave the row out"
    method, baseline, rater, vote, first = (texts[name] for name in COLUMNS[2:])
    if vote not in _VOTES:
        return f"vote must be A, B or tie, got {vote[:40]}; write it so, or leave the row out"
    if method == baseline:
        return f"method and baseline are both {method}; name the two models that wrote the answers"
    if first not in (method, baseline):
        return f"a_is must be {method} or {baseline}, got {first[:40]}; name the model whose answer was shown as A"
    if not rater.partition(":")[0]:
        return f"rater must be a kind or kind:name, got {rater[:40]}; write human:anna, for one"
    result = TIE if vote == "tie" else WIN if (vote == "A") == (first == method) else LOSS
    return Vote(texts["item_id"], texts["prompt_id"], method, baseline, rater, result)
