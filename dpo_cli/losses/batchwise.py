"""Losses in which a pair's loss depends on all pairs of its optimizer step, as plain functions.

Legend: B pairs, the whole step; 2 answers, column 0 chosen.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dpo_cli.losses.catalogue import Loss
from dpo_cli.losses.pairwise import Pairs, difference, log_sigmoid, logistic

if TYPE_CHECKING:
    from torch import Tensor


@Loss(
    "logistic loss of sort(log π_w / π_l) - sort(log ref_w / ref_l), times beta",
    "AOT: Melnyk et al. 2024",
    "the whole distribution of margins is to move; large batches",
    ("ld_alpha",),
    is_coupled=True,
)
def aot(pairs: Pairs, /, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """The logistic loss between sorted log-ratios: AOT on pairs (Melnyk et al. 2024).

    log(pi_w / pi_l) and log(ref_w / ref_l) of the whole optimizer batch are each sorted, then compared rank by
    rank: the first is to dominate the second. Losses come in the order of the ranks.
    """
    policy_B, reference_B = difference(pairs.policy_alone_B2), difference(pairs.reference_B2.double())
    return logistic(beta * (policy_B.sort().values - reference_B.sort().values), label_smoothing)


@Loss(
    "logistic loss of sort(r_w) - sort(r_l)",
    "AOT: Melnyk et al. 2024, unpaired",
    "the same, if the two sides of a row are unrelated",
    ("ld_alpha",),
    is_coupled=True,
)
def aot_unpaired(pairs: Pairs, /, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """The logistic loss between the sorted log-ratios of chosen and of rejected answers: AOT, unpaired (Melnyk 2024).

    Over the whole optimizer batch. Losses come in the order of the ranks.
    """
    return logistic(beta * difference(pairs.log_ratios_B2.sort(0).values), label_smoothing)


@Loss(
    "-log σ((1 + a (M - M_0)) m), M the mean margin of the step, M_0 that of the steps before, a = beta_dpo_alpha",
    "β-DPO: Wu et al. 2024",
    "beta is hard to choose: it grows where a batch is told apart by more than usual",
    ("ld_alpha",),
    is_coupled=True,
)
def beta_dpo(pairs: Pairs, /, beta: float, beta_dpo_alpha: float) -> Tensor:
    """-log sigma(beta' * delta), beta' = beta * (1 + alpha * (M - M_0)): beta-DPO (Wu et al. 2024).

    M is the mean margin, beta * delta, of the optimizer batch and M_0 its moving average over the steps before
    (``usual_margin`` of the pairs). No gradient flows through beta', which is at least a thousandth, as in the authors'
    code. The paper's other half is not done: it draws the pairs of a batch by how near their margins are to M_0, which
    leaves out outliers.
    """
    margins_B = beta * pairs.deltas_B
    surprise = margins_B.detach().mean() - pairs.usual_margin
    scaled = (beta * (1 + beta_dpo_alpha * surprise)).clamp(min=1e-3)
    return -log_sigmoid(scaled * pairs.deltas_B)


# --- of single answers that are good or bad -------------------------------------------------------


@Loss(
    "λ - λ σ(±beta (log(π / ref) - z)), + for good answers, - for bad ones, z = max(0, mean log(π / ref) of other"
    " prompts' answers)",
    "KTO: Ethayarajh et al. 2024, eq. 8",
    "thumbs up and down on single answers; λ is desirable_weight or undesirable_weight",
    is_coupled=True,
    is_unpaired=True,
)
def kto(
    answers: Pairs, is_good_B: Tensor, /, beta: float, desirable_weight: float = 1.0, undesirable_weight: float = 1.0
) -> Tensor:
    """lambda_y - v: Kahneman-Tversky optimization (Ethayarajh et al. 2024, eq. 8 and section 4).

    With l = log(pi / ref) of an answer, v is lambda_D * sigma(beta * (l - z)) of a good one and
    lambda_U * sigma(beta * (z - l)) of a bad one. z stands for KL(pi || ref): the mean of l over answers that belong to
    other prompts of the same data, at least 0. No gradient flows through it.

    Args:
        answers: Column 0 the answer of the row, column 1 another prompt's answer to its prompt.
        is_good_B: bool [B], what the answer of the row is called.
        beta: Strength of the pull towards the reference.
        desirable_weight: lambda_D.
        undesirable_weight: lambda_U.

    Returns:
        float64 [B].
    """
    own_B, others_B = answers.log_ratios_B2.unbind(1)
    above_B = beta * (own_B - others_B.detach().mean().clamp(min=0))
    return (desirable_weight * (-above_B).sigmoid()).where(is_good_B, undesirable_weight * above_B.sigmoid())
