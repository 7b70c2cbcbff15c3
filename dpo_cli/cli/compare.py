"""``dpo-cli compare``: settings that differ beside metrics that differ, with paired intervals by prompt."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer
from rich.console import Console
from rich.text import Text

from dpo_cli.cli.command import SetOption, command_app, examples
from dpo_cli.cli.console import ConsoleReporter, open_console, plain_table
from dpo_cli.cli.exits import errors_as_exit_codes
from dpo_cli.core.errors import ParamsError

if TYPE_CHECKING:
    from dpo_cli.evaluation.compare import Difference, ExperimentComparison
    from dpo_cli.evaluation.experiments import Scalar
    from dpo_cli.evaluation.head_to_head import HeadToHead

_NARROWEST = 40
_GAP = 2
_WIDEST_NAME = 20

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
            help="A metric to show, `evaluate.kl` or `kl`; may be repeated, or list several separated by commas."
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
        from dpo_cli.evaluation import compare  # here, so that --help does not wait for it

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
            print_comparison(found)
            if judged is not None:
                print_head_to_head(judged)


class _Column(NamedTuple):
    """A column: its title and a cell an experiment, each as lines."""

    title: list[str]
    cells: list[list[str]]

    @property
    def width(self) -> int:
        return max(Text(line).cell_len for lines in (self.title, *self.cells) for line in lines)


def print_comparison(found: ExperimentComparison, console: Console | None = None) -> None:
    """Print tables no wider than the terminal, or standard output's, then the notes."""
    console = console or open_console()
    names = _Column(["experiment"], [[experiment.name] for experiment in found.experiments])
    name_width = min(names.width, _WIDEST_NAME)
    room = max(console.width, _NARROWEST) - name_width
    columns = [_param_column(found, path) for path in found.params]
    columns += [_metric_column(found, name) for name in found.metrics]
    for block in _blocks(columns, room):
        table = plain_table()
        table.add_column(Text("\n" + names.title[0]), overflow="fold", width=name_width)
        for column in block:
            table.add_column(Text("\n".join(column.title)), overflow="fold", max_width=room - _GAP)
        for row, name in enumerate(names.cells):
            table.add_row(Text(name[0]), *(_cell(column.cells[row]) for column in block))
        console.print()
        console.print(table)
    confidence = found.sampling.confidence
    baseline = found.experiments[0].name
    console.print()
    if any(each.low is not None for differences in found.differences.values() for each in differences):
        console.print(
            Text(
                f"In brackets the difference from {baseline} and its paired {100 * confidence:g}% interval"
                f" ({found.sampling.draws} draws of prompts). * leaves out 0; by chance one in"
                f" {round(1 / (1 - confidence))} does."
            )
        )
    else:
        console.print(Text(f"In brackets the difference from {baseline}."))
    for note in found.notes:
        console.print(Text(f"- {note}"))


def _blocks(columns: Sequence[_Column], room: int) -> list[list[_Column]]:
    """Columns in as few tables as have room for them, in their order."""
    blocks: list[list[_Column]] = [[]]
    used = 0
    for column in columns:
        width = min(column.width, room - _GAP) + _GAP
        if blocks[-1] and used + width > room:
            blocks.append([])
            used = 0
        blocks[-1].append(column)
        used += width
    return blocks


def _cell(lines: Sequence[str]) -> Text:
    return Text("\n".join(lines), style="bold" if lines[-1].endswith("*") else "")


def _param_column(found: ExperimentComparison, path: str) -> _Column:
    return _Column(_title(path), [[_text(experiment.params.get(path))] for experiment in found.experiments])


def _metric_column(found: ExperimentComparison, name: str) -> _Column:
    values = [_text(experiment.metrics.get(name)) for experiment in found.experiments]
    differences = [None, *found.differences[name]]
    return _Column(_title(name), [_lines(value, each) for value, each in zip(values, differences, strict=True)])


def _title(path: str) -> list[str]:
    section, _, name = path.partition(".")
    return [f"{section}.", name] if name else ["", section]


def _text(value: Scalar) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _lines(value: str, found: Difference | None) -> list[str]:
    if found is None or found.value is None:
        return [value]
    if found.low is None or found.high is None:
        return [value, f"({found.value:+.3g})"] if found.value else [value]
    digits = _decimals(found)
    middle, low, high = (f"{end:+.{digits}f}" if end else "0" for end in (found.value, found.low, found.high))
    return [f"{value} ({middle})", f"[{low}, {high}]{'*' if found.leaves_out_zero else ''}"]


def _decimals(found: Difference) -> int:
    """Decimals that show two digits of half the interval, or three of the difference where it has no width."""
    assert found.low is not None
    assert found.high is not None
    assert found.value is not None
    half = (found.high - found.low) / 2
    size, digits = (half, 2) if half > 0 else (abs(found.value), 3)
    return 0 if size == 0 else min(6, max(0, digits - 1 - math.floor(math.log10(size))))


def print_head_to_head(found: HeadToHead, console: Console | None = None) -> None:
    """Print win rates of rows over columns, and strengths."""
    from dpo_cli.evaluation.flags import percent, percent_interval
    from dpo_cli.statistics.intervals import ends

    console = console or open_console()
    table = plain_table()
    table.add_column(Text("win rate of"), overflow="fold")
    for name in found.models:
        table.add_column(Text(f"over {name}"), overflow="fold")
    if found.strengths is not None:
        table.add_column("strength, logits")
    for first in found.models:
        cells = []
        for second in found.models:
            rate = None if first == second else found.win_rate(first, second)
            cells.append("-" if rate is None else f"{percent(rate.value)}\n{percent_interval([rate.low, rate.high])}")
        if found.strengths is not None:
            strength = found.strengths[first]
            anchor = first == found.models[0]
            interval = "" if anchor or ends(strength) is None else f"\n[{strength.low:+.2f}, {strength.high:+.2f}]"
            cells.append("0" if anchor else f"{strength.value:+.2f}{interval}")
        table.add_row(Text(first), *map(Text, cells))
    console.print()
    console.print(table)
    console.print()
    left_out = f", {found.num_left_out} that not all have are left out" if found.num_left_out else ""
    orders = ", in both orders," if found.reads else ""
    console.print(Text(f"Judged by {found.judge}{orders} on {found.num_prompts} prompts{left_out}."))
    console.print(
        Text(
            f"Strengths by Bradley-Terry, {found.models[0]} being 0."
            if found.strengths is not None
            else f"No strengths: {found.why}."
        )
    )
