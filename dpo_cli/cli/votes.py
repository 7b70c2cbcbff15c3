"""``dpo-cli votes``: have people vote in another annotation tool, and read their votes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from dpo_cli.cli.command import JsonOption, command_group, examples
from dpo_cli.cli.console import ConsoleReporter
from dpo_cli.cli.exits import errors_as_exit_codes
from dpo_cli.core import paths
from dpo_cli.core.errors import DataError, ParamsError

_TOOLS = "label-studio, argilla or potato"

app = command_group("votes", "Have people vote in Label Studio, Argilla or Potato, and bring their votes back.", "Data")


@app.command(
    "export",
    epilog=examples(
        "dpo-cli votes export data/samples/prompts.parquet --to label-studio --out tasks",
        "dpo-cli votes export reports/evaluate/samples.json --to argilla --out tasks",
        "dpo-cli votes export data/samples/prompts.parquet --to potato --mode ranking --out tasks",
    ),
)
def export_command(
    items: Annotated[
        Path,
        typer.Argument(
            metavar="ITEMS",
            help="Answers of `dpo-cli sample`, the samples.json of evaluate, or any rows with prompt and completions.",
        ),
    ],
    to: Annotated[str, typer.Option("--to", metavar="TOOL", help=f"{_TOOLS}.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The folder to make.")],
    mode: Annotated[
        str | None, typer.Option("--mode", metavar="MODE", help="pair (the default), ranking or thumbs.")
    ] = None,
    pairs: Annotated[
        int | None, typer.Option("--pairs", metavar="N", help="Most pairs of one prompt; 1 if left out.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", metavar="N", help="Of the order of items and answers; 0 if left out.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write what people vote on as tasks of another tool, with the configuration that it needs.

    Items and answers are in an order that is drawn from the seed, and nothing that raters see says who wrote an answer.
    That is in key.jsonl: keep the folder until the votes are imported.
    """
    with errors_as_exit_codes(as_json=as_json):
        tool = _tool("--to", to)
        from dpo_cli.labeling.settings import SETTINGS_FILE  # here, so that --help does not wait for it

        if out.exists() and (not out.is_dir() or any(each.name != SETTINGS_FILE for each in out.iterdir())):
            raise DataError(f"--out {out} exists, and is no empty folder; name another one")
        from dpo_cli.cli.label import account_of, open_items, print_account
        from dpo_cli.labeling.exchange import export_tasks

        reporter = ConsoleReporter(show_tables=not as_json)
        settings, store, account = open_items(items, out, {"mode": mode, "pairs": pairs, "seed": seed})
        export_tasks(store, settings, tool, out)
        print_account(items, account, reporter, [("tasks in", out.as_posix())])
        reporter.say(f"next, with {out}: {tool.next_step}; then dpo-cli votes import FILE --from {to} --tasks {out}")
        if as_json:
            typer.echo(json.dumps(account_of(account) | {"folder": out.as_posix()}, ensure_ascii=False))


@app.command(
    "import",
    epilog=examples(
        "dpo-cli votes import project-1.json --from label-studio --tasks tasks --out data/raw/votes",
        "dpo-cli votes import tasks/annotation_output/*/user_state.json --from potato --tasks tasks",
        "dpo-cli votes import records.json --from argilla --rater 2f1c7a52-8e0f-4b7e-9d43-5a1f0c6b9e21=anna",
    ),
)
def import_command(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help="What the tool exported: JSON, JSON lines, CSV or parquet.")
    ],
    source: Annotated[str, typer.Option("--from", metavar="TOOL", help=f"{_TOOLS}.")],
    tasks: Annotated[
        Path | None,
        typer.Option(
            "--tasks",
            metavar="DIR",
            help="The folder that `dpo-cli votes export` made; left out: prompt and answers are taken from FILE.",
        ),
    ] = None,
    raters: Annotated[
        list[str] | None,
        typer.Option("--rater", metavar="ID=NAME", help="The name of a rater; left out: as in FILE. May be repeated."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Folder of the votes; left out: data/votes/TOOL.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Read the votes that people gave in another tool, into one file a rater.

    Whatever is no vote is counted and named: drafts, answers to other questions, votes that were changed later or
    imported before. An annotation that is malformed, or on an unknown item, is an error, and nothing is written.
    """
    with errors_as_exit_codes(as_json=as_json):
        tool = _tool("--from", source)
        from dpo_cli.labeling.exchange import import_votes

        names = {said: name for said, _, name in (each.rpartition("=") for each in raters or [])}
        if not all((*names, *names.values())):
            raise ParamsError("--rater must be ID=NAME, such as --rater 7=anna")
        reporter = ConsoleReporter(show_tables=not as_json)
        folder = out or paths.VOTES / source
        account = import_votes(files, tool, tasks, names, folder)
        figures = {
            "num_annotations": account.num_annotations,
            "raters": dict(account.num_votes),
            "left_out": {reason: count for reason, count in account.left_out.items() if count},
            "doubts": dict(account.doubts),
            "folder": folder.as_posix(),
        }
        _print(figures, reporter)
        if as_json:
            typer.echo(json.dumps(figures, ensure_ascii=False))


def _print(figures: dict[str, Any], reporter: ConsoleReporter) -> None:
    rows = [("annotations", str(figures["num_annotations"]))]
    rows += [(rater, f"{count} votes") for rater, count in figures["raters"].items()]
    rows += [(reason, str(count)) for reason, count in figures["left_out"].items()]
    reporter.table(f"votes in {figures['folder']}", rows)
    for doubt, count in figures["doubts"].items():
        reporter.warn(f"votes: {count} votes {doubt}")


def _tool(option: str, name: str) -> Any:
    from dpo_cli.labeling.tools import TOOLS  # here, so that --help does not wait for them

    if name not in TOOLS:
        raise ParamsError(f"{option} must be {_TOOLS}, got {name}")
    return TOOLS[name]
