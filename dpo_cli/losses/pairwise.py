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
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dpo_cli.losses.catalogue import Loss

if TYPE_CHECKING:
    from torch import Tensor

ON_MARGIN = ("divergence", "ld_alpha", "weighting")
ON_REWARDS = ("ld_alpha", "weighting")


@dataclass(frozen=True)
class Pairs:
    """Pairs of answers, scored.

    Attributes:
        policy_B2: [B, 2], the policy's log-probabilities, sums over tokens, nats.
        reference_B2: The reference's, likewise.
        num_tokens_B2: int64 [B, 2].
        mean_chosen_tokens: Tokens of a chosen answer, a mean over the optimizer batch.
        usual_margin: Mean margin of a pair, a moving average over the steps before.
        scores_B2: float64 [B, 2], the answers' scores in the data; None where no loss reads them.
    """

    policy_B2: Tensor
    reference_B2: Tensor
    num_tokens_B2: Tensor
    mean_chosen_tokens: float = 1.0
    usual_margin: float = 0.0
    scores_B2: Tensor | None = None

    @property
    def log_ratios_B2(self) -> Tensor:
        """log(pi / ref) of both answers, float64 [B, 2]."""
        return log_ratios(self.policy_B2, self.reference_B2)

    @property
    def deltas_B(self) -> Tensor:
        """Log-ratio of the chosen answer less that of the rejected one, float64 [B]."""
        return difference(self.log_ratios_B2)

    @property
    def mean_log_ratios_B2(self) -> Tensor:
        """log(pi / ref) a token, float64 [B, 2]."""
        return self.log_ratios_B2 / self.num_tokens_B2

    @property
    def policy_alone_B2(self) -> Tensor:
        """Log pi, float64 [B, 2]."""
        return log_ratios(self.policy_B2, self.policy_B2.new_zeros(()))

    @property
    def told_scores_B2(self) -> Tensor:
        """The answers' scores in the data, float64 [B, 2].

        Raises:
            ValueError: There are none.
        """
        if self.scores_B2 is None:
            raise ValueError("the loss reads scores, and these pairs have none")
        return self.scores_B2.double()

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


def difference(values_B2: Tensor) -> Tensor:
    """The chosen answer's value less the rejected one's, [B]."""
    return values_B2[:, 0] - values_B2[:, 1]


def log_sigmoid(values: Tensor) -> Tensor:
    """Log of the logistic function, any shape."""
    from torch.nn.functional import logsigmoid  # here, so that settings are checked without torch

    return logsigmoid(values)


def logistic(margins_B: Tensor, smoothing: float | Tensor) -> Tensor:
    """The logistic loss where labels are flipped with a probability, one for all or [B], float64 [B]."""
    return -(1 - smoothing) * log_sigmoid(margins_B) - smoothing * log_sigmoid(-margins_B)


# --- on the margin ------------------------------------------------------------------------


@Loss(
    "-log σ(m)",
    "DPO: Rafailov et al. 2023, eq. 7",
    "the default",
    (*ON_MARGIN, "margin_scale"),
)
def sigmoid(pairs: Pairs, /, beta: float) -> Tensor:
    """-log sigma(beta * delta): DPO (Rafailov et al. 2023, eq. 7)."""
    return -log_sigmoid(beta * pairs.deltas_B)


@Loss(
    "-(1 - e) log σ(m) - e log σ(-m)",
    "conservative DPO: Mitchell 2023",
    "a share e of the labels is wrong: the margin has an end, log((1 - e) / e)",
    (*ON_MARGIN, "margin_scale"),
    needs=("label_smoothing",),
)
def cdpo(pairs: Pairs, /, beta: float, label_smoothing: float) -> Tensor:
    """-(1 - e) log sigma(beta * delta) - e log sigma(-beta * delta): conservative DPO (Mitchell 2023).

    Labels are taken to be flipped with probability e in (0, 1/2).
    """
    return logistic(beta * pairs.deltas_B, label_smoothing)


@Loss(
    "(-(1 - e) log σ(m) + e log σ(-m)) / (1 - 2e)",
    "Chowdhury et al. 2024, eq. 12",
    "a known share e of the labels was flipped at random: unbiased, but without a lower bound",
    (*ON_MARGIN, "margin_scale"),
    needs=("label_smoothing",),
)
def robust(pairs: Pairs, /, beta: float, label_smoothing: float) -> Tensor:
    """(-(1 - e) log sigma(beta * delta) + e log sigma(-beta * delta)) / (1 - 2 e): robust DPO (Chowdhury et al. 2024).

    Its mean over labels flipped with probability e in (0, 1/2) is the DPO loss on the true labels. It has no
    lower bound.
    """
    margin = beta * pairs.deltas_B
    right, flipped = -log_sigmoid(margin), -log_sigmoid(-margin)
    return ((1 - label_smoothing) * right - label_smoothing * flipped) / (1 - 2 * label_smoothing)


