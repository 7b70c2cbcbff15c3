"""Pairwise preference losses as pure functions of pairs of log-probabilities.

With

    delta = (log pi_w - log ref_w) - (log pi_l - log ref_l)

the implicit reward of an answer is ``beta * log(pi / ref)`` and a pair's margin ``beta * delta``
(Rafailov et al. 2023, eq. 5). Losses are float64 [B], one a pair.

To add a loss, write its function here, with its catalogue entry above it: it takes the pairs and, as parameters, the
settings of section train that it computes with, and can then be named in ``train.loss``.

Legend: B pairs, 2 answers, column 0 chosen.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dpo_cli.losses.catalogue import Loss

if TYPE_CHECKING:
    from torch import Tensor

_ON_MARGIN = ("divergence", "ld_alpha", "weighting")
_ON_REWARDS = ("ld_alpha", "weighting")


@dataclass(frozen=True)
class Pairs:
    """Pairs of answers, scored.

    Attributes:
        policy_B2: [B, 2], the policy's log-probabilities, sums over tokens, nats.
        reference_B2: The reference's, likewise.
        num_tokens_B2: int64 [B, 2].
        mean_chosen_tokens: Tokens of a chosen answer, a mean over the optimizer batch.
    """

    policy_B2: Tensor
    reference_B2: Tensor
    num_tokens_B2: Tensor
    mean_chosen_tokens: float = 1.0

    @property
    def log_ratios_B2(self) -> Tensor:
        """log(pi / ref) of both answers, float64 [B, 2]."""
        return log_ratios(self.policy_B2, self.reference_B2)

    @property
    def deltas_B(self) -> Tensor:
        """Log-ratio of the chosen answer less that of the rejected one, float64 [B]."""
        return _difference(self.log_ratios_B2)

    @property
    def mean_log_ratios_B2(self) -> Tensor:
        """log(pi / ref) a token, float64 [B, 2]."""
        return self.log_ratios_B2 / self.num_tokens_B2

    @property
    def policy_alone_B2(self) -> Tensor:
        """Log pi, float64 [B, 2]."""
        return log_ratios(self.policy_B2, self.policy_B2.new_zeros(()))

    def rewards(self, beta: float) -> tuple[Tensor, Tensor]:
        """Beta * log(pi / ref) of the chosen answer and of the rejected one, float64 [B] each."""
        chosen, rejected = (beta * self.log_ratios_B2).unbind(1)
        return chosen, rejected


def log_ratios(policy_B2: Tensor, reference_B2: Tensor) -> Tensor:
    """log(pi / ref) of both answers, float64 [B, 2].

    Raises:
        ValueError: There are not two answers.
    """
    if policy_B2.shape[-1] != 2:
        raise ValueError(f"a pairwise loss compares 2 answers, got {policy_B2.shape[-1]}")
    return policy_B2.double() - reference_B2.double()


def _difference(values_B2: Tensor) -> Tensor:
    return values_B2[:, 0] - values_B2[:, 1]


def _logsigmoid(values: Tensor) -> Tensor:
    from torch.nn.functional import logsigmoid  # here, so that settings are checked without torch

    return logsigmoid(values)


def _logistic(margins_B: Tensor, smoothing: float) -> Tensor:
    """The logistic loss where labels are flipped with a probability."""
    return -(1 - smoothing) * _logsigmoid(margins_B) - smoothing * _logsigmoid(-margins_B)


# --- on the margin ------------------------------------------------------------------------


@Loss(
    "-log σ(m)",
    "DPO: Rafailov et al. 2023, eq. 7",
    "the default",
    (*_ON_MARGIN, "margin_scale"),
)
def sigmoid(pairs: Pairs, /, beta: float) -> Tensor:
    """-log sigma(beta * delta): DPO (Rafailov et al. 2023, eq. 7)."""
    return -_logsigmoid(beta * pairs.deltas_B)


@Loss(
    "-(1 - e) log σ(m) - e log σ(-m)",
    "conservative DPO: Mitchell 2023",
    "a share e of the labels is wrong: the margin has an end, log((1 - e) / e)",
    (*_ON_MARGIN, "margin_scale"),
    needs=("label_smoothing",),
)
def cdpo(pairs: Pairs, /, beta: float, label_smoothing: float) -> Tensor:
    """-(1 - e) log sigma(beta * delta) - e log sigma(-beta * delta): conservative DPO (Mitchell 2023).

    Labels are taken to be flipped with probability e in (0, 1/2).
    """
    return _logistic(beta * pairs.deltas_B, label_smoothing)


@Loss(
    "(-(1 - e) log σ(m) + e log σ(-m)) / (1 - 2e)",
    "Chowdhury et al. 2024, eq. 12",
    "a known share e of the labels was flipped at random: unbiased, but without a lower bound",
    (*_ON_MARGIN, "margin_scale"),
    needs=("label_smoothing",),
)
def robust(pairs: Pairs, /, beta: float, label_smoothing: float) -> Tensor:
    """(-(1 - e) log sigma(beta * delta) + e log sigma(-beta * delta)) / (1 - 2 e): robust DPO (Chowdhury et al. 2024).

    Its mean over labels flipped with probability e in (0, 1/2) is the DPO loss on the true labels. It has no
    lower bound.
    """
    margin = beta * pairs.deltas_B
    right, flipped = -_logsigmoid(margin), -_logsigmoid(-margin)
    return ((1 - label_smoothing) * right - label_smoothing * flipped) / (1 - 2 * label_smoothing)


@Loss(
    "max(0, 1 - m)",
    "SLiC: Zhao et al. 2023; RSO: Liu et al. 2023",
    "pairs with a margin above 1 should be left alone",
    (*_ON_MARGIN, "margin_scale"),
)
def hinge(pairs: Pairs, /, beta: float) -> Tensor:
    """max(0, 1 - beta * delta): SLiC's hinge on the DPO margin (Zhao et al. 2023; Liu et al. 2023, RSO)."""
    return (1 - beta * pairs.deltas_B).relu()


