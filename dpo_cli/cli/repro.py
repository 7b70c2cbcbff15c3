"""``dpo-cli repro``: DVC with this interpreter, then the verdict."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from dpo_cli.cli.command import command_app, examples
from dpo_cli.cli.console import ConsoleReporter
from dpo_cli.cli.exits import EXIT_CODE_FILE, errors_as_exit_codes, stage_file
from dpo_cli.core import paths
from dpo_cli.core.artifacts import read_json
from dpo_cli.core.errors import Interrupted, ParamsError
from dpo_cli.core.pipeline import STAGES
from dpo_cli.core.progress import Reporter

app = command_app()


@app.command(
    "repro",
    rich_help_panel="Projects",
    epilog=examples("dpo-cli repro", "dpo-cli repro train --force"),
)
def repro_command(
    targets: Annotated[
        list[str] | None, typer.Argument(metavar="[STAGE]...", help="Stages to bring up to date; none: all.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Run even if nothing changed: only the named stages, or all.")
    ] = False,
) -> None:
    """Bring the project up to date: run the stages whose inputs changed, then print the verdict.

    It is `dvc repro` with this very interpreter, so no environment need be activated. It ends
    with the exit code of the stage that failed. To try a setting as an experiment of DVC, in a
    project that is committed to git: `dvc exp run -S train.beta=0.5`.
    """
    with errors_as_exit_codes(as_json=False):
        code = reproduce(targets or [], force=force, reporter=ConsoleReporter())
    if code:
        sys.exit(code)


def reproduce(targets: Sequence[str], *, force: bool, reporter: Reporter) -> int:
    """Run ``dvc repro`` on stages (by either of their names; none: all) and print the verdict.

    Returns:
        0, or the exit code of the stage that failed, or DVC's own.

    Raises:
        Interrupted: SIGTERM asked to stop; the stage that ran has ended.
        ParamsError: This is no project folder, there is no such stage, or params.yaml is wrong.
    """
    for path in (Path(".dvc"), Path("dvc.yaml")):
        if not path.exists():
            raise ParamsError(f"{path} is missing: {Path.cwd()} is no project folder; make one: dpo-cli init DIR")
    stages = {stage.command: stage.name for stage in STAGES} | {stage.name: stage.name for stage in STAGES}
    unknown = [target for target in targets if target not in stages]
    if unknown:
        known = ", ".join(stage.command for stage in STAGES)
        raise ParamsError([f"{target} is not a stage; there are {known}" for target in unknown])
    from dpo_cli.core.load_params import load_params  # here, so that --help does not wait for it

    load_params(paths.PARAMS)  # before DVC reads it, which bounds nothing
    # named and forced means those stages alone: DVC would force all that comes before them, too
    options = ["--force", *(["--single-item"] if targets else [])] if force else []
    command = [sys.executable, "-m", "dvc", "repro", *options, *map(stages.__getitem__, targets)]
    code = _run(command)
    if code == 0 and (not targets or {"evaluate", "report"} & {stages[target] for target in targets}):
        from dpo_cli.evaluation.verdict import report_verdict

        metrics = read_json(paths.metrics_file("evaluate"), "run: dpo-cli evaluate")["evaluate"]
        report_verdict(metrics, reporter, also=[("report", paths.REPORT_HTML.as_posix())])
    return code


def _run(command: Sequence[str]) -> int:
    with tempfile.TemporaryDirectory() as folder:
        code_file = Path(folder) / "exit_code"
        environment = os.environ | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
            EXIT_CODE_FILE: str(code_file),
        }
        process = subprocess.Popen(command, env=environment)
        asked: list[int] = []

        def end(signum: int, frame: FrameType | None) -> None:
            asked.append(signum)
            process.terminate()

        # Ctrl-C reaches the stage by itself; it saves and ends, then DVC ends, then we do. SIGTERM ends DVC, and then
        # the stage, which sees that DVC is gone.
        handlers = {signal.SIGINT: lambda signum, frame: None, signal.SIGTERM: end}
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        try:
            code = process.wait()
            if asked:
                _await_stage(stage_file(code_file))
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if code and code_file.exists():
            return int(code_file.read_text(encoding="utf-8"))
    if asked:
        raise Interrupted("stopped; the stages that are done are kept; run it again to resume")
    return code


def _await_stage(file: Path) -> None:
    """Wait until the stage that runs, if any, has saved and ended."""
    import psutil  # here, so that --help does not wait for it

    try:
        psutil.Process(int(file.read_text(encoding="utf-8"))).wait()
    except (OSError, ValueError, psutil.NoSuchProcess):
        return
