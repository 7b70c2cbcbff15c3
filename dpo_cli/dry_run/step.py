"""An optimizer step of the real training loop on the dry device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dpo_cli.core.interrupts import StopRequest
from dpo_cli.core.params import RuntimeParams
from dpo_cli.core.progress import SilentReporter
from dpo_cli.data.tokens import TokenGroup
from dpo_cli.models.device import Machine
from dpo_cli.models.workplace import Workplace
from dpo_cli.scoring.layout import LayoutName
from dpo_cli.scoring.limits import Work
from dpo_cli.scoring.regimes import random_pairs
from dpo_cli.scoring.scorer import MAX_READ_SHARE, Scorer
from dpo_cli.training.accumulation import Accumulator, Limits
from dpo_cli.training.protocols import Learner


class DryAccumulator(Accumulator[Any]):
    """The training loop's gradient of a batch; the sums are not read back at its end.

    Args:
        learner: The model, its trainable parameters marked, what scores groups with it, and what is minimized.
        max_tokens: Tokens of a micro-batch.
    """

    def __init__(self, learner: Learner[Any], max_tokens: int) -> None:
        machine = Machine(torch.device("cpu"), learner.scorer.compute_dtype)
        work = Workplace("dry run", SilentReporter(), RuntimeParams(), machine)
        super().__init__(learner, Limits.of(work, max_tokens), StopRequest())

    def _exchange(
        self, groups: Sequence[TokenGroup], sums_S: torch.Tensor, parameters: Sequence[torch.nn.Parameter]
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


def take_optimizer_step(trainable: Sequence[torch.nn.Parameter], norm: torch.Tensor) -> None:
    """Clip the gradients, which have this norm, and take a step of AdamW, as training does; they are gone after it."""
    torch.nn.utils.clip_grads_with_norm_(trainable, 1.0, norm)
    # fused: the other forms read on the CPU how many steps were done, which has no number here
    torch.optim.AdamW(trainable, lr=1e-6, fused=True).step()
    for parameter in trainable:
        parameter.grad = None
