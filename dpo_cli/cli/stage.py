"""The command of a stage: settings in, metrics out.

A stage run by hand is recorded in dvc.lock, so that the next ``dpo-cli repro`` does not run it again.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import typer

from dpo_cli.cli.command import JsonOption, SetOption, command_app, examples, refuse_unread
from dpo_cli.cli.console import ConsoleReporter
from dpo_cli.cli.exits import EXIT_CODE_FILE, errors_as_exit_codes, stage_file
from dpo_cli.core import paths
from dpo_cli.core.environment import importing, is_first_process
from dpo_cli.core.errors import MachineError, ParamsError
from dpo_cli.core.interrupts import heard
from dpo_cli.core.pipeline import Stage
from dpo_cli.core.progress import Reporter
from dpo_cli.core.scratch import die_with_parent

PANEL = "Stages, in their order"
_AGAIN = "dpo-cli repro will run it again"


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


def refuse_unwritable(places: Iterable[Path]) -> None:
    """Refuse to begin what could not be published hours later; folders above the places may be missing.

    Raises:
        MachineError: One of the places cannot be written or replaced.
    """
    for place in places:
        there = next((parent for parent in place.absolute().parents if parent.exists()), Path("/"))
        if not there.is_dir():
            raise MachineError(f"{place} cannot be written: {there} is not a folder; move it away")
        if not os.access(there, os.W_OK | os.X_OK):
            raise MachineError(f"{place} cannot be written: {there} forbids it; fix its permissions (chmod u+rwx)")


# --- recording ----------------------------------------------------------------------------


class HandRun:
    """One run of a stage outside DVC; to be made before the stage reads anything.

    Args:
        stage: The stage.
        overrides: What ``--set`` said. Settings of runtime change no result and are in no stage of dvc.yaml.
        reporter: Says whether the run was recorded.
    """

    def __init__(self, stage: Stage, overrides: Sequence[str], reporter: Reporter) -> None:
        self._stage = stage
        self._reporter = reporter
        self._is_of_params_yaml = all(override.partition(".")[0].strip() == "runtime" for override in overrides)
        self._is_ours = (
            "DVC_STAGE" not in os.environ
            and is_first_process()
            and Path(".dvc").is_dir()
            and Path("dvc.yaml").is_file()
        )
        self._read = _state(stage) if self._is_ours and self._is_of_params_yaml else None

    def record(self) -> None:
        """Tell DVC what the stage read and made. A run that cannot be recorded is none the worse for it."""
        if not self._is_ours:
            return
        name = self._stage.command
        if not self._is_of_params_yaml:
            self._reporter.say(f"{name}: not recorded in dvc.lock, since params.yaml does not say what --set says")
            return
        if self._read != _state(self._stage):
            self._reporter.say(f"{name}: not recorded in dvc.lock, since its inputs changed while it ran; {_AGAIN}")
            return
        command = [sys.executable, "-m", "dvc", "commit", "--force", self._stage.name]
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
            problem = _last_error(done.stderr) if done.returncode else ""
        except OSError as error:
            problem = f"dvc cannot be run ({error})"
        except KeyboardInterrupt as stop:
            heard(stop)
            problem = "stopped"
        if problem:
            self._reporter.say(f"{name}: done, but not recorded in dvc.lock: {problem}; {_AGAIN}")
        else:
            self._reporter.say(f"{name}: recorded in dvc.lock")


def _state(stage: Stage) -> Any:
    """What the stage reads: size and time of each file, and its sections of params.yaml."""
    files = [file for path in stage.inputs for file in (sorted(path.rglob("*")) if path.is_dir() else [path])]
    stamps = {}
    for file in files:
        if file.is_file():
            stat = file.stat()
            stamps[file.as_posix()] = (stat.st_size, stat.st_mtime_ns)
    return stamps, _sections(stage)


def _sections(stage: Stage) -> Any:
    from ruamel.yaml import YAML  # here, so that --help does not wait for it
    from ruamel.yaml.error import YAMLError

    if not stage.params:
        return None
    try:
        tree = YAML(typ="safe").load(paths.PARAMS)
    except (OSError, ValueError, YAMLError, RecursionError):
        return None
    return {name: tree.get(name) for name in stage.params} if isinstance(tree, dict) else None


def _last_error(stderr: str) -> str:
    """DVC's message: its last line that says ERROR, without that word."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")] or lines or ["dvc commit failed"]
    return errors[-1].removeprefix("ERROR:").strip()
