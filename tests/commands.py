"""Commands in processes of their own, as a user starts them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def run(folder: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command in a folder, which sees this Python, no DVC around it, and a name for git."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("DVC_")}
    clean["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{clean['PATH']}"
    for role in ("AUTHOR", "COMMITTER"):
        clean |= {f"GIT_{role}_NAME": "test", f"GIT_{role}_EMAIL": "test@example.org"}
    return subprocess.run(command, cwd=folder, env=clean | environment, capture_output=True, text=True, check=False)


def module(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A Python module, such as dpo_cli or dvc."""
    return run(folder, sys.executable, "-m", *arguments, **environment)


def succeed(folder: Path, *arguments: str) -> str:
    """What a Python module prints, which must end well."""
    done = module(folder, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def stages_run(output: str) -> list[str]:
    """The stages that DVC ran, and did not restore or skip."""
    return [line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage")]
