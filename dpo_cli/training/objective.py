"""Objectives as the training loop sees them: scored groups in, losses and metrics out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import torch

from dpo_cli.core.params import TrainParams
from dpo_cli.data.tokens import TokenGroup
from dpo_cli.losses.batchwise import kto
from dpo_cli.losses.catalogue import LOSSES
from dpo_cli.losses.changes import divergence_of, shared_length_logps, under_divergence, with_offset, wpo_weights
from dpo_cli.losses.pairwise import Pairs, difference, log_ratios
from dpo_cli.losses.ranking import Ties, plackett_luce, plackett_luce_nll
from dpo_cli.scoring.reward_scorer import Rewards
from dpo_cli.scoring.scorer import Scores, Statistics
from dpo_cli.training.history import TOKEN_METRICS
from dpo_cli.training.objective_metrics import (
    KL,
    PAIR_METRICS,
    REWARD_METRICS,
    TAU,
    pair_metrics,
    ranking_metrics,
    reward_metrics,
    token_means,
    values_of,
)
from dpo_cli.training.protocols import GroupLosses, Objective

_MOMENTUM = 0.9
"""Of the moving average of margins, as in the code of beta-DPO's authors."""


class PreferenceObjective(Objective[Scores], Protocol):
    """An objective that compares answers, against a reference that is cached."""

    def reference_logps(self, groups: Sequence[TokenGroup], device: torch.device) -> torch.Tensor:
        """float64 [B, K], nats, as the loss reads them."""
        ...

    def policy_logps(self, scores: Scores) -> torch.Tensor:
        """float64 [B, K], nats, as the loss reads them, with gradient."""
        ...


class SftObjective:
    """Negative log-likelihood a completion token, over the whole optimizer batch."""

    is_coupled = False
    statistics: Statistics = "plain"
    metric_names: Sequence[str] = TOKEN_METRICS

    def weight(self, groups: Sequence[TokenGroup]) -> float:
        """The number of completion tokens."""
        return float(sum(len(group.completions[0]) for group in groups))

    def losses(self, groups: Sequence[TokenGroup], scores: Scores, step: Sequence[TokenGroup]) -> GroupLosses:
        """Losses summed over tokens, nats."""
        return GroupLosses(-scores.logps_BK[:, 0], token_means(scores, step))


def preference_objective(
    train: TrainParams,
    reference: Mapping[str, Sequence[float]],
    *,
    shared_length: Mapping[str, Sequence[float]] | None = None,
    scores: Mapping[str, Sequence[float]] | None = None,
    ranks: Mapping[str, Sequence[int]] | None = None,
    good: Mapping[str, bool] | None = None,
) -> PreferenceObjective:
    """The objective that section train asks for.

    Args:
        train: Section train.
        reference: Reference log-probabilities of each group's completions by row id, nats.
        shared_length: The same of :func:`~dpo_cli.losses.changes.shared_length_logps`, for ``ld_alpha``.
        scores: The answers' scores in the data (chosen, rejected) by row id, where :func:`reads_scores`.
        ranks: Ranks of each group's completions by row id, for ``plackett_luce``.
        good: Whether the answer of each row is good, by row id, for ``kto``.
    """
    if "kto" in train.losses:
        return UnpairedObjective(train, reference, good or {})
    if "plackett_luce" in train.losses:
        return RankingObjective(train, reference, ranks or {})
    return PairObjective(train, reference, shared_length, scores)


def reads_scores(train: TrainParams) -> bool:
    """Whether the answers' scores in the data are read: by ``margin_scale``, or by a loss."""
    return train.margin_scale > 0 or any(LOSSES[name].reads_scores for name in train.losses)


