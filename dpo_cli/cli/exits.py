"""How a command ends: the user's errors one line each, with their exit code."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import typer

from dpo_cli.cli.machine import machine_problem
from dpo_cli.core.environment import is_first_process
from dpo_cli.core.errors import DpoCliError, Interrupted, MachineError
from dpo_cli.core.interrupts import heard
from dpo_cli.core.pipeline import STAGES
from dpo_cli.core.text import in_one_line

EXIT_CODE_FILE = "DPO_CLI_EXIT_CODE_FILE"
"""Environment variable: the file to which a failing stage writes its exit code, which DVC hides."""


@contextmanager
def errors_as_exit_codes(*, as_json: bool) -> Iterator[None]:
    """Print the user's errors one line each and exit with their code; let bugs through."""
    try:
        yield
    except KeyboardInterrupt as stop:
        heard(stop)
        _fail(Interrupted("stopped; nothing was published and nothing saved is lost; run it again"), as_json=as_json)
    except DpoCliError as error:
        _fail(error, as_json=as_json)
    except Exception as error:
        if (problem := machine_problem(error)) is None:
            raise
        _fail(MachineError(problem), as_json=as_json)


def _forced(match: re.Match[str]) -> str:
    stage = match[1] in {stage.command for stage in STAGES}
    return f"run: dpo-cli repro {match[1]} --force" if stage else match[0]


def _fail(error: DpoCliError, *, as_json: bool) -> NoReturn:
    if isinstance(error, Interrupted) and not is_first_process():
        raise typer.Exit(0)  # the first one says it; were this a failure, torchrun would end that one on its way out
    if "DVC_STAGE" in os.environ:
        # DVC's cache of runs would bring back what the user is to make anew, were it not forced
        error.problems = [re.sub(r"run: dpo-cli ([a-z-]+)", _forced, problem) for problem in error.problems]
    for problem in error.problems:
        typer.echo(f"dpo-cli: {'' if isinstance(error, Interrupted) else 'error: '}{in_one_line(problem)}", err=True)
    if as_json and is_first_process():
        typer.echo(json.dumps({"errors": error.problems, "exit_code": error.exit_code}, ensure_ascii=False))
    if report_to := os.environ.get(EXIT_CODE_FILE):
        Path(report_to).write_text(str(error.exit_code), encoding="utf-8")
    raise typer.Exit(error.exit_code)


def stage_file(code_file: Path) -> Path:
    """Where a stage says the id of its process, beside the file for its exit code."""
    return code_file.with_name("stage")
