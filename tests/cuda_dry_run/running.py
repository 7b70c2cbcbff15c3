"""Runs cases on the dry device; import it after the stub is loaded."""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dpo_cli.core.params import LoraParams, TrainParams
from dpo_cli.data.tokenise import TokenGroup
from dpo_cli.dry_run.counts import Counting, Counts
from dpo_cli.dry_run.device import CUDA, dry_cuda
from dpo_cli.dry_run.model import dry_model
from dpo_cli.dry_run.step import DryTrainer
from dpo_cli.models.device import Machine
from dpo_cli.models.shapes import SHAPES
from dpo_cli.scoring.recompute import set_recompute
from dpo_cli.scoring.regimes import random_pairs
from dpo_cli.scoring.reward import RewardScorer
from dpo_cli.scoring.scorer import MAX_READ_SHARE, Scorer
from dpo_cli.training.objective import SftObjective, preference_objective
from dpo_cli.training.reward_objective import RewardObjective
from tests.cuda_dry_run.cases import FAMILIES, Case


@dataclass
class Outcome:
    """What a case came to.

    Attributes:
        case: Its name.
        seconds: That it took here.
        error: What was raised, with its place; None where nothing was.
        wrong_gradients: Trainable parameters whose gradient is missing, not float32 or not on the device.
        counts: What was counted in the step; None where something was raised.
        num_layers: Layers of the model.
    """

    case: str
    seconds: float
    error: str | None
    wrong_gradients: list[str]
    counts: Counts | None
    num_layers: int

    def as_json(self) -> dict[str, Any]:
        """For a line of its own."""
        found: dict[str, Any] = {
            "case": self.case,
            "seconds": round(self.seconds, 2),
            "error": self.error,
            "wrong_gradients": self.wrong_gradients,
            "num_layers": self.num_layers,
        }
        if (counts := self.counts) is not None:
            total = counts.total
            found |= {
                "kernels": total.kernels,
                "bytes": total.bytes,
                "flops": total.flops,
                "by_kind": {kind: vars(work) for kind, work in counts.by_kind.items()},
                "peak_bytes": counts.peak_bytes,
                "base_bytes": counts.base_bytes,
                "async_copies": counts.num_async_copies,
                "blocking_copies": dict(counts.blocking_copies),
                "read_backs": dict(counts.read_backs),
                "strays": dict(counts.strays),
            }
        return found


def run(case: Case) -> Outcome:
    """Take one training step on the dry device."""
    begun = time.perf_counter()
    counting = Counting()
    capability = (7, 5) if case.layout == "pieces" else (8, 9)
    with dry_cuda(capability, allocated_bytes=lambda: counting.live_bytes), counting:
        shape = {"model_type": case.model, **FAMILIES[case.model]} if case.model in FAMILIES else SHAPES[case.model]
        machine = Machine(CUDA, getattr(torch, case.dtype))
        error, wrong, counts, num_layers = None, [], None, 0
        try:
            model = dry_model(shape, machine, case.quantization, LoraParams())
            scorer = open_dry(model, machine, case.layout)
            num_layers = scorer.config.num_hidden_layers
            set_recompute(model, case.grade)  # type: ignore[arg-type]
            groups = random_pairs("harmless", case.num_pairs, scorer.config.vocab_size)
            trainer = _trainer(case, model, scorer, groups)
            counting.restart()
            trainer.training_step(model, {"groups": groups if case.objective != "sft" else _first(groups)})
            counts, wrong = counting.counts, list(_wrong_gradients(model))
        except Exception as raised:
            error = f"{type(raised).__name__}: {str(raised).splitlines()[0][:200]} at {_where(raised)}"
    return Outcome(str(case), time.perf_counter() - begun, error, wrong, counts, num_layers)


def open_dry(model: Any, machine: Machine, layout: str) -> Scorer:
    """What ``open_scorer`` makes of a model whose probe passes."""
    scorer = Scorer(model, machine.compute_dtype, "shared" if layout == "pieces" else layout)  # type: ignore[arg-type]
    scorer.max_read_share = MAX_READ_SHARE if scorer.can_read_rows else 0.0
    return scorer


def _trainer(case: Case, model: Any, scorer: Scorer, groups: Sequence[TokenGroup]) -> DryTrainer:
    kind, _, loss = case.objective.rpartition("/")
    ranks = {group.id: [1, 2] for group in groups}
    if kind == "reward":
        head = torch.nn.Linear(scorer.config.hidden_size, 1, bias=False, device=CUDA)
        objective = RewardObjective(ranks if loss == "plackett_luce" else None)
        return DryTrainer(model, RewardScorer(scorer, head), objective, case.max_tokens)
    if loss == "sft":
        return DryTrainer(model, scorer, SftObjective(), case.max_tokens)
    reference = {group.id: [-1.0, -2.0] for group in groups}
    objective = preference_objective(
        TrainParams(loss=loss, **dict(case.settings)),  # type: ignore[arg-type]
        reference,
        shared_length=reference,
        score_gaps={group.id: 1.0 for group in groups},
        ranks=ranks,
    )
    return DryTrainer(model, scorer, objective, case.max_tokens)


def _first(groups: Sequence[TokenGroup]) -> list[TokenGroup]:
    return [TokenGroup(group.id, group.group, group.prompt, group.completions[:1]) for group in groups]


def _wrong_gradients(model: torch.nn.Module) -> Iterator[str]:
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.grad is None:
            yield f"{name}: none"
        elif parameter.grad.dtype != torch.float32 or parameter.grad.device != CUDA:
            yield f"{name}: {parameter.grad.dtype} on {parameter.grad.device}"


def _where(raised: BaseException) -> str:
    frames = traceback.extract_tb(raised.__traceback__)
    own = [frame for frame in frames if "dpo_cli/" in frame.filename and "/dry_run/" not in frame.filename]
    frame = (own or frames)[-1]
    return f"{'/'.join(frame.filename.split('/')[-2:])}:{frame.lineno}"
