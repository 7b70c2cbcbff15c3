"""Best-of-N: of N sampled answers to a prompt, the one with the highest reward."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def best_of(rewards: Sequence[float]) -> int:
    """Index of the answer with the highest reward; of several, the first sampled."""
    return max(range(len(rewards)), key=lambda index: rewards[index])


def expected_best_of(rewards: Sequence[float], values: Sequence[float], number: int) -> float:
    """The mean value of the best by reward among ``number`` of the samples, over all such subsets.

    So N samples of a prompt give an unbiased figure for every smaller number, and with
    ``number`` 1 the plain mean. Answers of equal reward are equally likely to be the best of them.

    Args:
        rewards: By which the best is chosen, one a sample.
        values: What is wanted of the chosen one: the known reward.
        number: 1 to N.

    Raises:
        ValueError: There are fewer samples.
    """
    count = len(rewards)
    if not 1 <= number <= count:
        raise ValueError(f"the best of {number} needs as many samples, got {count}")
    order = np.argsort(-np.asarray(rewards), kind="stable")
    weights = np.array([math.comb(count - 1 - place, number - 1) for place in range(count)], dtype=np.float64)
    _, tied = np.unique(np.asarray(rewards)[order], return_inverse=True)
    weights = (np.bincount(tied, weights=weights) / np.bincount(tied))[tied]  # shared among equal rewards
    return float(weights @ np.asarray(values, dtype=np.float64)[order] / math.comb(count, number))


def kl_bound(number: int) -> float:
    """What Best-of-N costs at most: KL(Best-of-N || the sampled model) <= log N - (N - 1) / N, nats a sequence.

    Source: Stiennon et al. 2020, appendix G.3; that it is a bound and not the value, Beirami et al. 2024.
    """
    return math.log(number) - (number - 1) / number