class PairObjective:
    """Pairwise preference losses against cached reference log-probabilities, a mean over pairs.

    Args:
        train: Section train: the losses, beta, and what they read.
        reference: Reference log-probabilities (chosen, rejected) by row id, nats.
        shared_length: The same of :func:`~dpo_cli.losses.changes.shared_length_logps`; read with ``ld_alpha``.
        scores: The answers' scores in the data (chosen, rejected) by row id, where :func:`reads_scores`.
    """

    metric_names: Sequence[str] = PAIR_METRICS

    def __init__(
        self,
        train: TrainParams,
        reference: Mapping[str, Sequence[float]],
        shared_length: Mapping[str, Sequence[float]] | None = None,
        scores: Mapping[str, Sequence[float]] | None = None,
    ) -> None:
        self._train = train
        self._plain = reference
        self._reference = reference if train.ld_alpha is None else shared_length or {}
        self._scores = (scores or {}) if reads_scores(train) else None
        self._usual_margin = 0.0
        self.statistics: Statistics = "squares" if train.weighting == "wpo" else "plain"
        self.is_coupled = any(LOSSES[name].is_coupled for name in train.losses)

    def reference_logps(self, groups: Sequence[TokenGroup], device: torch.device) -> torch.Tensor:
        """float64 [B, 2]."""
        return values_of(self._reference, groups, device)

    def policy_logps(self, scores: Scores) -> torch.Tensor:
        """float64 [B, 2], with gradient."""
        if self._train.ld_alpha is None:
            return scores.logps_BK
        return shared_length_logps(scores.token_logps_M, scores.num_tokens_BK, self._train.ld_alpha)

    def weight(self, groups: Sequence[TokenGroup]) -> float:
        """The number of pairs."""
        return float(len(groups))

    def losses(self, groups: Sequence[TokenGroup], scores: Scores, step: Sequence[TokenGroup]) -> GroupLosses:
        """Losses and the metrics that TRL logs; an accuracy of a tie is one half."""
        device = scores.logps_BK.device
        weights = None
        if self._train.weighting == "wpo":
            squares = None if scores.statistics is None else scores.statistics.log_sum_squares_N
            if squares is None:
                raise ValueError("weighting wpo needs the sums of squared probabilities")
            weights = wpo_weights(scores.token_logps_M, squares, scores.num_tokens_BK)
        mean_chosen_tokens = sum(len(group.completions[0]) for group in step) / len(step)
        shared = Pairs(
            self.policy_logps(scores),
            self.reference_logps(groups, device),
            scores.num_tokens_BK,
            mean_chosen_tokens,
            self._usual_margin,
            None if self._scores is None else values_of(self._scores, groups, device),
        )
        plain = shared
        if self._train.ld_alpha is not None:
            plain = replace(shared, policy_B2=scores.logps_BK, reference_B2=values_of(self._plain, groups, device))
        losses = self._losses(shared, plain, weights)
        rewards = self._train.beta * log_ratios(shared.policy_B2.detach(), shared.reference_B2)
        return GroupLosses(losses, {**pair_metrics(rewards, scores.logps_BK.detach()), **token_means(scores, step)})

    def after_step(self, metrics: Mapping[str, float]) -> None:
        """Take a step's mean margin into the moving average with which ``beta_dpo`` compares the next step's."""
        self._usual_margin += (1 - _MOMENTUM) * (metrics["rewards/margins"] - self._usual_margin)

    def _losses(self, shared: Pairs, plain: Pairs, weights_B: torch.Tensor | None) -> torch.Tensor:
        """The sum of the losses; those that do not read ``ld_alpha`` are of the plain sums, float64 [B]."""
        names = list(self._train.losses)
        if shared is plain:
            return pairwise_losses(self._train, names, plain, weights_B)
        readers = [name for name in names if "ld_alpha" in LOSSES[name].reads]
        losses = pairwise_losses(self._train, readers, shared, weights_B)
        others = [name for name in names if name not in readers]
        return losses + pairwise_losses(self._train, others, plain, weights_B) if others else losses


