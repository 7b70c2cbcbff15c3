"""One block of a file, from records to canonical rows: a pure function, so that processes can share the work.

What is made lies in files beside each other, one set a block: the rows as Arrow, and their
digests, by which :mod:`dpo_cli.data.repeats` finds rows that repeat or contradict each other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dpo_cli.data.checks import (
    DESCRIPTIONS,
    FORMAT_CHECK,
    NO_FAULTS,
    ROW_REASONS,
    SAMPLED_OUT,
    check_example,
    has_chat_markers,
    is_empty,
    reason_to_drop,
)
from dpo_cli.data.formats.detect import RowReader
from dpo_cli.data.plan import BlockPlan
from dpo_cli.data.problem import RowProblem
from dpo_cli.data.reading.base import Block, Lines
from dpo_cli.data.reading.json_text import parse_lines
from dpo_cli.data.schema import (
    MESSAGES,
    PREFERENCE_SCHEMA,
    RANKING_SCHEMA,
    SFT_SCHEMA,
    TOOLS,
    Example,
    Messages,
    PreferenceExample,
    RankingExample,
    SftExample,
    deciding_part,
    full_schema,
    is_plain,
    joint_id,
    part_id,
    position_of,
    table_of,
    text_of,
)

DIGESTS = np.dtype(
    [
        ("id_high", "<u8"),
        ("id_low", "<u8"),
        ("group", "<u8"),
        ("opening", "<u8"),  # or of the whole prompt, where that decides the split
        ("sides", "<u8"),  # of the two answers, whatever their order
        ("flipped", "u1"),  # in which order they are
        ("held_out", "u1"),
        ("row", "<i8"),  # in the block; made global when the block comes back
    ]
)
"""What is remembered of an example to compare it with all others."""

_WHERE_TO = [("held_out", pa.bool_()), ("copies", pa.int32())]
_WHERE_FROM = [("row", pa.int64()), ("line", pa.int64()), ("part", pa.string()), ("ranking", pa.int32())]
_SCHEMAS = {
    "sft": pa.schema([*SFT_SCHEMA, *_WHERE_TO, *_WHERE_FROM]),
    "preference": pa.schema([*PREFERENCE_SCHEMA, *_WHERE_TO, *_WHERE_FROM]),
    "ranking": pa.schema([*RANKING_SCHEMA, *_WHERE_TO]),
}
"""Columns of a block's files."""
_FACTS = tuple("id one other group opening held_out copies row line part ranking prompt".split())
_COLUMNS = {
    "sft": (*_FACTS, "completion"),
    "preference": (*_FACTS, "chosen", "rejected", "chosen_score", "rejected_score"),
}
"""What is known of an example, in the order in which it is collected."""


@dataclass
class Reject:
    """A row, or a part of one, that is left out.

    Attributes:
        row: Its number in the file, from 0.
        line: Its line in the file, where it has lines.
        part: The part of the row; empty: the whole of it.
        check: The check by which it is left out.
        reason: Why, in short; mostly the check's name.
        detail: What is wrong, without content.
    """

    row: int
    line: int | None
    part: str
    check: str
    reason: str
    detail: str


@dataclass(kw_only=True)
class RowCounts:
    """How many rows, by name.

    Attributes:
        formats: Of which format.
        unread: With something in a column that nobody read.
        unwrapped: With a conversation as a chat template renders it, which was taken apart.
        rendered: With one that ``unwrap`` would take apart.
    """

    formats: Counter[str] = field(default_factory=Counter)
    unread: Counter[str] = field(default_factory=Counter)
    unwrapped: Counter[str] = field(default_factory=Counter)
    rendered: Counter[str] = field(default_factory=Counter)


@dataclass
class BlockResult(RowCounts):
    """What became of a block.

    Attributes:
        num_rows: Rows in it.
        num_examples: Rows in its Arrow file.
        rejects: What is left out so far.
        found: For each check, the rows of the block that fail it and are kept.
        digests: Of its examples (:data:`DIGESTS`).
        num_ties: Pairs of ranked answers that are tied.
    """

    num_rows: int = 0
    num_examples: int = 0
    rejects: list[Reject] = field(default_factory=list)
    found: dict[str, list[int]] = field(default_factory=dict)
    digests: np.ndarray = field(default_factory=lambda: np.empty(0, DIGESTS))
    num_ties: int = 0


