"""What the two conversion stages share: check the settings, convert, publish, and print the account of all rows."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpo_cli.core import paths
from dpo_cli.core.artifacts import publish_folder, write_json
from dpo_cli.core.data_params import AS_PREFERENCES, PreferenceSource, SftSource, Source
from dpo_cli.core.environment import usable_cores
from dpo_cli.core.errors import DataError, ParamsError
from dpo_cli.core.params import Params
from dpo_cli.core.progress import Reporter
from dpo_cli.core.scratch import stage_scratch
from dpo_cli.data.account import Conversion, account_rows, checks_of, metrics_of, unread_of, warnings_of
from dpo_cli.data.convert import convert
from dpo_cli.data.formats.detect import UnknownFormatError
from dpo_cli.data.plan import Treatment, find_files, num_bytes


def _section_of(kind: type[Source], params: Params) -> str:
    """Where the settings of a kind of sources stand."""
    return "data.sft" if issubclass(kind, SftSource) and params.data.sft.path != AS_PREFERENCES else "data.preferences"


def convert_stage(
    stage: str, sources: Sequence[Source], params: Params, place: Path, reporter: Reporter
) -> dict[str, Any]:
    """Convert raw files, publish the tables with their metrics, and print the account of their rows.

    Args:
        stage: Name of the stage.
        sources: Its sources, all of one kind.
        params: All settings.
        place: The folder to publish.
        reporter: Shows progress, and gets the account.

    Returns:
        The stage's metrics.

    Raises:
        ParamsError: A file does not lie under data/raw, where DVC would see it change, or a
            setting has no effect on this data.
        DataError: See :func:`~dpo_cli.data.convert.convert`; nothing is published then.
    """
    section = _section_of(type(sources[0]), params)
    _refuse_outside(section, sources)
    rejects_file = paths.rejects_file(stage)
    with stage_scratch(stage, "run") as scratch:
        try:
            report = _convert_and_publish(stage, sources, params, place, scratch.build_folder(), reporter)
        finally:
            scratch.clear()  # no later run goes on from here, and it may be as large as the data
    metrics = metrics_of(report)
    unread = unread_of(report)
    write_json(paths.checks_file(stage), checks_of(report) | ({"unread_columns": unread} if unread else {}))
    write_json(paths.metrics_file(stage), {stage: metrics})
    reporter.table(stage, account_rows(report, rejects_file))
    for warning in warnings_of(report):
        reporter.warn(warning)
    return metrics


def _convert_and_publish(
    stage: str, sources: Sequence[Source], params: Params, place: Path, built: Path, reporter: Reporter
) -> Conversion:
    files = [path for source in sources for path in find_files(source)]
    name = files[0].name if len(files) == 1 else f"{len(files)} files"
    rejects_file = paths.rejects_file(stage)
    out, work, listing = built / "out", built / "work", built / rejects_file.name
    out.mkdir()
    work.mkdir()
    try:
        with reporter.meter(f"{stage}: reading {name}", num_bytes(sources), "bytes") as meter:
            report = convert(
                sources,
                Treatment.of(params.data),
                work,
                out,
                listing,
                workers=params.runtime.workers or usable_cores(),
                on_bytes=meter.advance,
            )
    except UnknownFormatError as error:
        raise UnknownFormatError(f"{error} (in params.yaml, under {_section_of(type(sources[0]), params)})") from None
    except DataError:
        if listing.exists():  # all was read: say which rows stop it
            _move(listing, rejects_file)
        raise
    _refuse_without_effect(sources, report, params)
    publish_folder(out, place)
    _move(listing, rejects_file)
    return report


def _move(listing: Path, rejects_file: Path) -> None:
    rejects_file.parent.mkdir(parents=True, exist_ok=True)
    if not listing.stat().st_size:
        listing.write_text("\n", encoding="utf-8", newline="\n")  # DVC warns of empty files
    shutil.move(listing, rejects_file)


def _refuse_outside(section: str, sources: Sequence[Source]) -> None:
    problems = []
    for index, source in enumerate(sources):
        if not paths.is_raw(Path(source.path)):
            key = f"{section}.path" if index == 0 else f"{section}.also.{index - 1}.path"
            problems.append(
                f"params.yaml: {key} must lie under {paths.RAW.as_posix()}, which DVC watches, got {source.path};"
                " copy the file there"
            )
    if problems:
        raise ParamsError(problems)


def _refuse_without_effect(sources: Sequence[Source], report: Conversion, params: Params) -> None:
    """A setting that changed nothing is a misunderstanding."""
    problems = []
    for source in sources:
        section = _section_of(type(source), params)
        formats = {name for account in report.files if account.source is source for name in account.formats}
        has_rankings = {"kwise", "oasst"} & formats or report.num_rankings
        if isinstance(source, PreferenceSource) and source.pairs != "all" and not has_rankings:
            problems.append(
                f"params.yaml: data.preferences: pairs {source.pairs} has no effect: {source.path} holds pairs, no"
                " rankings of several answers; leave it at all"
            )
        if source.labels and "two_outputs" not in formats:
            problems.append(
                f"params.yaml: {section}: labels has no effect: {source.path} holds no two outputs with a label; leave"
                " it out"
            )
        if isinstance(source, SftSource) and source.turns != "last" and "messages" not in formats:
            problems.append(
                f"params.yaml: data.sft: turns {source.turns} has no effect: {source.path} holds no conversations as"
                " lists of messages; leave it at last"
            )
        if source.unwrap and not any(account.unwrapped for account in report.files if account.source is source):
            problems.append(
                f"params.yaml: {section}: unwrap has no effect: {source.path} holds no conversations that a chat"
                " template has rendered; leave it out"
            )
    if problems:
        raise ParamsError(problems)
