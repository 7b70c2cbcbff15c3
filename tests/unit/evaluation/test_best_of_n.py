"""Best-of-N: which answer is taken, and what that is worth on average."""

from __future__ import annotations

import itertools
import math
import random
from statistics import mean

import pytest

from dpo_cli.evaluation.best_of_n import best_of, expected_best_of, kl_bound


def test_the_best_is_the_first_of_the_highest() -> None:
    assert best_of([0.0, 2.0, 1.0, 2.0]) == 1
    assert best_of([-1.0]) == 0


@pytest.mark.parametrize("number", [1, 2, 3, 5, 6])
def test_the_expectation_is_the_mean_over_all_subsets(number: int) -> None:
    rng = random.Random(number)
    rewards = [float(rng.randrange(4)) for _ in range(6)]  # with ties
    values = [rng.random() for _ in range(6)]

    def one(subset: tuple[int, ...]) -> float:
        top = max(rewards[index] for index in subset)
        return mean(values[index] for index in subset if rewards[index] == top)

    expected = mean(one(subset) for subset in itertools.combinations(range(6), number))
    assert expected_best_of(rewards, values, number) == pytest.approx(expected)


def test_of_one_it_is_the_mean_and_of_all_the_best() -> None:
    assert expected_best_of([3.0, 1.0, 2.0], [10.0, 20.0, 60.0], 1) == pytest.approx(30)
    assert expected_best_of([3.0, 1.0, 2.0], [10.0, 20.0, 60.0], 3) == pytest.approx(10)
    with pytest.raises(ValueError, match="the best of 4 needs as many samples, got 3"):
        expected_best_of([3.0, 1.0, 2.0], [10.0, 20.0, 60.0], 4)


def test_the_bound_of_its_kl() -> None:
    assert kl_bound(1) == 0
    assert kl_bound(4) == pytest.approx(math.log(4) - 0.75)