def convert_block(
    plan: BlockPlan, block: Block, folder: Path, index: int, reader: RowReader | None = None
) -> BlockResult:
    """Convert a block and write its rows.

    Args:
        plan: How.
        block: Lines or records. Row numbers in the result count from the block's first row.
        folder: Where its files go.
        index: The block's number, which names its files.
        reader: The plan's reader, where the caller keeps one.

    Raises:
        DataError: A line is no JSON; its row number counts from the block's start.
    """
    reader = reader or plan.reader()
    records = parse_lines(plan.path, block) if isinstance(block, Lines) else block
    first_row = records[0].row if records else 0
    rows = _Rows(plan)
    result = rows.result
    for record in records:
        rows.place(record.row - first_row, record.line)
        try:
            fmt, found = reader.read(record.value)
            result.formats[fmt.name] += 1
            if isinstance(found, Example):
                rows.add(found, "")
            else:
                for part, example in found:
                    rows.add_part(example, part)
        except RowProblem as problem:
            rows.refuse(problem, "")
        if rows.is_marked and not plan.reading.unwrap:
            template, bare = reader.unwrapped(record.value)
            if template and not any(map(_is_marked, bare)):
                result.rendered[template] += 1
    rows.write(folder, index)
    result.num_rows = len(records)
    result.unread, result.unwrapped = reader.take_unread(), reader.take_unwrapped()
    return result


class _Rows:
    """The rows of a block."""

    def __init__(self, plan: BlockPlan) -> None:
        self._plan = plan
        self.result = BlockResult()
        self.is_marked = False  # whether the row at hand holds marks of chat templates
        self._rows: list[tuple[Any, ...]] = []  # as _COLUMNS
        self._rankings: list[dict[str, Any]] = []
        self._row: int = 0
        self._line: int | None = None
        self._prompt: Messages | None = None
        self._prompt_facts: tuple[str, str, bool, int] = ("", "", False, 1)

    def place(self, row: int, line: int | None) -> None:
        """Where the examples that follow come from."""
        self._row, self._line, self.is_marked = row, line, False

    def refuse(self, problem: RowProblem, part: str) -> None:
        """Leave out what does not fit its format."""
        check = "" if problem.reason in NO_FAULTS else ROW_REASONS.get(problem.reason, FORMAT_CHECK)
        self._reject(part, problem.reason, problem.detail, check)

    def _reject(self, part: str, reason: str, detail: str, check: str = "") -> None:
        self.result.rejects.append(Reject(self._row, self._line, part, check or reason, reason, detail))

    def add_part(self, example: Any, part: str) -> None:
        """Add one of several things that a row holds."""
        try:
            if isinstance(example, RowProblem):
                raise example
            self.add(example, part)
        except RowProblem as problem:
            self.refuse(problem, part)

    def add(self, example: Any, part: str) -> None:
        """Add an example, or the pairs of a ranking."""
        if isinstance(example, RankingExample):
            self._add_ranking(example, part)
        else:
            self._add_example(example, part, -1)

    def _add_ranking(self, found: RankingExample, part: str) -> None:
        places, unfit = fit_answers(found, self._plan.treatment.policies)
        before = f"{part}, " if part else ""
        for place, check, detail in unfit:
            self._reject(f"{before}answer {place + 1}", check, detail)
        if len(places) < 2:
            return
        example = found.only(places)
        pairs = example.pairs(self._plan.reading.pairs)
        if not pairs:
            raise RowProblem("tie", f"is a tie: no two of its {len(places)} answers differ in rank")
        _, _, held_out, copies = self._facts_of(example.prompt)
        self.result.num_ties += len(places) * (len(places) - 1) // 2 - len(example.pairs("all"))
        self._rankings.append({**_row_of(example, self._plan.path.name), "held_out": held_out, "copies": copies})
        ranking = len(self._rankings) - 1
        for better, worse in pairs:
            name = f"{before}answers {places[better] + 1} > {places[worse] + 1}"
            self._add_example(example.pair(better, worse), name, ranking)

    def _add_example(self, example: SftExample | PreferenceExample, part: str, ranking: int) -> None:
        found = check_example(example)
        if found:
            self.is_marked = self.is_marked or "chat_markers" in found
            reason = reason_to_drop(found, self._plan.treatment.policies)
            if reason is not None:
                self._reject(part, reason, DESCRIPTIONS[reason])
                return
            for name in found:
                self.result.found.setdefault(name, []).append(self._row)
        try:
            group, opening, held_out, copies = self._facts_of(example.prompt)
            if not copies:
                self._reject(part, SAMPLED_OUT, "left out by the weight of its source")
                return
            answers: tuple[Any, ...]
            if isinstance(example, SftExample):
                ids = (part_id(example.completion), group)
                example_id = joint_id(group, ids[0])
                answers = (example.completion,)
            else:
                ids = (part_id(example.chosen), part_id(example.rejected))
                example_id = joint_id(group, *ids)
                answers = (example.chosen, example.rejected, example.chosen_score, example.rejected_score)
        except UnicodeEncodeError:
            raise RowProblem("bad_unicode", "has half of a surrogate pair, which is no text") from None
        place = (group, opening, held_out, copies, self._row, self._line, part, ranking)
        self._rows.append((example_id, *ids, *place, example.prompt, *answers))

    def _facts_of(self, prompt: Messages) -> tuple[str, str, bool, int]:
        """The ids of a prompt and of what decides its split, that split, and how often its rows are taken.

        They are remembered for the other pairs of a ranking.
        """
        if prompt is self._prompt:
            return self._prompt_facts
        plan = self._plan
        group = part_id(prompt)
        opening = deciding_part(prompt, plan.treatment.split_by)
        opening_id = group if opening is prompt else part_id(opening)
        held_out = position_of(opening_id) < plan.treatment.eval_fraction
        weight = 1 if held_out else plan.source.weight
        copies = 1 if weight == 1 else int(weight) + (position_of(group[16:]) < weight % 1)
        self._prompt, self._prompt_facts = prompt, (group, opening_id, held_out, copies)
        return self._prompt_facts

    def write(self, folder: Path, index: int) -> None:
        """Write the files."""
        if self._rows:
            columns: dict[str, Any] = dict(zip(_COLUMNS[self._plan.kind], zip(*self._rows, strict=True), strict=True))
            columns["source"] = [self._plan.path.name] * len(self._rows)
            write_arrow(examples_file(folder, index), _table_of(columns, _SCHEMAS[self._plan.kind]))
            self.result.num_examples, self.result.digests = len(self._rows), _digests_of(columns)
        if self._rankings:
            write_arrow(rankings_file(folder, index), table_of(self._rankings, _SCHEMAS["ranking"]))


