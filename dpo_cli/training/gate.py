"""The step-0 gate: before the first step the policy must be its reference.

DPO's loss is ln 2 and every margin 0 when policy and reference are the same model (Rafailov
et al. 2023, section 4). If they are not, the cache belongs to another graph and every
gradient that followed would be wrong; so the run is stopped, with what differs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dpo_cli.core.errors import StaleArtifactError
from dpo_cli.core.gpu import is_gpu
from dpo_cli.data.tokenise import TokenGroup
from dpo_cli.scoring.probe import BFLOAT16_TOLERANCE
from dpo_cli.scoring.scorer import Scorer
from dpo_cli.training.objective import PreferenceObjective

NUM_PAIRS, NUM_PAIRS_ON_GPU = 64, 16
"""Pairs that are scored; fewer on a GPU, where what counts as rounding is measured with many small passes each time."""
TOLERANCE = 1e-4
"""Nats by which a log-probability may differ in float32."""
_NOISE_FACTOR = 4.0


@dataclass(frozen=True)
class StepZero:
    """What the gate saw.

    Attributes:
        loss: Mean loss of the gate's pairs before the first step, nats.
        max_abs_margin: Largest |beta * delta|.
        max_abs_logp_difference: Largest |log pi - log ref| of one answer, nats.
        num_pairs: Pairs scored.
    """

    loss: float
    max_abs_margin: float
    max_abs_logp_difference: float
    num_pairs: int


@torch.no_grad()
def check_step_zero(
    model: torch.nn.Module,
    scorer: Scorer,
    objective: PreferenceObjective,
    groups: Sequence[TokenGroup],
    max_tokens: int,
) -> StepZero:
    """Score some pairs through the training forward and compare with the cache.

    Raises:
        StaleArtifactError: They differ by more than rounding: than 1e-4 nats (0.05 in bfloat16, where
            another kernel alone moves a sum by as much), or, where that is more, than four times
            the difference between scoring an answer alone and beside another.
    """
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.eval()  # the first training step turns it on again
    sample = sorted(groups, key=lambda group: group.id)[: NUM_PAIRS_ON_GPU if is_gpu(scorer.device) else NUM_PAIRS]
    losses, margins, differences = [], [], []
    worst: tuple[float, TokenGroup] = (-1.0, sample[0])
    for indices in scorer.split(sample, max_tokens):
        batch = [sample[index] for index in indices]
        scores = scorer.score(batch, statistics=objective.statistics)
        result = objective.losses(batch, scores, sample)
        gap = objective.policy_logps(scores) - objective.reference_logps(batch, scorer.device)
        difference = gap.abs().amax(1).nan_to_num(nan=math.inf, posinf=math.inf)  # no number is never within rounding
        losses.append(result.losses_B)
        margins.append(result.metrics["rewards/margins"].abs())
        differences.append(difference)
        index = int(difference.argmax())
        worst = max(worst, (float(difference[index]), batch[index]), key=lambda pair: pair[0])
    step_zero = StepZero(
        loss=torch.cat(losses).mean().item(),
        max_abs_margin=torch.cat(margins).max().item(),
        max_abs_logp_difference=torch.cat(differences).max().item(),
        num_pairs=len(sample),
    )
    if not step_zero.max_abs_logp_difference <= TOLERANCE:
        floor = TOLERANCE if scorer.compute_dtype == torch.float32 else BFLOAT16_TOLERANCE
        allowed = max(floor, _NOISE_FACTOR * _batch_noise(scorer, sample))
        if not step_zero.max_abs_logp_difference <= allowed:
            raise StaleArtifactError(
                f"data/reference: policy and reference differ before the first step, by {worst[0]:.3g} nats in row"
                f" {worst[1].id} (allowed {allowed:.2g}): the cache is of another graph; run: dpo-cli precompute-ref"
            )
    return step_zero


def _batch_noise(scorer: Scorer, groups: Sequence[TokenGroup]) -> float:
    """Largest difference between an answer's log-probability alone and beside another, nats.

    The cache scores single answers in batches of its own, training scores pairs: neither's
    batches may decide what counts as rounding.
    """
    singles = [
        TokenGroup(group.id, group.group, group.prompt, (completion,))
        for group in sorted(groups, key=lambda group: (group.longest, group.id))
        for completion in group.completions
    ]
    # short answers beside a long one: as much padding as a batch can have
    batches = [[short, singles[-1 - index]] for index, short in enumerate(singles[: len(singles) // 2])]
    noise = 0.0
    for batch in batches:
        together = scorer.score(batch).logps_BK
        alone = torch.cat([scorer.score([single]).logps_BK for single in batch])
        noise = max(noise, (together - alone).abs().max().item())
    return noise