@Loss(
    "(m' / beta - 1 / (2 beta))², m' with log-ratios a token",
    "IPO: Azar et al. 2023, eq. 17, length-normalized as in TRL",
    "labels without noise, with which the sigmoid would push margins up forever; answers of different lengths",
    ("divergence", "weighting"),
    learns_log_ratio=False,
)
def ipo(pairs: Pairs, /, beta: float) -> Tensor:
    """(delta' - 1 / (2 beta))^2 with log-ratios averaged over tokens: IPO (Azar et al. 2023, eq. 17).

    The paper sums over tokens, see :func:`ipo_sum`; the mean is what TRL computes under this name.
    """
    return (_difference(pairs.mean_log_ratios_B2) - 1 / (2 * beta)) ** 2


@Loss(
    "(m / beta - 1 / (2 beta))²",
    "IPO: Azar et al. 2023, eq. 17",
    "IPO as its authors write it",
    _ON_MARGIN,
)
def ipo_sum(pairs: Pairs, /, beta: float) -> Tensor:
    """(delta - 1 / (2 beta))^2: IPO as the paper writes it (Azar et al. 2023, eq. 17)."""
    return (pairs.deltas_B - 1 / (2 * beta)) ** 2


@Loss(
    "σ(m) log(σ(m) / (1 - e)) + σ(-m) log(σ(-m) / e)",
    "EXO: Ji et al. 2024, eq. 16",
    "the reverse divergence, which seeks the mode; e = 0.001 in the paper",
    _ON_MARGIN,
    needs=("label_smoothing",),
)
def exo_pair(pairs: Pairs, /, beta: float, label_smoothing: float) -> Tensor:
    """KL(p || q), p = (sigma(beta * delta), its rest), q = (1 - e, e): EXO on pairs (Ji et al. 2024, eq. 16)."""
    margin = beta * pairs.deltas_B
    right = margin.sigmoid() * (_logsigmoid(margin) - math.log1p(-label_smoothing))
    return right + (-margin).sigmoid() * (_logsigmoid(-margin) - math.log(label_smoothing))


@Loss(
    "(1 - s) · -log σ(m) + s · exp(-m), s = σ(m / discopop_tau)",
    "DiscoPOP: Lu et al. 2024, eq. 5",
    "a loss that a language model found",
    _ON_MARGIN,
)
def discopop(pairs: Pairs, /, beta: float, discopop_tau: float) -> Tensor:
    """(1 - s) * -log sigma(m) + s * exp(-m), m = beta * delta, s = sigma(m / tau): DiscoPOP (Lu et al. 2024, eq. 5)."""
    margin = beta * pairs.deltas_B
    # s exp(-m) as exp(log s - m): where m is far below zero s is zero and exp(-m) beyond any number
    exponential = (_logsigmoid(margin / discopop_tau) - margin).exp()
    return (-margin / discopop_tau).sigmoid() * -_logsigmoid(margin) + exponential


@Loss(
    "-log σ(m'), m' with log-ratios a token",
    "length-normalized DPO: Lambert et al. 2024 (Tülu 3), eq. 6",
    "answers grow longer with sigmoid; beta is larger here, about 5",
    ("divergence", "weighting"),
    learns_log_ratio=False,
)
def sigmoid_norm(pairs: Pairs, /, beta: float) -> Tensor:
    """-log sigma(beta * delta'), log-ratios averaged over tokens: length-normalized DPO (Lambert et al. 2024)."""
    return -_logsigmoid(beta * _difference(pairs.mean_log_ratios_B2))


# --- on each answer's reward ----------------------------------------------------------------


