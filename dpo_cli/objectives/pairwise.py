"""Pairwise preference losses as pure functions.

Each takes the policy's and the reference's log-probabilities of (chosen, rejected) and the
tokens they have, and gives one loss a pair. With

    delta = (log pi_w - log ref_w) - (log pi_l - log ref_l)

the implicit reward of an answer is ``beta * log(pi / ref)`` and a pair's margin ``beta * delta``
(Rafailov et al. 2023, eq. 5). Log-probabilities are sums over tokens, float64 [B, 2], column 0
chosen, nats; numbers of tokens are int64 [B, 2]; losses are float64 [B].

What changes another loss is a function of that loss: :func:`f_divergence` and :func:`offset`
give it other log-ratios, :func:`mixture` adds losses up. Which setting each reads, and when to use
it, is in :mod:`dpo_cli.core.objectives`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import logsigmoid

from dpo_cli.core.objectives import OBJECTIVES, PairwiseName
from dpo_cli.core.params import TrainParams

PairwiseLoss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(policy_logps_B2, reference_logps_B2, num_tokens_B2) -> loss_B."""

_MAX_EXPONENT = 80.0
"""Beyond it a divergence's reward stays as it is and has no gradient, as in TRL's alpha: exp(80) is 5e34."""

Divergence = Callable[[torch.Tensor], torch.Tensor]
"""f'(t) of an f-divergence as a function of log t, any shape."""


def log_ratios(policy_logps_B2: torch.Tensor, reference_logps_B2: torch.Tensor) -> torch.Tensor:
    """log(pi / ref) of both answers, float64 [B, 2].

    Raises:
        ValueError: There are not two answers.
    """
    if policy_logps_B2.shape[-1] != 2:
        raise ValueError(f"a pairwise loss compares 2 answers, got {policy_logps_B2.shape[-1]}")
    return policy_logps_B2.double() - reference_logps_B2.double()


def _difference(values_B2: torch.Tensor) -> torch.Tensor:
    return values_B2[:, 0] - values_B2[:, 1]


def _delta(policy_B2: torch.Tensor, reference_B2: torch.Tensor) -> torch.Tensor:
    return _difference(log_ratios(policy_B2, reference_B2))


def _smoothed(margins_B: torch.Tensor, smoothing: float) -> torch.Tensor:
    """The logistic loss where labels are flipped with a probability."""
    return -(1 - smoothing) * logsigmoid(margins_B) - smoothing * logsigmoid(-margins_B)


# --- on the margin ------------------------------------------------------------------------


def sigmoid(beta: float) -> PairwiseLoss:
    """-log sigma(beta * delta): DPO (Rafailov et al. 2023, eq. 7)."""

    def loss(policy: torch.Tensor, reference: torch.Tensor, num_tokens: torch.Tensor) -> torch.Tensor:
        return -logsigmoid(beta * _delta(policy, reference))

    return loss


def cdpo(beta: float, label_smoothing: float) -> PairwiseLoss:
    """-(1 - e) log sigma(beta * delta) - e log sigma(-beta * delta): conservative DPO (Mitchell 2023).

    Labels are taken to be flipped with probability e in (0, 1/2).
    """

    def loss(policy: torch.Tensor, reference: torch.Tensor, num_tokens: torch.Tensor) -> torch.Tensor:
        return _smoothed(beta * _delta(policy, reference), label_smoothing)

    return loss


def robust(beta: float, label_smoothing: float) -> PairwiseLoss:
    """(-(1 - e) log sigma(beta * delta) + e log sigma(-beta * delta)) / (1 - 2 e): robust DPO (Chowdhury et al. 2024).

    Its mean over labels flipped with probability e in (0, 1/2) is the DPO loss on the true labels. It has no
    lower bound.
    """

    def loss(policy: torch.Tensor, reference: torch.Tensor, num_tokens: torch.Tensor) -> torch.Tensor:
        margin = beta * _delta(policy, reference)
        right, flipped = -logsigmoid(margin), -logsigmoid(-margin)
        return ((1 - label_smoothing) * right - label_smoothing * flipped) / (1 - 2 * label_smoothing)

    return loss


