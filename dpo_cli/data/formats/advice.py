"""Which columns to name where no format fits a row: those by which it can be read, tried before they are offered."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from dpo_cli.data.formats.base import Column, Columns, Format, Reading
from dpo_cli.data.formats.columns import Plan, plan_of
from dpo_cli.data.formats.content import is_turn, json_in
from dpo_cli.data.formats.labels import TIES, WORDS, label_text, side_of
from dpo_cli.data.problem import kind_of
from dpo_cli.data.schema import RawRow

_PLAIN = re.compile(r"\w(?:[\w .-]*\w)?")
_DEFAULTS = ("prompt_completion", "pairs")
"""The formats whose fields are named where nothing is known of a row, the first of those at hand."""
_OFFERED = {
    "chosen": ("good", "better", "best", "winner", "win", "positive", "pos"),
    "rejected": ("bad", "worse", "worst", "loser", "lose", "negative", "neg"),
}
"""Names that are offered for a field, and never taken for it unasked."""


class _Guess(NamedTuple):
    """Columns by which a row may be read as a format: their names end or begin as fields do, such as en_input."""

    columns: Columns  # that the user does not name and the format does not find
    missing: tuple[str, ...]  # fields that are needed beside them
    borrowed: int  # how many of the needed fields are found by another name than their own
    num_found: int  # how many of them are there


def columns_to_say(
    formats: Sequence[Format[Any]],
    rows: Sequence[RawRow],
    named: Mapping[str, Column],
    reading: Reading,
    reads: Callable[[Format[Any], Columns], bool],
) -> str:
    """Columns by which some rows of the same keys can be read, as params.yaml has them; empty: none are known.

    Args:
        formats: The formats in question.
        rows: The rows.
        named: The columns that the user names.
        reading: What the user says beside.
        reads: Whether a format reads the rows where these columns are named.
    """
    for fmt in formats:
        guesses = [guess for guess in _guesses(fmt, rows, named, reading) if guess.columns and not guess.missing]
        guess = min(guesses, key=lambda guess: guess.borrowed, default=None)
        if guess and reads(fmt, {**named, **guess.columns}):
            return _as_yaml(fmt, {**guess.columns, **named})
    return ""


def columns_to_fill_in(
    fmt: Format[Any] | None,
    formats: Sequence[Format[Any]],
    rows: Sequence[RawRow],
    named: Mapping[str, Column],
    reading: Reading,
) -> str:
    """The same for a format, or the usual one, with dots for the fields that nothing is known of; empty: it has all."""
    usual = sorted(formats, key=lambda other: [other.name != name for name in _DEFAULTS])  # stable
    guesses = [(each, guess) for each in ([fmt] if fmt else usual) for guess in _guesses(each, rows, named, reading)]
    # of equal ones the first is taken, which asks for most
    least, guess = max(
        ((each, guess) for each, guess in guesses if guess.missing),
        key=lambda pair: pair[1].num_found,
        default=(formats[0], None),
    )
    return _as_yaml(least, {**guess.columns, **dict.fromkeys(guess.missing, "..."), **named}) if guess else ""


def _guesses(fmt: Format[Any], rows: Sequence[RawRow], named: Mapping[str, Column], reading: Reading) -> list[_Guess]:
    """A guess for each need of a format."""
    return [_guess(replace(fmt, needs=(need,)), rows, named, reading) for need in fmt.needs]


def _guess(fmt: Format[Any], rows: Sequence[RawRow], named: Mapping[str, Column], reading: Reading) -> _Guess:
    """The columns for a format that has one need."""
    plan = plan_of(fmt, tuple(rows[0]), named, reading)
    free = list(plan.unread)
    found: Columns = {name: rivals[0] for name, rivals in plan.rivals.items()}
    borrowed = len(plan.columns.keys() & set(plan.needed) - named.keys())

    def take(fields: Iterable[str], names: Callable[[str], Collection[str]]) -> int:
        num = len(found)
        for field in fields:
            key = next((key for key in free if not {*names(field)}.isdisjoint(_affixes(key))), None)
            if key is not None and field not in found:
                found[field] = key
                free.remove(key)
        return len(found) - num

    take(plan.missing, lambda field: (field,))
    borrowed += take([field for field in plan.missing if field not in found], lambda field: fmt.names[field])
    take([field for field in plan.missing if field not in found], lambda field: _OFFERED.get(field, ()))
    missing = tuple(field for field in plan.missing if field not in found)
    if missing == ("label",) and (label := _label_in(rows, free, plan)):
        found["label"], missing = label, ()
    if not missing:
        there = {*plan.needed, *plan.columns, *named, *(fmt.names.keys() & rows[0].keys())}
        spare = [
            field
            for field in fmt.names
            if field not in there and not any(field in pair and there & {*pair} for pair in fmt.alternatives)
        ]
        take(spare, lambda field: (field,))
        take([field for field in spare if field not in found], lambda field: fmt.names[field])
    return _Guess(found, missing, borrowed, len(plan.needed) - len(missing))


def _label_in(rows: Sequence[RawRow], keys: Iterable[str], plan: Plan) -> str | None:
    """The column that names one of two outputs in each row."""
    labels = {**TIES, **(plan.reading.labels or WORDS)}
    return next((key for key in keys if all(side_of(label_text(row[key]), labels) for row in rows)), None)


def _affixes(key: str) -> set[str]:
    """A key in small letters, and what its first and its last word are without the other words."""
    words = re.findall(r"[^\W_]+", key.lower())
    return {"_".join(words[start:end]) for start, end in ((0, None), (1, None), (0, -1)) if words[start:end]}


def _as_yaml(fmt: Format[Any], columns: Mapping[str, Column]) -> str:
    """Columns in the order of the format's fields."""
    listed = [*(name for name in fmt.names if name in columns), *(name for name in columns if name not in fmt.names)]
    return "{" + ", ".join(f"{name}: {_quoted(columns[name])}" for name in listed) + "}"


def _quoted(column: Column) -> str:
    if not isinstance(column, str):
        return f"[{', '.join(map(_quoted, column))}]"
    return column if column == "..." or _PLAIN.fullmatch(column) else "'" + column.replace("'", "''") + "'"


def not_objects(first: Any) -> str:
    """What to do where rows are no objects."""
    inner = json_in(first) if isinstance(first, str) else None
    hint = "; they are such objects as text, so decode them once more (json.loads)" if isinstance(inner, dict) else ""
    return f"its rows must be JSON objects, got {kind_of(first)}{hint}"


def turned_table(only: Mapping[str, Any]) -> str:
    """What to do where a file's only row is a table by columns, or an object of rows by their names."""
    values = list(only.values())
    remedy = "write one object a row (pandas: to_json(path, orient='records', lines=True))"
    if only.keys() >= {"columns", "data"} and isinstance(only["data"], list) and isinstance(only["columns"], list):
        return f"it is one object with a table in it, columns and data; {remedy}"
    if len(values) < 2 or not all(
        isinstance(value, list | dict) and len(value) == len(values[0]) > 0 for value in values
    ):
        return ""
    if all(isinstance(value, list) and not any(isinstance(inner, dict | list) for inner in value) for value in values):
        return f"it is one object with a list for each column; {remedy}" if len(values[0]) > 1 else ""
    if not all(isinstance(value, dict) and value.keys() == values[0].keys() for value in values):
        return ""
    if all(key.isdecimal() for key in values[0]):
        return f"it is one object with an object for each column; {remedy}"
    return "" if any(map(is_turn, values)) else "it is one object with a row under each name; write them as a list"
