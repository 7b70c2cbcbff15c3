"""An optimizer step of the real training loop on the dry device."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch

from dpo_cli.core.progress import SilentReporter
from dpo_cli.data.tokenise import TokenGroup
from dpo_cli.models.device import Machine
from dpo_cli.scoring.budget import TokenBudget
from dpo_cli.scoring.layout import LayoutName
from dpo_cli.scoring.limits import Work
from dpo_cli.scoring.regimes import random_pairs
from dpo_cli.scoring.scorer import MAX_READ_SHARE, Scorer
from dpo_cli.training.loss_scale import LossScale
from dpo_cli.training.objective import GroupScorer, Objective
from dpo_cli.training.replicas import ALONE
from dpo_cli.training.trainer import GroupTrainer


class DryTrainer(GroupTrainer):
    """The training loop's step without transformers' loop around it; the sums are not read back at its end.

    Args:
        model: The model, its trainable parameters marked.
        scorer: Scores groups with that model.
        objective: What is minimized.
        max_tokens: Tokens of a micro-batch.
    """

    def __init__(self, model: Any, scorer: GroupScorer[Any], objective: Objective[Any], max_tokens: int) -> None:
        self.model = model
        self.accelerator: Any = SimpleNamespace(backward=lambda loss: loss.backward())
        self.state: Any = SimpleNamespace(global_step=0)
        self.args: Any = SimpleNamespace(seed=0, learning_rate=1e-6, device=torch.device("cpu"))
        self._replicas = ALONE
        self._scorer = scorer
        self._objective = objective
        self._budget = TokenBudget(max_tokens, "dry run", SilentReporter())
        inner: Any = getattr(scorer, "scorer", scorer)  # of a RewardScorer; else itself
        self._loss_scale = LossScale(inner.compute_dtype, "dry run", SilentReporter(), None)
        self._section = "train"

    def _exchange(
        self, groups: list[TokenGroup], sums_S: torch.Tensor, parameters: Sequence[torch.nn.Parameter]
    ) -> list[float]:
        """As many zeros as the real one reads from the device, in the one read-back of a step."""
        return [0.0] * len(sums_S)


def open_dry_scorer(model: Any, machine: Machine, layout: LayoutName) -> Scorer:
    """What ``open_scorer`` makes of a model whose probe passes; kernels are tried out as there."""
    scorer = Scorer(model, machine.compute_dtype, layout)
    scorer.max_read_share = MAX_READ_SHARE if scorer.can_read_rows else 0.0
    with scorer, torch.no_grad():
        scorer.score(random_pairs("equal", 1, scorer.config.vocab_size))
    return scorer


def mean_visible_pairs(scorer: Scorer, groups: Sequence[TokenGroup], max_tokens: int) -> int:
    """(query, key) pairs that see each other in a micro-batch, a mean over those of a step."""
    batches = [[groups[index] for index in indices] for indices in scorer.split(groups, max_tokens)]
    return Work.of(batches, scorer.layout).visible // len(batches)


def take_optimizer_step(trainable: Sequence[torch.nn.Parameter]) -> None:
    """Clip the gradients and take a step of AdamW, as training does; they are gone after it."""
    torch.nn.utils.clip_grad_norm_(trainable, 1.0)
    # fused: the other forms read on the CPU how many steps were done, which has no number here
    torch.optim.AdamW(trainable, lr=1e-6, fused=True).step()
    for parameter in trainable:
        parameter.grad = None
