"""``dpo-cli capability``: what tuning cost on other tasks, item by item."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from dpo_cli.cli.command import command_app, examples
from dpo_cli.cli.console import ConsoleReporter, open_console, plain_table
from dpo_cli.cli.exits import errors_as_exit_codes
from dpo_cli.core import paths
from dpo_cli.core.errors import ParamsError

if TYPE_CHECKING:
    from dpo_cli.evaluation.capability import Difference, TaskResult

app = command_app()


@app.command(
    "capability",
    rich_help_panel="Measurements",
    epilog=examples(
        "dpo-cli capability tasks",
        "dpo-cli capability tasks --tasks arithmetic,reading --limit 200",
        "dpo-cli capability tasks --json",
    ),
)
def capability_command(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER",
            help="YAML files of lm-evaluation-harness; paths of their data files are relative to this folder.",
        ),
    ],
    tasks: Annotated[
        str | None,
        typer.Option("--tasks", metavar="NAME,...", help="Tasks, groups or tags of the folder; left out: all tasks."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", metavar="N", min=1, help="The first N items of each task; left out: all.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as one JSON object, no tables.")] = False,
) -> None:
    """Say what tuning cost on other tasks: base, SFT and DPO answer the same items, compared item by item.

    The tasks are local files of lm-evaluation-harness (`pip install 'dpo-cli[lm-eval]'`); nothing is downloaded. A
    task's figure is the first of its metrics that is a mean over items. A task may name Python functions of its folder,
    which are run. Reads the models of this project, evaluate and runtime in params.yaml. Writes reports/capability.
    """
    with errors_as_exit_codes(as_json=as_json):
        # here, so that --help does not wait for them
        from dpo_cli.core.load_params import load_params
        from dpo_cli.evaluation.capability import measure_capability, metrics_of

        names = [name.strip() for name in tasks.split(",") if name.strip()] if tasks is not None else []
        if tasks is not None and not names:
            raise ParamsError(f"--tasks must name a task, got {tasks!r}")
        params = load_params(paths.PARAMS, [])
        found = measure_capability(folder, names, limit, params, ConsoleReporter(show_tables=not as_json))
        if as_json:
            typer.echo(json.dumps(metrics_of(found), ensure_ascii=False))
        else:
            print_table(found)


def print_table(results: Sequence[TaskResult], console: Console | None = None) -> None:
    """Print a row a task, then in words where the model got worse.

    Args:
        results: What to print.
        console: Where; None: standard output.
    """
    from dpo_cli.evaluation.capability import MODELS, NAMES, STEPS, in_words  # here, so that --help does not wait

    console = console or open_console()
    table = plain_table()
    for title in ("task", "metric", "items", *(NAMES[model] for model in MODELS)):
        table.add_column(Text(title), overflow="fold")
    for ours, theirs in STEPS:
        table.add_column(Text(f"{NAMES[ours]} - {NAMES[theirs]}"), no_wrap=True)
    for result in results:
        table.add_row(
            Text(result.scores.task),
            Text(result.scores.metric + ("" if result.scores.higher_is_better else "\n(less is better)")),
            Text(str(len(result.scores.items))),
            *(Text(f"{result.means[model]:.3f}") for model in MODELS),
            *(_cell(result.differences[step]) for step in STEPS),
        )
    console.print()
    console.print(table)
    console.print()
    sampling = results[0].sampling
    console.print(
        Text(
            f"In brackets {100 * sampling.confidence:g}% intervals of the difference, paired by item"
            f" ({sampling.draws} draws of items)."
        )
    )
    for line in in_words(results):
        console.print(Text(line, style="bold"))


def _cell(difference: Difference) -> Text:
    value, low, high = (difference.estimate.value, difference.estimate.low, difference.estimate.high)
    lines = (f"{value:+.3f}", f"[{low:+.3f}, {high:+.3f}]", difference.change)
    return Text("\n".join(lines), style={"worse": "bold red", "better": "green"}.get(difference.change, ""))
