"""``dpo-cli watch``: the curves of a training that runs, was stopped or is done."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from time import sleep
from typing import TYPE_CHECKING, Annotated

import typer

from dpo_cli.cli.command import JsonOption, command_app, examples
from dpo_cli.cli.console import ConsoleReporter
from dpo_cli.cli.exits import errors_as_exit_codes
from dpo_cli.core.errors import DataError, ParamsError
from dpo_cli.core.interrupts import heard

if TYPE_CHECKING:
    from dpo_cli.core.progress import Status
    from dpo_cli.evaluation.flags import Finding
    from dpo_cli.report.watched import Watched

_REFRESH_S = 10

app = command_app()


@app.command(
    "watch",
    rich_help_panel="Measurements",
    epilog=examples("dpo-cli watch", "dpo-cli -C mine watch train", "dpo-cli watch train --html train.html"),
)
def watch_command(
    stage: Annotated[
        str | None,
        typer.Argument(metavar="[STAGE]", help="base, sft, train, reward or ppo; left out: what trained last."),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(
            "--html",
            metavar="FILE",
            help=f"Write a page instead, again every {_REFRESH_S} s while the training runs; a browser that shows it"
            " follows.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show how a training goes: its curves, what they say, and the time left.

    It reads the files that the stage writes, in another terminal, over ssh or afterwards, and does not disturb it.
    Where its output is no terminal, it prints how the training stands and ends.
    """
    with errors_as_exit_codes(as_json=as_json):
        from dpo_cli.report.steps import CURVES  # here, so that --help does not wait for them

        if stage is not None and stage not in CURVES:
            raise ParamsError(f"{stage} does not train; dpo-cli watch shows {', '.join(CURVES)}")
        if html is not None and as_json:
            raise ParamsError("--json has no effect with --html, which prints nothing; leave one of them out")
        if html is not None:
            _write_pages(stage, html)
        elif as_json or not all(stream.isatty() for stream in (sys.stdin, sys.stdout, sys.stderr)):
            _print_summary(_find(stage), as_json=as_json)
        else:
            from dpo_cli.report.watch_terminal import watch_in_terminal

            watch_in_terminal(stage)


def _find(stage: str | None) -> Watched:
    from dpo_cli.report.watched import find_logs, read_log

    logs = find_logs()
    name = stage or next(iter(logs), None)
    found = read_log(name, logs[name]) if name in logs else None
    if found is None:
        what = "nothing was trained here" if stage is None else f"{stage} has not trained here"
        raise DataError(f"{what}, so there are no curves; run: dpo-cli {stage or 'repro'}")
    return found


def _print_summary(watched: Watched, *, as_json: bool) -> None:
    from dpo_cli.report.readings import readings, worst

    findings = readings(watched.stage, watched.steps)
    if as_json:
        typer.echo(json.dumps(_summary(watched, findings)))
        return
    rows: list[tuple[Status, str, str]] = [
        (found.status, found.name, f"{found.value}: {found.meaning}") for found in findings
    ]
    ConsoleReporter().verdict(watched.headline, worst(findings), rows)


def _summary(watched: Watched, findings: list[Finding]) -> dict[str, object]:
    return {
        **{name: getattr(watched, name) for name in ("stage", "state", "step", "num_steps", "seconds_left")},
        "last": {name: value for row in watched.steps for name, value in row.items() if value == value},
        "readings": [vars(found) for found in findings],
    }


def _write_pages(stage: str | None, path: Path) -> None:
    """Write the page until the training runs no longer, or Ctrl-C."""
    from dpo_cli.report.watch_page import write_watch_page
    from dpo_cli.report.watched import find_logs, read_log

    reporter, watched, is_said = ConsoleReporter(), _find(stage), False
    try:
        while True:
            write_watch_page(path, watched, _REFRESH_S)
            if watched.state != "running":
                break
            if not is_said:
                reporter.say(f"{path} follows {watched.stage} until it ends, or Ctrl-C")
                is_said = True
            sleep(_REFRESH_S)
            watched = (read_log(watched.stage, find_logs().get(watched.stage, watched.source))) or watched
    except KeyboardInterrupt as stop:  # the usual end
        heard(stop)
    reporter.say(f"{watched.headline}; wrote {path}")