@Loss(
    "max(0, 1 - m)",
    "SLiC: Zhao et al. 2023; RSO: Liu et al. 2023",
    "pairs with a margin above 1 should be left alone",
    (*ON_MARGIN, "margin_scale"),
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
    return (difference(pairs.mean_log_ratios_B2) - 1 / (2 * beta)) ** 2


@Loss(
    "(m / beta - 1 / (2 beta))²",
    "IPO: Azar et al. 2023, eq. 17",
    "IPO as its authors write it",
    ON_MARGIN,
)
def ipo_sum(pairs: Pairs, /, beta: float) -> Tensor:
    """(delta - 1 / (2 beta))^2: IPO as the paper writes it (Azar et al. 2023, eq. 17)."""
    return (pairs.deltas_B - 1 / (2 * beta)) ** 2


@Loss(
    "σ(m) log(σ(m) / (1 - e)) + σ(-m) log(σ(-m) / e)",
    "EXO: Ji et al. 2024, eq. 16",
    "the reverse divergence, which seeks the mode; e = 0.001 in the paper",
    ON_MARGIN,
    needs=("label_smoothing",),
)
def exo_pair(pairs: Pairs, /, beta: float, label_smoothing: float) -> Tensor:
    """KL(p || q), p = (sigma(beta * delta), its rest), q = (1 - e, e): EXO on pairs (Ji et al. 2024, eq. 16)."""
    margin = beta * pairs.deltas_B
    right = margin.sigmoid() * (log_sigmoid(margin) - math.log1p(-label_smoothing))
    return right + (-margin).sigmoid() * (log_sigmoid(-margin) - math.log(label_smoothing))


@Loss(
    "(1 - s) · -log σ(m) + s · exp(-m), s = σ(m / discopop_tau)",
    "DiscoPOP: Lu et al. 2024, eq. 5",
    "a loss that a language model found",
    ON_MARGIN,
)
def discopop(pairs: Pairs, /, beta: float, discopop_tau: float) -> Tensor:
    """(1 - s) * -log sigma(m) + s * exp(-m), m = beta * delta, s = sigma(m / tau): DiscoPOP (Lu et al. 2024, eq. 5)."""
    margin = beta * pairs.deltas_B
    # s exp(-m) as exp(log s - m): where m is far below zero s is zero and exp(-m) beyond any number
    exponential = (log_sigmoid(margin / discopop_tau) - margin).exp()
    return (-margin / discopop_tau).sigmoid() * -log_sigmoid(margin) + exponential


@Loss(
    "-log σ(m'), m' with log-ratios a token",
    "length-normalized DPO: Lambert et al. 2024 (Tülu 3), eq. 6",
    "answers grow longer with sigmoid; beta is larger here, about 5",
    ("divergence", "weighting"),
    learns_log_ratio=False,
)
def sigmoid_norm(pairs: Pairs, /, beta: float) -> Tensor:
    """-log sigma(beta * delta'), log-ratios averaged over tokens: length-normalized DPO (Lambert et al. 2024)."""
    return -log_sigmoid(beta * difference(pairs.mean_log_ratios_B2))


@Loss(
    "-log σ(m - beta dpop_lambda max(0, log ref_w / π_w))",
    "DPO-positive: Pal et al. 2024 (Smaug), eq. 3",
    "the two answers differ in few words, and the chosen one's probability falls with sigmoid",
    ON_REWARDS,
)
def dpop(pairs: Pairs, /, beta: float, dpop_lambda: float) -> Tensor:
    """-log sigma(beta * (delta - lambda * max(0, log(ref_w / pi_w)))): DPO-positive (Pal et al. 2024, eq. 3).

    The penalty is how much log-probability the chosen answer has lost, if it has.
    """
    fallen_B = (-pairs.log_ratios_B2[:, 0]).relu()
    return -log_sigmoid(beta * (pairs.deltas_B - dpop_lambda * fallen_B))


@Loss(
    "-log σ(m + rdpo_alpha (|w| - |l|))",
    "R-DPO: Park et al. 2024",
    "chosen answers are the longer ones, and length is not to be learned; rdpo_alpha is in units of reward a token",
    ON_MARGIN,
    needs=("rdpo_alpha",),
    learns_log_ratio=False,
)
def r_dpo(pairs: Pairs, /, beta: float, rdpo_alpha: float) -> Tensor:
    """-log sigma(beta * delta + alpha * (|w| - |l|)): length-regularized DPO (Park et al. 2024).

    It is DPO where the policy is to maximize r - alpha * |y|: beta * log(pi / ref) + alpha * |y| is then the reward r
    that explains the data, so what length explains the policy need not learn.
    """
    return -log_sigmoid(beta * pairs.deltas_B + rdpo_alpha * difference(pairs.num_tokens_B2.double()))


# --- on the margin, and on the scores in the data -------------------------------------------------


@Loss(
    "-p log σ(m) - (1 - p) log σ(-m), p = score_w / (score_w + score_l)",
    "maximum likelihood of all votes, Rafailov et al. 2023, eq. 7; soft labels: Furuta et al. 2024",
    "several people voted on each pair: the scores in the data are their numbers of votes, or shares",
    ON_MARGIN,
    reads_scores=True,
)
def soft_label(pairs: Pairs, /, beta: float) -> Tensor:
    """-p log sigma(beta * delta) - (1 - p) log sigma(-beta * delta), p the share of votes for the chosen answer.

    It is the mean DPO loss over the votes, each taken as a pair of its own: pairs that people disagree on pull less,
    and only as far as a margin of log(p / (1 - p)). Furuta et al. 2024 compare it as cDPO with soft labels.
    """
    scores_B2 = pairs.told_scores_B2
    return logistic(beta * pairs.deltas_B, scores_B2[:, 1] / scores_B2.sum(1))


@Loss(
    "σ(g) log(σ(g) / σ(m)) + σ(-g) log(σ(-g) / σ(-m)), g = rpo_eta (score_w - score_l)",
    "reward-aware preference optimization: Nvidia 2024 (Nemotron-4 340B); Sun et al. 2025, RPO-bwd",
    "the data has scores: pairs are pushed as far apart as their scores are, and no further",
    ON_MARGIN,
    reads_scores=True,
)
def rpo_bwd_kl(pairs: Pairs, /, beta: float, rpo_eta: float) -> Tensor:
    """KL(p || q), p = (sigma(g), its rest), q = (sigma(beta * delta), its rest), g = eta * (score_w - score_l).

    Reward-aware preference optimization with the backward Bernoulli divergence, which Nemotron-4 was trained with
    (Nvidia 2024; Sun et al. 2025 compare it with the forward one and the squared difference). It is 0 where the margin
    is g.
    """
    margins_B, gaps_B = beta * pairs.deltas_B, rpo_eta * difference(pairs.told_scores_B2)
    right = gaps_B.sigmoid() * (log_sigmoid(gaps_B) - log_sigmoid(margins_B))
    return right + (-gaps_B).sigmoid() * (log_sigmoid(-gaps_B) - log_sigmoid(-margins_B))


# --- on each answer's reward ----------------------------------------------------------------


@Loss(
    "-log σ(r_w) - ½ log σ(-r_w) - ½ log σ(-r_l)",
    "NCA: Chen et al. 2024",
    "the chosen answers' probability should not fall",
    ON_REWARDS,
)
def nca_pair(pairs: Pairs, /, beta: float) -> Tensor:
    """-log sigma(r_w) - (log sigma(-r_w) + log sigma(-r_l)) / 2: NCA on pairs (Chen et al. 2024)."""
    chosen, rejected = pairs.rewards(beta)
    return -log_sigmoid(chosen) - 0.5 * log_sigmoid(-chosen) - 0.5 * log_sigmoid(-rejected)


@Loss(
    "-log σ(r_w) - log σ(-r_l)",
    "BCO: Jung et al. 2024, without its reward shift",
    "each answer is good or bad by itself",
    ON_REWARDS,
)
def bco_pair(pairs: Pairs, /, beta: float) -> Tensor:
    """-log sigma(r_w) - log sigma(-r_l): a binary classifier on pairs, without the reward shift (Jung et al. 2024)."""
    chosen, rejected = pairs.rewards(beta)
    return -log_sigmoid(chosen) - log_sigmoid(-rejected)


@Loss(
    "(r_w / beta - 1 / (2 beta))² + (r_l / beta + 1 / (2 beta))²",
    "SPPO: Wu et al. 2024, eq. 4.7, with sure labels",
    "self-play: pairs sampled from the policy",
    ON_REWARDS,
)
def sppo_hard(pairs: Pairs, /, beta: float) -> Tensor:
    """(l_w - 1 / (2 beta))^2 + (l_l + 1 / (2 beta))^2, l = log(pi / ref): SPPO, labels sure (Wu et al. 2024, 4.7)."""
    chosen, rejected = pairs.log_ratios_B2.unbind(1)
    return (chosen - 0.5 / beta) ** 2 + (rejected + 0.5 / beta) ** 2


@Loss(
    "1 - σ(r_w) + σ(r_l)",
    "APO: D'Oosterlinck et al. 2024, eq. 7",
    "the chosen answers are better than the model's own",
    ON_REWARDS,
)
def apo_zero(pairs: Pairs, /, beta: float) -> Tensor:
    """(1 - sigma(r_w)) + sigma(r_l): APO-zero (D'Oosterlinck et al. 2024, eq. 7)."""
    chosen, rejected = pairs.rewards(beta)
    return (-chosen).sigmoid() + rejected.sigmoid()


@Loss(
    "σ(r_w) + 1 - σ(m)",
    "APO: D'Oosterlinck et al. 2024, eq. 8",
    "the chosen answers are worse than the model's own",
    ON_REWARDS,
)
def apo_down(pairs: Pairs, /, beta: float) -> Tensor:
    """sigma(r_w) + (1 - sigma(r_w - r_l)): APO-down (D'Oosterlinck et al. 2024, eq. 8)."""
    chosen, rejected = pairs.rewards(beta)
    return chosen.sigmoid() + (rejected - chosen).sigmoid()
