"""Plackett-Luce losses over K ranked answers, and Bradley-Terry as their K = 2.

The probability of an order y_1 > y_2 > ... > y_K under rewards r is

    prod_k exp(r_k) / sum_{j >= k} exp(r_j)

(Plackett 1975, Luce 1959; Rafailov et al. 2023, eq. 18). DPO's form takes
r = beta * log(pi / ref), the prompt's normalizer cancels (eq. 20).

Ranks are int64 [B, K], 1 the best, ascending along K; equal ranks are tied. An answer of rank 0
is none and takes no part, so groups of different K go into one tensor.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Literal

from dpo_cli.losses.catalogue import Loss

if TYPE_CHECKING:
    from torch import Tensor

Ties = Literal["average", "groups"]

MAX_TIED = 12
"""Answers that may be tied with ``average``: the orders among them are summed over their 2^n subsets."""


def plackett_luce_nll(rewards_BK: Tensor, ranks_BK: Tensor, ties: Ties = "average") -> Tensor:
    """-log of the probability of the ranking, nats.

    Args:
        rewards_BK: [B, K], any floating dtype, with gradient.
        ranks_BK: int64 [B, K], see above; on the CPU, or it is waited for.
        ties: What tied answers are. ``average``: any order of them may be the true one, and the mean of
            -log P over those orders is taken. ``groups``: they are not compared; each is chosen from itself and
            all answers below its rank.

    Returns:
        [B]; where all ranks differ the two agree. With ``groups`` a ranking that is one tie gives 0.

    Raises:
        ValueError: Ranks do not ascend, or more than 12 answers are tied with ``average``.
    """
    import torch  # here, as below: settings are checked without it

    all_ranks, filled_BK = ranks_BK.tolist(), ranks_BK > 0
    backwards = (ranks_BK[:, 1:] < ranks_BK[:, :-1]) & filled_BK[:, 1:]
    if bool(backwards.any()) or bool((filled_BK[:, 1:] & ~filled_BK[:, :-1]).any()):
        raise ValueError("ranks must ascend, those of missing answers (0) last")
    rewards_BK = rewards_BK.masked_fill((~filled_BK).to(rewards_BK.device, non_blocking=True), -torch.inf)
    return torch.stack([_nll(rewards, ranks, ties) for rewards, ranks in zip(rewards_BK, all_ranks, strict=True)])


def _nll(rewards_K: Tensor, ranks: list[int], ties: Ties) -> Tensor:
    """Of one ranking; a scalar."""
    from torch.nn.functional import logsigmoid

    count = sum(rank > 0 for rank in ranks)
    ends = [end for end in range(1, count + 1) if end == count or ranks[end] != ranks[end - 1]]
    nll = rewards_K[:0].sum()  # zero, with a gradient where nothing is compared
    for begin, end in zip([0, *ends], ends, strict=False):
        tied, below = rewards_K[begin:end], rewards_K[end:count]
        if end - begin == 1 or ties == "groups":
            if end < count:
                nll = nll - logsigmoid(tied - below.logsumexp(0)).sum()
        else:
            nll = nll + _mean_over_orders(tied, below)
    return nll


def _mean_over_orders(tied_N: Tensor, below_M: Tensor) -> Tensor:
    """The mean of -log P over the N! orders in which tied answers may come before those below.

    When k of them are still to come, each subset of k is left in equally many orders.
    """
    import torch

    number = len(tied_N)
    if number > MAX_TIED:
        raise ValueError(f"at most {MAX_TIED} answers may be tied with ties average, got {number}; take ties groups")
    total = -tied_N.sum()
    for left in range(1, number + 1):
        subsets = torch.tensor(list(itertools.combinations(range(number), left)))
        subsets = subsets.to(tied_N.device, non_blocking=True)
        rest = below_M.expand(len(subsets), -1)
        total = total + torch.cat([tied_N[subsets], rest], dim=1).logsumexp(1).mean()
    return total


@Loss(
    "-Σ_k log(exp r_k / Σ_{j ≥ k} exp r_j), answers in the order of their ranks",
    "Rafailov et al. 2023, appendix A.3, eq. 20",
    "rankings of more than two answers (data/preference/*.ranking.parquet)",
    is_ranking=True,
)
def plackett_luce(
    policy_BK: Tensor, reference_BK: Tensor, ranks_BK: Tensor, /, beta: float, ties: Ties = "average"
) -> Tensor:
    """DPO on rankings (Rafailov et al. 2023, eq. 20): the ranking's -log P with r = beta * log(pi / ref).

    Args:
        policy_BK: [B, K], log-probabilities, sums over tokens, nats, with gradient.
        reference_BK: [B, K], likewise, of the reference.
        ranks_BK: int64 [B, K], ascending.
        beta: Strength of the pull towards the reference.
        ties: See :func:`plackett_luce_nll`.

    Returns:
        float64 [B]. For K = 2 it is the sigmoid loss.
    """
    return plackett_luce_nll(beta * (policy_BK.double() - reference_BK.double()), ranks_BK, ties)


def kendall_tau(rewards_BK: Tensor, ranks_BK: Tensor) -> Tensor:
    """How well rewards order the answers: (agreeing - disagreeing) / compared pairs, ties in the ranks left out.

    Args:
        rewards_BK: [B, K].
        ranks_BK: int64 [B, K]; 0 is no answer.

    Returns:
        float64 [B], -1 to 1: Kendall's tau, with pairs of equal reward in the denominator; NaN where
        nothing is to compare.
    """
    filled = ranks_BK > 0
    better = (ranks_BK[:, :, None] < ranks_BK[:, None, :]) & filled[:, :, None] & filled[:, None, :]
    agreement = (rewards_BK[:, :, None] - rewards_BK[:, None, :]).sign().double()
    return (agreement * better).sum((1, 2)) / better.sum((1, 2))
