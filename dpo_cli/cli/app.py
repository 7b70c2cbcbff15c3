"""The command line: one command a stage, ``init`` for a new project, ``repro`` for all of it."""

from __future__ import annotations

import errno
import importlib
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer

from dpo_cli.cli.console import ConsoleReporter
from dpo_cli.cli.repro import EXIT_CODE_FILE, reproduce
from dpo_cli.core import paths
from dpo_cli.core.environment import prepare_environment
from dpo_cli.core.errors import DpoCliError, Interrupted, MachineError, ParamsError
from dpo_cli.core.pipeline import STAGES, Stage
from dpo_cli.core.scratch import die_with_parent


def _examples(*lines: str) -> str:
    return "**Examples**\n\n" + "\n".join(f"- `{line}`" for line in lines)


_EXIT_CODES = (
    "**Exit codes**: 0 done, 1 a bug, 2 usage, 3 settings, 4 data, 5 stale artifact, 6 machine or model,"
    " 130 stopped by you."
)

app = typer.Typer(
    name="dpo-cli",
    help="Tune a language model on preferences with Direct Preference Optimization: offline, versioned, on one GPU.",
    epilog=_examples(
        "dpo-cli init mine --sft instructions.json --preferences pairs.jsonl --model ~/models/Qwen2.5-0.5B",
        "dpo-cli -C mine repro",
        "dpo-cli -C mine precompute-ref && dpo-cli -C mine train --set train.beta=0.5",
    )
    + f"\n\n{_EXIT_CODES}",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)

SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a setting of params.yaml; may be repeated."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the metrics as one JSON object, and no tables.")]


def main() -> None:
    """Entry point of the console script and of ``python -m dpo_cli``."""
    prepare_environment()
    signal.signal(signal.SIGTERM, _interrupt)
    app()


