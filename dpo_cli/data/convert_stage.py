"""What the two conversion stages share: check the settings, convert, publish, and print the account of all rows."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpo_cli.core import paths
from dpo_cli.core.artifacts import publish_folder, write_json
from dpo_cli.core.errors import DataError, ParamsError
from dpo_cli.core.params import Params, PreferenceSource, SftSource, Source
from dpo_cli.core.progress import Reporter
from dpo_cli.core.scratch import stage_scratch
from dpo_cli.data.blocks import SAMPLED_OUT
from dpo_cli.data.convert import SPLITS, Conversion, convert, find_files

LENGTH_BIAS = 0.65
"""Share of pairs whose preferred answer is the longer one, above which there is a warning."""


def convert_stage(
    stage: str, sources: Sequence[Source], params: Params, place: Path, reporter: Reporter
) -> dict[str, Any]:
    """Convert raw files, publish the tables with their metrics, and print the account of their rows.

    Args:
        stage: Name of the stage.
        sources: Its sources, all of one kind.
        params: All settings.
        place: The folder to publish.
        reporter: Hears of progress, and gets the account.

    Returns:
        The stage's metrics.

    Raises:
        ParamsError: A file does not lie under data/raw, where DVC would see it change, or a
            setting has no effect on this data.
        DataError: See :func:`~dpo_cli.data.convert.convert`; nothing is published then.
    """
    _refuse_outside(stage, sources)
    files = [path for source in sources for path in find_files(source)]
    size = sum(path.stat().st_size for path in files if path.is_file())
    name = files[0].name if len(files) == 1 else f"{len(files)} files"
    rejects_file = paths.rejects_file(stage)
    with stage_scratch(stage, "run") as scratch:
        built = scratch.build_folder()
        out, work = built / "out", built / "work"
        out.mkdir()
        work.mkdir()
        listing = built / rejects_file.name
        try:
            with reporter.meter(f"{stage}: reading {name}", size, "bytes") as meter:
                report = convert(
                    sources,
                    params.data.checks.model_dump(),
                    params.data.eval_fraction,
                    work,
                    out,
                    listing,
                    workers=params.runtime.workers or os.cpu_count() or 1,
                    on_bytes=meter.advance,
                )
        except DataError:
            if listing.exists():  # all was read: say which rows stop it
                _move(listing, rejects_file)
            raise
        _refuse_without_effect(sources, report)
        publish_folder(out, place)
        _move(listing, rejects_file)
        scratch.clear()
    metrics = metrics_of(report)
    write_json(paths.checks_file(stage), checks_of(report))
    write_json(paths.metrics_file(stage), {stage: metrics})
    reporter.table(stage, account_rows(report, rejects_file))
    for warning in warnings_of(report):
        reporter.warn(warning)
    return metrics


def _move(listing: Path, rejects_file: Path) -> None:
    rejects_file.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(listing, rejects_file)


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
    return metrics


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


def account_rows(report: Conversion, rejects_file: Path | None) -> list[tuple[str, str]]:
    """The account of all rows, for a table: read = used + left out.

    Args:
        report: What became of them.
        rejects_file: Where the rows left out are listed; None: nothing is written, it is only looked at.
    """
    rows: list[tuple[str, str]] = []
    for account in report.files:
        rows += [("file", account.path.as_posix()), ("format", account.why)]
        if len(report.files) > 1 or account.stopped:
            stopped = "; stopped there by max_rows, the rest was not read" if account.stopped else ""
            rows.append(("", f"{account.num_rows} rows, {account.num_used} of them used{stopped}"))
    rows.append(("rows read", str(report.num_read)))
    rows.append(("rows used", str(report.num_used)))
    rows.append(("rows left out", str(report.num_rejected_rows)))
    written = "would go to" if rejects_file is None else "written to"
    rows += [(f"{written} {split}", str(report.num_written[split])) for split in SPLITS]
    if report.num_copies:
        rows.append(("repeated by weight", f"{report.num_copies} of these"))
    if sum(report.num_rankings.values()):
        rows += [(f"rankings in {split}", str(report.num_rankings[split])) for split in SPLITS]
        rows.append(("tied pairs, not written", str(report.num_ties)))
    rows += [(f"left out: {reason.replace('_', ' ')}", str(count)) for reason, count in report.rejected.most_common()]
    if rejects_file is not None:
        rows.append(("left out, listed in", f"{rejects_file.as_posix()} ({sum(report.rejected.values())})"))
    for name, finding in report.checks.items():
        if finding.policy == "keep" and finding.count:
            rows.append((f"kept: {name.replace('_', ' ')}", f"{finding.count} ({report.rate(name):.1%})"))
    return rows


def warnings_of(report: Conversion) -> list[str]:
    """What the user should know of the data as a whole."""
    warnings = []
    longer = report.checks.get("longer_chosen")
    if longer is not None and longer.policy == "keep" and report.num_checked >= 100:
        share = report.rate("longer_chosen")
        if share > LENGTH_BIAS:
            warnings.append(
                f"the preferred answer is the longer one in {share:.0%} of the pairs: a model may learn length"
                " in place of quality"
            )
    lost = report.num_rejected_rows - report.num_sampled_out
    if report.num_read and lost > 0.2 * report.num_read:
        reasons = Counter({reason: n for reason, n in report.rejected.items() if reason != SAMPLED_OUT})
        named = ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in reasons.most_common(3))
        warnings.append(f"{lost} of {report.num_read} rows ({lost / report.num_read:.0%}) are left out: {named}")
    if any(source.split != "auto" for source in report.sources):
        warnings.append(
            "a source has a split of its own: its prompts are held out here, and may be among the rows of the other"
            " conversion's train table; evaluate says how many are (num_leaked_prompts)"
        )
    return warnings


def _refuse_outside(stage: str, sources: Sequence[Source]) -> None:
    section = {"convert_sft": "data.sft", "convert_preferences": "data.preferences"}[stage]
    problems = []
    for index, source in enumerate(sources):
        path = Path(source.path)
        if ".." in path.parts or not path.is_relative_to(paths.RAW):
            key = f"{section}.path" if index == 0 else f"{section}.also.{index - 1}.path"
            problems.append(
                f"params.yaml: {key} must lie under {paths.RAW.as_posix()}, which DVC watches, got {source.path};"
                " copy the file there"
            )
    if problems:
        raise ParamsError(problems)


def _refuse_without_effect(sources: Sequence[Source], report: Conversion) -> None:
    """A setting that changed nothing is a misunderstanding."""
    problems = []
    for source in sources:
        formats = {name for account in report.files if account.source is source for name in account.formats}
        if isinstance(source, PreferenceSource) and source.pairs != "all" and not {"kwise", "oasst"} & formats:
            problems.append(
                f"params.yaml: data.preferences: pairs {source.pairs} has no effect: {source.path} holds pairs, no"
                " rankings of several answers; leave it at all"
            )
        if isinstance(source, SftSource) and source.turns != "last" and "messages" not in formats:
            problems.append(
                f"params.yaml: data.sft: turns {source.turns} has no effect: {source.path} holds no conversations as"
                " lists of messages; leave it at last"
            )
    if problems:
        raise ParamsError(problems)
