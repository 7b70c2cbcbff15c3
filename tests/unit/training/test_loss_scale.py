"""float16: small gradients survive, large ones are tried again smaller, and what comes out is float32's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dpo_cli.core.params import RuntimeParams, TrainParams
from dpo_cli.core.training_params import LoraParams
from dpo_cli.data.tokens import TokenGroup
from dpo_cli.models.adapters import add_adapter
from dpo_cli.models.device import Machine
from dpo_cli.models.load import load_model
from dpo_cli.models.project import Workplace
from dpo_cli.scoring.scorer import Scorer
from dpo_cli.training import accumulation
from dpo_cli.training.accumulation import LossScale
from dpo_cli.training.fit import fit
from dpo_cli.training.objective import PairObjective
from dpo_cli.training.parallel import Job
from dpo_cli.training.protocols import Learner

CPU = torch.device("cpu")
SETTINGS = TrainParams(learning_rate=1e-3, batch_size=8, max_steps=2, eval_steps=0)


@pytest.fixture
def train(
    tiny_folder: Path,
    tmp_path: Path,
    reporter: Any,
    make_groups: Callable[..., list[TokenGroup]],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., list[torch.Tensor]]:
    """``train(dtype, start, ...)``: the gradients of two steps of DPO that hardly weighs anything."""

    def go(dtype: torch.dtype, start: float = 2.0**13, work: str = "", dropout: float = 0.0) -> list[torch.Tensor]:
        monkeypatch.setattr(accumulation, "_LOSS_SCALE_AT_START", start)
        machine = Machine(CPU, dtype)
        lora = LoraParams(r=4, alpha=8.0, dropout=dropout)
        model = add_adapter(load_model(tiny_folder, machine, quantization="none"), lora, seed=0)
        scorer = Scorer(model, dtype)
        train, held_out = make_groups(8, seed=1), make_groups(2, seed=2)
        with torch.no_grad():
            reference = {g.id: scorer.score([g]).logps_BK[0].tolist() for g in [*train, *held_out]}
        seen: list[torch.Tensor] = []
        unscale = LossScale.unscale

        def noted(scale: LossScale, parameters: Any) -> None:
            unscale(scale, parameters)
            seen.append(torch.cat([parameter.grad.flatten() for parameter in parameters]))

        folder = tmp_path / (work or f"{dtype} {start} {dropout}")
        folder.mkdir(exist_ok=True)
        with monkeypatch.context() as patch:
            patch.setattr(LossScale, "unscale", noted)
            learner = Learner(model, scorer, PairObjective(TrainParams(beta=2e-5), reference))
            runtime = RuntimeParams(recompute="none", checkpoint_minutes=60.0)
            fit(learner, train, held_out, SETTINGS, Job(Workplace("train", reporter, runtime, machine), folder))
        assert {gradient.dtype for gradient in seen} == {torch.float32}
        assert len(seen) == SETTINGS.max_steps
        return seen

    return go


def off(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


def test_small_gradients_survive(train: Callable[..., list[torch.Tensor]]) -> None:
    exact = train(torch.float32)[0]
    assert off(train(torch.float16)[0], exact) <= 0.01
    assert off(train(torch.float16, start=1.0)[0], exact) >= 0.2, "there is something to keep"


def test_a_step_whose_gradients_overflow_is_done_again(train: Callable[..., list[torch.Tensor]], reporter: Any) -> None:
    expected = train(torch.float16, dropout=0.2)
    assert reporter.said == []
    found = train(torch.float16, start=2.0**44, work="high", dropout=0.2)
    assert off(found[0], expected[0]) <= 1e-2, "the same numbers are dropped"
    assert off(found[1], expected[1]) <= 2e-2
    halvings = len(reporter.said)
    assert halvings >= 5
    last = reporter.said[-1]
    assert last.startswith("train: gradients overflowed float16; repeating the step with loss scale ")
    assert float(last.rpartition(" ")[2]) == 2.0 ** (44 - halvings)


def work_in(dtype: torch.dtype, reporter: Any) -> Workplace:
    return Workplace("train", reporter, RuntimeParams(), Machine(CPU, dtype))


def test_a_halved_scale_is_remembered(tmp_path: Path, reporter: Any) -> None:
    work = work_in(torch.float16, reporter)
    first = LossScale(work, tmp_path / "scale.json")
    assert first.halve()
    assert LossScale(work, tmp_path / "scale.json").value == first.value == 2.0**12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes_have_none(dtype: torch.dtype, reporter: Any) -> None:
    scale = LossScale(work_in(dtype, reporter))
    assert scale.value == 1
    assert not scale.halve()