def pairwise_losses(
    train: TrainParams,
    names: Sequence[str],
    pairs: Pairs,
    weights_B: torch.Tensor | None = None,
) -> torch.Tensor:
    """A weighted sum of losses, each of the pairs as the settings that it reads change them, float64 [B].

    Source: MPO (Wang et al. 2024, eq. 1), RPO and what else one mixes.

    Args:
        train: Section train.
        names: Those of its losses that are meant.
        pairs: What is compared.
        weights_B: float64 [B], what each pair counts; for ``weighting``.

    Raises:
        ValueError: A loss is one of rankings, or of single answers.
    """
    derivative = divergence_of(train.divergence, train.divergence_alpha)
    parts: list[tuple[float, torch.Tensor]] = []
    for name in names:
        loss, changed = LOSSES[name], pairs
        if loss.is_ranking or loss.is_unpaired:
            raise ValueError(f"{name} is no loss of pairs")
        if derivative is not None and "divergence" in loss.reads:
            changed = under_divergence(changed, derivative)
        if train.margin_scale and "margin_scale" in loss.reads:
            changed = with_offset(changed, train.margin_scale * difference(pairs.told_scores_B2) / train.beta)
        losses = loss.of(changed, train)
        if weights_B is not None and "weighting" in loss.reads:
            losses = weights_B * losses
        parts.append((train.losses[name], losses))
    if len(parts) == 1 and parts[0][0] == 1:
        return parts[0][1]
    return torch.stack([weight * losses for weight, losses in parts]).sum(0)


class RankingObjective:
    """Plackett-Luce over rankings against cached reference log-probabilities, a mean over rankings.

    Args:
        train: Section train: beta and ties.
        reference: Reference log-probabilities of all answers, best first, by row id, nats.
        ranks: Their ranks by row id, ascending.
    """

    is_coupled = False
    statistics: Statistics = "plain"
    metric_names: Sequence[str] = (*PAIR_METRICS, TAU)

    def __init__(
        self, train: TrainParams, reference: Mapping[str, Sequence[float]], ranks: Mapping[str, Sequence[int]]
    ) -> None:
        self._train = train
        self._reference = reference
        self._ranks = ranks

    def reference_logps(self, groups: Sequence[TokenGroup], device: torch.device) -> torch.Tensor:
        """float64 [B, K]."""
        return values_of(self._reference, groups, device)

    def policy_logps(self, scores: Scores) -> torch.Tensor:
        """float64 [B, K], with gradient."""
        return scores.logps_BK

    def weight(self, groups: Sequence[TokenGroup]) -> float:
        """The number of rankings."""
        return float(len(groups))

    def losses(self, groups: Sequence[TokenGroup], scores: Scores, step: Sequence[TokenGroup]) -> GroupLosses:
        """Losses and metrics: those of a pair for the best answer and the worst, and Kendall's tau over all."""
        ranks = torch.tensor([list(self._ranks[group.id]) for group in groups])
        policy, reference = scores.logps_BK, self.reference_logps(groups, scores.logps_BK.device)
        losses = plackett_luce(policy, reference, ranks, self._train.beta, self._train.ties)
        rewards = self._train.beta * (policy.detach() - reference)
        metrics = {**pair_metrics(rewards, policy.detach()), **token_means(scores, step)}
        return GroupLosses(losses, metrics | ranking_metrics(rewards, ranks))


