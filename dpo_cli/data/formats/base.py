"""What a format is, what it finds in a row, and the small checks that readers share."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from dpo_cli.data.problem import RowProblem, kind_of
from dpo_cli.data.schema import Example, RawRow

Found = TypeVar("Found", bound=Example)


@dataclass(frozen=True)
class Reading:
    """What a source says beside its format, for readers that ask.

    Attributes:
        roles: Further names of roles, such as ``{"narrator": "system"}``.
        labels: What a label means that names the better of two outputs: ``first``, ``second`` or ``tie``.
        turns: ``last``: a conversation is one example, its last answer; ``all``: one for each answer.
        compare: ``last``: the two conversations of a pair differ in their last answers alone; ``first``: in more, and
            the first answer in which they differ counts.
        pairs: Which pairs are made of K ranked answers: ``all``, ``adjacent`` or ``best_vs_worst``.
        unwrap: Whether texts that are conversations, as chat templates render them, become messages.
        in_order: Whether the user says that a list of answers without ranks or scores is in order, best first.
        labels_found: Whether ``labels`` come from the outputs' names; else the user says them.
    """

    roles: Mapping[str, str] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    turns: str = "last"
    compare: str = "last"
    pairs: str = "all"
    unwrap: bool = False
    in_order: bool = False
    labels_found: bool = False


Column = str | list[str]
"""Where a field lies in a row: a key, keys with dots between, or several such whose values make a list."""

Columns = dict[str, Column]
"""Where fields lie, by the fields' names."""

Part = tuple[str, Found | RowProblem]
"""A part of a row by its name (empty: the whole row), and what was found in it."""

Suggestion = tuple[Columns, dict[str, str]]
"""Columns, and meanings of labels."""


def paths_of(column: Column) -> list[str]:
    """The keys of a column."""
    return [column] if isinstance(column, str) else column


@dataclass(frozen=True)
class Format(Generic[Found]):
    """A format of input rows.

    Attributes:
        name: Its name in params.yaml.
        fields: What its rows are known by, for messages.
        names: The fields it reads, each with the other names it goes by in the wild.
        needs: Alternatives of fields that a row must have, by their names in ``names``.
        read: The canonical example in a row, or several of them as parts; raises :class:`RowProblem`.
        matches: What the row's values must look like beside its having the fields; None: like anything.
        weak: Whether a row that matches might as well be a row of another format that lacks a
            field; it is read so only in a file most of whose rows are of this format. None: never.
        note: What a user should know who did not choose it, for the account.
        doubt: Why reading these rows of a file so would be a guess, and how to say what they are;
            empty: it would be none. Only asked where the user names no format.
        suggest: Columns (and meanings of labels) for a row with these fields, where ``names`` cannot
            say it, beside those that the user names.
        alternatives: Two fields of which the second is not read where the first holds something.
        of_a_turn: What it reads of a turn beside role, text and the like; None: its fields hold no such turns.
        by_name: Whether only the user can say that rows are of it: ``auto`` never finds it.
        unread: What it leaves of a row's fields beside such turns, by the fields' names: parts, or all of it (empty).
    """

    name: str
    fields: str
    names: Mapping[str, tuple[str, ...]]
    needs: tuple[tuple[str, ...], ...]
    read: Callable[[RawRow, Reading], Found | Iterator[Part[Found]]]
    matches: Callable[[RawRow], bool] | None = None
    weak: Callable[[RawRow], bool] | None = None
    note: Callable[[RawRow, Reading], str] = lambda row, reading: ""
    doubt: Callable[[Sequence[RawRow], Reading], str] = lambda rows, reading: ""
    suggest: Callable[[Collection[str], Mapping[str, Column]], Suggestion | None] = lambda keys, named: None
    alternatives: tuple[tuple[str, str], ...] = ()
    of_a_turn: tuple[str, ...] | None = ()
    by_name: bool = False
    unread: Mapping[str, Callable[[RawRow], Iterable[str]]] = field(default_factory=dict)

    def fits(self, row: RawRow) -> bool:
        """Whether a row that has the fields looks like one of this format."""
        return self.matches is None or self.matches(row)


def says_something(value: Any) -> bool:
    """Whether a field holds more than nothing: null, an empty text, list or object are nothing, 0 and false are not."""
    return bool(value) or value == 0


def text_field(row: RawRow, name: str) -> str:
    """A field that must hold text."""
    try:
        value = row[name]
    except KeyError:
        raise RowProblem("missing_field", f"has no {name!r}") from None
    if not isinstance(value, str):
        raise RowProblem("not_text", f"{name!r} must be text, got {kind_of(value)}")
    return value


def optional_text(row: RawRow, name: str) -> str:
    """A field that holds text where it is there; missing and null are empty."""
    return "" if row.get(name) is None else text_field(row, name)


def optional_number(row: RawRow, name: str) -> float | None:
    """A field that holds a number where it is there, perhaps as text; missing, null and empty are None."""
    value = row.get(name)
    return None if value is None or value == "" else number(value, repr(name))


def number(value: Any, where: str) -> float:
    """A score: a number, a truth value, or a number as text."""
    try:
        found = float(value) if isinstance(value, int | float | str) else None
    except (ValueError, OverflowError):
        found = None
    if found is None or found != found or found in (float("inf"), float("-inf")):
        got = "one that is not" if isinstance(value, float) else kind_of(value)
        raise RowProblem("not_a_number", f"{where} must be a finite number, got {got}")
    return found
