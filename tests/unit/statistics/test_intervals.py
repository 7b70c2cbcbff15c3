"""Intervals by prompt: right on average, wider where rows hang together, the same in any order."""

from __future__ import annotations

import math
from dataclasses import replace
from math import comb

import numpy as np
import pytest

from dpo_cli.statistics import intervals
from dpo_cli.statistics.intervals import (
    FEW_PROMPTS,
    Estimate,
    Sampling,
    detectable_of_interval,
    detectable_win_rate,
    exact_interval,
    wilson_interval,
    win_rate_power,
)

SAMPLING = Sampling(draws=2000, confidence=0.95, seed=0)


def interval(values: list[float], clusters: list[str], **changes: float) -> Estimate:
    return replace(SAMPLING, **changes).interval(values, clusters)  # type: ignore[arg-type]


def test_the_value_is_the_mean_over_rows() -> None:
    estimate = interval([1, 0, 0, 1, 1], ["a", "a", "a", "b", "c"])
    assert estimate.value == pytest.approx(0.6)
    assert estimate.low <= estimate.value <= estimate.high


def test_equal_values_have_no_interval() -> None:
    assert interval([0.25] * 6, list("aabbcd")) == Estimate(0.25, 0.25, 0.25)
    assert interval([0, 1, 1, 1], ["a"] * 4) == Estimate(0.75, 0.75, 0.75), "nor has one prompt"


def test_ten_equal_rows_a_prompt_count_as_one() -> None:
    rng = np.random.default_rng(1)
    values = rng.normal(size=100)
    single = interval(values.tolist(), [f"{i:03d}" for i in range(100)])
    repeated = interval(np.repeat(values, 10).tolist(), [f"{i // 10:03d}" for i in range(1000)])
    assert (repeated.low, repeated.high) == pytest.approx((single.low, single.high))
    as_if_independent = interval(np.repeat(values, 10).tolist(), [f"{i:04d}" for i in range(1000)])
    assert repeated.high - repeated.low > 2.5 * (as_if_independent.high - as_if_independent.low)


def test_more_confidence_is_a_wider_interval() -> None:
    values, clusters = [float(i % 3) for i in range(60)], [f"{i}" for i in range(60)]
    narrow, wide = (interval(values, clusters, confidence=confidence) for confidence in (0.8, 0.99))
    assert wide.low < narrow.low < narrow.high < wide.high


def test_the_seed_alone_decides_the_draws() -> None:
    values, clusters = [float(i % 3) for i in range(60)], [f"{i}" for i in range(60)]
    assert interval(values, clusters) == interval(values, clusters)
    assert interval(values, clusters) != interval(values, clusters, seed=1)


def test_drawing_in_pieces_changes_nothing_but_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    values, clusters = [float(i % 3) for i in range(60)], [f"{i}" for i in range(60)]
    whole = interval(values, clusters)
    monkeypatch.setattr(intervals, "_MAX_CELLS", 60 * 7)
    assert interval(values, clusters) == whole


def test_the_size_of_a_prompt_weighs() -> None:
    """A draw of prompts is averaged over its rows, so a mean can lie anywhere between the two prompts'."""
    estimate = interval([0, 1, 1, 1], ["a", "b", "b", "b"])
    assert (estimate.low, estimate.value, estimate.high) == (0, 0.75, 1)


def test_nominal_95_covers_93_to_97_by_prompt_and_far_less_by_row() -> None:
    """1000 sets of 120 prompts with 1 to 6 votes that share the prompt's own win rate; truth .6."""
    rng = np.random.default_rng(3)
    hits = {"prompt": 0, "row": 0}
    for seed in range(1000):
        owners = np.repeat(np.arange(120), rng.integers(1, 7, size=120))
        wins = (rng.random(len(owners)) < rng.beta(0.9, 0.6, size=120)[owners]).astype(float)
        for unit, clusters in (("prompt", owners), ("row", np.arange(len(owners)))):
            estimate = interval(wins.tolist(), clusters, draws=400, seed=seed)  # type: ignore[arg-type]
            hits[unit] += estimate.low <= 0.6 <= estimate.high
    assert 0.93 <= hits["prompt"] / 1000 <= 0.97
    assert hits["row"] / 1000 < 0.85


@pytest.mark.parametrize(
    ("method", "temperature", "rate"), [("DPO", 0, 0.36), ("DPO", 0.25, 0.31), ("PPO", 0, 0.26), ("PPO", 0.25, 0.23)]
)
def test_the_papers_table_1_has_wilsons_intervals(method: str, temperature: float, rate: float) -> None:
    """Win rates against ground truth, out of distribution (Rafailov et al. 2023, Table 1), with 256 prompts judged.

    The ends may differ from Wilson's by what the two methods differ, (1/2 - p) z^2 / (n + z^2), which is .004 at the
    most here, by one prompt of 256, .004, and by three standard errors of a quantile of 20 000 draws, 3 * .0006: .01.
    """
    wins = round(256 * rate)
    assert round(wins / 256, 2) == rate, f"{method} at T = {temperature}"
    found = interval([1.0] * wins + [0.0] * (256 - wins), [f"{i:03d}" for i in range(256)], draws=20_000)
    assert found.value == wins / 256
    assert (found.low, found.high) == pytest.approx(wilson_interval(wins, 256), abs=0.01)


