"""The embedded model's pretraining: the same bytes for a seed, whether it was stopped, killed, or neither."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dpo_cli.core.errors import Interrupted
from dpo_cli.core.params import RuntimeParams
from dpo_cli.models.device import Machine
from dpo_cli.models.workplace import Workplace
from dpo_cli.training.parallel import Job
from dpo_cli.training.pretraining import build_embedded

STEPS = 5


def build(folder: Path, reporter: Any, checkpoint_minutes: float = 60, seed: int = 0) -> dict[str, torch.Tensor]:
    (folder / "out").mkdir(parents=True, exist_ok=True)
    runtime = RuntimeParams(device="cpu", checkpoint_minutes=checkpoint_minutes)
    machine = Machine(torch.device("cpu"), torch.float32)
    build_embedded(folder / "out", seed, STEPS, Job(Workplace("base", reporter, runtime, machine), folder))
    return load_file(folder / "out" / "model.safetensors")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    from contextlib import nullcontext
    from unittest.mock import MagicMock

    reporter = MagicMock()
    reporter.meter.return_value = nullcontext(MagicMock())
    folder = tmp_path_factory.mktemp("embedded")
    build(folder, reporter)
    return folder / "out"


def test_the_same_seed_builds_the_same_bytes(built: Path, tmp_path: Path, reporter: Any) -> None:
    build(tmp_path, reporter)
    names = sorted(path.name for path in built.iterdir())
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(names)
    assert names == sorted(path.name for path in (tmp_path / "out").iterdir())
    assert [name for name in names if (built / name).read_bytes() != (tmp_path / "out" / name).read_bytes()] == []
    (meter,) = reporter.meters
    assert meter.done == meter.total == STEPS


def test_another_seed_builds_another_model(built: Path, tmp_path: Path, reporter: Any) -> None:
    other = build(tmp_path, reporter, seed=1)
    assert not torch.equal(other["model.norm.weight"], load_file(built / "model.safetensors")["model.norm.weight"])


@pytest.mark.parametrize("stop_at", [1, 3])
def test_stopped_and_run_again_it_builds_the_same_weights(
    built: Path, tmp_path: Path, reporter: Any, make_reporter: Any, stop_at: int
) -> None:
    def stop(done: int) -> None:
        if done == stop_at:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted, match=rf"stopped and saved at step {stop_at} of {STEPS}"):
        build(tmp_path, make_reporter(stop))
    build(tmp_path, reporter)
    assert reporter.said == [f"base: going on from checkpoint-{stop_at}"]
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (built / "model.safetensors").read_bytes()


def test_killed_and_run_again_it_builds_the_same_weights(
    built: Path, tmp_path: Path, reporter: Any, make_reporter: Any
) -> None:
    def kill(done: int) -> None:
        if done == 4:
            raise RuntimeError

    with pytest.raises(RuntimeError):
        build(tmp_path, make_reporter(kill), checkpoint_minutes=0)
    build(tmp_path, reporter)
    assert reporter.said == ["base: going on from checkpoint-3"]
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (built / "model.safetensors").read_bytes()


def test_what_is_built_can_be_loaded(built: Path, cpu: Any) -> None:
    from dpo_cli.data.chat import ChatEncoder
    from dpo_cli.models.load import context_length, load_model, load_tokenizer

    encoder = ChatEncoder(load_tokenizer(built))
    assert encoder.stop_ids == [1]
    assert context_length(built) == 8192
    assert load_model(built, cpu, quantization="nf4").config.vocab_size > 1000
