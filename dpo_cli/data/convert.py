"""From raw files to train.parquet and eval.parquet, with every row accounted for.

Blocks stream through: format, checks of single examples, split (:mod:`dpo_cli.data.blocks`).
Then rows are compared with each other (:mod:`dpo_cli.data.repeats`), and what stays is written.
What is left out is counted by reason and listed with its file, row and line, never with its
content. Memory does not grow with the files.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from dpo_cli.core.data_params import SftSource, Source
from dpo_cli.core.environment import usable_cores
from dpo_cli.core.errors import DataError
from dpo_cli.core.progress import Reporter
from dpo_cli.data.account import SPLITS, Conversion, ConvertedBlock, FileAccount, Finding
from dpo_cli.data.blocks import (
    DIGESTS,
    BlockResult,
    Reject,
    examples_file,
    is_full,
    rankings_file,
    read_arrow,
    widen,
    write_arrow,
)
from dpo_cli.data.checks import CHECKS_OF
from dpo_cli.data.formats.votes import VOTES, Tally
from dpo_cli.data.plan import Treatment, find_files, num_bytes, plan_of, tally_of
from dpo_cli.data.reading.base import Block
from dpo_cli.data.reading.files import read_blocks, read_records
from dpo_cli.data.repeats import CHECKS, Repeats, find_repeats
from dpo_cli.data.schema import PREFERENCE_SCHEMA, RANKING_SCHEMA, SFT_SCHEMA, full_schema
from dpo_cli.data.workers import convert_blocks, without_collector

_RECORDS_A_BLOCK = 1000
_ROWS_A_GROUP = 20_000
_COMPRESSION = 1
_BYTES_WORTH_A_POOL = 16 << 20
_COMPARED = {
    "duplicate": "repeats",
    "contradiction": "has the answers in the other order than",
    "shared_prompt": "has the prompt of the held-out",
    "repeated_prompt": "has the prompt of",
}


@without_collector()
def convert(
    sources: Sequence[Source],
    treatment: Treatment,
    work: Path,
    out: Path | None,
    rejects_file: Path,
    *,
    workers: int = 1,
    on_bytes: Callable[[int], None] = lambda _: None,
) -> Conversion:
    """Convert raw files into ``out/train.parquet`` and ``out/eval.parquet``, rankings beside them.

    Args:
        sources: Where the data is; all of one kind, instructions or preferences.
        treatment: What is done with their rows.
        work: An empty folder for what is half done, about as large as the data.
        out: An empty folder to write to; None: only check.
        rejects_file: Where the rows left out are listed, one JSON line each.
        workers: Processes that share the work on large files of JSON lines.
        on_bytes: Is told of every so many bytes of the files that were read.

    Raises:
        DataError: A file cannot be read, has no known format, leaves a split empty, or fails a
            check whose policy is ``error``.
        ParamsError: A source's columns name a field that there is none of, or those of votes.
    """
    kind = "sft" if isinstance(sources[0], SftSource) else "preference"
    run = _Run(kind, treatment, work)
    for source in sources:
        left = source.max_rows
        for path in find_files(source):
            if left == 0:
                break
            num_rows = run.read_file(source, path, workers, left, on_bytes)
            left = None if left is None else left - num_rows
    repeats = run.compare()
    run.finish(repeats, out, rejects_file)
    if out is not None and not sum(run.report.num_written.values()):
        _refuse_nothing(run.report, sources, rejects_file)
    run.judge_splits(sources)
    if out is not None and run.report.empty_split:
        raise DataError(run.report.empty_split)
    return run.report


@contextmanager
def convert_aside(
    sources: Sequence[Source], treatment: Treatment, reporter: Reporter, doing: str, workers: int | None
) -> Iterator[tuple[Conversion, Path]]:
    """Convert in a folder that does not last, and write no tables; what became of the rows, and the list of rejects.

    The meter says what is ``doing``; ``workers`` as in section runtime. Raises as :func:`convert` does.
    """
    with tempfile.TemporaryDirectory(prefix="dpo-cli-") as folder:
        work, rejects = Path(folder) / "work", Path(folder) / "rejects.jsonl"
        work.mkdir()
        with reporter.meter(doing, num_bytes(sources), "bytes") as meter:
            report = convert(
                sources, treatment, work, None, rejects, workers=workers or usable_cores(), on_bytes=meter.advance
            )
        yield report, rejects


class _Run:
    """One conversion, step by step."""

    def __init__(self, kind: str, treatment: Treatment, work: Path) -> None:
        self._kind = kind
        self._treatment = treatment
        self._policies = policies = treatment.policies
        self._work = work
        self._digests = work / "digests"
        self.report = Conversion(
            checks={name: Finding(policies[name]) for name in policies if name in CHECKS_OF[kind]},
            split_by=treatment.split_by,
        )
        self._blocks = self.report.blocks
        self._tallies: dict[int, Tally] = {}  # of the votes of a source

    # --- reading ------------------------------------------------------------------------------

    def read_file(
        self, source: Source, path: Path, workers: int, max_rows: int | None, on_bytes: Callable[[int], None]
    ) -> int:
        """Read and convert a file, block by block, or its first rows; how many there were."""
        plan, why = plan_of(source, path, self._treatment)
        account = FileAccount(path, source, why, first=self.report.num_read)
        self.report.files.append(account)
        if plan.fallback == VOTES.name:
            tally = self._tallies.get(id(source)) or self._tallies.setdefault(id(source), tally_of(source))
            blocks = self._limited(tally.records(path, on_bytes), max_rows or sys.maxsize, account)
        elif max_rows is None:
            blocks = read_blocks(path, on_bytes, source.records)
        else:
            blocks = self._limited(read_records(path, on_bytes, source.records), max_rows, account)
        pool = workers if path.stat().st_size >= _BYTES_WORTH_A_POOL and max_rows is None else 1
        with self._digests.open("ab") as digests:
            for result in convert_blocks(plan, blocks, self._work, len(self._blocks), pool):
                self._take(result, account, digests, is_weighted=source.weight > 1)
        return account.num_rows

    @staticmethod
    def _limited(records: Iterator[Any], max_rows: int, account: FileAccount) -> Iterator[Block]:
        left = max_rows
        while left and (block := list(islice(records, min(_RECORDS_A_BLOCK, left)))):
            left -= len(block)
            yield block
        account.stopped = next(records, None) is not None

    def _take(self, result: BlockResult, account: FileAccount, digests: Any, *, is_weighted: bool) -> None:
        index, first = len(self._blocks), self.report.num_read
        held_out = int(result.digests["held_out"].sum())
        self._blocks.append(
            ConvertedBlock(
                account,
                examples_file(self._work, index),
                first,
                self.report.num_checked,
                result.num_examples,
                len(np.unique(result.digests["row"])),
                {"train": result.num_examples - held_out, "eval": held_out},
                is_weighted,
            )
        )
        if result.rejects:
            in_block = first - account.first
            for reject in result.rejects:
                reject.row += in_block
            rejects = [vars(reject) for reject in result.rejects]
            (self._work / f"{index:08d}.rejects.json").write_text(json.dumps(rejects), encoding="utf-8")
        for name, rows in result.found.items():
            self._note(name, len(rows), (first + row for row in rows))
        result.digests["row"] += first
        result.digests.tofile(digests)
        self.report.num_checked += result.num_examples
        self.report.num_ties += result.num_ties
        account.num_rows += result.num_rows
        account.add(result)

    # --- comparing ----------------------------------------------------------------------------

    def compare(self) -> Repeats:
        """Compare all examples with each other."""
        repeats = find_repeats(self._digests, self.report.num_checked, self._policies)
        for name in CHECKS:
            if self._policies[name] == "keep" and name in self.report.checks:
                indices, _ = repeats[name]
                rows = np.memmap(self._digests, DIGESTS, "r")["row"] if len(indices) else indices
                self._note(name, len(indices), (int(rows[index]) for index in indices.tolist()))
        return repeats

    def _note(self, name: str, count: int, rows: Iterable[int]) -> None:
        finding = self.report.checks[name]
        finding.count += count
        most = None if name == self._treatment.listed else self._treatment.rows_listed
        for row in rows:
            if not finding.name(self._place_of(row), most):
                break

    def _place_of(self, row: int) -> tuple[str, int]:
        """A row among all rows, as its file and its number there."""
        account = next(account for account in reversed(self.report.files) if account.first <= row)
        return account.path.as_posix(), row - account.first

    # --- writing ------------------------------------------------------------------------------

    def finish(self, repeats: Repeats, out: Path | None, rejects_file: Path) -> None:
        """List what is left out, and write what stays."""
        dropped = [name for name in CHECKS if self._policies[name] != "keep"]
        with rejects_file.open("w", encoding="utf-8", newline="\n") as listing:
            for index, block in enumerate(self._blocks):
                account = block.file
                rejects = self._rejects_of(index)
                ends = (block.start, block.start + block.num)
                ranges = {name: np.searchsorted(repeats[name][0], ends) for name in dropped}
                if block.num and (block.is_weighted or any(low < high for low, high in ranges.values())):
                    rejects += self._thin_out(block, repeats, ranges)
                self._count(index, block)
                rejects.sort(key=lambda reject: reject.row)
                for reject in rejects:
                    self._list(reject, account, listing)
        self._judge()
        if out is not None:
            self._write(out)

    def judge_splits(self, sources: Sequence[Source]) -> None:
        """Say why a split has no rows, where it should have some."""
        report, fraction = self.report, self._treatment.eval_fraction
        num = sum(report.num_written.values())
        empty = next((split for split in SPLITS if num and not report.num_written[split]), None)
        if empty is None:
            return
        name = ", ".join(account.path.as_posix() for account in report.files)
        told = (
            f"{name}: no row fell into the {empty} split ({report.num_read} read, {report.num_rejected_rows} left out)"
        )
        if any(source.split != "auto" for source in sources):
            report.empty_split = f"{told}; add rows, or change the split of its sources"
            return
        digests = np.memmap(self._digests, DIGESTS, "r")
        deciding, prompts = (len(np.unique(digests[key])) for key in ("opening", "group"))
        share = min(fraction, 1 - fraction)
        report.cannot_split = deciding * share < 1 <= num * share
        if prompts == 1 < num:
            report.empty_split = (
                f"{told}: all {num} examples have the same prompt, and the prompt decides the split; add rows with"
                " other prompts, or give rows to hold out as a source with split: eval and set"
                " data.checks.shared_prompt to keep"
            )
        elif deciding < min(prompts, 1 / share):
            openings = "1 distinct opening" if deciding == 1 else f"{deciding} distinct openings"
            report.empty_split = (
                f"{told}: its {prompts} distinct prompts have {openings} (all up to the first user turn), which decides"
                " the split; say data.split_by: prompt, or add rows that begin otherwise"
            )
        else:
            few = f" and has {prompts} distinct prompts" if prompts < num else ""
            report.empty_split = f"{told}{few}; add rows, or change data.eval_fraction, now {fraction:g}"

    def _thin_out(self, block: ConvertedBlock, repeats: Repeats, ranges: Mapping[str, np.ndarray]) -> list[Reject]:
        """Write a block anew without the rows that later checks drop, and with as many copies as its weight says."""
        account, file = block.file, block.examples
        table = read_arrow(file)
        shift = block.first - account.first
        stays = np.ones(block.num, bool)
        rejects = []
        for name, (low, high) in ranges.items():
            hits, others = repeats[name][0][low:high] - block.start, repeats[name][1][low:high]
            stays[hits] = False
            for hit, other in zip(table.select(["row", "line", "part"]).take(hits).to_pylist(), others, strict=True):
                (path, row), own = self._place_of(int(other)), hit["row"] + shift
                where = f"row {row}" if path == account.path.as_posix() else f"row {row} of {path}"
                detail = f"{_COMPARED[name]} {'another pair of its row' if where == f'row {own}' else where}"
                rejects.append(Reject(own, hit["line"], hit["part"], name, name, detail))
            if name == "contradiction":
                block.refuted = np.unique(table["ranking"].to_numpy()[hits])
        table = table.take(np.repeat(np.arange(block.num), np.where(stays, table["copies"].to_numpy(), 0)))
        file.unlink()
        if table.num_rows:
            write_arrow(file, table)
        held_out = table["held_out"].to_numpy()
        block.num_by_split = {"train": int((~held_out).sum()), "eval": int(held_out.sum())}
        block.num_used = len(np.unique(table["row"].to_numpy()))
        self.report.num_items -= int((~stays).sum())
        self.report.num_copies += table.num_rows - int(stays.sum())
        return rejects

    def _count(self, index: int, block: ConvertedBlock) -> None:
        block.file.num_used += block.num_used
        self.report.num_items += block.num
        self.report.num_written.update(block.num_by_split)
        file = rankings_file(self._work, index)
        if not file.exists():
            return
        # those of which a pair stays and none is contradicted
        used = read_arrow(block.examples)["ranking"].to_numpy() if block.examples.exists() else np.empty(0, np.int32)
        kept = np.setdiff1d(used[used >= 0], block.refuted)
        rankings = read_arrow(file)
        rankings = rankings.take(np.repeat(kept, rankings["copies"].to_numpy()[kept]))
        file.unlink()
        if rankings.num_rows:
            write_arrow(file, rankings)
        held_out = rankings["held_out"].to_numpy()
        self.report.num_rankings.update({"train": int((~held_out).sum()), "eval": int(held_out.sum())})

    def _write(self, out: Path) -> None:
        canonical = SFT_SCHEMA if self._kind == "sft" else PREFERENCE_SCHEMA
        for name, file_of, schema in (("", examples_file, canonical), (".ranking", rankings_file, RANKING_SCHEMA)):
            files = [file for index in range(len(self._blocks)) if (file := file_of(self._work, index)).exists()]
            if not files:
                continue
            if any(full := [is_full(file) for file in files]):
                schema = full_schema(schema)
                for file in (file for file, is_wide in zip(files, full, strict=True) if not is_wide):
                    widen(file)
            rows = pl.scan_ipc(files, glob=False)
            for split in SPLITS:  # together they take as long and more memory
                rows.filter(pl.col("held_out") == (split == "eval")).select(schema.names).sink_parquet(
                    out / f"{split}{name}.parquet",
                    compression="zstd",
                    compression_level=_COMPRESSION,
                    row_group_size=_ROWS_A_GROUP,
                )

    def _rejects_of(self, index: int) -> list[Reject]:
        file = self._work / f"{index:08d}.rejects.json"
        return [Reject(**reject) for reject in json.loads(file.read_text(encoding="utf-8"))] if file.exists() else []

    def _list(self, reject: Reject, account: FileAccount, listing: Any) -> None:
        entry = {
            "file": account.path.as_posix(),
            "row": reject.row,
            **({"line": reject.line} if reject.line is not None else {}),
            **({"part": reject.part} if reject.part else {}),
            "reason": reject.reason,
            "detail": reject.detail,
        }
        listing.write(json.dumps(entry, ensure_ascii=False) + "\n")
        self.report.rejected[reject.reason] += 1
        self.report.num_items += 1
        if reject.check in self.report.checks:
            self._note(reject.check, 1, iter([account.first + reject.row]))

    def _judge(self) -> None:
        """Stop where a check whose policy is ``error`` found something."""
        problems = []
        for name, finding in self.report.checks.items():
            if finding.policy == "error" and finding.count:
                file = finding.rows[0][0]
                problems.append(
                    f"{file}: {finding.count} {'example fails' if finding.count == 1 else 'examples fail'} the check"
                    f" {name} (rows {finding.places()}), and data.checks.{name} is error; fix them, or set it to drop"
                )
        if problems:
            raise DataError(problems)


def _refuse_nothing(report: Conversion, sources: Sequence[Source], rejects_file: Path) -> None:
    """Stop where no row is left."""
    name = ", ".join(account.path.as_posix() for account in report.files)
    counts = ", ".join(f"{reason} {count}" for reason, count in report.rejected.most_common())
    first = ""
    with rejects_file.open(encoding="utf-8") as file:
        if line := file.readline():
            reject = json.loads(line)
            first = f"; row {reject['row']} {reject['detail']}"
    named = any(source.format != "auto" for source in sources)
    hint = ", or set its format to auto" if named and report.num_read else ""
    remedy = f"; look at it with: dpo-cli data check{hint}" if report.num_read else ""
    raise DataError(f"{name}: all {report.num_read} rows were left out: {counts or 'it holds none'}{first}{remedy}")
