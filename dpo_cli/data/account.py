"""The account of a conversion: what became of every row, as figures, as a table, and as warnings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dpo_cli.core.data_params import Source
from dpo_cli.data.blocks import RowCounts, read_arrow
from dpo_cli.data.checks import NO_FAULTS
from dpo_cli.data.problem import shown_name
from dpo_cli.data.schema import from_table

SPLITS = ("train", "eval")
MANY_CONFLICTS = 0.5
"""Share of pairs whose scores contradict the choice, above which something may be swapped."""
LENGTH_BIAS = 0.65
"""Share of pairs whose preferred answer is the longer one, above which there is a warning."""

_COLUMNS_SHOWN = 20
_COLUMNS_KEPT = 1000
MANY_MARKED = 0.5
"""Share of rows with the marks of a chat template above which there is a warning."""


@dataclass
class FileAccount(RowCounts):
    """A file that was read.

    Attributes:
        path: The file.
        source: The source it is of.
        why: The format of its rows, and why that one.
        num_rows: Rows read.
        num_used: Rows of which something was written.
        more_unread: Whether there are further unread columns, too many to count.
        stopped: Whether max_rows ended the reading.
        first: The number of its first row among the rows of all files.
    """

    path: Path
    source: Source
    why: str
    num_rows: int = 0
    num_used: int = 0
    more_unread: bool = False
    stopped: bool = False
    first: int = 0

    def add(self, counts: RowCounts) -> None:
        """Add the counts of some rows. Rows whose keys are data have too many unread columns to remember all."""
        self.formats.update(counts.formats)
        self.unwrapped.update(counts.unwrapped)
        self.rendered.update(counts.rendered)
        for column, count in counts.unread.items():
            if column in self.unread or len(self.unread) < _COLUMNS_KEPT:
                self.unread[column] += count
            else:
                self.more_unread = True

    def unread_text(self) -> str:
        """The unread columns with how many rows have them, the most frequent first; empty: there are none."""
        num_read = sum(self.formats.values())
        groups: dict[int, list[str]] = {}
        for column, count in self.unread.most_common(_COLUMNS_SHOWN):
            groups.setdefault(count, []).append(shown_name(column))
        told = [
            f"{', '.join(columns)} ({_rows_text(count, num_read)}{' each' if columns[1:] and count < num_read else ''})"
            for count, columns in groups.items()
        ]
        rest = len(self.unread) - _COLUMNS_SHOWN
        if rest > 0:
            told.append(f"and {'more than ' if self.more_unread else ''}{rest} more")
        return "; ".join(told)


def _rows_text(count: int, total: int) -> str:
    return "all rows" if count == total else "1 row" if count == 1 else f"{count} rows"


@dataclass
class Finding:
    """What a check found.

    Attributes:
        policy: What becomes of it: drop, keep or error.
        count: Examples, or rows where no example could be made, that fail it.
        rows: The first rows of them: file and row.
        more: Whether there are further rows.
    """

    policy: str
    count: int = 0
    rows: list[tuple[str, int]] = field(default_factory=list)
    more: bool = False

    def name(self, place: tuple[str, int], most: int | None) -> bool:
        """Name a row, once; False where that would be one more than the most."""
        if self.rows[-1:] == [place]:  # several pairs of a ranking are of one row
            return True
        self.more = most is not None and len(self.rows) >= most
        if not self.more:
            self.rows.append(place)
        return not self.more

    def places(self) -> str:
        """The rows it names, by file where there are several."""
        by_file: dict[str, list[str]] = {}
        for file, row in self.rows:
            by_file.setdefault(file, []).append(str(row))
        listed = [
            f"{', '.join(rows)} of {file}" if len(by_file) > 1 else ", ".join(rows) for file, rows in by_file.items()
        ]
        return "; ".join(listed) + (", ..." if self.more else "")


@dataclass
class ConvertedBlock:
    """A block that was converted.

    Attributes:
        file: The file it is of.
        examples: Its rows that stay, as Arrow, where there are any.
        first: The number of its first row among all rows.
        start: The number of its first example among all examples.
        num: Its examples.
        num_used: Rows of which one of them is.
        num_by_split: How many of them go where.
        is_weighted: Whether rows of it are taken more often than once.
        refuted: Rankings of it with a pair that another row contradicts.
    """

    file: FileAccount
    examples: Path
    first: int
    start: int
    num: int
    num_used: int
    num_by_split: dict[str, int]
    is_weighted: bool
    refuted: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))

    def rows(self) -> list[dict[str, Any]]:
        """Its rows that stay, as the canonical table has them, with where they come from."""
        return list(map(from_table, read_arrow(self.examples).to_pylist())) if self.examples.exists() else []


@dataclass
class Conversion:
    """What became of the rows of all files.

    Attributes:
        files: The files, in order.
        num_written: Examples written, by split, copies included.
        num_rankings: Rankings written, by split.
        num_ties: Tied pairs within rankings, of which no pair is made.
        num_copies: Examples written beyond the first time, by the weight of their source.
        num_items: Examples found, and rows in which none was.
        num_checked: Examples that no check of a single one left out; later they are compared with each other.
        rejected: How many rows or parts of rows were left out for which reason.
        checks: What each check found.
        split_by: What of a prompt decides its split: its ``opening``, or the whole ``prompt``.
        empty_split: Why a split that the sources do not leave out has no rows, and what to do; empty: none is so.
        cannot_split: Whether that is for want of distinct prompts, however many rows there are.
        blocks: The files in blocks, in order; their rows lie in the working folder.
    """

    files: list[FileAccount] = field(default_factory=list)
    num_written: Counter[str] = field(default_factory=Counter)
    num_rankings: Counter[str] = field(default_factory=Counter)
    num_ties: int = 0
    num_copies: int = 0
    num_items: int = 0
    num_checked: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    checks: dict[str, Finding] = field(default_factory=dict)
    split_by: str = "opening"
    empty_split: str = ""
    cannot_split: bool = False
    blocks: list[ConvertedBlock] = field(default_factory=list)

    def rate(self, check: str) -> float:
        """The share of what was looked at that fails a check.

        Of rows where a check is of rows (malformed, tie), of the examples found where it leaves
        some out, and of the examples that were left then where it keeps them.
        """
        finding = self.checks[check]
        if check in ("malformed", "tie"):
            total = self.num_read
        elif finding.policy == "keep":
            total = self.num_checked
        else:
            total = self.num_items - sum(
                self.checks[name].count for name in ("malformed", "tie") if name in self.checks
            )
        return finding.count / total if total else 0.0

    @property
    def num_read(self) -> int:
        """Rows read."""
        return sum(account.num_rows for account in self.files)

    @property
    def num_used(self) -> int:
        """Rows of which something was written."""
        return sum(account.num_used for account in self.files)

    @property
    def num_rejected_rows(self) -> int:
        """Rows of which nothing was written."""
        return self.num_read - self.num_used


# --- what is told of it ---------------------------------------------------------------------


def metrics_of(report: Conversion) -> dict[str, Any]:
    """The figures of a conversion, for metrics.json."""
    metrics: dict[str, Any] = {
        "num_read": report.num_read,
        "num_train": report.num_written["train"],
        "num_eval": report.num_written["eval"],
        "num_rejected": report.num_rejected_rows,
        "rejected": dict(report.rejected.most_common()),
    }
    if sum(report.num_rankings.values()):
        metrics["num_train_rankings"] = report.num_rankings["train"]
        metrics["num_eval_rankings"] = report.num_rankings["eval"]
        metrics["num_tied_pairs"] = report.num_ties
    if unread := {column for account in report.files for column in account.unread}:
        metrics["num_unread_columns"] = len(unread)
    return metrics


def unread_of(report: Conversion) -> list[dict[str, Any]]:
    """The columns that nobody read, by file, with how many rows have something in them."""
    return [
        {"file": account.path.as_posix(), "columns": dict(account.unread.most_common())}
        for account in report.files
        if account.unread
    ]


def checks_of(report: Conversion) -> dict[str, Any]:
    """What each check found: its policy, count, rate, and the first rows."""
    return {
        name: {
            "policy": finding.policy,
            "count": finding.count,
            "rate": report.rate(name),
            "first_rows": [{"file": file, "row": row} for file, row in finding.rows],
        }
        for name, finding in report.checks.items()
    }


def account_rows(
    report: Conversion, rejects_file: Path | None, examples: Mapping[str, str] | None = None
) -> list[tuple[str, str]]:
    """The account of all rows, for a table: read = used + left out.

    Args:
        report: What became of them.
        rejects_file: Where the rows left out are listed; None: nothing is written, it is only looked at.
        examples: What is said of the first row that is left out for each reason, where that is wanted.
    """
    rows: list[tuple[str, str]] = []
    for account in report.files:
        rows += [("file", account.path.as_posix()), ("format", account.why)]
        if len(report.files) > 1 or account.stopped:
            stopped = "; stopped there by max_rows, the rest was not read" if account.stopped else ""
            rows.append(("", f"{account.num_rows} rows, {account.num_used} of them used{stopped}"))
        if unread := account.unread_text():
            rows.append(("not read", unread))
        if account.unwrapped:
            made_by = ", ".join(f"{template} {count}" for template, count in account.unwrapped.most_common())
            rows.append(("taken apart", f"{sum(account.unwrapped.values())} rows of rendered conversations: {made_by}"))
    rows.append(("rows read", str(report.num_read)))
    rows.append(("rows used", str(report.num_used)))
    rows.append(("rows left out", str(report.num_rejected_rows)))
    written = "would go to" if rejects_file is None else "written to"
    rows += [(f"{written} {split}", str(report.num_written[split])) for split in SPLITS]
    if report.split_by == "prompt":
        rows.append(("split by", "the whole prompt: conversations that begin alike may be on both sides"))
    if report.num_copies:
        rows.append(("repeated by weight", f"{report.num_copies} of these"))
    if sum(report.num_rankings.values()):
        rows += [(f"rankings in {split}", str(report.num_rankings[split])) for split in SPLITS]
        rows.append(("tied pairs, not written", str(report.num_ties)))
    for reason, count in report.rejected.most_common():
        example = f": {examples[reason]}{', ...' if count > 1 else ''}" if examples else ""
        rows.append((f"left out: {reason.replace('_', ' ')}", f"{count}{example}"))
    if rejects_file is None:
        return rows
    rows.append(("left out, listed in", f"{rejects_file.as_posix()} ({sum(report.rejected.values())})"))
    for name, finding in report.checks.items():
        if finding.policy == "keep" and finding.count:
            rows.append((f"kept: {name.replace('_', ' ')}", f"{finding.count} ({report.rate(name):.1%})"))
    return rows


def warnings_of(report: Conversion) -> list[str]:
    """What the user should know of the data as a whole."""
    warnings = []
    if report.num_checked >= 100 and (share := _kept_rate(report, "longer_chosen")) > LENGTH_BIAS:
        warnings.append(
            f"the preferred answer is the longer one in {share:.0%} of the pairs: a model may learn length"
            " in place of quality"
        )
    if (share := _kept_rate(report, "score_conflict")) >= MANY_CONFLICTS:
        warnings.append(
            f"the preferred answer's score is not the higher one in {share:.0%} of the pairs:"
            " are the answers, or the scores, the wrong way round?"
        )
    warnings += _template_warnings(report)
    lost = report.num_rejected_rows - sum(report.rejected[reason] for reason in NO_FAULTS)
    if report.num_read and lost > 0.2 * report.num_read:
        reasons = Counter({reason: n for reason, n in report.rejected.items() if reason not in NO_FAULTS})
        named = ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in reasons.most_common(3))
        warnings.append(f"{lost} of {report.num_read} rows ({lost / report.num_read:.0%}) are left out: {named}")
    if any(account.source.split != "auto" for account in report.files):
        warnings.append(
            "a source has a split of its own: its prompts are held out here, and may be among the rows of the other"
            " conversion's train table; evaluate says how many are (num_leaked_prompts)"
        )
    return warnings


def _kept_rate(report: Conversion, check: str) -> float:
    """The rate of what a check finds and keeps; 0 where it keeps nothing."""
    return report.rate(check) if check in report.checks and report.checks[check].policy == "keep" else 0.0


def _template_warnings(report: Conversion) -> list[str]:
    """Texts that a chat template made already, to which the model's own will be applied again."""
    warnings = []
    for account in report.files:
        num_rendered = sum(account.rendered.values())
        if num_rendered > MANY_MARKED * sum(account.formats.values()):
            (template, _), *_ = account.rendered.most_common()
            warnings.append(
                f"{account.path.as_posix()}: {num_rendered} of {account.num_rows} rows hold conversations that a chat"
                f" template ({template}) has rendered, and the model's own template will be put around them; unwrap:"
                " true in the source's settings makes messages of them"
            )
    if not warnings and _kept_rate(report, "chat_markers") > MANY_MARKED:
        warnings.append(
            f"{report.checks['chat_markers'].count} of {report.num_checked} examples hold marks of chat templates, and"
            " the model's own template will be put around them; give bare texts or messages, or set"
            " data.checks.chat_markers to drop"
        )
    return warnings
