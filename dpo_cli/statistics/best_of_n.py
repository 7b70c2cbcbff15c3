"""What samples of the reference say of policies that nobody trained: Best-of-N, and the optimum of every beta.

Legend: P prompts, M samples of the reference to each, N of which the best is taken, B betas. float64, KL in nats.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MIN_EFFECTIVE_SAMPLES = 30.0
"""Effective samples of a prompt below which its part of the ideal frontier says little."""


def best_of_n(choosing_PM: np.ndarray, reported_PM: np.ndarray, numbers: Sequence[int]) -> np.ndarray:
    """The expected reward of the best of N samples, without bias: its mean over all N of the M samples.

    The i-th smallest of M is the best of C(i - 1, N - 1) of the C(M, N) subsets; samples that are tied are taken
    equally often.

    Args:
        choosing_PM: [P, M], the reward that the best one is chosen by.
        reported_PM: [P, M], the reward that it is measured by: another one, or the same.
        numbers: The N, each in 1 ... M.

    Returns:
        float64 [P, len(numbers)]; the estimate is the mean over prompts.

    Raises:
        ValueError: Shapes differ, a reward is not finite, or an N is out of range.

    Source: Nakano et al. 2021 (WebGPT), appendix I.
    """
    rewards = _checked(choosing_PM, reported_PM)
    num_samples = rewards[0].shape[1]
    if not all(1 <= number <= num_samples for number in numbers):
        raise ValueError(f"Best-of-N needs N in 1 ... {num_samples}, the samples of a prompt, got {list(numbers)}")
    weights_NM = np.stack([_weights(number, num_samples) for number in numbers])
    return np.stack([weights_NM @ _ascending(*row) for row in zip(*rewards, strict=True)])


def best_of_n_kl_bound(numbers: Sequence[int]) -> np.ndarray:
    """Log N - (N - 1) / N, which KL(Best-of-N || reference) does not exceed, nats, float64 [len(numbers)].

    The KL comes near it where every answer is rare, and is lower where the same answer comes again or rewards are tied
    (Beirami et al. 2024).

    Source: Stiennon et al. 2020, appendix G.3.
    """
    numbers_N = np.asarray(numbers, dtype=np.float64)
    return np.log(numbers_N) - (numbers_N - 1) / numbers_N


def _weights(number: int, num_samples: int) -> np.ndarray:
    """C(i - 1, N - 1) / C(M, N) for i = 1 ... M, [M]: from N / M at M downwards, each from the one above."""
    above = np.arange(num_samples, 1, -1)
    ratios = np.maximum(above - number, 0) / (above - 1)
    return (number / num_samples * np.cumprod([1.0, *ratios]))[::-1]


def _ascending(choosing_M: np.ndarray, reported_M: np.ndarray) -> np.ndarray:
    """What is reported, in ascending order of what it is chosen by; those that are tied have their mean, [M]."""
    _, owners, counts = np.unique(choosing_M, return_inverse=True, return_counts=True)
    means = np.bincount(owners, weights=reported_M) / counts
    return np.repeat(means, counts)


def _checked(*rewards: np.ndarray) -> list[np.ndarray]:
    found = [np.asarray(each, dtype=np.float64) for each in rewards]
    shape = found[0].shape
    if len(shape) != 2 or 0 in shape or any(each.shape != shape for each in found):
        raise ValueError(f"rewards are [prompts, samples], got {' and '.join(str(each.shape) for each in found)}")
    if not all(np.isfinite(each).all() for each in found):
        raise ValueError("a reward is not finite")
    return found


@dataclass(frozen=True)
class IdealFrontier:
    """The most reward at each KL to the reference, by prompt.

    Attributes:
        betas_B: float64 [B].
        rewards_PB: float64 [P, B], mean reward of the optimal policy.
        kls_PB: float64 [P, B], KL(optimal policy || reference), nats.
        effective_samples_PB: float64 [P, B], 1 / sum w^2, in 1 ... M.
    """

    betas_B: np.ndarray
    rewards_PB: np.ndarray
    kls_PB: np.ndarray
    effective_samples_PB: np.ndarray

    @property
    def valid_B(self) -> np.ndarray:
        """Whether 19 of 20 prompts have effective samples enough, bool [B]; say their minimum, too.

        Where they have not, a few samples have all the weight: reward, KL and reward - beta KL come out too low, the KL
        never above log M.
        """
        return np.quantile(self.effective_samples_PB, 0.05, axis=0) >= MIN_EFFECTIVE_SAMPLES


def ideal_frontier(rewards_PM: np.ndarray, betas: Sequence[float]) -> IdealFrontier:
    """The optimum of reward - beta KL, pi*(y | x) = pi_ref(y | x) exp(r / beta) / Z, from samples of the reference.

    A sample counts w_k = exp(r_k / beta) / sum_j exp(r_j / beta): reward sum w r, KL sum w log(M w), which are
    self-normalized estimates.

    Args:
        rewards_PM: [P, M], rewards of M samples of the reference to each prompt.
        betas: Above zero.

    Raises:
        ValueError: Rewards are not [P, M] or not finite, or a beta is not above zero.

    Source: Rafailov et al. 2023, eq. 4.
    """
    (rewards,) = _checked(rewards_PM)
    betas_B = np.asarray(betas, dtype=np.float64)
    if not (betas_B > 0).all():
        raise ValueError(f"beta must be > 0, got {list(betas)}")
    points = []
    for beta in betas_B:
        logs = (rewards - rewards.max(1, keepdims=True)) / beta
        logs -= np.log(np.exp(logs).sum(1, keepdims=True))
        weights = np.exp(logs)
        kls = (weights * np.where(weights > 0, logs + np.log(rewards.shape[1]), 0)).sum(1)
        points.append(((weights * rewards).sum(1), kls, 1 / (weights**2).sum(1)))
    return IdealFrontier(betas_B, *(np.stack(each, axis=1) for each in zip(*points, strict=True)))
