"""``dpo-cli data stats``: what data is like before it is used. Nothing here writes to the project."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

from dpo_cli.cli.show import encoder_of
from dpo_cli.cli.sources import policies_of, project_params
from dpo_cli.core.params import DataParams, SftSource, Source
from dpo_cli.core.progress import Meter, Reporter
from dpo_cli.data.chat import ChatEncoder
from dpo_cli.data.checks import check_preference, check_sft, reason_to_drop
from dpo_cli.data.formats.base import RowProblem
from dpo_cli.data.plan import Treatment, find_files, plan_of
from dpo_cli.data.reading.files import read_records
from dpo_cli.data.schema import Messages, PreferenceExample, RankingExample, SftExample
from dpo_cli.data.statistics import NO_LETTERS, TOO_SHORT, Characters, DataStatistics, Measure

LIMITS = (512, 1024, 2048, 4096)
"""Numbers of tokens above which examples are counted."""

_BAR = 36
_EIGHTHS = " ▏▎▍▌▋▊▉"
_NAMED = 8
_SURE = 0.6
"""The probability from which on a guessed language is named."""
_NOT_TOLD = {NO_LETTERS: "no letters", TOO_SHORT: "too short to tell"}


def stats_of_sources(
    sources: Sequence[Source], model: str | None, template: str | None, reporter: Reporter
) -> dict[str, Any]:
    """Read sources, and print what is in them.

    Rows are read and checked one by one as the conversion does it; they are not compared with
    each other, so those that repeat are counted.

    Args:
        sources: Where the data is.
        model: The folder of a model whose tokens are counted, or ``embedded``; None: characters are.
        template: Its chat template; None: what the project says.
        reporter: Gets the tables.

    Returns:
        The figures by kind of data.

    Raises:
        DataError: A file cannot be read or has no known format.
        ParamsError: There is no template of that name.
        MachineError: The model's tokenizer cannot be used.
    """
    measure: Measure = Characters() if model is None else _Tokens(encoder_of(model, template)[1])
    figures: dict[str, Any] = {}
    for kind in ("sft", "preferences"):
        mine = [source for source in sources if isinstance(source, SftSource) == (kind == "sft")]
        if not mine:
            continue
        size = sum(path.stat().st_size for source in mine for path in find_files(source) if path.is_file())
        reading = _Reading(DataStatistics(measure, LIMITS if model is not None else (), language_of))
        with reporter.meter(f"reading {kind}", size, "bytes") as meter:
            for source in mine:
                for path in find_files(source):
                    reading.read(source, path, meter)
        figures[kind] = reading.summary()
        _print(kind, figures[kind], reporter)
    return figures


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

    def __init__(self, statistics: DataStatistics) -> None:
        params = project_params()
        self._eval_fraction = (params.data if params else DataParams()).eval_fraction
        self._policies = policies_of()
        self._statistics = statistics
        self._sources: list[dict[str, Any]] = []
        self._formats: Counter[str] = Counter()
        self._left_out: Counter[str] = Counter()
        self._num_rows = 0

    def read(self, source: Source, path: Path, meter: Meter) -> None:
        """Read a file."""
        plan, why = plan_of(source, path, Treatment(self._policies, self._eval_fraction))
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
        reason = reason_to_drop(failed, self._policies) if failed else None
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


# --- printing -----------------------------------------------------------------------------


def _print(kind: str, found: dict[str, Any], reporter: Reporter) -> None:
    reporter.table(f"{kind}: what there is", _account(found))
    if not found["examples"]:
        return
    unit = found["unit"]
    rows = [("", _figures_line("mean", "median", "p95", "p99", "max"))]
    rows += [
        (_name(name), _figures_line(f"{it['mean']:.1f}", *(str(it[key]) for key in ("median", "p95", "p99", "max"))))
        for name, it in found["lengths"].items()
    ]
    reporter.table(f"{kind}: lengths ({unit})", rows)
    for name, lengths in found["lengths"].items():
        reporter.table(f"{kind}: {_name(name)} ({unit})", _bars(lengths))
    if "over" in found:
        rows = [(f"over {limit} tokens", _share_text(share)) for limit, share in found["over"].items()]
        reporter.table(f"{kind}: examples too long", rows)
    if "chosen_longer" in found:
        reporter.table(f"{kind}: is the chosen answer the longer one?", _longer_rows(found))
    reporter.table(f"{kind}: languages, guessed", _language_rows(found))


def _account(found: dict[str, Any]) -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for source in found["sources"]:
        rows.append(("file", f"{source['file']}: {source['rows']} rows"))
        rows.append(("", source["format"]))
    rows.append(("formats", ", ".join(f"{name} {count}" for name, count in found["formats"].items()) or "none"))
    rows.append(("rows", str(found["rows"])))
    for reason, count in found["left_out"].items():
        rows.append((f"left out: {reason.replace('_', ' ')}", f"{count}; dpo-cli data check names them"))
    rows.append(("examples", str(found["examples"])))
    if found.get("rankings"):
        rows.append(("of them rankings", f"{found['rankings']}; pairs in all: {found['pairs']}"))
    rows.append(("multi-turn", _share_text(found["multi_turn"])))
    turns = found["turns"]
    rows.append(("turns of the user", f"mean {turns['mean']:.2f}, median {turns['median']}, max {turns['max']}"))
    rows.append(("with a system prompt", _share_text(found["system_prompt"])))
    return rows


def _longer_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    longer = found["chosen_longer"]
    low, high = longer["interval"]
    interval = f"{longer['share']:.1%} [{low:.1%}, {high:.1%}] (95%, Wilson)"
    return [
        ("longer", f"{longer['count']} of {found['pairs']} pairs: {interval}"),
        ("as long", str(longer["equal"])),
    ]


def _language_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    languages = found["languages"]
    rows = [("sampled", f"{found['sampled']} of {found['examples']} examples")]
    rows += [(name, _named(languages[name], found["sampled"])) for name in ("prompts", "answers")]
    rows.append(("answer in another", _share_text(languages["answer_in_another"])))
    scripts = {script: share for script, share in found["scripts"].items() if share}
    rows.append(("letters", ", ".join(f"{script} {share:.1%}" for script, share in scripts.items()) or "none"))
    return rows


def _named(counts: dict[str, int], total: int) -> str:
    named = [(_NOT_TOLD.get(name, name), count) for name, count in counts.items()]
    rest = sum(count for _, count in named[_NAMED:])
    shown = [*named[:_NAMED], *([("others", rest)] if rest else [])]
    return ", ".join(f"{name} {count / total:.1%}" for name, count in shown)


def _bars(lengths: dict[str, Any]) -> list[tuple[str, str]]:
    """A histogram as bars of at most ``_BAR`` characters."""
    bins = lengths["histogram"]
    most = max((count for *_, count in bins), default=1)
    return [
        (f"{low}-{high}" if high > low else str(low), f"{_bar(count, most)} {count} ({count / lengths['count']:.1%})")
        for low, high, count in bins
    ]


def _bar(count: int, most: int) -> str:
    """A bar in eighths of a character; what is not nothing is at least one eighth."""
    eighths = max(round(8 * _BAR * count / most), 1 if count else 0)
    whole, rest = divmod(eighths, 8)
    return ("█" * whole + (_EIGHTHS[rest] if rest else "")).ljust(_BAR)


def _figures_line(*figures: str) -> str:
    return " ".join(f"{figure:>9}" for figure in figures)


def _share_text(share: dict[str, Any]) -> str:
    return f"{share['count']} ({share['share']:.1%})"


def _name(key: str) -> str:
    return key.replace("_", " ")
