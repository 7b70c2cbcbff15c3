"""A small project that ``dpo-cli repro`` has made, built once for all processes of a test run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from dpo_cli.core.artifacts import write_text
from dpo_cli.core.load_params import load_params
from dpo_cli.core.params_text import params_yaml
from dpo_cli.data import world
from tests.commands import run, succeed
from tests.tiny_project import CONVERTED, TRAINING, run_stages, write_raw

NUM_ROWS = 160
_SMALL = {
    "pretrain_steps: 1800": "pretrain_steps: 40",
    "epochs: 3.0": "epochs: 1.0",
    "num_prompts: 0": "num_prompts: 16",
    "max_new_tokens: 48": "max_new_tokens: 12",
    "temperatures: [0.0, 0.25, 0.5, 0.75, 1.0]": "temperatures: [0.0]",
    "scales: [0.25, 0.5, 0.75, 1.5]": "scales: [0.5]",
}


@pytest.fixture(scope="session")
def no_network() -> tuple[str, ...]:
    """A command that runs another in a network namespace without a network, where the system allows it."""
    command = ("unshare", "-rn") if os.geteuid() else ("unshare", "-n")
    if shutil.which("unshare") is None or subprocess.run([*command, "true"], check=False).returncode:
        return ()
    return command


@pytest.fixture(scope="session")
def new_project() -> Callable[[Path], Path]:
    """``new_project(folder)``: the embedded project with small settings, of which no stage has run."""

    def make(folder: Path) -> Path:
        succeed(folder.parent, "dpo_cli", "init", str(folder))
        params = folder / "params.yaml"
        text = params.read_text(encoding="utf-8")
        for before, after in _SMALL.items():
            assert before in text, before
            text = text.replace(before, after)
        params.write_text(text, encoding="utf-8")
        for name, rows in (("instructions", world.instruction_rows), ("preferences", world.preference_rows)):
            (folder / f"data/raw/{name}.json").write_text(json.dumps(rows(0, NUM_ROWS)), encoding="utf-8")
        return folder

    return make


@pytest.fixture(scope="session")
def finished(
    tmp_path_factory: pytest.TempPathFactory, no_network: tuple[str, ...], new_project: Callable[[Path], Path]
) -> Path:
    """Such a project after ``dpo-cli repro``, committed; all processes share it, so it is not to be changed."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "finished"
    with FileLock(f"{folder}.lock"):
        if not (folder / "complete").is_file():
            folder.mkdir()
            project = new_project(folder / "project")
            done = run(project, *no_network, sys.executable, "-m", "dpo_cli", "repro")
            assert done.returncode == 0, done.stdout + done.stderr
            run(project, "git", "add", "-A")
            run(project, "git", "commit", "-qm", "first")
            (folder / "complete").touch()
    return folder / "project"


@pytest.fixture(scope="session")
def train_tiny(tiny_folder: Path, make_reporter: Any) -> Callable[..., None]:
    """``train_tiny(folder, settings)``: a project of the tiny model after stage train, for tests of commands."""

    def make(folder: Path, settings: dict[str, Any], more_rows: Sequence[Any] = ()) -> None:
        values = {
            "data.eval_fraction": 0.3,
            "data.preferences.also": [],
            "model.name": "tiny",
            **{f"{section}.{key}": value for section in ("sft", "train") for key, value in TRAINING.items()},
            "sft.max_length": 200,
            "reference.max_length": 200,
            "reference.quantization": "none",
            "evaluate.bootstrap_draws": 200,
            "runtime.model_path": str(tiny_folder),
            "runtime.device": "cpu",
        }
        with chdir(folder):
            write_text(Path("params.yaml"), params_yaml(values | settings))
            write_raw([*world.preference_rows(0, 60), *more_rows], 60)
            stages = (*CONVERTED, "sft", "precompute_ref", "train")
            run_stages(load_params(Path("params.yaml")), make_reporter(), *stages)

    return make
