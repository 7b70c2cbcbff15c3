"""The command of a stage: settings in, metrics out."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from dpo_cli.cli.command import JsonOption, SetOption, command_app, examples, refuse_unread
from dpo_cli.cli.console import ConsoleReporter
from dpo_cli.cli.exits import EXIT_CODE_FILE, errors_as_exit_codes, stage_file
from dpo_cli.cli.machine import refuse_unwritable
from dpo_cli.cli.record import HandRun
from dpo_cli.core import paths
from dpo_cli.core.environment import importing, is_first_process
from dpo_cli.core.errors import ParamsError
from dpo_cli.core.pipeline import Stage
from dpo_cli.core.scratch import die_with_parent

PANEL = "Stages, in their order"


def stage_app(stage: Stage) -> typer.Typer:
    """The command of a stage without options of its own."""

    def command(overrides: SetOption = None, as_json: JsonOption = False) -> None:
        run_stage(stage, overrides or [], as_json=as_json)

    return add_stage(stage, command)


def add_stage(stage: Stage, command: Callable[..., None]) -> typer.Typer:
    """A stage's command, with the help that follows from what it reads and writes."""
    reads = ", ".join(path.as_posix() for path in stage.inputs) or "nothing but params.yaml"
    writes = stage.output.as_posix() if stage.output else paths.report_dir(stage.name).as_posix()
    command.__doc__ = (
        f"{stage.summary}\n\nSettings: {', '.join(stage.params)} and runtime in params.yaml."
        f" Reads {reads}. Writes {writes}."
    )
    app = command_app()
    app.command(stage.command, epilog=examples(stage.example, *stage.more_examples), rich_help_panel=PANEL)(command)
    return app


def run_stage(stage: Stage, overrides: list[str], *, as_json: bool) -> None:
    """Run a stage with the settings of params.yaml, and record it."""
    with errors_as_exit_codes(as_json=as_json):
        if overrides and "DVC_STAGE" in os.environ:
            raise ParamsError("--set has no place in a DVC stage: DVC would not see it; change params.yaml")
        from dpo_cli.core.load_params import load_params  # here, so that --help does not wait for it

        params = load_params(paths.PARAMS, overrides)
        refuse_unread(stage.command, (*stage.params, "runtime"), overrides)
        refuse_unwritable(stage.made)
        die_with_parent()
        if code_file := os.environ.get(EXIT_CODE_FILE):
            stage_file(Path(code_file)).write_text(str(os.getpid()), encoding="utf-8")
        told = stage.name == "evaluate" and EXIT_CODE_FILE in os.environ  # repro prints the verdict at its end
        reporter = ConsoleReporter(show_tables=not (as_json or told))
        by_hand = HandRun(stage, overrides, reporter)
        with importing():
            run: Callable[..., dict[str, Any]] = importlib.import_module(stage.module).run
        metrics = run(params, reporter)
        by_hand.record()
    if as_json and is_first_process():
        typer.echo(json.dumps({stage.name: metrics}, ensure_ascii=False))
