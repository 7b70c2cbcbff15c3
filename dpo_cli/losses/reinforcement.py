"""Reinforcement learning from a reward: advantages, PPO's clipped losses, the price of leaving the reference.

An answer is an episode, a token of it an action. The reward r(x, y) comes at the last token; on the way each token
costs what it leaves the reference by. So the return of an answer is r(x, y) - c log(pi(y|x) / pi_ref(y|x)), the
objective that DPO solves in closed form (Rafailov et al. 2023, eq. 3).

Legend: T tokens of an answer, N tokens of some answers, B prompts, K answers to a prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def token_rewards(reward: float, log_ratios_T: Tensor, kl_coefficient: float) -> Tensor:
    """r_t = -c log(pi(y_t) / pi_ref(y_t)), and at the last token the answer's reward as well.

    Source: Ziegler et al. 2019, eq. 2, a token at a time.

    Args:
        reward: r(x, y).
        log_ratios_T: float64 [T], log(pi / pi_ref) of each token as it was sampled, nats.
        kl_coefficient: c, rewards a nat.

    Returns:
        float64 [T].
    """
    rewards_T = -kl_coefficient * log_ratios_T
    rewards_T[-1] += reward
    return rewards_T


def generalized_advantages(rewards_T: Tensor, values_T: Tensor, gamma: float, lam: float) -> Tensor:
    """A_t = sum over l of (gamma lam)^l delta_{t+l}, with delta_t = r_t + gamma V_{t+1} - V_t.

    Behind the last token V is 0: the episode is over, also where an answer was cut off at its longest length. A + V is
    what the value of a token should have been.
    Source: Schulman et al. 2016, eq. 16.

    Args:
        rewards_T: float64 [T].
        values_T: float64 [T], V before each token.
        gamma: Discount of later rewards, in [0, 1].
        lam: In [0, 1]: 0 trusts the values, 1 the rewards.

    Returns:
        float64 [T].
    """
    import torch  # here, as below: settings are checked without it

    following, after = 0.0, 0.0
    advantages: list[float] = []
    for reward, value in zip(reversed(rewards_T.tolist()), reversed(values_T.tolist()), strict=True):
        following = reward + gamma * after - value + gamma * lam * following
        advantages.append(following)
        after = value
    return torch.tensor(advantages[::-1], dtype=torch.float64)


def leave_one_out(returns_BK: Tensor) -> Tensor:
    """A_k = R_k - the mean return of the prompt's other answers.

    REINFORCE with a baseline that does not depend on the answer, so its gradient is unbiased.
    Source: Kool et al. 2019, eq. 8; Ahmadian et al. 2024, eq. 6.

    Args:
        returns_BK: float64 [B, K], K at least 2.

    Returns:
        float64 [B, K]; each row sums to 0.

    Raises:
        ValueError: There is one answer to a prompt.
    """
    num_answers = returns_BK.shape[1]
    if num_answers < 2:
        raise ValueError("leave-one-out needs at least two answers to a prompt")
    return (returns_BK - returns_BK.mean(1, keepdim=True)) * (num_answers / (num_answers - 1))


def whiten(advantages_N: Tensor) -> Tensor:
    """Mean 0 and standard deviation 1 over all tokens of a round; all the same give 0. float64 [N]."""
    centered = advantages_N - advantages_N.mean()
    return centered / (centered.square().mean().sqrt() + 1e-8)


def clipped_surrogate(logps_N: Tensor, old_logps_N: Tensor, advantages_N: Tensor, clip: float) -> Tensor:
    """-min(rho A, clip(rho, 1 - clip, 1 + clip) A), with rho = pi / pi_old of the token.

    Where rho is 1 its gradient is that of -A log pi: the policy gradient. Source: Schulman et al. 2017, eq. 7.

    Args:
        logps_N: float64 [N], log pi, with gradient, nats.
        old_logps_N: float64 [N], log pi of the policy that sampled the token, nats.
        advantages_N: float64 [N].
        clip: How far rho may leave 1 before it no longer pays.

    Returns:
        float64 [N].
    """
    import torch

    ratios = (logps_N - old_logps_N).exp()
    return torch.maximum(-advantages_N * ratios, -advantages_N * ratios.clamp(1 - clip, 1 + clip))


def clipped_value_loss(values_N: Tensor, old_values_N: Tensor, returns_N: Tensor, clip: float) -> Tensor:
    """max((V - R)^2, (V_clipped - R)^2) / 2, where V_clipped is within ``clip`` of the value at the time of sampling.

    Source: the implementation of Schulman et al. 2017 (OpenAI baselines), as in Ouyang et al. 2022.

    Args:
        values_N: float64 [N], with gradient.
        old_values_N: float64 [N].
        returns_N: float64 [N], what they should have been.
        clip: In units of the reward; infinity clips nothing.

    Returns:
        float64 [N].
    """
    import torch

    clipped = old_values_N + (values_N - old_values_N).clamp(-clip, clip)
    return torch.maximum((values_N - returns_N).square(), (clipped - returns_N).square()) / 2


@dataclass
class KlController:
    """The price of a nat from the reference: fixed, or raised and lowered towards a target.

    c <- c (1 + gain clip(KL / target - 1, -0.2, 0.2)) after each round. Source: Ziegler et al. 2019, section 2.2.

    Attributes:
        coefficient: c now, rewards a nat.
        target: KL a sequence to aim at, nats; None leaves the coefficient as it is.
        gain: How fast it moves: 0.5 moves it by up to a tenth a round; 0.1 is the source's, over many more rounds.
    """

    coefficient: float
    target: float | None = None
    gain: float = 0.5

    def update(self, kl: float) -> None:
        """Move the coefficient by the mean KL of a round's answers, nats a sequence."""
        if self.target is not None:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.coefficient *= 1 + self.gain * error
