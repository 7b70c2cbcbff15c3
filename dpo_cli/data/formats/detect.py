"""Which format a row has, and where its fields lie: named by the user, or found and explained."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from dpo_cli.core.errors import DataError, ParamsError
from dpo_cli.data.formats.advice import columns_to_fill_in, columns_to_say, not_objects, turned_table
from dpo_cli.data.formats.base import (
    Column,
    Columns,
    Format,
    Reading,
    paths_of,
)
from dpo_cli.data.formats.columns import MISSING, Plan, look_up, plan_of, shown
from dpo_cli.data.formats.content import is_turn, media_keys, read_tools, refuse_media
from dpo_cli.data.formats.instructions import ANSWER_NAMES, unpaired_label
from dpo_cli.data.formats.prompts import CONVERSATION_NAMES, tools_of
from dpo_cli.data.formats.rendered import unwrap, unwrap_row
from dpo_cli.data.problem import RowProblem, kind_of, shown_name
from dpo_cli.data.schema import RawRow, with_tools

_PLANS_KEPT = 2000
"""Rows whose keys are data must not fill the memory."""


class UnknownFormatError(DataError):
    """The file is sound, but no format fits its rows."""


class RowReader:
    """Reads the rows of one source, each in the format that fits it.

    Args:
        formats: The formats a row may have, in the order in which they are tried.
        name: A format's name, or ``auto``.
        columns: Where fields lie, as the user says; an empty path says that there is no such field.
        reading: What the source says beside.

    Raises:
        ParamsError: ``columns`` names a field that no format has.
    """

    def __init__(
        self, formats: Sequence[Format[Any]], name: str, columns: Mapping[str, Column], reading: Reading
    ) -> None:
        self._formats = [fmt for fmt in formats if name == fmt.name or (name == "auto" and not fmt.by_name)]
        self._columns = columns
        # a format that is named is not questioned
        self._reading = replace(reading, in_order=reading.in_order or name == "kwise")
        self._unread: Counter[tuple[str, ...]] = Counter()
        self._unwrapped: Counter[str] = Counter()
        self._plans: dict[tuple[str, ...], tuple[list[Plan], tuple[str, ...]]] = {}
        self._main: Format[Any] | None = None
        known = {field for fmt in self._formats for field in fmt.names}
        for field in columns:
            if field not in known:
                close = difflib.get_close_matches(field, known, n=1)
                hint = f"; did you mean {close[0]}?" if close else f"; there are {', '.join(sorted(known))}"
                of = "" if name == "auto" else f" of the format {name}"
                raise ParamsError(
                    f"columns.{field} is not a field{of}{hint} (the field is on the left, the file's name on the right)"
                )

    def read(self, row: RawRow) -> tuple[Format[Any], Any]:
        """The row's format and what it reads: an example, or an iterator of parts.

        Raises:
            RowProblem: The row fits no format.
        """
        if type(row) is not dict:
            raise RowProblem("not_an_object", f"must be a JSON object, got {kind_of(row)}")
        plan, found, made_by = self._taken(row, unwraps=self._reading.unwrap)
        try:
            content = plan.format.read(found, plan.reading)
            tools = read_tools(tools_of(found)) if "tools" in plan.format.names else None
        except RowProblem as problem:
            raise plan.named(problem) from None
        if plan.may_leave and (unread := plan.unread_in(row, found)):
            self._unread[unread] += 1
        if made_by:
            self._unwrapped[made_by] += 1
        return plan.format, content if tools is None else _with_tools(content, tools)

    def unwrapped(self, row: RawRow) -> tuple[str, list[Any]]:
        """What ``unwrap: true`` would make of a row, and the template of its texts; empty: it would change nothing."""
        try:
            plan, found, made_by = self._taken(row, unwraps=True)
            content = plan.format.read(found, plan.reading) if made_by else ()
            parts = [part for _, part in content] if isinstance(content, Iterator) else [content]
        except RowProblem:
            return "", []
        return (made_by, parts) if made_by else ("", [])

    def _taken(self, row: RawRow, *, unwraps: bool) -> tuple[Plan, RawRow, str]:
        """How a row is read, the row with its fields under their own names, and the template that was taken off it.

        Raises:
            RowProblem: It holds media, or may be read in two ways.
        """
        made_by = ""
        keys = tuple(row)
        plans, media = self._plans.get(keys) or self._plans_of(keys)
        if media:
            refuse_media(row, media)
        for plan in plans:
            if not plan.fits:
                continue
            found = plan.rename(row)
            if unwraps:
                found, made_by = unwrap_row(found, plan.format.names)
            fmt = plan.format
            if (fmt.matches is None or fmt.matches(found)) and (fmt.weak is None or not self._is_doubtful(fmt, found)):
                return plan, found, made_by
        plan = plans[self._formats.index(self._main) if self._main else 0]
        found, made_by = _renamed(plan, row, unwraps=unwraps)
        if plan.rivals:
            field, rivals = next(iter(plan.rivals.items()))
            raise RowProblem("two_fields", f"{' and '.join(rivals)} may both be {field}; say which in columns")
        return plan, found, made_by

    def take_unread(self) -> Counter[str]:
        """How many of the rows read since the last call have something in a column that nobody read, by column."""
        unread: Counter[str] = Counter()
        for columns, count in self._unread.items():
            unread.update(dict.fromkeys(columns, count))
        self._unread.clear()
        return unread

    def take_unwrapped(self) -> Counter[str]:
        """How many of the rows read since the last call held a conversation as a template renders it, by template."""
        unwrapped, self._unwrapped = self._unwrapped, Counter()
        return unwrapped

    def _plans_of(self, keys: tuple[str, ...]) -> tuple[list[Plan], tuple[str, ...]]:
        """How rows with these keys are read as each format, and their fields that hold pictures and the like.

        Those that the user names as text are none.
        """
        if keys in self._plans:
            return self._plans[keys]
        named = {path for column in self._columns.values() for path in paths_of(column)}
        plans = [plan_of(fmt, keys, self._columns, self._reading) for fmt in self._formats]
        known = plans, tuple(key for key in media_keys(keys) if key not in named)
        if len(self._plans) < _PLANS_KEPT:
            self._plans[keys] = known
        return known

    def _is_doubtful(self, fmt: Format[Any], row: RawRow) -> bool:
        """Whether the row is more likely one of the file's main format that lacks a field."""
        return fmt.weak is not None and self._main not in (None, fmt) and fmt.weak(row)

    # --- a whole file -------------------------------------------------------------------------

    def detect(self, file: Any, rows: Sequence[Any]) -> str:
        """Find the formats of a file's first rows, and say why.

        Rows that fit no format are read as the most frequent one, whose reader says what is wrong.

        Raises:
            UnknownFormatError: No row fits any format, or reading them as one would be a guess.
        """
        objects = [row for row in rows if isinstance(row, dict)]
        if len(rows) == 1 and objects and (turned := turned_table(objects[0])):
            raise UnknownFormatError(f"{file}: {turned}")
        self._refuse_unknown_paths(file, objects)
        self._main = None
        found: dict[str, list[tuple[Plan, RawRow]]] = {}
        for plan, row in filter(None, map(self._choose, objects)):
            found.setdefault(plan.format.name, []).append((plan, row))
        if not found:
            raise UnknownFormatError(f"{file}: {self._why_none(rows, objects)}")
        best = max(found, key=lambda name: len(found[name]))
        self.use_fallback(best)
        for name in [name for name in found if name != best]:
            found[name] = [(plan, row) for plan, row in found[name] if not self._is_doubtful(plan.format, row)]
        for name, read in found.items():
            for plan, alike in _by_reading(read):
                if doubt := plan.format.doubt([plan.without_sources(row) for row in alike], plan.reading):
                    doubt = plan.in_words_of_the_file(doubt)
                    raise UnknownFormatError(f"{file}: its rows look like {name}, but {doubt}")
        told = sorted((read for read in found.values() if read), key=len, reverse=True)
        rest = len(rows) - sum(map(len, told))
        unread = f"; {rest} of them fit no format and are read as {best}" if rest else ""
        return "; ".join(_explain(read, len(rows)) for read in told) + unread

    def use_fallback(self, name: str) -> None:
        """Read rows that fit no format as this one."""
        self._main = next(fmt for fmt in self._formats if fmt.name == name)

    @property
    def fallback(self) -> str:
        """The format of rows that fit none."""
        return (self._main or self._formats[0]).name

    def _choose(self, row: RawRow) -> tuple[Plan, RawRow] | None:
        for plan in filter(lambda plan: plan.fits, self._plans_of(tuple(row))[0]):
            try:
                renamed, _ = _renamed(plan, row, unwraps=self._reading.unwrap)
            except RowProblem:
                continue
            if plan.format.fits(renamed):
                return plan, renamed
        return None

    # --- what to say where nothing fits ---------------------------------------------------------

    def _refuse_unknown_paths(self, file: Any, objects: Sequence[Mapping[str, Any]]) -> None:
        for field, column in self._columns.items():
            for path in filter(None, paths_of(column)):
                if objects and all(look_up(row, path) is MISSING for row in objects):
                    close = difflib.get_close_matches(path, list(_paths(objects[0])), n=1)
                    hint = f"; did you mean {close[0]}?" if close else ""
                    raise UnknownFormatError(
                        f"{file}: columns.{field} names {path!r}, which none of the first {len(objects)} rows has{hint}"
                    )

    def _why_none(self, rows: Sequence[Any], objects: Sequence[dict[str, Any]]) -> str:
        if not objects:
            return not_objects(rows[0]) if rows else "it has no rows"
        first = objects[0]
        label = unpaired_label(objects)
        if label and any(name in first for name in (*ANSWER_NAMES, *CONVERSATION_NAMES)):
            return (
                f"its rows are single answers that {label} calls good or bad (unpaired, as KTO takes them);"
                f" {_how_to_take(first, label)}; the other losses need two answers to the same prompt, chosen and"
                " rejected"
            )
        known = ", ".join(fmt.name for fmt in self._formats)
        fields = ", ".join(key if key == key.strip() else repr(key) for key in first) or "no fields"
        told = [f"unknown format: its first row has {fields}", *self._what_to_say(objects)]
        lists = [key for key, value in first.items() if isinstance(value, list) and any(map(_is_row, value[:1]))]
        if lists and len(rows) == 1:
            told.append(f"if the rows are nested, set records: {lists[0]}")
        texts = [(key, unwrap(value)) for key, value in first.items() if isinstance(value, str)]
        for key, conversation in texts:
            if conversation and any("messages" in fmt.names for fmt in self._formats):
                told.append(
                    f"{shown_name(key)} holds conversations as {conversation.template} renders them, which"
                    f" columns: {{messages: {key}}} and unwrap: true take apart"
                )
        return "; ".join([*told, f"known formats (docs/data.md): {known}"])

    def _what_to_say(self, objects: Sequence[RawRow]) -> Iterator[str]:
        """What keeps the rows from a format, and the columns that would help."""
        alike = [row for row in objects if row.keys() == objects[0].keys()]
        closest, fmt = self._closest(objects[0])
        if closest:
            yield closest
        columns = columns_to_say(
            self._formats,
            alike,
            self._columns,
            self._reading,
            lambda fmt, named: self._would_read(alike[0], fmt, named),
        )
        if not columns and not closest.startswith("read as"):
            columns = columns_to_fill_in(fmt, self._formats, alike, self._columns, self._reading)
        if columns:
            yield f"say which field is which, such as columns: {columns}"

    def _would_read(self, row: RawRow, fmt: Format[Any], columns: Columns) -> bool:
        """Whether a row is read as a format where these columns are named."""
        reader = RowReader(self._formats, "auto", columns, self._reading)
        plan, renamed = reader._choose(row) or (None, row)
        if plan is None or plan.format is not fmt:
            return False
        try:
            found = fmt.read(renamed, plan.reading)
            return not isinstance(found, Iterator) or bool(list(found))
        except RowProblem as problem:
            return problem.reason == "tie"

    def _closest(self, row: RawRow) -> tuple[str, Format[Any] | None]:
        """What keeps the row from the format that comes next to it, and that one, where it lacks fields."""
        plans, _ = self._plans_of(tuple(row))
        for plan in plans:
            if plan.rivals and not plan.missing:
                field, rivals = next(iter(plan.rivals.items()))
                return f"as {plan.format.name}, {' and '.join(rivals)} may both be {field}", plan.format
        for plan in plans:
            if plan.fits:
                try:
                    plan.format.read(plan.rename(row), plan.reading)
                except RowProblem as problem:
                    if problem.reason != "missing_field" and (problem.reason, plan.needed[-1]) != (
                        "not_a_list",
                        "output",
                    ):
                        return f"read as {plan.format.name}: {plan.named(problem).detail}", None
        plain = {key.strip().lower(): key for key in row}
        for plan in plans:
            if plan.missing and all(name in plain for name in plan.missing):
                spelled = ", ".join(repr(plain[name]) for name in plan.missing)
                return f"{spelled} must be spelled {', '.join(plan.missing)}", plan.format
        plan = min(plans, key=lambda plan: (len(plan.missing) or 9, -len(plan.needed)))
        if 0 < len(plan.missing) < len(plan.needed) - 1:
            told = f"{plan.format.name} comes next to it, which needs {' and '.join(plan.missing)}, too"
            return told, plan.format
        return "", None


