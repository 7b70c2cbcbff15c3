"""sft and train as torchrun starts them, on a small project: what they publish is what one process does."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dpo_cli.core.errors import MachineError
from dpo_cli.core.load_params import parse_params
from dpo_cli.core.manifest import DPO
from dpo_cli.core.progress import SilentReporter
from dpo_cli.data import world

TRAINING = {"learning_rate": 1e-3, "batch_size": 8, "max_steps": 6}


def command(folder: Path, *arguments: str) -> tuple[list[str], dict[str, Any]]:
    """A command of dpo-cli in two processes, and how to start it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    line = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DVC_")}
    options = {"cwd": folder, "env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return [*line, "-m", "dpo_cli", *arguments], options


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    line, options = command(folder, *arguments)
    return subprocess.run(line, **options, check=False, timeout=600)


@pytest.fixture(scope="module")
def settings(tiny_folder: Path) -> dict[str, Any]:
    """Settings of a small project on the tiny model."""
    return {
        "data": {"eval_fraction": 0.2},
        "model": {"name": "tiny"},
        "sft": {**TRAINING, "max_length": 256},
        "reference": {"max_length": 256},
        "train": TRAINING,
        "runtime": {"model_path": str(tiny_folder), "device": "cpu"},
    }


def alone(folder: Path, settings: dict[str, Any], *stages: str) -> None:
    """Run stages in this process."""
    with contextlib.chdir(folder):
        for stage in stages:
            importlib.import_module(f"dpo_cli.stages.{stage}").run(parse_params(settings), SilentReporter())


@pytest.fixture(scope="module")
def prepared(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose stages before sft are done; not to be changed."""
    folder = tmp_path_factory.mktemp("torchrun") / "project"
    raw = folder / "data/raw"
    raw.mkdir(parents=True)
    (raw / "instructions.json").write_text(json.dumps(world.instruction_rows(0, 80)), encoding="utf-8")
    (raw / "preferences.json").write_text(json.dumps(world.preference_rows(0, 90)), encoding="utf-8")
    (folder / "params.yaml").write_text(json.dumps(settings), encoding="utf-8")
    alone(folder, settings, "base", "convert_sft", "convert_preferences")
    return folder


@pytest.fixture
def copy(prepared: Path, tmp_path: Path) -> Path:
    """A copy of the project that a test may change."""
    return Path(shutil.copytree(prepared, tmp_path / "copy"))


def weights(folder: Path) -> Any:
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


def metrics(folder: Path, stage: str) -> dict[str, Any]:
    return json.loads((folder / f"reports/{stage}/metrics.json").read_text(encoding="utf-8"))[stage]


def same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert (found[name] - value).norm() <= 1e-5 * value.norm(), name


def test_two_processes_publish_what_one_does(
    copy: Path, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    single = Path(shutil.copytree(copy, tmp_path / "single"))
    shared = run(copy, "sft", "--json")
    assert shared.returncode == 0, shared.stderr
    assert json.loads(shared.stdout)["sft"]["num_steps"] == 6, "one process prints, and nothing else"
    assert shared.stderr.count("sft: training: 6/6 steps") == 1
    alone(single, settings, "sft", "precompute_ref")
    same(weights(copy / "models/sft"), weights(single / "models/sft"))

    for name in ("models/sft", "data/reference"):  # both train from the same reference
        shutil.rmtree(copy / name, ignore_errors=True)
        shutil.copytree(single / name, copy / name)
    shared = run(copy, "train")
    assert shared.returncode == 0, shared.stderr
    assert shared.stdout.count("held-out accuracy") == 1
    alone(single, settings, "train")
    same(weights(copy / "models/dpo"), weights(single / "models/dpo"))
    for name in ("loss", "eval_loss_start", "eval_loss", "eval_margin"):
        assert metrics(copy, "train")[name] == pytest.approx(metrics(single, "train")[name], rel=1e-5, abs=1e-7), name
    first, second = (DPO.read(folder / DPO.folder) for folder in (copy, single))
    assert replace(first, files={}) == replace(second, files={}), "the number of processes is no part of the result"
    assert not any((copy / ".scratch/train").glob("*/*")), "the half-done work is gone"

    monkeypatch.setenv("WORLD_SIZE", "2")
    for stage in ("base", "precompute_ref", "evaluate"):
        with pytest.raises(MachineError, match="2 processes were started"):
            alone(single, settings, stage)


def test_stopped_they_save_once_and_go_on(copy: Path) -> None:
    """Ctrl-C reaches torchrun, which hands it on to all."""
    line, options = command(copy, "sft", "--set", "sft.max_steps=100", "--set", "runtime.checkpoint_minutes=0")
    process = subprocess.Popen(line, **options)
    try:
        while not any(copy.glob(".scratch/sft/*/checkpoint-*/state.json")):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=0.1)
                pytest.fail(f"it ended before it saved: {process.communicate()[1]}")
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=600)
    finally:
        process.kill()
    assert process.returncode != 0
    assert stderr.count("sft: stopped and saved at step") == 1, stderr
    step = stderr.split("stopped and saved at step ")[1].split()[0]
    assert not (copy / "models/sft").exists()
    again = run(copy, "sft", "--set", "sft.max_steps=100")
    assert again.returncode == 0, again.stderr
    assert again.stderr.count(f"sft: going on from checkpoint-{step}") == 1
    assert [row.split("\t")[0] for row in (copy / "reports/sft/steps.tsv").read_text().splitlines()[1:]] == [
        str(number) for number in range(101)
    ]
