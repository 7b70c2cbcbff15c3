"""The step-0 gate: before the first step the policy must be its reference.

DPO's loss is ln 2 and every margin 0 when policy and reference are the same model (Rafailov
et al. 2023, section 4). If they are not, the cache belongs to another graph and every
gradient that followed would be wrong; so the run is stopped, with what differs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from dpo_cli.core.errors import StaleArtifactError
from dpo_cli.data.tokens import TokenGroup
from dpo_cli.scoring.probe import BFLOAT16_TOLERANCE, NOISE_FACTOR, allowed_difference
from dpo_cli.scoring.scorer import Scorer
from dpo_cli.training.objective import PreferenceObjective

NUM_PAIRS = 64
TOLERANCE = 1e-4
"""Nats by which a log-probability may differ in float32."""
_NUM_NOISE_PAIRS = 16
"""Pairs on which rounding is measured, where it has to be."""
_STANDARD_ERRORS = 5.0
"""How far from 0 the mean of differences may be that are rounding, where 16 pairs or more are compared."""


@dataclass(frozen=True)
class StepZero:
    """What the gate saw.

    Attributes:
        loss: Mean loss of the gate's pairs before the first step, nats.
        max_abs_margin: Largest |beta * delta|.
        max_abs_logp_difference: Largest |log pi - log ref| of one answer, nats.
        num_pairs: Pairs scored.
        doubt: What the user should know of how well this could be told; None where it could be told well.
    """

    loss: float
    max_abs_margin: float
    max_abs_logp_difference: float
    num_pairs: int
    doubt: str | None = None


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
        StaleArtifactError: They differ by more than rounding: an answer by more than
            :func:`~dpo_cli.scoring.probe.allowed_difference` of the difference between scoring an answer alone and
            beside another, or all of them on average by more than 0.05 nats and five standard errors, since rounding
            goes both ways.
    """
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.eval()  # the first training step turns it on again
    sample = sorted(groups, key=lambda group: group.id)[:NUM_PAIRS]
    losses, margins, gaps, means = [], [], [], []
    answers: list[tuple[str, int]] = []  # row and number of tokens
    for indices in scorer.split(sample, max_tokens):
        batch = [sample[index] for index in indices]
        scores = scorer.score(batch, statistics=objective.statistics)
        result = objective.losses(batch, scores, sample)
        gap_BK = objective.policy_logps(scores) - objective.reference_logps(batch, scorer.device)
        losses.append(result.losses_B)
        margins.append(result.metrics["rewards/margins"].abs())
        gaps.append(gap_BK.flatten())
        means.append(gap_BK.mean(1))
        answers += [(group.id, len(completion)) for group in batch for completion in group.completions]
    # no number is never within rounding
    differences = torch.cat(gaps).abs().nan_to_num(nan=math.inf, posinf=math.inf).tolist()
    step_zero = StepZero(
        loss=torch.cat(losses).mean().item(),
        max_abs_margin=torch.cat(margins).max().item(),
        max_abs_logp_difference=max(differences),
        num_pairs=len(sample),
    )
    if step_zero.max_abs_logp_difference <= TOLERANCE:
        return step_zero
    noise, dtype = _batch_noise(scorer, sample), scorer.compute_dtype
    allowed = [allowed_difference(noise, num_tokens, dtype) for _, num_tokens in answers]
    worst = max(range(len(answers)), key=lambda index: differences[index] / allowed[index])
    what = None
    if not differences[worst] <= allowed[worst]:
        what = f"by {differences[worst]:.3g} nats in row {answers[worst][0]} (allowed {allowed[worst]:.2g})"
    elif reason := _lean(torch.cat(means), TOLERANCE if dtype == torch.float32 else BFLOAT16_TOLERANCE):
        what = reason
    if what is not None:
        raise StaleArtifactError(
            f"data/reference: policy and reference differ before the first step, {what}: the cache is of another"
            " graph; run: dpo-cli precompute-ref"
        )
    asked = NOISE_FACTOR * noise
    if dtype == torch.float32 or asked <= max(allowed):
        return step_zero
    return replace(
        step_zero,
        doubt=f"rounding alone moves an answer's log-probability by up to {noise:.2g} nats, so that a difference of"
        f" {asked:.2g} between policy and reference would have to be allowed; no more than {max(allowed):.2g} was",
    )


def _lean(means_B: torch.Tensor, floor: float) -> str | None:
    """Why differences are not rounding: they lean to one side; None where they do not, or are too few to tell."""
    number = len(means_B)
    if number < _NUM_NOISE_PAIRS:
        return None
    mean, error = means_B.mean().item(), means_B.std().item() / math.sqrt(number)
    allowed = max(floor, _STANDARD_ERRORS * error)
    if abs(mean) <= allowed:
        return None
    return f"by {mean:+.3g} nats an answer on average (allowed {allowed:.2g}), and rounding goes both ways"


def _batch_noise(scorer: Scorer, groups: Sequence[TokenGroup]) -> float:
    """Largest difference between an answer's log-probability alone and beside another, nats, the longest among them.

    The cache scores single answers in batches of its own, training scores pairs: neither's
    batches may decide what counts as rounding.
    """
    by_length = sorted(groups, key=lambda group: (group.longest, group.id))
    stride = max(1, len(by_length) // _NUM_NOISE_PAIRS)
    singles = [
        TokenGroup(group.id, group.group, group.prompt, (completion,))
        for group in by_length[::-stride][::-1]
        for completion in group.completions
    ]
    # short answers beside a long one: as much padding as a batch can have
    batches = [[short, singles[-1 - index]] for index, short in enumerate(singles[: len(singles) // 2])]
    noise = torch.zeros((), dtype=torch.float64, device=scorer.device)
    for batch in batches:
        together = scorer.score(batch).logps_BK
        alone = torch.cat([scorer.score([single]).logps_BK for single in batch])
        noise = torch.maximum(noise, (together - alone).abs().max())
    return noise.item()