@Loss(
    "-log σ(r_w) - ½ log σ(-r_w) - ½ log σ(-r_l)",
    "NCA: Chen et al. 2024",
    "the chosen answers' probability should not fall",
    _ON_REWARDS,
)
def nca_pair(pairs: Pairs, /, beta: float) -> Tensor:
    """-log sigma(r_w) - (log sigma(-r_w) + log sigma(-r_l)) / 2: NCA on pairs (Chen et al. 2024)."""
    chosen, rejected = pairs.rewards(beta)
    return -_logsigmoid(chosen) - 0.5 * _logsigmoid(-chosen) - 0.5 * _logsigmoid(-rejected)


@Loss(
    "-log σ(r_w) - log σ(-r_l)",
    "BCO: Jung et al. 2024, without its reward shift",
    "each answer is good or bad by itself",
    _ON_REWARDS,
)
def bco_pair(pairs: Pairs, /, beta: float) -> Tensor:
    """-log sigma(r_w) - log sigma(-r_l): a binary classifier on pairs, without the reward shift (Jung et al. 2024)."""
    chosen, rejected = pairs.rewards(beta)
    return -_logsigmoid(chosen) - _logsigmoid(-rejected)


@Loss(
    "(r_w / beta - 1 / (2 beta))² + (r_l / beta + 1 / (2 beta))²",
    "SPPO: Wu et al. 2024, eq. 4.7, with sure labels",
    "self-play: pairs sampled from the policy",
    _ON_REWARDS,
)
def sppo_hard(pairs: Pairs, /, beta: float) -> Tensor:
    """(l_w - 1 / (2 beta))^2 + (l_l + 1 / (2 beta))^2, l = log(pi / ref): SPPO, labels sure (Wu et al. 2024, 4.7)."""
    chosen, rejected = pairs.log_ratios_B2.unbind(1)
    return (chosen - 0.5 / beta) ** 2 + (rejected + 0.5 / beta) ** 2


@Loss(
    "1 - σ(r_w) + σ(r_l)",
    "APO: D'Oosterlinck et al. 2024, eq. 7",
    "the chosen answers are better than the model's own",
    _ON_REWARDS,
)
def apo_zero(pairs: Pairs, /, beta: float) -> Tensor:
    """(1 - sigma(r_w)) + sigma(r_l): APO-zero (D'Oosterlinck et al. 2024, eq. 7)."""
    chosen, rejected = pairs.rewards(beta)
    return (-chosen).sigmoid() + rejected.sigmoid()


@Loss(
    "σ(r_w) + 1 - σ(m)",
    "APO: D'Oosterlinck et al. 2024, eq. 8",
    "the chosen answers are worse than the model's own",
    _ON_REWARDS,
)
def apo_down(pairs: Pairs, /, beta: float) -> Tensor:
    """sigma(r_w) + (1 - sigma(r_w - r_l)): APO-down (D'Oosterlinck et al. 2024, eq. 8)."""
    chosen, rejected = pairs.rewards(beta)
    return chosen.sigmoid() + (rejected - chosen).sigmoid()


# --- on a whole batch ------------------------------------------------------------------------


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
    policy_B, reference_B = _difference(pairs.policy_alone_B2), _difference(pairs.reference_B2.double())
    return _logistic(beta * (policy_B.sort().values - reference_B.sort().values), label_smoothing)


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
    return _logistic(beta * _difference(pairs.log_ratios_B2.sort(0).values), label_smoothing)


# --- without a reference ------------------------------------------------------------------------


@Loss(
    "-log σ(beta (log π_w / |w| - log π_l / |l|) - gamma)",
    "SimPO: Meng et al. 2024, eq. 6",
    "no reference wanted; beta about 2, gamma about half of it",
    ("weighting",),
    has_reference=False,
)
def simpo(pairs: Pairs, /, beta: float, gamma: float, label_smoothing: float = 0.0) -> Tensor:
    """-log sigma(beta * (log pi_w / |w| - log pi_l / |l|) - gamma): SimPO (Meng et al. 2024, eq. 6)."""
    return _logistic(beta * _difference(pairs.policy_alone_B2 / pairs.num_tokens_B2) - gamma, label_smoothing)


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
    return -beta * _logsigmoid(_difference(mean - _log1mexp(mean)))


def _log1mexp(values: Tensor) -> Tensor:
    """log(1 - exp(x)) for x <= 0; what a certain answer would make infinite is held at the least of float64."""
    below = values.clamp(max=-sys.float_info.min)
    small = below > -math.log(2)  # where either form loses its digits, the other has them (Maechler 2012)
    return (-below.expm1()).log().where(small, (-below.clamp(max=-math.log(2)).exp()).log1p())


@Loss(
    "-log σ(beta (log π_w - log π_l))",
    "CPO: Xu et al. 2024, eq. 3; whole as {cpo: 1, sft: 1}",
    "no reference wanted",
    _ON_REWARDS,
    has_reference=False,
)
def cpo(pairs: Pairs, /, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """-log sigma(beta * (log pi_w - log pi_l)): CPO's preference term (Xu et al. 2024, eq. 3); ``sft`` is the other."""
    return _logistic(beta * _difference(pairs.policy_alone_B2), label_smoothing)
