"""DPO on N preferences comes as near to the optimal policy as N allows: total variation falls as N^(-1/2).

Legend: X prompts, Y answers, P ordered pairs, S data sets.
"""

from __future__ import annotations

import itertools
import math
from functools import cache, partial

import numpy as np
import pytest
import torch

from dpo_cli.losses.pairwise import cdpo, sigmoid
from tests.theory.worlds import (
    PairwiseLoss,
    float64,
    free_logits,
    make_world,
    minimize,
    ordered_pairs,
    pair_losses,
    softmax_policy,
    total_variation,
)

BETA, PROMPTS, ANSWERS, DATASETS = 1.0, 8, 4, 200
SIZES = [10**3, 10**4, 10**5]
WORLD = make_world(PROMPTS, ANSWERS)


def chances() -> torch.Tensor:
    """How often each ordered pair is in the data, [X, P]: all pairs alike, labels by Bradley-Terry."""
    better, worse = WORLD.reward_XY[:, ordered_pairs(ANSWERS)].unbind(2)
    return 1 / (1 + (worse - better).exp()) / (PROMPTS * math.comb(ANSWERS, 2))


def distances(loss: PairwiseLoss, size: int) -> torch.Tensor:
    """Total variation from pi*, a mean over the prompts, of the policies trained on data sets of N pairs, [S].

    The mean loss of a data set needs the number of times each pair is in it, and all sets train at once: a
    prompt of one is a prompt of its own.
    """
    counts = np.random.default_rng(size).multinomial(size, chances().flatten().numpy(), size=DATASETS)
    counts_XP = float64(counts.tolist()).view(DATASETS * PROMPTS, -1)
    reference = WORLD.reference_XY.repeat(DATASETS, 1)

    def losses(free: torch.Tensor) -> torch.Tensor:
        rows = pair_losses(loss, softmax_policy(free), reference)
        return (counts_XP * rows).sum(1) / counts_XP.sum(1).clamp(min=1)

    found = softmax_policy(minimize(losses, free_logits(reference))).exp()
    return total_variation(found, WORLD.optimum(BETA).repeat(DATASETS, 1)).view(DATASETS, PROMPTS).mean(1)


def slope(by_size: list[torch.Tensor]) -> tuple[float, float]:
    """d log TV / d log N by least squares over the sizes, and its standard error from the data sets."""
    x = np.log(SIZES) - np.mean(np.log(SIZES))
    weights = x / (x**2).sum()
    means = [float(rows.mean()) for rows in by_size]
    errors = [float(rows.std()) / math.sqrt(len(rows)) / mean for rows, mean in zip(by_size, means, strict=True)]
    return float(weights @ np.log(means)), float(np.sqrt((weights**2) @ np.square(errors)))


@cache
def dpo() -> list[torch.Tensor]:
    """The distances of DPO, for each size."""
    return [distances(partial(sigmoid, beta=BETA), size) for size in SIZES]


def falls_as_it_must(by_size: list[torch.Tensor]) -> bool:
    """A slope of -1/2, but for 4 standard errors and 0.02 for what is left of higher orders in 1/N at N = 1000."""
    found, error = slope(by_size)
    return abs(found + 0.5) < 4 * error + 0.02


def test_the_distance_falls_with_the_root_of_the_data() -> None:
    """Eq. 7 is -log of the likelihood of eq. 6, so its minimum errs by N^(-1/2).

    Seen: .066, .020, .0066 at N = 1e3, 1e4, 1e5.
    """
    _, error = slope(dpo())
    assert error < 0.01  # the bound is narrow enough to mean something
    assert falls_as_it_must(dpo())
    assert [float(rows.mean()) for rows in dpo()] == pytest.approx([0.066, 0.020, 0.0066], rel=0.1)


def test_a_hundred_preferences_are_too_few() -> None:
    """At N = 1e2, two for each pair, answers that always won run away: farther off than the root of N says."""
    few = distances(partial(sigmoid, beta=BETA), 100).mean()
    assert 0.25 < few < 0.45
    assert few > 1.3 * math.sqrt(10) * dpo()[0].mean()


@pytest.mark.parametrize("number", [1, 2])
def test_the_distance_is_that_of_the_maximum_of_likelihood(number: int) -> None:
    """The minimum of eq. 7 is a maximum of likelihood: r has the covariance F^-1 / N, the least there is (Cramer, Rao).

    F = sum over pairs of q sigma(d) sigma(-d) (e_i - e_j)(e_i - e_j)', d = r_i - r_j and q the pair's share of the
    data, without the constants in r (Lemma 1); pi* moves by (diag(pi*) - pi* pi*') dr / beta; |z| of a normal z of
    standard deviation s is s sqrt(2 / pi) on average.
    """
    unit = torch.eye(ANSWERS, dtype=torch.float64)
    share = 1 / (PROMPTS * math.comb(ANSWERS, 2))
    expected = []
    for rewards, policy in zip(WORLD.reward_XY.tolist(), WORLD.optimum(BETA), strict=True):
        information = torch.zeros_like(unit)
        for i, j in itertools.combinations(range(ANSWERS), 2):
            difference = rewards[i] - rewards[j]
            direction = unit[i] - unit[j]
            information += share / (2 + 2 * math.cosh(difference)) * direction.outer(direction)
        jacobian = (policy.diag() - policy.outer(policy)) / BETA
        variances = (jacobian @ torch.linalg.pinv(information) @ jacobian.T).diag() / SIZES[number]
        expected.append(float(variances.sqrt().sum()) * math.sqrt(2 / math.pi) / 2)
    mean = math.fsum(expected) / PROMPTS
    rows = dpo()[number]
    assert abs(rows.mean() - mean) < 4 * rows.std() / math.sqrt(DATASETS) + 0.02 * mean


@pytest.mark.parametrize(
    "biased",
    [partial(sigmoid, beta=1.1 * BETA), partial(cdpo, beta=BETA, label_smoothing=0.02)],
    ids=["another beta", "labels in doubt"],
)
def test_an_estimate_that_is_off_does_not_fall_like_that(biased: PairwiseLoss) -> None:
    """What is least elsewhere than at pi* stays at a distance, however much data there is."""
    by_size = [distances(biased, size) for size in SIZES]
    assert not falls_as_it_must(by_size)
    assert slope(by_size)[0] > -0.4
    assert by_size[-1].mean() > 2 * dpo()[-1].mean()