def hinge(beta: float) -> PairwiseLoss:
    """max(0, 1 - beta * delta): SLiC's hinge on the DPO margin (Zhao et al. 2023; Liu et al. 2023, RSO)."""

    def loss(policy: torch.Tensor, reference: torch.Tensor, num_tokens: torch.Tensor) -> torch.Tensor:
        return torch.relu(1 - beta * _delta(policy, reference))

    return loss


def ipo(beta: float) -> PairwiseLoss:
    """(delta' - 1 / (2 beta))^2 with log-ratios averaged over tokens: IPO (Azar et al. 2023, eq. 17).

    The paper sums over tokens, see :func:`ipo_sum`; the mean is what TRL computes under this name.
    """

    def loss(policy: torch.Tensor, reference: torch.Tensor, num_tokens: torch.Tensor) -> torch.Tensor:
        return (_difference(log_ratios(policy, reference) / num_tokens) - 1 / (2 * beta)) ** 2

    return loss


def ipo_sum(beta: float) -> PairwiseLoss:
    """(delta - 1 / (2 beta))^2: IPO as the paper writes it (Azar et al. 2023, eq. 17)."""

    def loss(policy: torch.Tensor, reference: torch.Tensor, num_tokens: torch.Tensor) -> torch.Tensor:
        return (_delta(policy, reference) - 1 / (2 * beta)) ** 2

    return loss


def exo_pair(beta: float, label_smoothing: float) -> PairwiseLoss:
    """KL(p || q), p = (sigma(beta * delta), its rest), q = (1 - e, e): EXO on pairs (Ji et al. 2024, eq. 16)."""
    log_right, log_flipped = math.log1p(-label_smoothing), math.log(label_smoothing)

    def loss(policy: torch.Tensor, reference: torch.Tensor, num_tokens: torch.Tensor) -> torch.Tensor:
        margin = beta * _delta(policy, reference)
        right = margin.sigmoid() * (logsigmoid(margin) - log_right)
        return right + (-margin).sigmoid() * (logsigmoid(-margin) - log_flipped)

    return loss


def discopop(beta: float, tau: float) -> PairwiseLoss:
    """(1 - s) * -log sigma(m) + s * exp(-m), m = beta * delta, s = sigma(m / tau): DiscoPOP (Lu et al. 2024, eq. 5)."""

    def loss(policy: torch.Tensor, reference: torch.Tensor, num_tokens: torch.Tensor) -> torch.Tensor:
        margin = beta * _delta(policy, reference)
        # s exp(-m) as exp(log s - m): where m is far below zero s is zero and exp(-m) beyond any number
        exponential = (logsigmoid(margin / tau) - margin).exp()
        return (-margin / tau).sigmoid() * -logsigmoid(margin) + exponential

    return loss


def sigmoid_norm(beta: float) -> PairwiseLoss:
    """-log sigma(beta * delta'), log-ratios averaged over tokens: length-normalised DPO (Lambert et al. 2024)."""

    def loss(policy: torch.Tensor, reference: torch.Tensor, num_tokens: torch.Tensor) -> torch.Tensor:
        return -logsigmoid(beta * _difference(log_ratios(policy, reference) / num_tokens))

    return loss


# --- on each answer's reward ----------------------------------------------------------------


def _rewards(beta: float, policy_B2: torch.Tensor, reference_B2: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    chosen, rejected = (beta * log_ratios(policy_B2, reference_B2)).unbind(1)
    return chosen, rejected


def nca_pair(beta: float) -> PairwiseLoss:
    """-log sigma(r_w) - (log sigma(-r_w) + log sigma(-r_l)) / 2: NCA on pairs (Chen et al. 2024)."""

    def loss(policy: torch.Tensor, reference: torch.Tensor, num_tokens: torch.Tensor) -> torch.Tensor:
        chosen, rejected = _rewards(beta, policy, reference)
        return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)

    return loss


