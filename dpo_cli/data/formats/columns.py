"""Where the fields of a format lie in a row: under their own names, under others, or where the user says."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from dpo_cli.data.formats.base import Column, Columns, Format, Reading, paths_of, says_something
from dpo_cli.data.formats.content import is_turn, unread_beside, unread_of_turns
from dpo_cli.data.formats.prompts import roles_of
from dpo_cli.data.problem import RowProblem
from dpo_cli.data.schema import RawRow

MISSING = object()
_SPOKEN = ("messages", "conversations", "history", "prompt", "chosen", "rejected", "completion", "first", "second")
_FIELD = re.compile(r"'(\w+)'|\b(\w+)\[(\d+)\]")


@dataclass(frozen=True)
class Plan:
    """How rows with certain keys are read as one format.

    Attributes:
        format: The format.
        reading: What the source says, and what the fields' names say beside it.
        columns: Where fields lie that are not under their own names.
        hidden: Keys that are no field, though they are called so.
        needed: Fields that a row must have.
        missing: Those of them that these rows have not.
        rivals: Keys of which more than one may be a needed field.
        unread: Keys that the format does not read.
        entered: Keys of which only parts are read, with the paths of these parts in them.
        alternatives: The format's alternatives of which these rows may have both.
        spoken: Fields that these rows have and that may hold turns.
        leaves: Fields that they have and of which the format may leave something else.
    """

    format: Format[Any]
    reading: Reading
    columns: Columns = field(default_factory=dict)
    hidden: tuple[str, ...] = ()
    needed: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    rivals: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    unread: tuple[str, ...] = ()
    entered: Mapping[str, frozenset[str]] = field(default_factory=dict)
    alternatives: tuple[tuple[str, str], ...] = ()
    spoken: tuple[str, ...] = ()
    leaves: tuple[str, ...] = ()

    @cached_property
    def fits(self) -> bool:
        """Whether each needed field is found, and is found in one place."""
        return not self.missing and not self.rivals

    def rename(self, row: RawRow) -> RawRow:
        """The row with its fields under their own names, too.

        Raises:
            RowProblem: A needed field is not where it is said to be.
        """
        if not (self.columns or self.hidden):
            return row
        renamed = dict(row)
        for key in self.hidden:
            renamed.pop(key, None)
        for name, column in self.columns.items():
            if type(column) is str and column in row:
                renamed[name] = row[column]
                continue
            values = [look_up(row, path) for path in paths_of(column)]
            if all(value is MISSING for value in values):
                renamed.pop(name, None)
                if name in self.needed:
                    raise RowProblem("missing_field", f"has no {shown(column)!r}, which stands for {name}")
            else:
                values = [None if value is MISSING else value for value in values]
                renamed[name] = values[0] if isinstance(column, str) else values
        return renamed

    def without_sources(self, renamed: RawRow) -> RawRow:
        """A renamed row without the keys from which its fields come."""
        columns = self.columns.values()
        paths = {path for column in columns for path in paths_of(column)}
        sources = {path if path in renamed else path.partition(".")[0] for path in paths} - self.format.names.keys()
        return {key: value for key, value in renamed.items() if key not in sources} if sources else renamed

    @cached_property
    def may_leave(self) -> bool:
        """Whether rows with these keys may hold something that is not read."""
        return bool(self.unread or self.entered or self.alternatives or self.spoken or self.leaves)

    def unread_in(self, row: RawRow, renamed: RawRow) -> tuple[str, ...]:
        """The columns of a row that hold something and are not read, by the file's names.

        Args:
            row: The row as the file has it.
            renamed: The same as :meth:`rename` gives it.
        """
        found = [key for key in self.unread if (value := row[key]) or value == 0]
        for name in self.spoken:
            if type(value := renamed.get(name)) is list or type(value) is dict:
                column = shown(self.columns.get(name, name))
                found += [f"{column}.{key}" for key in self._unread_of_turns(name, value, renamed)]
        for name in self.leaves:
            column = shown(self.columns.get(name, name))
            found += [f"{column}.{part}" if part else column for part in self.format.unread[name](renamed)]
        if not self.entered and not self.alternatives:
            return tuple(dict.fromkeys(found)) if found else ()
        for key, paths in self.entered.items():
            found += _unread_within(row[key], paths, key)
        for name, spare in self.alternatives:
            if says_something(renamed.get(name)) and says_something(renamed.get(spare)):
                column = self.columns.get(spare, spare)
                found += paths_of(column)
        return tuple(dict.fromkeys(found))

    def _unread_of_turns(self, name: str, value: Any, renamed: RawRow) -> list[str]:
        also_read = self.format.of_a_turn or ()
        if name == "prompt" and type(value) is dict and renamed.get("tools") is None:
            also_read = (*also_read, "tools")
        if name == "prompt" and type(value) is dict and not is_turn(value):
            inner = unread_of_turns(value.get("messages"), (), roles_of(self.reading))
            return [*unread_beside(value, ("messages", *also_read)), *(f"messages.{key}" for key in inner)]
        return unread_of_turns(value, also_read, roles_of(self.reading))

    def in_words_of_the_file(self, text: str) -> str:
        """A message with fields by the names that they have in the file."""

        def name(match: re.Match[str]) -> str:
            column = self.columns.get(match[1] or match[2])
            if column is None:
                return match[0]
            if match[1]:
                return f"'{shown(column)}'"
            index = int(match[3])
            return (
                f"{column}[{index}]" if isinstance(column, str) else column[index] if index < len(column) else match[0]
            )

        return _FIELD.sub(name, text)

    def named(self, problem: RowProblem) -> RowProblem:
        """A problem in the words of the file."""
        detail = self.in_words_of_the_file(problem.detail)
        if problem.reason == "missing_field":
            lost = next((name for name in self.format.names if detail.endswith(f"has no {name!r}")), "")
            if rivals := self.rivals.get(lost):
                detail += f", and {' or '.join(rivals)} may be it; say which in columns"
            elif others := self.format.names.get(lost):
                detail += f", nor {', '.join(others)}"
        return RowProblem(problem.reason, detail)


def plan_of(fmt: Format[Any], keys: Collection[str], named: Mapping[str, Column], reading: Reading) -> Plan:
    """How rows with these keys are read as this format, as far as they can be.

    Args:
        fmt: The format.
        keys: The rows' keys.
        named: Where fields lie, as the user says; an empty path says that there is none.
        reading: What the user says beside.
    """
    columns: Columns = {name: column for name, column in named.items() if column}
    nowhere = {name for name, column in named.items() if not column}
    suggested, labels = fmt.suggest(keys, columns) or ({}, {})
    if labels and not reading.labels:
        reading = replace(reading, labels=labels, labels_found=True)
    columns = {name: column for name, column in suggested.items() if name not in keys} | columns
    found = _Fields(fmt, keys, nowhere, columns)
    needed = min(fmt.needs, key=found.cost)
    found.take(needed)
    rivals = found.rivals(needed, named)
    anywhere = {name for need in fmt.needs for name in need}
    found.take([name for name in fmt.names if name not in anywhere])
    taken = found.taken()
    paths = [path for name, column in columns.items() if name in fmt.names for path in paths_of(column)]
    own = {name for name in fmt.names if name not in columns and found.has(name)}
    read = own | {path for path in paths if path in keys}
    entered: dict[str, set[str]] = {}
    for first, _, rest in (path.partition(".") for path in paths if path not in keys):
        if first in keys and first not in read:
            entered.setdefault(first, set()).add(rest)
    return Plan(
        fmt,
        reading,
        columns,
        tuple(key for key in keys if key not in columns and ((key in taken and key in fmt.names) or key in nowhere)),
        needed,
        tuple(name for name in needed if not found.has(name)),
        rivals,
        tuple(key for key in keys if key not in read and key not in entered),
        {key: frozenset(rests) for key, rests in entered.items()},
        tuple(pair for pair in fmt.alternatives if all(map(found.has, pair))),
        tuple(name for name in _SPOKEN if name in fmt.names and found.has(name)) if fmt.of_a_turn is not None else (),
        tuple(filter(found.has, fmt.unread)),
    )


class _Fields:
    """The fields of a format among a row's keys; what is taken is added to the columns."""

    def __init__(self, fmt: Format[Any], keys: Collection[str], nowhere: Collection[str], columns: Columns) -> None:
        self._names = fmt.names
        self._keys = keys
        self._nowhere = nowhere
        self._columns = columns

    def taken(self) -> set[str]:
        """Keys that stand for fields of other names."""
        return {path for name, column in self._columns.items() for path in paths_of(column) if path != name}

    def has(self, name: str) -> bool:
        """Whether the field is there by its own name, or was found."""
        if name in self._columns:
            return True
        return name in self._keys and name not in self._nowhere and name not in self.taken()

    def aliases(self, name: str) -> list[str]:
        """Keys that may be the field, those first that are no field's own name."""
        if name in self._nowhere:
            return []
        taken = self.taken()
        found = [alias for alias in self._names[name] if alias in self._keys and alias not in taken]
        return sorted(found, key=lambda alias: alias in self._names)

    def cost(self, need: Sequence[str]) -> tuple[int, int, int]:
        """How badly the keys meet a need: what is lost, how little it says, and what has to be borrowed."""
        away = [(name, self.aliases(name)) for name in need if not self.has(name)]
        borrowed = sum(bool(aliases) and aliases[0] in self._names for _, aliases in away)
        return sum(not aliases for _, aliases in away), -len(need), borrowed

    def take(self, names: Sequence[str]) -> None:
        """Find fields by their other names."""
        for name in names:
            if not self.has(name) and (aliases := self.aliases(name)):
                self._columns[name] = aliases[0]

    def rivals(self, needed: Sequence[str], named: Collection[str]) -> dict[str, tuple[str, ...]]:
        """Keys of which more than one may be a needed field that was taken by another name."""
        rivals = {}
        for name in needed:
            column = self._columns.get(name)
            if name in named or not isinstance(column, str) or column in self._names or column not in self._names[name]:
                continue
            others = [alias for alias in self.aliases(name) if alias not in self._names]
            if name == "prompt" and "instruction" in self._names and self.has("instruction"):
                others.append("instruction")
            if others:
                rivals[name] = (column, *others)
        return rivals


def look_up(row: Any, path: str) -> Any:
    """What lies at a path: a key, or keys and places in lists with dots between; else ``MISSING``."""
    if path in row:
        return row[path]
    value = row
    for key in path.split("."):
        if isinstance(value, dict) and key in value:
            value = value[key]
        elif isinstance(value, list) and key.isdecimal() and int(key) < len(value):
            value = value[int(key)]
        else:
            return MISSING
    return value


def _unread_within(value: Any, paths: Collection[str], where: str) -> Iterator[str]:
    """Where something lies in a value beside the parts at some paths."""
    members = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, member in members:
        place = f"{where}.{key}"
        within = [rest for first, _, rest in (path.partition(".") for path in paths) if first == str(key)]
        if within and all(within):
            yield from _unread_within(member, within, place)
        elif not within and says_something(member):
            yield place


def shown(column: Column) -> str:
    """A column for messages."""
    return column if isinstance(column, str) else " + ".join(column)
