"""What data is like before it is used: files read and checked as the conversion does it, and counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

from dpo_cli.core.data_params import DataParams, SftSource, Source
from dpo_cli.core.progress import Meter, Reporter
from dpo_cli.data.chat import ChatEncoder
from dpo_cli.data.checks import check_preference, check_sft, reason_to_drop
from dpo_cli.data.plan import Treatment, find_files, num_bytes, plan_of
from dpo_cli.data.problem import RowProblem
from dpo_cli.data.reading.files import read_records
from dpo_cli.data.schema import Messages, PreferenceExample, RankingExample, SftExample
from dpo_cli.data.statistics import TOO_SHORT, Characters, DataStatistics, Measure

LIMITS = (512, 1024, 2048, 4096)
"""Numbers of tokens above which examples are counted."""

_SURE = 0.6
"""The probability from which on a guessed language is named."""


def profile_sources(
    sources: Sequence[Source], data: DataParams, encoder: ChatEncoder | None, reporter: Reporter
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Read sources, and say what is in them.

    Rows are read and checked one by one as the conversion does it; they are not compared with
    each other, so those that repeat are counted.

    Args:
        sources: Where the data is.
        data: Section data of the project.
        encoder: Whose tokens are counted; None: characters are.
        reporter: Shows progress.

    Yields:
        A kind of data and its figures, as soon as it is read.

    Raises:
        DataError: A file cannot be read or has no known format.
    """
    measure: Measure = Characters() if encoder is None else _Tokens(encoder)
    for kind in ("sft", "preferences"):
        mine = [source for source in sources if isinstance(source, SftSource) == (kind == "sft")]
        if not mine:
            continue
        size = num_bytes(mine)
        reading = _Reading(DataStatistics(measure, LIMITS if encoder is not None else (), language_of), data)
        with reporter.meter(f"reading {kind}", size, "bytes") as meter:
            for source in mine:
                for path in find_files(source):
                    reading.read(source, path, meter)
        yield kind, reading.summary()


def language_of(text: str) -> str:
    """The language of a text as two letters: a guess, or TOO_SHORT where it would be a poor one."""
    language, probability = _identifier().classify(text)
    return str(language) if probability >= _SURE else TOO_SHORT


@cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier  # here: it takes half a second

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


class _Tokens:
    """Lengths in tokens, with all that the chat template adds."""

    unit = "tokens"

    def __init__(self, encoder: ChatEncoder) -> None:
        self._encoder = encoder

    def prompt(self, prompt: Messages) -> int:
        return len(self._encoder.encode_prompt(prompt))

    def answer(self, prompt: Messages, answer: Messages) -> int:
        return len(self._encoder.encode_completion(prompt, answer))


class _Reading:
    """Reads files into statistics, with an account of the rows."""

    def __init__(self, statistics: DataStatistics, data: DataParams) -> None:
        self._treatment = Treatment.of(data)
        self._statistics = statistics
        self._sources: list[dict[str, Any]] = []
        self._formats: Counter[str] = Counter()
        self._left_out: Counter[str] = Counter()
        self._num_rows = 0

    def read(self, source: Source, path: Path, meter: Meter) -> None:
        """Read a file."""
        plan, why = plan_of(source, path, self._treatment)
        reader = plan.reader()
        before = self._num_rows
        for record in islice(read_records(path, meter.advance, source.records), source.max_rows):
            self._num_rows += 1
            try:
                fmt, found = reader.read(record.value)
                self._formats[fmt.name] += 1
                for _, example in found if isinstance(found, Iterator) else [("", found)]:
                    self._add(example, plan.reading.pairs)
            except RowProblem as problem:
                self._left_out[problem.reason] += 1
        self._sources.append({"file": path.as_posix(), "rows": self._num_rows - before, "format": why})

    def _add(self, example: Any, scheme: str) -> None:
        try:
            if isinstance(example, RowProblem):
                raise example
            if isinstance(example, RankingExample):
                self._add_ranking(example, scheme)
            elif self._stays(example):
                self._statistics.add(example)
        except RowProblem as problem:
            self._left_out[problem.reason] += 1

    def _add_ranking(self, example: RankingExample, scheme: str) -> None:
        pairs = example.pairs(scheme)
        if not pairs:
            raise RowProblem("tie", "is a tie")
        kept = [(better, worse) for better, worse in pairs if self._stays(example.pair(better, worse))]
        if kept:
            self._statistics.add(example, kept)

    def _stays(self, example: SftExample | PreferenceExample) -> bool:
        failed = check_sft(example) if isinstance(example, SftExample) else check_preference(example)
        reason = reason_to_drop(failed, self._treatment.policies) if failed else None
        if reason is not None:
            self._left_out[reason] += 1
        return reason is None

    def summary(self) -> dict[str, Any]:
        """All figures."""
        return {
            "rows": self._num_rows,
            "left_out": dict(self._left_out.most_common()),
            "sources": self._sources,
            "formats": dict(self._formats.most_common()),
            **self._statistics.summary(),
        }
