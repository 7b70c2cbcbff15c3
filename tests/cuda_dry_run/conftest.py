"""Runs each suite once, in a process whose CUDA device is not there."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dpo_cli.dry_run.stub import lacking

Outcomes = Callable[[str], dict[str, dict[str, Any]]]


@pytest.fixture(scope="session")
def outcomes() -> Outcomes:
    """The outcomes of a suite by the names of its cases."""
    if (reason := lacking()) is not None:
        warnings.warn(f"the code for CUDA is not run dry: {reason}", stacklevel=1)
        pytest.skip(reason)
    known: dict[str, dict[str, dict[str, Any]]] = {}

    def of(suite: str) -> dict[str, dict[str, Any]]:
        if suite not in known:
            line = [sys.executable, "-m", "tests.cuda_dry_run", "--suite", suite]
            root = Path(__file__).parents[2]
            done = subprocess.run(line, cwd=root, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr[-2000:]
            found = [json.loads(text) for text in done.stdout.splitlines()]
            known[suite] = {outcome["case"]: outcome for outcome in found}
        return known[suite]

    return of