def _interrupt(signum: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dpo-cli {version('dpo-cli')}")
        raise typer.Exit


@app.callback()
def _global_options(
    directory: Annotated[
        Path | None, typer.Option("-C", metavar="DIR", help="Run in this project folder, as if started there.")
    ] = None,
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    if directory is None:
        return
    with _errors_as_exit_codes(as_json=False):
        try:
            os.chdir(directory)
        except OSError as error:
            raise MachineError(f"-C {directory}: {error.strerror}") from None


@contextmanager
def _errors_as_exit_codes(*, as_json: bool) -> Iterator[None]:
    """Print the user's errors one line each and exit with their code; let bugs through."""
    try:
        yield
    except KeyboardInterrupt:
        _fail(Interrupted("stopped; nothing was published and nothing saved is lost; run it again"), as_json=as_json)
    except DpoCliError as error:
        _fail(error, as_json=as_json)
    except (MemoryError, OSError, RuntimeError) as error:
        if (problem := _machine_problem(error)) is None:
            raise
        _fail(MachineError(problem), as_json=as_json)


def _machine_problem(error: Exception) -> str | None:
    """What the machine lacks, where that is what went wrong: memory, room on the disk, or a right."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, which is not imported
        return "out of memory; lower runtime.max_tokens_per_microbatch in params.yaml, then run it again to go on"
    if isinstance(error, OSError) and error.errno in (
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EACCES,
        errno.EPERM,
        errno.EROFS,
    ):
        return f"{error.filename or 'a file'} cannot be written or read: {error.strerror}; free room or mend the rights"
    return None


def _forced(match: re.Match[str]) -> str:
    stage = match[1] in {stage.command for stage in STAGES}
    return f"run: dpo-cli repro {match[1]} --force" if stage else match[0]


def _fail(error: DpoCliError, *, as_json: bool) -> NoReturn:
    if "DVC_STAGE" in os.environ:
        # DVC's cache of runs would bring back what the user is to make anew, were it not forced
        error.problems = [re.sub(r"run: dpo-cli ([a-z-]+)", _forced, problem) for problem in error.problems]
    for problem in error.problems:
        typer.echo(f"dpo-cli: {'' if isinstance(error, Interrupted) else 'error: '}{problem}", err=True)
    if as_json:
        typer.echo(json.dumps({"errors": error.problems, "exit_code": error.exit_code}, ensure_ascii=False))
    if report_to := os.environ.get(EXIT_CODE_FILE):
        Path(report_to).write_text(str(error.exit_code), encoding="utf-8")
    raise typer.Exit(error.exit_code)


# --- stages -------------------------------------------------------------------------------


def _run_stage(stage: Stage, overrides: list[str], *, as_json: bool) -> None:
    with _errors_as_exit_codes(as_json=as_json):
        if overrides and "DVC_STAGE" in os.environ:
            raise ParamsError("--set has no place in a DVC stage: DVC would not see it; change params.yaml")
        from dpo_cli.core.params import load_params  # here, so that --help does not wait for it

        params = load_params(paths.PARAMS, overrides)
        _refuse_unread(stage, overrides)
        die_with_parent()
        run: Callable[..., dict[str, Any]] = importlib.import_module(f"dpo_cli.stages.{stage.name}").run
        metrics = run(params, ConsoleReporter(show_tables=not as_json))
    if as_json:
        typer.echo(json.dumps({stage.name: metrics}, ensure_ascii=False))


def _refuse_unread(stage: Stage, overrides: list[str]) -> None:
    read = (*stage.params, "runtime")
    unread = [override for override in overrides if override.partition(".")[0].strip() not in read]
    if unread:
        raise ParamsError(
            [f"--set {override} has no effect on {stage.command}, which reads {', '.join(read)}" for override in unread]
        )


def _add_stage(stage: Stage) -> None:
    def command(overrides: SetOption = None, as_json: JsonOption = False) -> None:
        _run_stage(stage, overrides or [], as_json=as_json)

    reads = ", ".join(path.as_posix() for path in stage.inputs) or "nothing but params.yaml"
    writes = stage.output.as_posix() if stage.output else "reports/evaluate and reports/report.html"
    command.__doc__ = (
        f"{stage.summary}\n\nSettings: {', '.join(stage.params)} and runtime in params.yaml."
        f" Reads {reads}. Writes {writes}."
    )
    app.command(stage.command, epilog=_examples(stage.example), rich_help_panel="Stages, in their order")(command)


for _stage in STAGES:
    _add_stage(_stage)


# --- projects -----------------------------------------------------------------------------


@app.command(
    "init",
    rich_help_panel="Projects",
    epilog=_examples(
        "dpo-cli init demo",
        "dpo-cli init mine --sft instructions.json --preferences pairs.jsonl --model ~/models/Qwen2.5-0.5B",
    ),
)
def init_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the new project; made where it is missing.")],
    sft: Annotated[
        Path | None, typer.Option("--sft", metavar="FILE", help="Instruction data; copied into data/raw.")
    ] = None,
    preferences: Annotated[
        Path | None, typer.Option("--preferences", metavar="FILE", help="Preference data; copied into data/raw.")
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option("--model", metavar="DIR", help="Base model in Hugging Face layout; none: the embedded model."),
    ] = None,
) -> None:
    """Make a project folder: params.yaml, dvc.yaml, data and a git repository with DVC.

    Without files it holds the embedded small world, without a model the embedded tiny model.
    What stands in the folder already is never overwritten.
    """
    from dpo_cli.cli.init import ProjectFiles, create_project  # here, so that --help does not wait for it

    with _errors_as_exit_codes(as_json=False):
        create_project(folder, ProjectFiles(sft=sft, preferences=preferences, model=model), ConsoleReporter())


@app.command(
    "repro",
    rich_help_panel="Projects",
    epilog=_examples("dpo-cli repro", "dpo-cli repro train --force"),
)
def repro_command(
    targets: Annotated[
        list[str] | None, typer.Argument(metavar="[STAGE]...", help="Stages to bring up to date; none: all.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Run them though they did not change: the named stages alone, or all.")
    ] = False,
) -> None:
    """Bring the project up to date: run the stages whose inputs changed, then print the verdict.

    It is `dvc repro` with this very interpreter, so no environment need be activated. It ends
    with the exit code of the stage that failed. To try a setting as an experiment of DVC, in a
    project that is committed to git: `dvc exp run -S train.beta=0.5`.
    """
    with _errors_as_exit_codes(as_json=False):
        code = reproduce(targets or [], force=force, reporter=ConsoleReporter())
    if code:
        sys.exit(code)
