"""The embedded model's pretraining: the same bytes for a seed, whether it was stopped, killed, or neither."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dpo_cli.core.errors import Interrupted
from dpo_cli.core.params import RuntimeParams
from dpo_cli.models.project import Workplace
from dpo_cli.training.parallel import Job
from dpo_cli.training.pretraining import build_embedded
from tests.small_training import CPU, Killed, kill_at, stop_at

STEPS = 5


def build(folder: Path, reporter: Any, checkpoint_minutes: float = 60, seed: int = 0) -> dict[str, torch.Tensor]:
    (folder / "out").mkdir(parents=True, exist_ok=True)
    runtime = RuntimeParams(device="cpu", checkpoint_minutes=checkpoint_minutes)
    build_embedded(folder / "out", seed, STEPS, Job(Workplace("base", reporter, runtime, CPU), folder))
    return load_file(folder / "out" / "model.safetensors")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, make_reporter: Any) -> Path:
    folder = tmp_path_factory.mktemp("embedded")
    build(folder, make_reporter())
    return folder / "out"


def test_the_same_seed_builds_the_same_bytes_and_another_one_another_model(
    built: Path, tmp_path: Path, reporter: Any, make_reporter: Any
) -> None:
    build(tmp_path, reporter)
    names = sorted(path.name for path in built.iterdir())
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(names)
    assert names == sorted(path.name for path in (tmp_path / "out").iterdir())
    assert [name for name in names if (built / name).read_bytes() != (tmp_path / "out" / name).read_bytes()] == []
    (meter,) = reporter.meters
    assert meter.done == meter.total == STEPS
    other = build(tmp_path / "other", make_reporter(), seed=1)
    assert not torch.equal(other["model.norm.weight"], load_file(built / "model.safetensors")["model.norm.weight"])


def test_stopped_and_run_again_it_builds_the_same_weights(
    built: Path, tmp_path: Path, reporter: Any, make_reporter: Any
) -> None:
    with pytest.raises(Interrupted, match=rf"stopped and saved at step 2 of {STEPS}"):
        build(tmp_path, make_reporter(stop_at(2)))
    build(tmp_path, reporter)
    assert reporter.said == ["base: going on from checkpoint-2"]
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (built / "model.safetensors").read_bytes()


def test_killed_and_run_again_it_builds_the_same_weights(
    built: Path, tmp_path: Path, reporter: Any, make_reporter: Any
) -> None:
    with pytest.raises(Killed):
        build(tmp_path, make_reporter(kill_at(4)), checkpoint_minutes=0)
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
