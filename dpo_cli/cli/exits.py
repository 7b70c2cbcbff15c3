"""How a command ends: the user's errors, and what the machine lacks, one line each, with their exit code."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import typer

from dpo_cli.core.environment import is_first_process
from dpo_cli.core.errors import DISK_FULL, DpoCliError, Interrupted, MachineError, is_out_of_memory
from dpo_cli.core.interrupts import heard
from dpo_cli.core.pipeline import STAGES
from dpo_cli.core.text import in_one_line, shown

EXIT_CODE_FILE = "DPO_CLI_EXIT_CODE_FILE"
"""Environment variable: the file to which a failing stage writes its exit code, which DVC hides."""

_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
_NOT_A_NAME = (errno.ENAMETOOLONG,)
_SAYS_FULL = (
    "no space left on device",
    "disk quota exceeded",
    "os error 28",  # what is written in Rust: safetensors, tokenizers, polars
    "os error 122",
    "storagefull",
    "pytorchstreamwriter failed writing",
)
_SAYS_CUT_OFF = re.compile(r"\d+ requested and \d+ written|unexpected pos \d+ vs \d+")  # numpy's and torch's words
_SAYS_FORBIDDEN = ("os error 13", "os error 30", "permission denied")


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


def machine_problem(error: BaseException) -> str | None:
    """What the machine lacks: memory, room on the disk, a right; or a path that none can have; None for a bug."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    for each in chain:
        if is_out_of_memory(each):
            return "out of memory; lower runtime.max_tokens_per_microbatch in params.yaml, then run it again to resume"
        if (problem := _problem_of_a_file(each)) is not None:
            return problem
    return None


def _problem_of_a_file(error: BaseException) -> str | None:
    said = str(error).lower()
    number = error.errno if isinstance(error, OSError) else None
    name = (error.filename if isinstance(error, OSError) else None) or "a file"
    if number in DISK_FULL or any(words in said for words in _SAYS_FULL) or _SAYS_CUT_OFF.search(said):
        return f"{name} cannot be written: the disk is full; free some space, then run it again to resume"
    if number in _FORBIDDEN or any(words in said for words in _SAYS_FORBIDDEN):
        why = error.strerror if isinstance(error, OSError) and error.strerror else "permission denied"
        return f"{name} cannot be written or read: {why}; fix its permissions"
    if number in _NOT_A_NAME:
        return f"{shown(str(name))} is not a valid file name: it is too long ({len(str(name))} characters)"
    if isinstance(error, ValueError) and "null byte" in said:
        return "a path holds a NUL byte, which no name of a file can have"
    return None