def bco_pair(beta: float) -> PairwiseLoss:
    """-log sigma(r_w) - log sigma(-r_l): a binary classifier on pairs, without the reward shift (Jung et al. 2024)."""

    def loss(policy: torch.Tensor, reference: torch.Tensor, num_tokens: torch.Tensor) -> torch.Tensor:
        chosen, rejected = _rewards(beta, policy, reference)
        return -logsigmoid(chosen) - logsigmoid(-rejected)

    return loss


def sppo_hard(beta: float) -> PairwiseLoss:
    """(l_w - 1 / (2 beta))^2 + (l_l + 1 / (2 beta))^2, l = log(pi / ref): SPPO, labels sure (Wu et al. 2024, 4.7)."""

    def loss(policy: torch.Tensor, reference: torch.Tensor, num_tokens: torch.Tensor) -> torch.Tensor:
        chosen, rejected = log_ratios(policy, reference).unbind(1)
        return (chosen - 0.5 / beta) ** 2 + (rejected + 0.5 / beta) ** 2

    return loss


def apo_zero(beta: float) -> PairwiseLoss:
    """(1 - sigma(r_w)) + sigma(r_l): APO-zero (D'Oosterlinck et al. 2024, eq. 7)."""

    def loss(policy: torch.Tensor, reference: torch.Tensor, num_tokens: torch.Tensor) -> torch.Tensor:
        chosen, rejected = _rewards(beta, policy, reference)
        return (-chosen).sigmoid() + rejected.sigmoid()

    return loss


def apo_down(beta: float) -> PairwiseLoss:
    """sigma(r_w) + (1 - sigma(r_w - r_l)): APO-down (D'Oosterlinck et al. 2024, eq. 8)."""

    def loss(policy: torch.Tensor, reference: torch.Tensor, num_tokens: torch.Tensor) -> torch.Tensor:
        chosen, rejected = _rewards(beta, policy, reference)
        return chosen.sigmoid() + (rejected - chosen).sigmoid()

    return loss


# --- on a whole batch ------------------------------------------------------------------------


def aot(beta: float, label_smoothing: float = 0.0) -> PairwiseLoss:
    """The logistic loss between sorted log-ratios: AOT on pairs (Melnyk et al. 2024).

    log(pi_w / pi_l) and log(ref_w / ref_l) of the whole optimizer batch are each sorted, then compared rank by
    rank: the first is to dominate the second. Losses come in the order of the ranks.
    """

    def loss(policy: torch.Tensor, reference: torch.Tensor, num_tokens: torch.Tensor) -> torch.Tensor:
        log_ratios(policy, reference)  # refuses other numbers of answers
        differences = _difference(policy.double()).sort().values - _difference(reference.double()).sort().values
        return _smoothed(beta * differences, label_smoothing)

    return loss


def aot_unpaired(beta: float, label_smoothing: float = 0.0) -> PairwiseLoss:
    """The logistic loss between the sorted log-ratios of chosen and of rejected answers: AOT, unpaired (Melnyk 2024).

    Over the whole optimizer batch. Losses come in the order of the ranks.
    """

    def loss(policy: torch.Tensor, reference: torch.Tensor, num_tokens: torch.Tensor) -> torch.Tensor:
        return _smoothed(beta * _difference(log_ratios(policy, reference).sort(0).values), label_smoothing)

    return loss


# --- without a reference ------------------------------------------------------------------------


def _free(policy_B2: torch.Tensor) -> torch.Tensor:
    return log_ratios(policy_B2, torch.zeros_like(policy_B2))


def cpo(beta: float, label_smoothing: float = 0.0) -> PairwiseLoss:
    """-log sigma(beta * (log pi_w - log pi_l)): CPO's preference term (Xu et al. 2024, eq. 3); ``sft`` is the other."""

    def loss(policy: torch.Tensor, reference: torch.Tensor, num_tokens: torch.Tensor) -> torch.Tensor:
        return _smoothed(beta * _difference(_free(policy)), label_smoothing)

    return loss


