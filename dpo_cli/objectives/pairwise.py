"""Pairwise preference losses as pure functions.

Each takes the policy's and the reference's log-probabilities of (chosen, rejected) and the
tokens they have, and gives one loss a pair. With

    delta = (log pi_w - log ref_w) - (log pi_l - log ref_l)

the implicit reward of an answer is ``beta * log(pi / ref)`` and a pair's margin ``beta * delta``
(Rafailov et al. 2023, eq. 5). All tensors are float64 [B, 2], column 0 chosen, nats.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.functional import logsigmoid

PairwiseLoss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(policy_logps_B2, reference_logps_B2, num_tokens_B2) -> loss_B."""


def log_ratios(policy_logps_B2: torch.Tensor, reference_logps_B2: torch.Tensor) -> torch.Tensor:
    """log(pi / ref) of both answers, float64 [B, 2]."""
    return policy_logps_B2.double() - reference_logps_B2.double()


def _delta(ratios_B2: torch.Tensor) -> torch.Tensor:
    return ratios_B2[:, 0] - ratios_B2[:, 1]


def sigmoid(beta: float) -> PairwiseLoss:
    """-log sigma(beta * delta): DPO (Rafailov et al. 2023, eq. 7)."""

    def loss(policy: torch.Tensor, reference: torch.Tensor, num_tokens: torch.Tensor) -> torch.Tensor:
        return -logsigmoid(beta * _delta(log_ratios(policy, reference)))

    return loss


def cdpo(beta: float, label_smoothing: float) -> PairwiseLoss:
    """-(1 - e) log sigma(beta * delta) - e log sigma(-beta * delta): conservative DPO (Mitchell 2023).

    Labels are taken to be flipped with probability e in (0, 1/2).
    """

    def loss(policy: torch.Tensor, reference: torch.Tensor, num_tokens: torch.Tensor) -> torch.Tensor:
        margin = beta * _delta(log_ratios(policy, reference))
        return -(1 - label_smoothing) * logsigmoid(margin) - label_smoothing * logsigmoid(-margin)

    return loss


def ipo(beta: float) -> PairwiseLoss:
    """(delta' - 1 / (2 beta))^2 with log-ratios averaged over tokens: IPO (Azar et al. 2023, eq. 17).

    The paper sums over tokens; the mean is what TRL computes under this name.
    """

    def loss(policy: torch.Tensor, reference: torch.Tensor, num_tokens: torch.Tensor) -> torch.Tensor:
        return (_delta(log_ratios(policy, reference) / num_tokens) - 1 / (2 * beta)) ** 2

    return loss


def hinge(beta: float) -> PairwiseLoss:
    """max(0, 1 - beta * delta): SLiC's hinge on the DPO margin (Zhao et al. 2023)."""

    def loss(policy: torch.Tensor, reference: torch.Tensor, num_tokens: torch.Tensor) -> torch.Tensor:
        return torch.relu(1 - beta * _delta(log_ratios(policy, reference)))

    return loss


def pairwise_loss(name: str, beta: float, label_smoothing: float = 0.0) -> PairwiseLoss:
    """The loss of this name."""
    if name == "cdpo":
        return cdpo(beta, label_smoothing)
    return {"sigmoid": sigmoid, "ipo": ipo, "hinge": hinge}[name](beta)
