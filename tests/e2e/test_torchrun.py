"""sft and train as torchrun starts them, on a small project: what they publish is what one process does."""

from __future__ import annotations

import contextlib
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
from tests.tiny_project import CONVERTED, run_stages, tiny_settings, write_raw

SFT_STEPS = 40
"""Enough that a signal comes before the last."""


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


def weights(folder: Path) -> Any:
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


def metrics(folder: Path, stage: str) -> dict[str, Any]:
    return json.loads((folder / f"reports/{stage}/metrics.json").read_text(encoding="utf-8"))[stage]


def same(found: dict[str, Any], expected: dict[str, Any], tolerance: float) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert (found[name] - value).norm() <= tolerance * value.norm(), name


def test_two_processes_are_stopped_go_on_and_publish_what_one_does(
    project: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C reaches torchrun, which hands it on to all."""
    settings = tiny_settings(tiny_folder, sft={"max_steps": SFT_STEPS})
    params = parse_params(settings)
    write_raw()
    run_stages(params, SilentReporter(), *CONVERTED)
    (project / "params.yaml").write_text(json.dumps(settings), encoding="utf-8")
    shared = Path(shutil.copytree(project, tmp_path / "shared"))

    line, options = command(shared, "sft", "--set", "runtime.checkpoint_minutes=0")
    process = subprocess.Popen(line, **options)
    try:
        while not any(shared.glob(".scratch/sft/*/checkpoint-*/state.json")):
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
    assert not (shared / "models/sft").exists()
    done = run(shared, "sft", "--json")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(f"sft: going on from checkpoint-{step}") == 1
    assert json.loads(done.stdout)["sft"]["num_steps"] == SFT_STEPS, "one process prints, and nothing else"
    assert done.stderr.count(f"sft: training: {SFT_STEPS}/{SFT_STEPS} steps") == 1
    steps = [row.split("\t")[0] for row in (shared / "reports/sft/steps.tsv").read_text().splitlines()[1:]]
    assert steps == [str(number) for number in range(SFT_STEPS + 1)]
    run_stages(params, SilentReporter(), "sft", "precompute_ref")
    same(weights(shared / "models/sft"), weights(project / "models/sft"), 1e-4)

    for name in ("models/sft", "data/reference"):  # both train from the same reference
        shutil.rmtree(shared / name, ignore_errors=True)
        shutil.copytree(project / name, shared / name)
    done = run(shared, "train")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("held-out accuracy") == 1
    run_stages(params, SilentReporter(), "train")
    same(weights(shared / "models/dpo"), weights(project / "models/dpo"), 1e-5)
    for name in ("loss", "eval_loss_start", "eval_loss", "eval_margin"):
        assert metrics(shared, "train")[name] == pytest.approx(metrics(project, "train")[name], rel=1e-5, abs=1e-7)
    first, second = (DPO.read(folder / DPO.folder) for folder in (shared, project))
    assert replace(first, files={}) == replace(second, files={}), "the number of processes is no part of the result"
    assert not any((shared / ".scratch/train").glob("*/*")), "the half-done work is gone"

    monkeypatch.setenv("WORLD_SIZE", "2")
    for stage in ("base", "precompute_ref", "evaluate"):
        with pytest.raises(MachineError, match="2 processes were started"):
            run_stages(params, SilentReporter(), stage)