def simpo(beta: float, gamma: float, label_smoothing: float = 0.0) -> PairwiseLoss:
    """-log sigma(beta * (log pi_w / |w| - log pi_l / |l|) - gamma): SimPO (Meng et al. 2024, eq. 6)."""

    def loss(policy: torch.Tensor, reference: torch.Tensor, num_tokens: torch.Tensor) -> torch.Tensor:
        return _smoothed(beta * _difference(_free(policy) / num_tokens) - gamma, label_smoothing)

    return loss


def orpo(beta: float) -> PairwiseLoss:
    """-beta * log sigma(log odds_w - log odds_l): ORPO's odds ratio (Hong et al. 2024, eq. 6-7); ``sft`` is the other.

    The odds are p / (1 - p) of the mean probability a token, exp(log pi / |y|); beta is the paper's lambda.
    """

    def loss(policy: torch.Tensor, reference: torch.Tensor, num_tokens: torch.Tensor) -> torch.Tensor:
        mean = _free(policy) / num_tokens
        return -beta * logsigmoid(_difference(mean - _log1mexp(mean)))

    return loss


def _log1mexp(values: torch.Tensor) -> torch.Tensor:
    """log(1 - exp(x)) for x <= 0; what a certain answer would make infinite is held at the least of float64."""
    below = values.clamp(max=-torch.finfo(torch.float64).tiny)
    small = below > -math.log(2)  # where either form loses its digits, the other has them (Maechler 2012)
    return torch.where(small, (-torch.expm1(below)).log(), torch.log1p(-below.clamp(max=-math.log(2)).exp()))


# --- the chosen answer alone ------------------------------------------------------------------------


def sft(mean_tokens: float) -> PairwiseLoss:
    """-log pi_w over the mean length of the step's chosen answers: a loss a token, as TRL's term ``sft`` has it.

    Args:
        mean_tokens: Tokens of a chosen answer, a mean over the optimizer batch.
    """

    def loss(policy: torch.Tensor, reference: torch.Tensor, num_tokens: torch.Tensor) -> torch.Tensor:
        return -_free(policy)[:, 0] / mean_tokens

    return loss


def sft_norm(policy: torch.Tensor, reference: torch.Tensor, num_tokens: torch.Tensor) -> torch.Tensor:
    """-log pi_w / |w|: the term that RPO adds (Pang et al. 2024, eq. 2)."""
    return -_free(policy)[:, 0] / num_tokens[:, 0]


# --- what changes a loss ------------------------------------------------------------------------


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


def f_divergence(loss: PairwiseLoss, derivative: Divergence) -> PairwiseLoss:
    """A loss whose reward is beta * f'(pi / ref) in place of beta * log(pi / ref): f-DPO (Wang et al. 2023, eq. 9)."""

    def changed(policy: torch.Tensor, reference: torch.Tensor, num_tokens: torch.Tensor) -> torch.Tensor:
        scores = derivative(log_ratios(policy, reference))
        return loss(scores, torch.zeros_like(scores), num_tokens)

    return changed


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


def offset(loss: PairwiseLoss, beta: float, margins_B: torch.Tensor) -> PairwiseLoss:
    """A loss whose margin beta * delta is less by an offset of each pair: ODPO (Amini et al. 2024, eq. 9).

    Args:
        loss: A loss of the margin.
        beta: Its beta.
        margins_B: float64 [B], what the margin must reach before the pair counts as told apart, nats.
    """

    def changed(policy: torch.Tensor, reference: torch.Tensor, num_tokens: torch.Tensor) -> torch.Tensor:
        shift = torch.stack([margins_B / beta, torch.zeros_like(margins_B)], dim=1)
        return loss(policy, reference + shift, num_tokens)

    return changed


def weighted(loss: PairwiseLoss, weights_B: torch.Tensor) -> PairwiseLoss:
    """A loss times a weight of each pair, float64 [B]."""

    def changed(policy: torch.Tensor, reference: torch.Tensor, num_tokens: torch.Tensor) -> torch.Tensor:
        return weights_B * loss(policy, reference, num_tokens)

    return changed


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


