"""KL(policy || reference), the price of what was gained.

Legend: N tokens of one answer, V vocabulary.

The headline is the exact KL of each next-token distribution, summed along answers that the
policy sampled at temperature 1: an unbiased estimate of the sequence KL with far less variance
than the log-ratio of the samples (k1), which stands beside it as a cross-check. Schulman's k3 is
a diagnostic alone. The log-ratio on the data set's answers is not this KL.

Source: Schulman 2020, Approximating KL divergence (k1, k3); Rafailov et al. 2023, footnote of section 6.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

ALARM_STANDARD_ERRORS = 4.0


@dataclass(frozen=True)
class SequenceKl:
    """Three estimates from one sampled answer, and what else its distributions say; nats.

    Attributes:
        exact: Sum over tokens of the exact next-token KL.
        k1: log pi - log ref of the sampled tokens.
        k3: Sum over tokens of ref / pi - 1 - log(ref / pi): never negative, and wide where pi and ref are far apart.
        entropy: Sum over tokens of the policy's next-token entropy.
        reference_entropy: The same of the reference, at the same places.
        variance: Sum over tokens of the variance of log pi - log ref under the policy: that of k1 - exact, nats^2.
    """

    exact: float
    k1: float
    k3: float
    entropy: float
    reference_entropy: float
    variance: float
    num_tokens: int

    @classmethod
    def add_up(cls, parts: Sequence[SequenceKl]) -> SequenceKl:
        """What the parts of one answer make together."""
        return cls(*(sum(values) for values in zip(*(vars(part).values() for part in parts), strict=True)))


_MAX_BYTES = 256 << 20
"""Bytes that are worked with at once."""
_BYTES_EACH = 64
"""Bytes for each number of a distribution: both in float64, and what is made of them."""


def sequence_kl(policy_logps_NV: torch.Tensor, reference_logps_NV: torch.Tensor, tokens: Sequence[int]) -> SequenceKl:
    """All of them from one answer, so many of its tokens at once that the memory is bounded.

    Args:
        policy_logps_NV: float32 [N, V], the policy's next-token log-probabilities along the answer.
        reference_logps_NV: The same of the reference.
        tokens: The N sampled tokens, the stop token included.
    """
    num_rows = max(1, _MAX_BYTES // (_BYTES_EACH * policy_logps_NV.shape[1]))
    parts = zip(
        policy_logps_NV.split(num_rows),
        reference_logps_NV.split(num_rows),
        torch.tensor(tokens, device=policy_logps_NV.device).split(num_rows),
        strict=True,
    )
    return SequenceKl.add_up([_of_rows(*part) for part in parts])


def _of_rows(policy_NV: torch.Tensor, reference_NV: torch.Tensor, tokens_N: torch.Tensor) -> SequenceKl:
    policy, reference = policy_NV.double(), reference_NV.double()
    exact = _expected(policy, policy - reference)
    means_N1 = torch.where(policy > -torch.inf, policy.exp() * (policy - reference), 0.0).sum(1, keepdim=True)
    variance = torch.where(policy > -torch.inf, policy.exp() * (policy - reference - means_N1) ** 2, 0.0)
    index = tokens_N[:, None]
    log_ratios_N1 = policy.gather(1, index) - reference.gather(1, index)
    k3 = (torch.expm1(-log_ratios_N1) + log_ratios_N1).sum()
    return SequenceKl(
        exact.item(),
        log_ratios_N1.sum().item(),
        k3.item(),
        _expected(policy, -policy).item(),
        _expected(reference, -reference).item(),
        variance.sum().item(),
        len(tokens_N),
    )


def _expected(logps_NV: torch.Tensor, values_NV: torch.Tensor) -> torch.Tensor:
    """Sum over tokens of a value's mean under the distribution; 0 log 0 = 0."""
    return torch.where(logps_NV > -torch.inf, logps_NV.exp() * values_NV, 0.0).sum()


def estimates_disagree(samples: Sequence[SequenceKl]) -> bool:
    """Whether exact and k1 differ by more than 4 standard errors: then one of them is wrong.

    Given what came before, k1 - exact has mean 0 at every token, and its variance is known from the distributions. The
    sample's own deviation would not do: a policy that is all but certain rarely samples the token that makes it.
    """
    if not samples:
        return False
    difference = math.fsum(sample.exact - sample.k1 for sample in samples)
    error = math.sqrt(math.fsum(sample.variance for sample in samples))
    return abs(difference) > ALARM_STANDARD_ERRORS * error + 1e-6 * len(samples)
