"""What changes the pairs of a loss, or what each of them counts: divergences, offsets, lengths, weights.

Legend: B pairs, 2 answers, column 0 chosen; M tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch.nn.functional import logsigmoid

from dpo_cli.losses.pairwise import Pairs

_MAX_EXPONENT = 80.0
"""Beyond it a divergence's reward stays as it is and has no gradient, as in TRL's alpha: exp(80) is 5e34."""

Divergence = Callable[[torch.Tensor], torch.Tensor]
"""f'(t) of an f-divergence as a function of log t, any shape."""


def forward_kl(log_t: torch.Tensor) -> torch.Tensor:
    """f'(t) = 1 - 1 / t, of f(t) = t - log t (Wang et al. 2023, table 1, with the constant that makes f'(1) zero)."""
    return -torch.expm1((-log_t).clamp(max=_MAX_EXPONENT))


def js(log_t: torch.Tensor) -> torch.Tensor:
    """f'(t) = log(2 t / (1 + t)): the Jensen-Shannon divergence (Wang et al. 2023, table 1)."""
    return math.log(2) + logsigmoid(log_t)


def alpha(coefficient: float) -> Divergence:
    """f'(t) = (t^(a - 1) - 1) / (a - 1), 0 <= a < 1: an alpha-divergence (Wang et al. 2023, table 1).

    The coefficient is TRL's; the paper's is 1 - a. At 0 it is the forward KL, towards 1 the reverse.
    """
    power = coefficient - 1

    def derivative(log_t: torch.Tensor) -> torch.Tensor:
        return torch.expm1((power * log_t).clamp(max=_MAX_EXPONENT)) / power

    return derivative


def divergence_of(name: str, coefficient: float) -> Divergence | None:
    """F' of the divergence of this name; None for the reverse KL, where it is log t, which the losses have anyway."""
    return {"forward_kl": forward_kl, "js": js, "alpha": alpha(coefficient)}.get(name)


def under_divergence(pairs: Pairs, derivative: Divergence) -> Pairs:
    """Pairs whose reward is beta * f'(pi / ref) in place of beta * log(pi / ref): f-DPO (Wang et al. 2023, eq. 9)."""
    scores_B2 = derivative(pairs.log_ratios_B2)
    return replace(pairs, policy_B2=scores_B2, reference_B2=torch.zeros_like(scores_B2))


def with_offset(pairs: Pairs, offsets_B: torch.Tensor) -> Pairs:
    """Pairs whose delta is less by an offset: ODPO (Amini et al. 2024, eq. 9).

    Args:
        pairs: Of a loss of the margin.
        offsets_B: float64 [B], what delta must reach before the pair counts as told apart, nats: the paper's offset
            of the margin over beta.
    """
    shift_B2 = torch.stack([offsets_B, torch.zeros_like(offsets_B)], dim=1)
    return replace(pairs, reference_B2=pairs.reference_B2 + shift_B2)


def shared_length_logps(token_logps_M: torch.Tensor, num_tokens_B2: torch.Tensor, weight: float) -> torch.Tensor:
    """Sums in which the tokens beyond the shorter answer's length count less: LD-DPO (Liu et al. 2024, eq. 9).

    Args:
        token_logps_M: [M], log-probabilities of all tokens, answer after answer, nats, with gradient.
        num_tokens_B2: int64 [B, 2], tokens of each answer; M in all.
        weight: What the longer answer's further tokens count, 0 to 1.

    Returns:
        float64 [B, 2].
    """
    lengths = num_tokens_B2.flatten()
    shared = num_tokens_B2.amin(1, keepdim=True).expand_as(num_tokens_B2).flatten()
    total = len(token_logps_M)
    owners = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths, output_size=total)
    places = torch.arange(total, device=lengths.device) - (lengths.cumsum(0) - lengths)[owners]
    weights = torch.where(places < shared[owners], 1.0, weight).double()
    sums = torch.zeros(len(lengths), dtype=torch.float64, device=lengths.device)
    return sums.index_add(0, owners, token_logps_M.double() * weights).view_as(num_tokens_B2)


def wpo_weights(
    token_logps_M: torch.Tensor, log_sum_squares_M: torch.Tensor, num_tokens_B2: torch.Tensor
) -> torch.Tensor:
    """How likely pairs are under the policy: WPO's aligned weights (Zhou et al. 2024, eq. 2 and section 3.2).

    Of each answer exp of the mean, over its tokens, of log p(token) - log sum p^2, so that an answer sampled from
    the policy has a weight near 1; of a pair the product. No gradient flows.

    Args:
        token_logps_M: [M], log-probabilities of all tokens, answer after answer, nats.
        log_sum_squares_M: [M], of each token's distribution the log of the sum of squared probabilities.
        num_tokens_B2: int64 [B, 2], tokens of each answer; M in all.

    Returns:
        float64 [B].
    """
    aligned = (token_logps_M.detach() - log_sum_squares_M).double()
    lengths = num_tokens_B2.flatten()
    owners = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths, output_size=len(aligned))
    sums = torch.zeros(len(lengths), dtype=torch.float64, device=lengths.device).index_add(0, owners, aligned)
    return (sums / lengths).exp().view_as(num_tokens_B2).prod(1)
