"""Files of prompts: what is asked in rows of any format that the converter reads, each prompt once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

from dpo_cli.core.data_params import PreferenceSource, SftSource
from dpo_cli.core.errors import DataError
from dpo_cli.data.formats.base import Reading
from dpo_cli.data.formats.content import read_tools
from dpo_cli.data.formats.detect import RowReader, UnknownFormatError
from dpo_cli.data.formats.prompts import CONVERSATION_NAMES, read_prompt, tools_of
from dpo_cli.data.plan import Treatment, find_files, plan_of
from dpo_cli.data.problem import RowProblem, kind_of
from dpo_cli.data.reading.files import read_records
from dpo_cli.data.schema import Messages, content_id, with_tools
from dpo_cli.data.votes import UNDONE

_MOST_PROBLEMS = 5


@dataclass
class PromptFile:
    """The prompts of a file, each once, in its order, by content id.

    Attributes:
        path: The file, or the folder of several.
        prompts: By content id.
        rows: File and row, from 0, of each.
        num_read: Rows in all.
        left_out: Rows of data that hold no prompt, and why.
    """

    path: Path
    prompts: dict[str, Messages] = field(default_factory=dict)
    rows: dict[str, tuple[Path, int]] = field(default_factory=dict)
    num_read: int = 0
    left_out: list[tuple[Path, int, RowProblem]] = field(default_factory=list)


def read_prompts(path: Path) -> PromptFile:
    """The prompts of a file, or of the JSON lines in a folder, whose rows may be of any format of the data.

    Rows have ``prompt`` (text or messages), ``instruction``, or messages that end with the user's; or they are data,
    and those that would be left out of it are left out here, too.

    Raises:
        DataError: A file cannot be read or there are no rows, or a row of no known format has no prompt; it names the
            first of them.
    """
    found = PromptFile(path)
    problems: list[tuple[Path, int, RowProblem]] = []
    for file in find_files(PreferenceSource(path=str(path))):
        reader = cache(partial(_reader_of, file))
        for record in read_records(file):
            if isinstance(record.value, dict) and record.value.get("vote") == UNDONE:
                continue  # it takes back a vote, and holds no prompt
            found.num_read += 1
            try:
                prompts = _prompts_of(record.value, reader)
            except _LeftOut as problem:
                found.left_out.append((file, record.row, problem))
            except RowProblem as problem:
                problems.append((file, record.row, problem))
            else:
                for messages in prompts:
                    id = content_id(messages)
                    found.prompts.setdefault(id, messages)
                    found.rows.setdefault(id, (file, record.row))
    refuse_rows(problems if found.prompts else [*problems, *found.left_out])
    if not found.prompts:
        raise DataError(f"{path} has no rows: there is nothing to answer")
    return found


class _LeftOut(RowProblem):
    """What is wrong with a row of data."""


def _prompts_of(row: Any, reader: Callable[[], RowReader | None]) -> list[Messages]:
    if not isinstance(row, dict):
        raise RowProblem("bad_row", f"must be an object with a 'prompt', got {kind_of(row)}")
    talk = next((row[name] for name in CONVERSATION_NAMES if "prompt" not in row and name in row), None)
    try:
        messages = read_prompt(row if talk is None else {**row, "prompt": talk}, Reading())
        prompts = [with_tools(messages, tools) if (tools := read_tools(tools_of(row))) else messages]
    except RowProblem:
        if (of_data := reader()) is None:
            raise
        try:
            _, content = of_data.read(row)
        except RowProblem as problem:
            raise _LeftOut(problem.reason, problem.detail) from None
        parts = [part for _, part in content] if isinstance(content, Iterator) else [content]
        prompts = [part.prompt for part in parts if not isinstance(part, RowProblem)]
    if any(not any(message["content"].strip() for message in messages) for messages in prompts):
        raise RowProblem("empty_prompt", "asks nothing: 'prompt' is empty")
    return prompts


def _reader_of(path: Path) -> RowReader | None:
    """The reader of a file's preferences or instructions; None where its rows are of no known format."""
    for source in (PreferenceSource(path=str(path)), SftSource(path=str(path))):
        with suppress(UnknownFormatError):
            return plan_of(source, path, Treatment({}, 0.5))[0].reader()
    return None


def refuse_rows(problems: Sequence[tuple[Path, int, RowProblem]]) -> None:
    """Refuse files by their first bad rows: file, row and problem of each; nothing where there are none.

    Raises:
        DataError: There are some.
    """
    lines = [f"{path}, row {row} {problem}; correct the row, or take it out" for path, row, problem in problems]
    more = len(lines) - _MOST_PROBLEMS
    if lines:
        raise DataError([*lines[:_MOST_PROBLEMS], *([f"{more} more rows are like that"] if more > 0 else [])])