def mixture(losses: Sequence[tuple[float, PairwiseLoss]]) -> PairwiseLoss:
    """A weighted sum of losses: MPO (Wang et al. 2024, eq. 1), RPO and what else one mixes."""

    def total(policy: torch.Tensor, reference: torch.Tensor, num_tokens: torch.Tensor) -> torch.Tensor:
        return torch.stack([weight * loss(policy, reference, num_tokens) for weight, loss in losses]).sum(0)

    return total


# --- by name ------------------------------------------------------------------------


@dataclass(frozen=True)
class BatchFacts:
    """What a loss may ask of its pairs beside their log-probabilities.

    Attributes:
        mean_chosen_tokens: Tokens of a chosen answer, a mean over the optimizer batch.
        score_gaps_B: float64 [B], chosen minus rejected score; None where no loss reads it.
        weights_B: float64 [B], what each pair counts; None where all count alike.
    """

    mean_chosen_tokens: float
    score_gaps_B: torch.Tensor | None = None
    weights_B: torch.Tensor | None = None


def pairwise_loss(name: PairwiseName, knobs: TrainParams, mean_chosen_tokens: float = 1.0) -> PairwiseLoss:
    """The loss of this name, as section train sets it; without divergence and offset."""
    beta, smoothing = knobs.beta, knobs.label_smoothing
    match name:
        case "cdpo" | "robust" | "exo_pair" | "aot" | "aot_unpaired" | "cpo":
            return _SMOOTHED[name](beta, smoothing)
        case "simpo":
            return simpo(beta, knobs.gamma, smoothing)
        case "discopop":
            return discopop(beta, knobs.discopop_tau)
        case "sft":
            return sft(mean_chosen_tokens)
        case "sft_norm":
            return sft_norm
        case _:
            return _PLAIN[name](beta)


_SMOOTHED: Mapping[str, Callable[[float, float], PairwiseLoss]] = {
    "cdpo": cdpo,
    "robust": robust,
    "exo_pair": exo_pair,
    "aot": aot,
    "aot_unpaired": aot_unpaired,
    "cpo": cpo,
}
_PLAIN: Mapping[str, Callable[[float], PairwiseLoss]] = {
    "sigmoid": sigmoid,
    "hinge": hinge,
    "ipo": ipo,
    "ipo_sum": ipo_sum,
    "nca_pair": nca_pair,
    "bco_pair": bco_pair,
    "sppo_hard": sppo_hard,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "sigmoid_norm": sigmoid_norm,
    "orpo": orpo,
}


def divergence_of(knobs: TrainParams) -> Divergence | None:
    """What gives f' of the divergence that section train asks for; None for the reverse KL, where it is log t."""
    match knobs.divergence:
        case "forward_kl":
            return forward_kl
        case "js":
            return js
        case "alpha":
            return alpha(knobs.divergence_alpha)
        case _:
            return None


def objective_loss(knobs: TrainParams, facts: BatchFacts, names: Collection[str] | None = None) -> PairwiseLoss:
    """The pairwise loss that section train asks for: the sum of its losses, each changed by what it reads.

    Args:
        knobs: Section train.
        facts: What its losses ask of the pairs.
        names: Those of its losses that are meant; None for all.
    """
    derivative = divergence_of(knobs)
    parts: list[tuple[float, PairwiseLoss]] = []
    for name, weight in knobs.losses.items():
        if names is not None and name not in names:
            continue
        if name == "plackett_luce":
            raise ValueError("plackett_luce is a loss of rankings, not of pairs")
        loss, reads = pairwise_loss(name, knobs, facts.mean_chosen_tokens), OBJECTIVES[name].reads
        if facts.score_gaps_B is not None and "margin_scale" in reads:
            loss = offset(loss, knobs.beta, knobs.margin_scale * facts.score_gaps_B)
        if derivative is not None and "divergence" in reads:
            loss = f_divergence(loss, derivative)
        if facts.weights_B is not None and "weighting" in reads:
            loss = weighted(loss, facts.weights_B)
        parts.append((weight, loss))
    return parts[0][1] if len(parts) == 1 and parts[0][0] == 1 else mixture(parts)
