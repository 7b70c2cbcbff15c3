"""Which files there are, and how the rows of each are read: by the source's settings and the file's first rows."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from dpo_cli.core.data_params import DataParams, PreferenceSource, SftSource, Source
from dpo_cli.core.errors import DataError, ParamsError
from dpo_cli.data.checks import without_stops
from dpo_cli.data.formats import PREFERENCE_FORMATS, SFT_FORMATS
from dpo_cli.data.formats.base import Reading
from dpo_cli.data.formats.detect import RowReader
from dpo_cli.data.formats.labels import label_text
from dpo_cli.data.formats.votes import Tally
from dpo_cli.data.reading.base import BrokenLines, missing
from dpo_cli.data.reading.files import read_records
from dpo_cli.data.votes import is_torn, unended_line

_DETECTION_ROWS = 100


@dataclass(frozen=True)
class Treatment:
    """What is done with rows.

    Attributes:
        policies: What to do with what each check finds (:class:`dpo_cli.core.data_params.DataChecks`).
        eval_fraction: Share of prompts held out.
        split_by: What of a prompt decides its split: its ``opening``, or the whole ``prompt``.
        rows_listed: Rows named for each check.
        listed: The check of which all rows are named.
    """

    policies: Mapping[str, str]
    eval_fraction: float
    split_by: str = "opening"
    rows_listed: int = 20
    listed: str | None = None

    @classmethod
    def of(cls, data: DataParams) -> Treatment:
        """What section data says."""
        return cls(data.checks.model_dump(), data.eval_fraction, data.split_by)

    def without_stops(self) -> Treatment:
        """The same for a look at the data: what would stop the conversion is left out."""
        return replace(self, policies=without_stops(self.policies))


@dataclass(frozen=True)
class BlockPlan:
    """All that decides what becomes of the blocks of one file; it travels to other processes.

    Attributes:
        path: The file.
        source: The source it is of.
        treatment: What is done with its rows; all of them go to one split where its fraction is 0 or 1.
        reading: What the source says beside the format, for readers.
        fallback: The format of rows that fit none.
    """

    path: Path
    source: Source
    treatment: Treatment
    reading: Reading
    fallback: str = ""

    @property
    def kind(self) -> str:
        """``sft`` or ``preference``."""
        return "sft" if isinstance(self.source, SftSource) else "preference"

    def reader(self) -> RowReader:
        """The reader of its rows."""
        formats = SFT_FORMATS if self.kind == "sft" else PREFERENCE_FORMATS
        reader = RowReader(formats, self.source.format, self.source.columns, self.reading)
        if self.fallback:
            reader.use_fallback(self.fallback)
        return reader


def find_files(source: Source) -> list[Path]:
    """The files of a source, in order: the one of its name, those of a pattern with * and ?, or a folder's JSON lines.

    Raises:
        DataError: A pattern matches none.
    """
    path = Path(source.path)
    if path.is_dir() and (found := sorted(path.glob("*.jsonl"))):
        return found
    if path.exists() or not any(mark in source.path for mark in "*?"):
        return [path]
    pattern = source.path.replace("[", "[[]")  # brackets are part of the name
    found = sorted(path for name in glob.glob(pattern) if (path := Path(name)).is_file())  # noqa: PTH207
    if not found:
        raise DataError(f"{source.path}: no file has such a name; put your data there, or name it in params.yaml")
    return found


def refuse_missing(data: DataParams) -> None:
    """Refuse settings that name files that are not there.

    Raises:
        DataError: With all of them.
    """
    problems: list[str] = []
    for source in {source.path: source for source in (*data.sft_sources, *data.preference_sources)}.values():
        try:
            problems += [str(missing(path)) for path in find_files(source) if not path.exists()]
        except DataError as error:
            problems += error.problems
    if problems:
        raise DataError(problems)


def tally_of(source: Source) -> Tally:
    """The votes of a source, of all its files together.

    Raises:
        DataError: A file cannot be read.
        ParamsError: The source names columns.
    """
    if source.columns:
        raise ParamsError(
            f"{source.path}: columns has no effect on votes, whose fields have their own names; leave it out"
        )
    return Tally(find_files(source), source.records)


def by_kind(sources: Sequence[Source]) -> Iterator[tuple[str, list[Source]]]:
    """The sources of instructions, then those of preferences, where there are some."""
    for kind in ("sft", "preferences"):
        if mine := [source for source in sources if isinstance(source, SftSource) == (kind == "sft")]:
            yield kind, mine


def num_bytes(sources: Sequence[Source]) -> int:
    """Bytes of the files of some sources, for a meter."""
    return sum(path.stat().st_size for source in sources for path in find_files(source) if path.is_file())


def plan_of(source: Source, path: Path, treatment: Treatment, *, before_broken: bool = False) -> tuple[BlockPlan, str]:
    """How the rows of a file are read, and why so: by the source's settings and the file's first rows.

    With ``before_broken`` by those before the first broken line, where some are.

    Raises:
        DataError: The file cannot be read, or its rows have no known format.
        ParamsError: The columns name a field that there is none of.
    """
    reading = Reading(
        roles=source.roles,
        labels={label_text(label): side for label, side in source.labels.items()},
        turns=source.turns if isinstance(source, SftSource) else "last",
        compare=source.compare if isinstance(source, PreferenceSource) else "last",
        pairs=source.pairs if isinstance(source, PreferenceSource) else "all",
        unwrap=source.unwrap,
    )
    fraction = {"auto": treatment.eval_fraction, "train": 0.0, "eval": 1.0}[source.split]
    plan = BlockPlan(path, source, replace(treatment, eval_fraction=fraction), reading)
    reader = plan.reader()
    head = []
    try:
        for record in islice(read_records(path, within=source.records), _DETECTION_ROWS):
            head.append(record.value)
    except BrokenLines:
        # of votes, a last line that was cut off is none; whoever reads another file stops at it
        if not head or not (before_broken or is_torn(unended_line(path))):
            raise
    why = f"{source.format}: named by you"
    if source.format in ("auto", "two_outputs"):  # to name two_outputs does not say what its labels mean
        why = reader.detect(path, head)
    return replace(plan, fallback=reader.fallback), why
