"""A stage run by hand is recorded in dvc.lock, so that the next ``dpo-cli repro`` does not run it again."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpo_cli.core import paths
from dpo_cli.core.environment import is_first_process
from dpo_cli.core.interrupts import heard
from dpo_cli.core.pipeline import Stage
from dpo_cli.core.progress import Reporter

_AGAIN = "dpo-cli repro will run it again"


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
