"""Length control: what is planted is found again under any length shift; degenerate data is named."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dpo_cli.statistics.length_control import (
    ALL_AS_LONG,
    SAME_DIFFERENCE,
    SEPARABLE,
    LengthControlled,
    control_length,
    fit_length,
)


def control(outcomes: list[float], lengths: list[float], prompts: list[str] | None = None) -> LengthControlled:
    prompts = prompts or [f"p{number:06d}" for number in range(len(outcomes))]
    return control_length(outcomes, lengths, prompts, draws=200, confidence=0.95, seed=0)


def sigma(x: np.ndarray | float) -> np.ndarray:
    return 1 / (1 + np.exp(-np.asarray(x)))


def draw(shift: float, num_rows: int, *, soft: bool = False, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A judge that prefers ours in 55% at equal length, and likes length; ours is longer by shift on average."""
    rng = np.random.default_rng(seed)
    lengths = rng.normal(shift, 40, size=num_rows).round()
    p = sigma(math.log(0.55 / 0.45) + 1.2 * np.tanh(lengths / 40))
    return (p if soft else (rng.random(num_rows) < p).astype(float)), lengths


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize(("shift", "raw"), [(0, 0.54), (15, 0.62), (45, 0.71)])
def test_a_planted_win_rate_is_found_under_rising_length_shift(shift: float, raw: float, soft: bool) -> None:
    outcomes, lengths = draw(shift, 20_000, soft=soft)
    theta, phi = fit_length(outcomes, np.tanh(lengths / lengths.std()), np.ones((1, len(lengths))))[0]
    assert outcomes.mean() == pytest.approx(raw, abs=0.02)
    assert sigma(theta) == pytest.approx(0.55, abs=0.02)
    assert phi == pytest.approx(1.2, abs=0.1)


def test_the_interval_holds_the_planted_rate_and_not_the_raw_one() -> None:
    outcomes, lengths = draw(45, 2000)
    found = control(outcomes.tolist(), lengths.tolist())
    assert found.controlled is not None
    assert found.controlled.low < 0.55 < found.controlled.high < found.win_rate.low
    assert found.scale == pytest.approx(40, rel=0.1)
    assert found.why == ""


def test_the_maximum_is_one() -> None:
    """The gradient is 0 there, and no neighbor has more likelihood."""
    outcomes, lengths = draw(10, 300)
    x = np.tanh(lengths / lengths.std())

    def likelihood(theta: float, phi: float) -> float:
        p = sigma(theta + phi * x)
        return float((outcomes * np.log(p) + (1 - outcomes) * np.log(1 - p)).sum())

    theta, phi = fit_length(outcomes, x, np.ones((1, 300)))[0]
    residual = outcomes - sigma(theta + phi * x)
    assert residual.sum() == pytest.approx(0, abs=1e-8)
    assert (residual * x).sum() == pytest.approx(0, abs=1e-8)
    around = [likelihood(theta + a, phi + b) for a in (-0.01, 0, 0.01) for b in (-0.01, 0, 0.01)]
    assert max(around) == likelihood(theta, phi)


def test_weights_are_copies_of_rows() -> None:
    outcomes, lengths = draw(10, 100)
    x = np.tanh(lengths / 40)
    weights = np.random.default_rng(1).integers(0, 3, size=(1, 100))
    copies = np.repeat(np.arange(100), weights[0])
    once = fit_length(outcomes[copies], x[copies], np.ones((1, len(copies))))
    assert fit_length(outcomes, x, weights.astype(float)) == pytest.approx(once, abs=1e-8)


def test_ten_equal_rows_a_prompt_count_as_one() -> None:
    outcomes, lengths = draw(10, 100)
    single = control(outcomes.tolist(), lengths.tolist())
    repeated = control(
        np.repeat(outcomes, 10).tolist(), np.repeat(lengths, 10).tolist(), [f"p{i // 10:06d}" for i in range(1000)]
    )
    assert single.controlled is not None
    assert repeated.controlled is not None
    assert repeated.controlled.low == pytest.approx(single.controlled.low, abs=1e-6)
    assert repeated.controlled.high == pytest.approx(single.controlled.high, abs=1e-6)


def test_the_order_of_rows_changes_nothing() -> None:
    outcomes, lengths = (each.tolist() for each in draw(10, 90))
    prompts = [f"p{i // 3}" for i in range(90)]
    turned = control(outcomes[::-1], lengths[::-1], prompts[::-1])
    assert turned == control(outcomes, lengths, prompts)


def test_without_any_length_difference_it_is_the_win_rate() -> None:
    found = control([1, 1, 0, 0.5], [0] * 4)
    assert found.controlled == found.win_rate
    assert found.win_rate.value == 0.625
    assert found.why == ALL_AS_LONG


def test_one_length_difference_everywhere_tells_nothing() -> None:
    found = control([1, 1, 0, 0.5], [0.1] * 4)
    assert (found.controlled, found.why) == (None, SAME_DIFFERENCE)


@pytest.mark.parametrize("outcomes", [[0, 0, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0], [0, 0.5, 1, 1]])
def test_outcomes_that_length_tells_apart_have_no_fit(outcomes: list[float]) -> None:
    found = control(outcomes, [-5, 1, 2, 9])
    assert (found.controlled, found.why) == (None, SEPARABLE)
    assert found.win_rate.value == sum(outcomes) / 4


def test_a_fit_that_most_draws_do_not_have_has_no_interval() -> None:
    found = control([0, 1, 0, 1], [-5, 1, 2, 9])
    assert found.controlled is not None
    assert math.isnan(found.controlled.low)


@pytest.mark.parametrize(
    ("outcomes", "lengths", "prompts"),
    [
        ([], [], []),
        ([1.0], [1.0], ["a", "b"]),
        ([1.0, 0.0], [1.0], ["a", "b"]),
        ([1.5], [1.0], ["a"]),
        ([1.0], [math.inf], ["a"]),
    ],
)
def test_rows_that_make_no_sense(outcomes: list[float], lengths: list[float], prompts: list[str]) -> None:
    with pytest.raises(ValueError, match="must be"):
        control_length(outcomes, lengths, prompts, draws=100, confidence=0.95, seed=0)
