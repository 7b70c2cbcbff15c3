"""KL(policy || reference), the price of what was gained.

Legend: N tokens of one answer, V vocabulary.

The headline is the exact KL of each next-token distribution, summed along answers that the
policy sampled at temperature 1: an unbiased estimate of the sequence KL with far less variance
than the log-ratio of the samples (k1), which stands beside it as a cross-check. The log-ratio
on the data set's answers is not this KL.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

ALARM_STANDARD_ERRORS = 4.0


@dataclass(frozen=True)
class SequenceKl:
    """Two estimates from one sampled answer, nats.

    Attributes:
        exact: Sum over tokens of the exact next-token KL.
        k1: log pi - log ref of the sampled tokens.
    """

    exact: float
    k1: float


def sequence_kl(policy_logps_NV: torch.Tensor, reference_logps_NV: torch.Tensor, tokens: Sequence[int]) -> SequenceKl:
    """Both estimates from one answer.

    Args:
        policy_logps_NV: float32 [N, V], the policy's next-token log-probabilities along the answer.
        reference_logps_NV: The same of the reference.
        tokens: The N sampled tokens, the stop token included.
    """
    policy, reference = policy_logps_NV.double(), reference_logps_NV.double()
    exact = torch.where(policy > -torch.inf, policy.exp() * (policy - reference), 0.0).sum()  # 0 log 0 = 0
    index = torch.tensor(tokens, device=policy.device)[:, None]
    k1 = (policy.gather(1, index) - reference.gather(1, index)).sum()
    return SequenceKl(exact.item(), k1.item())


def estimates_disagree(samples: Sequence[SequenceKl]) -> bool:
    """Whether the two estimates differ by more than 4 standard errors: then one of them is wrong."""
    if len(samples) < 2:
        return False
    differences = torch.tensor([sample.exact - sample.k1 for sample in samples], dtype=torch.float64)
    error = differences.std().item() / math.sqrt(len(samples))
    return abs(differences.mean().item()) > ALARM_STANDARD_ERRORS * error + 1e-6