class UnpairedObjective:
    """KTO over single answers against cached reference log-probabilities, a mean over answers.

    A group is a prompt with its answer and, second, another prompt's.

    Args:
        train: Section train: beta and the weights of good and bad answers.
        reference: Reference log-probabilities of both by row id, nats.
        good: Whether the row's answer is good, by row id.
    """

    is_coupled = True
    statistics: Statistics = "plain"
    metric_names: Sequence[str] = (*PAIR_METRICS, KL)

    def __init__(self, train: TrainParams, reference: Mapping[str, Sequence[float]], good: Mapping[str, bool]) -> None:
        self._train = train
        self._reference = reference
        self._good = good

    def reference_logps(self, groups: Sequence[TokenGroup], device: torch.device) -> torch.Tensor:
        """float64 [B, 2]."""
        return values_of(self._reference, groups, device)

    def policy_logps(self, scores: Scores) -> torch.Tensor:
        """float64 [B, 2], with gradient."""
        return scores.logps_BK

    def weight(self, groups: Sequence[TokenGroup]) -> float:
        """The number of answers."""
        return float(len(groups))

    def losses(self, groups: Sequence[TokenGroup], scores: Scores, step: Sequence[TokenGroup]) -> GroupLosses:
        """Losses and metrics: means over good answers (chosen) and over bad ones (rejected), 0 where there are none.

        The accuracy is the share of answers on their side of the KL: good ones above it, bad ones below.
        """
        device, train = scores.logps_BK.device, self._train
        answers = Pairs(scores.logps_BK, self.reference_logps(groups, device), scores.num_tokens_BK)
        good_B = values_of(self._good, groups, device) > 0
        losses = kto(answers, good_B, train.beta, train.desirable_weight, train.undesirable_weight)
        log_ratios_B2 = answers.log_ratios_B2.detach()
        kl = log_ratios_B2[:, 1].mean().clamp(min=0)
        rewards_B, logps_B = train.beta * log_ratios_B2[:, 0], scores.logps_BK[:, 0].detach()
        right_B = torch.where(good_B, 1.0, -1.0) * (rewards_B - train.beta * kl)
        metrics = {"rewards": rewards_B, "logps": logps_B}
        means = {
            f"{what}/{name}": values_B * side_B * (len(groups) / side_B.sum().clamp(min=1))
            for what, values_B in metrics.items()
            for name, side_B in (("chosen", good_B), ("rejected", ~good_B))
        }
        return GroupLosses(
            losses,
            {
                **means,
                "rewards/margins": means["rewards/chosen"] - means["rewards/rejected"],
                "rewards/accuracies": (right_B.sign() + 1) / 2,
                "rewards/ties": (right_B == 0).double(),
                "gradient_weight": right_B.sigmoid() * (-right_B).sigmoid(),
                KL: kl.expand(len(groups)),
                **token_means(scores, step),
            },
        )


class RewardObjective:
    """-log P of the ranking under the rewards themselves, a mean over groups.

    With two answers it is Bradley-Terry's -log sigma(r_w - r_l) (Rafailov et al. 2023, eq. 2), with more
    Plackett-Luce's (eq. 18). Rewards are fixed up to a constant a prompt; they are logged less their mean over the
    group.

    Args:
        ranks: Ranks of each group's answers by row id, ascending; left out: two answers, the better one first.
        ties: What tied answers are (:func:`~dpo_cli.losses.ranking.plackett_luce_nll`).
    """

    is_coupled = False
    statistics: Statistics = "none"

    def __init__(self, ranks: Mapping[str, Sequence[int]] | None = None, ties: Ties = "average") -> None:
        self._ranks = ranks
        self._ties: Ties = ties
        self.metric_names: Sequence[str] = REWARD_METRICS if ranks is None else (*REWARD_METRICS, TAU)

    def weight(self, groups: Sequence[TokenGroup]) -> float:
        """The number of groups."""
        return float(len(groups))

    def losses(self, groups: Sequence[TokenGroup], scores: Rewards, step: Sequence[TokenGroup]) -> GroupLosses:
        """Losses and metrics by DPO's names; with rankings, as there, the accuracy is over all their pairs."""
        rewards = scores.rewards_BK
        ranks = torch.tensor([[1, 2] if self._ranks is None else list(self._ranks[group.id]) for group in groups])
        losses = plackett_luce_nll(rewards, ranks, self._ties)
        detached = rewards.detach()
        metrics = reward_metrics(detached - detached.mean(1, keepdim=True))
        if self._ranks is not None:
            metrics |= ranking_metrics(detached, ranks)
        return GroupLosses(losses, metrics)
