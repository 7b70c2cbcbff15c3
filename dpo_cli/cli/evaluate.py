"""``dpo-cli evaluate``: the stage, or the same of another model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from dpo_cli.cli.command import JsonOption, SetOption, refuse_unread
from dpo_cli.cli.console import ConsoleReporter
from dpo_cli.cli.exits import errors_as_exit_codes
from dpo_cli.cli.stage import add_stage, run_stage
from dpo_cli.core import paths
from dpo_cli.core.errors import ParamsError
from dpo_cli.core.pipeline import STAGES

_STAGE = next(stage for stage in STAGES if stage.name == "evaluate")


def _command(
    overrides: SetOption = None,
    model: Annotated[
        Path | None,
        typer.Option(
            "--model",
            metavar="DIR",
            help="Judge this adapter for the project's SFT model, or this whole model, in place of models/dpo; no"
            " training is needed. Its files go to --out, and no report is made.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Where --model's files go; evaluations/NAME if not given."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    if model is None and out is None:
        run_stage(_STAGE, overrides or [], as_json=as_json)
    else:
        _evaluate_model(model, out, overrides or [], as_json=as_json)


def _evaluate_model(model: Path | None, out: Path | None, overrides: list[str], *, as_json: bool) -> None:
    with errors_as_exit_codes(as_json=as_json):
        if model is None:
            raise ParamsError("--out has no effect without --model: stage evaluate writes to reports/evaluate")
        from dpo_cli.core.load_params import load_params  # here, so that --help does not wait for it

        params = load_params(paths.PARAMS, overrides)
        refuse_unread(_STAGE.command, (*_STAGE.params, "train", "runtime"), overrides)
        from dpo_cli.stages.evaluate import evaluate_model

        folder = out or paths.EVALUATIONS / model.resolve().name
        beta_given = any(override.strip().startswith("train.") for override in overrides)
        reporter = ConsoleReporter(show_tables=not as_json)
        metrics = evaluate_model(params, model, folder, reporter, beta_given=beta_given)
    if as_json:
        typer.echo(json.dumps({_STAGE.name: metrics}, ensure_ascii=False))


app = add_stage(_STAGE, _command)