def _is_marked(example: Any) -> bool:
    """Whether a text of an example holds marks of a chat template; a problem in its place does, too."""
    if not isinstance(example, Example):
        return True
    return any(has_chat_markers(text_of(messages)) for messages in (example.prompt, *example.answers))


def fit_answers(example: RankingExample, policies: Mapping[str, str]) -> tuple[list[int], list[tuple[int, str, str]]]:
    """Which answers of a ranking stay: none that is empty, or says what a better one says, where these are dropped.

    Returns:
        The places that stay, ascending; and of the others the place, the check and what is wrong.
    """
    places: list[int] = []
    unfit: list[tuple[int, str, str]] = []
    seen: dict[str, int] = {}
    for place, completion in enumerate(example.completions):
        text = text_of(completion).strip()
        if is_empty(completion) and policies["empty_rejected"] != "keep":
            unfit.append((place, "empty_rejected", "has an empty answer"))
        elif text in seen and policies["equal_sides"] != "keep":
            unfit.append((place, "equal_sides", f"has the text of answer {seen[text] + 1} again"))
        else:
            places.append(place)
            seen.setdefault(text, place)
    return places, unfit


def _table_of(columns: dict[str, Any], schema: pa.Schema) -> pa.Table:
    """A block's rows; in full, where a message has more than role and content."""
    if not all(is_plain(*columns[column.name]) for column in schema if column.type == MESSAGES):
        schema = full_schema(schema)
        columns[TOOLS] = [prompt[0].get(TOOLS) for prompt in columns["prompt"]]
    return pa.table([pa.array(columns[column.name], column.type) for column in schema], schema=schema)


def _digests_of(columns: Mapping[str, Sequence[Any]]) -> np.ndarray:
    """What is remembered of a block's rows (:data:`DIGESTS`)."""

    def words(name: str) -> np.ndarray:
        return np.frombuffer(bytes.fromhex("".join(columns[name])), "<u8").reshape(-1, 2)

    digests = np.empty(len(columns["id"]), DIGESTS)
    digests["id_high"], digests["id_low"] = words("id").T
    one, other = words("one")[:, 0], words("other")[:, 0]
    digests["sides"], digests["flipped"] = one ^ other, one > other
    for name in ("group", "opening"):
        digests[name] = words(name)[:, 0]
    for name in ("held_out", "row"):
        digests[name] = columns[name]
    return digests


def _row_of(example: RankingExample, source: str) -> dict[str, Any]:
    try:
        return example.row(source)
    except UnicodeEncodeError:
        raise RowProblem("bad_unicode", "has half of a surrogate pair, which is no text") from None


# --- its files ----------------------------------------------------------------------------------


def examples_file(folder: Path, index: int) -> Path:
    """The rows of a block."""
    return folder / f"{index:08d}.arrow"


def rankings_file(folder: Path, index: int) -> Path:
    """The rankings of a block, where it has any."""
    return folder / f"{index:08d}.rankings.arrow"


def write_arrow(path: Path, table: pa.Table) -> None:
    """Write rows or rankings of a block."""
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)


def read_arrow(path: Path) -> pa.Table:
    """The rows or rankings of a block."""
    with pa.OSFile(str(path)) as file:
        return pa.ipc.open_file(file).read_all()


def is_full(path: Path) -> bool:
    """Whether a block's file has a place for tools, calls and reasoning."""
    with pa.OSFile(str(path)) as file:
        return TOOLS in pa.ipc.open_file(file).schema.names


def widen(path: Path) -> None:
    """Give a block's file that place, as a file beside it has it."""
    table = read_arrow(path)
    write_arrow(path, table_of(table.to_pylist(), full_schema(table.schema)))
