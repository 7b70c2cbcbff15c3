"""Files checked as the conversion would: every row that it would leave out. Nothing is written."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dpo_cli.core.data_params import DataParams, SftSource, Source
from dpo_cli.core.errors import ParamsError
from dpo_cli.core.params import Params, TokenChecks
from dpo_cli.core.progress import Reporter
from dpo_cli.data.account import Conversion, Finding, account_rows, checks_of, metrics_of, unread_of, warnings_of
from dpo_cli.data.checks import NO_FAULTS, TokenView
from dpo_cli.data.convert import convert_aside
from dpo_cli.data.plan import Treatment, by_kind
from dpo_cli.data.problem import RowProblem
from dpo_cli.data.tokenize import answered, tokenize_row

_ROWS_NAMED = 5


def check_sources(
    sources: Sequence[Source],
    params: Params,
    reporter: Reporter,
    listed: str | None = None,
    view_of: Callable[[Source], TokenView] | None = None,
) -> tuple[dict[str, Any], bool]:
    """Convert sources without writing anything, and print what was found.

    Args:
        sources: Where the data is; sources of one kind are compared with each other.
        params: The settings of the project.
        reporter: Gets the tables.
        listed: The check whose rows are all to be named; None: the first ones of each.
        view_of: How a model sees a source, by whose tokens rows are checked, too.

    Returns:
        The figures by kind, and whether all rows are accepted.

    Raises:
        DataError: A file cannot be read or has no known format.
        MachineError: The model's tokenizer cannot be used.
    """
    asked = Treatment.of(params.data)
    treatment = replace(asked.without_stops(), rows_listed=_ROWS_NAMED, listed=listed)
    figures: dict[str, Any] = {}
    accepted = True
    for kind, mine in by_kind(sources):
        with convert_aside(mine, treatment, reporter, f"checking {kind}", params.runtime.workers) as (report, rejects):
            for name, finding in report.checks.items():
                finding.policy = asked.policies[name]
            examples = _first_of_each_reason(rejects)
            view = view_of(mine[0]) if view_of else None
            tokens = _check_tokens(report, mine[0], view, listed, reporter) if view else None
        figures[kind] = {**metrics_of(report), "checks": checks_of(report), "unread_columns": unread_of(report)}
        accepted &= not set(report.rejected) - NO_FAULTS and not report.cannot_split
        reporter.table(f"{kind}: what goes in", account_rows(report, None, examples))
        rates = {name: report.rate(name) for name in report.checks}
        _print_findings(f"{kind}: checks", report.checks, rates, listed, reporter)
        for warning in (*warnings_of(report), *filter(None, [report.empty_split])):
            reporter.warn(warning)
        if tokens is not None and view is not None:
            figures[kind]["tokens"] = {name: vars(finding) for name, finding in tokens.items()}
            accepted &= all(finding.policy == "keep" or not finding.count for finding in tokens.values())
            rates = {name: finding.count / (report.num_checked or 1) for name, finding in tokens.items()}
            title = f"{kind}: left out later by their tokens, as {view.model} sees them"
            _print_findings(title, tokens, rates, listed, reporter)
    return figures, accepted


def _check_tokens(
    report: Conversion, source: Source, view: TokenView, listed: str | None, reporter: Reporter
) -> dict[str, Finding]:
    """What the checks of tokens find in the rows that a conversion leaves."""
    view = view.without_stops()
    columns = ("completion",) if isinstance(source, SftSource) else ("chosen", "rejected")
    findings = {name: Finding(policy) for name, policy in view.policies.items()}
    findings["template_refused"] = Finding("drop")
    with reporter.meter("tokenizing", report.num_checked, "examples") as meter:
        for block in report.blocks:
            before = block.first - block.file.first
            for row in block.rows():
                try:
                    _, found = tokenize_row(row, answered(row, columns), view)
                except RowProblem as problem:
                    found = [problem.reason]
                for name in found:
                    finding = findings.setdefault(name, Finding("drop"))
                    finding.count += 1
                    finding.name(
                        (block.file.path.as_posix(), row["row"] + before), None if name == listed else _ROWS_NAMED
                    )
            meter.advance(block.num)
    return findings


def _first_of_each_reason(rejects: Path) -> dict[str, str]:
    """For each reason to leave rows out, what is said of the first one."""
    found: dict[str, str] = {}
    with rejects.open(encoding="utf-8") as file:
        for entry in map(json.loads, file):
            line = f" (line {entry['line']})" if "line" in entry else ""
            part = f", {entry['part']}" if "part" in entry else ""
            found.setdefault(entry["reason"], f"{entry['file']}, row {entry['row']}{line}{part}: {entry['detail']}")
    return found


def _print_findings(
    title: str, findings: Mapping[str, Finding], rates: Mapping[str, float], listed: str | None, reporter: Reporter
) -> None:
    shown = {name: finding for name, finding in findings.items() if listed in (None, name)}
    rows = [
        (name, f"{finding.count:>7} {rates[name]:>7.2%}  {finding.policy:<5}  rows {finding.places()}")
        for name, finding in shown.items()
        if finding.count
    ]
    sound = [name for name, finding in shown.items() if not finding.count]
    if rows:
        rows.insert(0, ("", f"{'count':>7} {'rate':>7}  policy"))
    if sound:
        rows.append(("nothing found", ", ".join(sound)))
    if rows:
        reporter.table(title, rows)
    if any(finding.policy == "error" and finding.count for finding in shown.values()):
        reporter.warn("a check whose policy is error found something: the conversion will stop there")


def refuse_unknown_check(name: str | None, model: str | None, data: DataParams) -> None:
    """``--list`` takes the name of a check; those of tokens need a model.

    Raises:
        ParamsError: There is none of that name, or no model.
    """
    if name in TokenChecks.model_fields and model is None:
        raise ParamsError(f"--list {name} has no effect without --model: it is a check of tokens")
    known = [*data.checks.model_dump(), *TokenChecks.model_fields]
    if name is not None and name not in known:
        raise ParamsError(f"--list: {name} is not a check; choose from {', '.join(known)}")