def test_weights_are_the_draws_of_the_bootstrap() -> None:
    values, clusters = [float(i % 7) for i in range(60)], [f"{i // 2:02d}" for i in range(60)]
    sums = np.array(values).reshape(30, 2).sum(1)
    weights = np.concatenate(list(Sampling(500, 0.95, 4).weights(30)))
    assert (weights.sum(1) == 30).all()
    low, high = np.quantile(weights @ sums / 60, [0.025, 0.975])
    estimate = interval(values, clusters, draws=500, seed=4)
    assert (estimate.low, estimate.high) == pytest.approx((low, high))


def test_undefined_draws_are_left_out_where_they_are_few() -> None:
    found = np.arange(100.0)
    found[:5] = np.nan
    sampling = Sampling(100, 0.9, 0)
    estimate = sampling.of_draws(0.5, found)
    assert (estimate.low, estimate.high) == pytest.approx(tuple(np.quantile(found[5:], [0.05, 0.95])))
    found[:6] = np.nan
    assert math.isnan(sampling.of_draws(0.5, found).low)


# --- runs ---------------------------------------------------------------------------------


def spread(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Normal values with mean 0 and variance 1 along the last axis, exactly."""
    values = rng.normal(size=shape)
    values -= values.mean(-1, keepdims=True)
    return values / values.std(-1, keepdims=True)


@pytest.mark.parametrize("same_prompts", [True, False])
def test_the_interval_of_runs_has_the_width_of_the_variances(same_prompts: bool) -> None:
    """With variances 0.09 of runs, 1 of prompts and 0.25 of the rest, S = 20 runs and P = 60 prompts.

    The variance of the mean is 0.09 / S + 1 / P + 0.25 / (S P) where all runs have the same prompts, and
    0.09 / S + 1.25 / (S P) where each has its own.
    """
    rng, num_runs, num_prompts = np.random.default_rng(5), 20, 60
    shape = (num_prompts,) if same_prompts else (num_runs, num_prompts)
    values = 0.3 * spread(rng, num_runs)[:, None] + spread(rng, *shape) + 0.5 * spread(rng, num_runs, num_prompts)
    rest = 0.25 / (num_runs * num_prompts)
    prompts = 1 / num_prompts if same_prompts else 1 / (num_runs * num_prompts)
    expected = 2 * 1.96 * math.sqrt(0.09 / num_runs + prompts + rest)
    found = replace(SAMPLING, draws=5000).of_runs([*values], same_prompts=same_prompts)
    assert found.value == pytest.approx(values.mean(), abs=1e-12)
    assert found.high - found.low == pytest.approx(expected, rel=0.06)


def test_runs_of_the_same_prompts_are_not_taken_for_more_prompts() -> None:
    """What two policies have in common at a prompt drops out of their paired difference, and of nothing else."""
    rng = np.random.default_rng(6)
    prompts, noise = rng.normal(size=200), rng.normal(size=(2, 3, 200))
    first, second = prompts + 0.1 * noise[0] + 0.2, prompts + 0.1 * noise[1]
    alone, difference = (SAMPLING.of_runs([*runs], same_prompts=True) for runs in (first, first - second))
    nested = SAMPLING.of_runs([*first], same_prompts=False)
    assert nested.high - nested.low < 0.7 * (alone.high - alone.low)
    assert difference.low > 0.15 > alone.low
    assert difference.high - difference.low < 0.2 * (alone.high - alone.low)


def test_runs_are_drawn_alike_each_time_and_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [np.arange(20.0) % 7, np.arange(30.0) % 5]
    whole = SAMPLING.of_runs(runs, same_prompts=False)
    assert SAMPLING.of_runs(runs, same_prompts=False) == whole
    assert replace(SAMPLING, seed=1).of_runs(runs, same_prompts=False) != whole
    monkeypatch.setattr(intervals, "_MAX_CELLS", 60 * 7)
    assert SAMPLING.of_runs(runs, same_prompts=False) == whole
    with pytest.raises(ValueError, match=r"the same ones if they say so; got \[20, 30\]"):
        SAMPLING.of_runs(runs, same_prompts=True)


# --- rates --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wins", "number", "low", "high"),
    [
        (2, 2, math.sqrt(0.025), 1.0),
        (0, 2, 0.0, 1 - math.sqrt(0.025)),
        (1, 1, 0.025, 1.0),
        (4, 10, 0.1215523, 0.7376219),  # R: binom.test(4, 10)
        (6, 6, 0.025 ** (1 / 6), 1.0),
        (534, 534, 0.025 ** (1 / 534), 1.0),
    ],
)
def test_exact_intervals_are_those_of_clopper_and_pearson(wins: int, number: int, low: float, high: float) -> None:
    assert exact_interval(wins, number, 0.95) == pytest.approx((low, high), abs=1e-6)


def test_half_a_win_is_taken_both_ways() -> None:
    low, high = exact_interval(1.5, 4, 0.95)
    assert low == exact_interval(1, 4, 0.95)[0]
    assert high == exact_interval(2, 4, 0.95)[1]


def test_a_rate_of_few_prompts_or_of_none_lost_has_the_exact_interval() -> None:
    assert SAMPLING.rate([1, 1], ["a", "b"]) == Estimate(1.0, *exact_interval(2, 2, 0.95))
    assert SAMPLING.rate([1, 1, 1, 0], ["a", "a", "a", "b"]) == Estimate(0.75, *exact_interval(1.5, 2, 0.95))
    many = [f"{i}" for i in range(FEW_PROMPTS)]
    assert SAMPLING.rate([1.0] * FEW_PROMPTS, many) == Estimate(1.0, *exact_interval(FEW_PROMPTS, FEW_PROMPTS, 0.95))
    mixed = [1.0, 0.0, 1.0] * (FEW_PROMPTS // 3)
    assert SAMPLING.rate(mixed, many) == interval(mixed, many)


# --- power and shares -------------------------------------------------------------------------


def test_it_is_what_counting_gives() -> None:
    """Of 20 prompts 15 wins or more come in 21700 of 2^20 cases (2.07%), 14 or more in 5.8%."""
    above = [sum(comb(20, wins) for wins in range(least, 21)) / 2**20 for least in (15, 14)]
    assert above[0] <= 0.025 < above[1]
    expected = sum(comb(20, wins) * 0.7**wins * 0.3 ** (20 - wins) for wins in range(21) if wins >= 15 or wins <= 5)
    assert win_rate_power(0.7, 20) == pytest.approx(expected, rel=1e-12)
    assert win_rate_power(0.5, 20) == pytest.approx(2 * above[0], rel=1e-12)
    assert win_rate_power(1.0, 20) == 1


@pytest.mark.parametrize("num_prompts", [6, 50, 256, 1000, 20_000])
def test_the_least_effect_is_found_with_the_power_asked_for(num_prompts: int) -> None:
    found = detectable_win_rate(num_prompts)
    assert found is not None
    assert win_rate_power(found, num_prompts) == pytest.approx(0.8, abs=1e-6)


def test_five_prompts_show_nothing() -> None:
    """Even 5 of 5 wins come by chance in 2 of 32 cases."""
    assert win_rate_power(0.99, 5) == 0
    assert detectable_win_rate(5) is None


@pytest.mark.parametrize(("num_prompts", "share_of_ties"), [(256, 0.0), (1000, 0.0), (400, 0.4)])
def test_a_detectable_win_rate_is_found_four_times_in_five(num_prompts: int, share_of_ties: float) -> None:
    """Wins, ties and losses are drawn at the rate that an interval says it would find; then it mostly does."""
    rng = np.random.default_rng(0)

    def draw(rate: float) -> np.ndarray:
        lead = (rate - 0.5) / (1 - share_of_ties)
        decided = rng.random(num_prompts) < 0.5 + lead
        return np.where(rng.random(num_prompts) < share_of_ties, 0.5, decided)

    def normal(values: np.ndarray) -> Estimate:
        error = 1.96 * values.std() / math.sqrt(num_prompts)
        return Estimate(values.mean(), values.mean() - error, values.mean() + error)

    rate = detectable_of_interval(normal(draw(0.5)), 0.95)
    assert rate is not None
    found = np.mean([normal(draw(rate)).low > 0.5 for _ in range(2000)])
    assert 0.76 < found < 0.86


def test_too_wide_an_interval_finds_nothing() -> None:
    assert detectable_of_interval(Estimate(0.5, 0.0, 1.0), 0.95) is None
    assert detectable_of_interval(Estimate(0.5, math.nan, math.nan), 0.95) is None
    assert detectable_of_interval(Estimate(0.5, 0.5, 0.5), 0.95) == 0.5


@pytest.mark.parametrize(
    ("count", "total", "low", "high"),
    [
        (5, 10, 0.23659, 0.76341),  # (0.5 +- sqrt(0.025 + z^2/400) z + z^2/20) / (1 + z^2/10)
        (81, 263, 0.25529, 0.36620),  # Newcombe 1998, table I
        (15, 148, 0.06240, 0.16050),
        (0, 20, 0.0, 0.16113),
        (1, 29, 0.00611, 0.17177),
        (20, 20, 0.83887, 1.0),
        (0, 0, 0.0, 1.0),
    ],
)
def test_wilson(count: int, total: int, low: float, high: float) -> None:
    assert wilson_interval(count, total) == pytest.approx((low, high), abs=1e-4)
