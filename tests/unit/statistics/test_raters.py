"""Raters with planted faults are found, each within its interval; one without is not accused."""

from __future__ import annotations

import random

import pytest

from dpo_cli.statistics.agreement import LOSS, TIE, WIN
from dpo_cli.statistics.intervals import Sampling
from dpo_cli.statistics.raters import RaterQuality, ShownVote, noise_of, rater_quality

SAMPLING = Sampling(draws=500, confidence=0.95, seed=0)


def votes_of(kind: str, num: int = 400, repeats: int = 150, seed: int = 0) -> RaterQuality:
    """The figures of a rater of a kind, who sees the answers of each item in an order that is drawn."""
    draw = random.Random(f"{kind} {seed}")
    votes, orders = [], {}
    for number in [*range(num), *range(repeats)]:
        is_repeat = number in orders
        method_first = not orders[number] if is_repeat else draw.random() < 0.5
        orders[number] = method_first
        result = WIN if draw.random() >= {"noise": 0.1}.get(kind, 0.0) else LOSS
        if kind == "left" or (kind == "leans left" and draw.random() < 0.3):
            result = WIN if method_first else LOSS
        votes.append(ShownVote(kind, f"{number}", f"{number}", result, (result == WIN) == method_first, is_repeat))
    [found] = rater_quality(votes, SAMPLING)
    return found


def test_who_always_picks_left_is_biased_and_never_consistent() -> None:
    found = votes_of("left", num=40, repeats=4)
    assert found.position_bias is not None
    assert found.position_bias.value == 1
    assert found.position_bias.low > 0.8
    assert found.consistency is not None
    assert found.consistency.value == 0
    leaning = votes_of("leans left").position_bias
    assert leaning is not None
    assert 0 < leaning.low < 0.3 < leaning.high


def test_ten_percent_of_noise_are_found_within_the_interval_in_most_draws() -> None:
    inside = 0
    for seed in range(20):
        found = votes_of("noise", seed=seed)
        assert found.noise is not None
        assert found.position_bias is not None
        inside += found.noise.low <= 0.1 <= found.noise.high
        assert found.noise.low > 0
    assert inside >= 17


def test_who_reads_the_answers_alone_is_not_accused() -> None:
    accused = 0
    for seed in range(20):
        found = votes_of("good", seed=seed)
        assert found.position_bias is not None
        accused += not found.position_bias.low <= 0 <= found.position_bias.high
        assert found.noise is not None
        assert found.noise.value == 0
    assert accused <= 3


def test_noise_is_the_root_of_what_two_votes_share() -> None:
    assert noise_of(0.9**2 + 0.1**2) == pytest.approx(0.1)
    assert (noise_of(1.0), noise_of(0.5), noise_of(0.2)) == (0.0, 0.5, 0.5)


def test_ties_are_half_the_same_and_tell_no_noise() -> None:
    votes = [
        ShownVote("a", "1", "p", TIE, None, False),
        ShownVote("a", "1", "p", WIN, True, True),
        ShownVote("a", "2", "q", LOSS, False, True),  # nothing before it
    ]
    [found] = rater_quality(votes, SAMPLING)
    assert (found.num_votes, found.num_ties, found.num_repeats, found.noise) == (3, 1, 1, None)
    assert found.consistency is not None
    assert found.consistency.value == 0.5
