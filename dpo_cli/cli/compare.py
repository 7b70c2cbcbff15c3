"""``dpo-cli compare``: settings that differ beside metrics that differ, with paired intervals by prompt."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Annotated

import typer

from dpo_cli.cli.command import SetOption, command_app, examples
from dpo_cli.cli.console import ConsoleReporter
from dpo_cli.cli.exits import errors_as_exit_codes
from dpo_cli.core.errors import ParamsError

app = command_app()


@app.command(
    "compare",
    rich_help_panel="Measurements",
    epilog=examples(
        "dpo-cli compare",
        "dpo-cli compare --baseline HEAD --metric win_rate,kl",
        "dpo-cli compare workspace nutty-lamb main~1",
        "dpo-cli compare HEAD nutty-lamb --all --csv comparison.csv",
        "dpo-cli compare HEAD nutty-lamb evaluations/another --judge",
    ),
)
def compare_command(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[EXP]...",
            help="Experiments of DVC, git revisions, folders of `evaluate --model`, or `workspace`; none: the workspace"
            " and every experiment based on HEAD. The first is the baseline.",
        ),
    ] = None,
    baseline: Annotated[
        str | None, typer.Option("--baseline", metavar="EXP", help="Compare with this one in place of the first.")
    ] = None,
    metrics: Annotated[
        list[str] | None,
        typer.Option(
            "--metric",
            metavar="NAME",
            help="A metric to show, `evaluate.kl` or `kl`; may be repeated, or hold several with commas between."
            " None: the main ones that differ.",
        ),
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Show every metric of every stage.")] = False,
    csv_file: Annotated[
        Path | None, typer.Option("--csv", metavar="FILE", help="Write the figures to a CSV file, too.")
    ] = None,
    judge: Annotated[
        bool,
        typer.Option(
            "--judge",
            help="Judge their answers against each other, too, by the judge of params.yaml: a win rate for every two,"
            " and strengths by Bradley-Terry.",
        ),
    ] = False,
    overrides: SetOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as one JSON object, no tables.")] = False,
) -> None:
    """Compare experiments: the settings that differ beside the metrics that differ, with paired intervals.

    Values of the same prompt are compared with each other, so the interval is that of the difference, by
    prompts that both experiments have. Reads params.yaml, dvc.lock and reports/ from git and from the
    workspace; runs nothing, but for the judge with --judge.
    """
    with errors_as_exit_codes(as_json=as_json):
        if every and metrics:
            raise ParamsError("--metric has no effect with --all; give one of them")
        if overrides and not judge:
            raise ParamsError("--set has no effect without --judge: nothing else is computed")
        from dpo_cli.cli import compare_tables  # here, so that --help does not wait for them
        from dpo_cli.evaluation import compare

        found = compare.compare(names or [], baseline, metrics or [], every=every)
        head_to_head = importlib.import_module("dpo_cli.evaluation.head_to_head") if judge else None  # it loads torch
        judged = None
        if head_to_head is not None:
            reporter = ConsoleReporter(show_tables=not as_json)
            judged = head_to_head.judge_experiments(found.experiments, overrides or [], reporter)
        if csv_file is not None:
            compare.write_csv(found, csv_file)
        if as_json:
            figures = compare.as_json(found)
            if head_to_head is not None:
                figures["head_to_head"] = head_to_head.head_to_head_json(judged)
            typer.echo(json.dumps(figures, ensure_ascii=False))
        else:
            compare_tables.print_comparison(found)
            if judged is not None:
                compare_tables.print_head_to_head(judged)