def _renamed(plan: Plan, row: RawRow, *, unwraps: bool) -> tuple[RawRow, str]:
    """A row with its fields under their own names, and the template that was taken off it."""
    found = plan.rename(row)
    return unwrap_row(found, plan.format.names) if unwraps else (found, "")


def _with_tools(found: Any, tools: str) -> Any:
    """What was read, with the tools in its prompts."""
    if isinstance(found, Iterator):
        return ((part, _with_tools(example, tools)) for part, example in found)
    return found if isinstance(found, RowProblem) else replace(found, prompt=with_tools(found.prompt, tools))


def _by_reading(read: Sequence[tuple[Plan, RawRow]]) -> list[tuple[Plan, list[RawRow]]]:
    """Rows of a format by what their fields' names say beside it, such as what labels mean, with a plan of each."""
    groups: list[tuple[Plan, list[RawRow]]] = []
    for plan, row in read:
        rows = next((rows for other, rows in groups if other.reading == plan.reading), None)
        if rows is None:
            groups.append((plan, rows := []))
        rows.append(row)
    return groups


def _is_row(value: Any) -> bool:
    return isinstance(value, dict) and not is_turn(value)


def _paths(row: Mapping[str, Any], before: str = "") -> Iterator[str]:
    """The keys of a row, and those of the objects in it."""
    for key, value in row.items():
        yield f"{before}{key}"
        if isinstance(value, dict) and not before:
            yield from _paths(value, f"{key}.")


def _explain(read: Sequence[tuple[Plan, RawRow]], num_rows: int) -> str:
    """What is told of the rows of one format."""
    plan, row = read[0]
    columns: Columns = {}
    for other, _ in read:
        columns = {**other.columns, **columns}
    moved = ", ".join(f"{field} <- {shown(column)}" for field, column in columns.items() if field != column)
    told = f"{plan.format.name}: {len(read)} of the first {num_rows} rows have {plan.format.fields}"
    note = plan.format.note(row, plan.reading)
    return f"{told}{f' ({moved})' if moved else ''}{f'; {note}' if note else ''}"


def _how_to_take(row: RawRow, label: str) -> str:
    """How single answers that a label calls good or bad are learned from."""
    if not any(name in row for name in ANSWER_NAMES):
        return "train.loss kto takes them with format: unpaired, as rows of prompt, completion and label"
    columns = "" if label == "label" else f" and columns: {{label: {label}}}"
    return f"to learn from them with train.loss kto say format: unpaired{columns}"
