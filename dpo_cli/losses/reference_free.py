"""Pairwise losses of the policy's log-probabilities alone, as plain functions: no reference is in them.

Legend: B pairs, 2 answers, column 0 chosen.
"""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING

from dpo_cli.losses.catalogue import Loss
from dpo_cli.losses.pairwise import ON_REWARDS, Pairs, difference, log_sigmoid, logistic

if TYPE_CHECKING:
    from torch import Tensor

_MAX_EXPONENT = 80.0
"""Beyond it alphapo's reward stays as it is and has no gradient: exp(80) is 5e34."""


@Loss(
    "-log σ(beta (log π_w / |w| - log π_l / |l|) - gamma)",
    "SimPO: Meng et al. 2024, eq. 6",
    "no reference wanted; beta about 2, gamma about half of it",
    ("weighting",),
    has_reference=False,
)
def simpo(pairs: Pairs, /, beta: float, gamma: float, label_smoothing: float = 0.0) -> Tensor:
    """-log sigma(beta * (log pi_w / |w| - log pi_l / |l|) - gamma): SimPO (Meng et al. 2024, eq. 6)."""
    return logistic(beta * difference(pairs.policy_alone_B2 / pairs.num_tokens_B2) - gamma, label_smoothing)


@Loss(
    "-log σ(s_w - s_l - gamma), s = beta (1 - p^-a) / a, p the mean probability a token, a = alphapo_alpha",
    "AlphaPO: Gupta et al. 2025",
    "chosen answers become less likely with simpo; a about 0.25, beta and gamma as there",
    ("weighting",),
    has_reference=False,
)
def alphapo(pairs: Pairs, /, beta: float, gamma: float, alphapo_alpha: float, label_smoothing: float = 0.0) -> Tensor:
    """-log sigma(s_w - s_l - gamma), s = beta * (1 - p^-alpha) / alpha, p = exp(log pi / |y|): AlphaPO (Gupta 2025).

    Towards alpha 0 it is :func:`simpo`, whose s is beta * log p. With alpha above 0 an unlikely answer has the steeper
    reward, ds / dlog p = beta * p^-alpha.
    """
    mean = pairs.policy_alone_B2 / pairs.num_tokens_B2
    if alphapo_alpha:
        mean = -(-alphapo_alpha * mean).clamp(max=_MAX_EXPONENT).expm1() / alphapo_alpha
    return logistic(beta * difference(mean) - gamma, label_smoothing)


@Loss(
    "-beta log σ(log odds_w - log odds_l), odds of the mean probability a token",
    "ORPO: Hong et al. 2024, eq. 6 and 7; whole as {orpo: 1, sft: 1}",
    "SFT and preferences in one training, from a base model",
    ("weighting",),
    has_reference=False,
)
def orpo(pairs: Pairs, /, beta: float) -> Tensor:
    """-beta * log sigma(log odds_w - log odds_l): ORPO's odds ratio (Hong et al. 2024, eq. 6-7); ``sft`` is the other.

    The odds are p / (1 - p) of the mean probability a token, exp(log pi / |y|); beta is the paper's lambda.
    """
    mean = pairs.policy_alone_B2 / pairs.num_tokens_B2
    return -beta * log_sigmoid(difference(mean - _log1mexp(mean)))


def _log1mexp(values: Tensor) -> Tensor:
    """log(1 - exp(x)) for x <= 0; what a certain answer would make infinite is held at the least of float64."""
    below = values.clamp(max=-sys.float_info.min)
    small = below > -math.log(2)  # where either form loses its digits, the other has them (Maechler 2012)
    return (-below.expm1()).log().where(small, (-below.clamp(max=-math.log(2)).exp()).log1p())


@Loss(
    "-log σ(beta (log π_w - log π_l))",
    "CPO: Xu et al. 2024, eq. 3; whole as {cpo: 1, sft: 1}",
    "no reference wanted",
    ON_REWARDS,
    has_reference=False,
)
def cpo(pairs: Pairs, /, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """-log sigma(beta * (log pi_w - log pi_l)): CPO's preference term (Xu et al. 2024, eq. 3); ``sft`` is the other."""
    return logistic(beta * difference(pairs.policy_alone_B2), label_smoothing)
