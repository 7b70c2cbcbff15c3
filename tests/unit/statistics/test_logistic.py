"""Strengths against Hunter's MM algorithm; length control against planted truths; degenerate data is named."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dpo_cli.statistics.intervals import Estimate, Sampling
from dpo_cli.statistics.logistic import (
    ALL_AS_LONG,
    SAME_DIFFERENCE,
    SEPARABLE,
    LengthControlled,
    Outcome,
    bradley_terry,
    control_length,
    fit_length,
    fit_strengths,
)

TRUE = {"a": 0.0, "b": 0.7, "c": -0.5, "d": 1.2}


def sigma(x: np.ndarray | float) -> np.ndarray:
    return 1 / (1 + np.exp(-np.asarray(x)))


def draw(num_prompts: int, seed: int = 0) -> list[Outcome]:
    rng = np.random.default_rng(seed)
    outcomes = []
    for number in range(num_prompts):
        for first, second in (("a", "b"), ("b", "c"), ("c", "d"), ("d", "a")):
            win = float(rng.random() < sigma(TRUE[first] - TRUE[second]))
            outcomes.append(Outcome(f"p{number}", first, second, 0.5 if rng.random() < 0.1 else win))
    return outcomes


def fit(outcomes: list[Outcome], anchor: str = "a", draws: int = 200) -> dict[str, Estimate]:
    return fit_strengths(outcomes, anchor, Sampling(draws, 0.95, 0))


def hunter_mm(outcomes: list[Outcome], anchor: str) -> dict[str, float]:
    """Hunter 2004, equation 3: gamma_i <- W_i / sum_j N_ij / (gamma_i + gamma_j), until nothing moves."""
    names = sorted({name for each in outcomes for name in (each.first, each.second)})
    won = dict.fromkeys(names, 0.0)
    played: dict[tuple[str, str], int] = {}
    for each in outcomes:
        won[each.first] += each.win
        won[each.second] += 1 - each.win
        for pair in ((each.first, each.second), (each.second, each.first)):
            played[pair] = played.get(pair, 0) + 1
    gamma = dict.fromkeys(names, 1.0)
    for _ in range(3000):
        gamma = {i: won[i] / sum(played.get((i, j), 0) / (gamma[i] + gamma[j]) for j in names if j != i) for i in names}
    return {name: math.log(gamma[name] / gamma[anchor]) for name in names}


def test_equal_to_hunters_mm_algorithm() -> None:
    outcomes = draw(60)
    found = fit(outcomes)
    for name, value in hunter_mm(outcomes, "a").items():
        assert found[name].value == pytest.approx(value, abs=1e-8)


def test_planted_strengths_lie_in_their_intervals() -> None:
    found = fit(draw(2000, seed=1), draws=500)
    shrink = 0.9  # a tenth of the outcomes is a tie, so strengths are drawn towards each other
    for name, value in TRUE.items():
        assert found[name].value == pytest.approx(shrink * value, abs=0.12)
        if name != "a":
            assert found[name].low < found[name].value < found[name].high


def test_two_models_give_the_win_rate() -> None:
    outcomes = [Outcome(f"{i}", "dpo", "sft", win) for i, win in enumerate([1, 1, 0, 0.5, 1])]
    found = fit(outcomes, "sft")
    assert found["dpo"].value == pytest.approx(math.log(3.5 / 1.5))


def test_the_anchor_moves_all_strengths_alike() -> None:
    outcomes = draw(60)
    a, d = fit(outcomes, "a"), fit(outcomes, "d")
    assert a["a"].value == a["a"].low == a["a"].high == 0
    for name in TRUE:
        moved = a[name].value - a["d"].value
        assert d[name].value == pytest.approx(moved, abs=1e-9)


def test_neither_the_order_of_rows_nor_that_of_sides_counts() -> None:
    outcomes = draw(40)
    turned = [Outcome(each.prompt, each.second, each.first, 1 - each.win) for each in outcomes[::-1]]
    found = fit(outcomes)
    for name, estimate in fit(turned).items():
        mine = found[name]
        assert (estimate.value, estimate.low, estimate.high) == pytest.approx((mine.value, mine.low, mine.high))


def test_a_model_that_always_loses_is_named() -> None:
    outcomes = [*draw(20), *(Outcome(f"p{i}", "a", "bad", 1.0) for i in range(20))]
    with pytest.raises(ValueError, match="strengths are infinite: bad never won against a, b, c, d"):
        fit(outcomes)


def test_models_that_never_met_are_named() -> None:
    outcomes = [Outcome(f"{i}", *pair, i % 2) for i in range(8) for pair in (("a", "b"), ("c", "d"))]
    with pytest.raises(ValueError, match="a, b never won against c, d"):
        fit(outcomes)


@pytest.mark.parametrize(("second", "win"), [("a", 0.5), ("b", 1.5)])
def test_outcomes_that_make_no_sense(second: str, win: float) -> None:
    with pytest.raises(ValueError, match="two different models"):
        fit([Outcome("p", "a", second, win)])
    with pytest.raises(ValueError, match="the anchor z is none of the models a, b"):
        fit([Outcome("p", "a", "b", 1)], "z")


def test_infinite_draws_are_nan_and_leave_the_others_alone() -> None:
    wins = np.array([[[0, 3], [1, 0]], [[0, 4], [0, 0]]])
    found = bradley_terry(wins, 1)
    assert found[0] == pytest.approx([math.log(3), 0])
    assert np.isnan(found[1]).all()


# --- length ---------------------------------------------------------------------------------


def control(outcomes: list[float], lengths: list[float], prompts: list[str] | None = None) -> LengthControlled:
    prompts = prompts or [f"p{number:06d}" for number in range(len(outcomes))]
    return control_length(outcomes, lengths, prompts, Sampling(200, 0.95, 0))


def draw_lengths(shift: float, num_rows: int, *, soft: bool = False, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A judge that prefers ours in 55% at equal length, and likes length; ours is longer by shift on average."""
    rng = np.random.default_rng(seed)
    lengths = rng.normal(shift, 40, size=num_rows).round()
    p = sigma(math.log(0.55 / 0.45) + 1.2 * np.tanh(lengths / 40))
    return (p if soft else (rng.random(num_rows) < p).astype(float)), lengths


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize(("shift", "raw"), [(0, 0.54), (15, 0.62), (45, 0.71)])
def test_a_planted_win_rate_is_found_under_rising_length_shift(shift: float, raw: float, soft: bool) -> None:
    outcomes, lengths = draw_lengths(shift, 20_000, soft=soft)
    theta, phi = fit_length(outcomes, np.tanh(lengths / lengths.std()), np.ones((1, len(lengths))))[0]
    assert outcomes.mean() == pytest.approx(raw, abs=0.02)
    assert sigma(theta) == pytest.approx(0.55, abs=0.02)
    assert phi == pytest.approx(1.2, abs=0.1)


def test_the_interval_holds_the_planted_rate_and_not_the_raw_one() -> None:
    outcomes, lengths = draw_lengths(45, 2000)
    found = control(outcomes.tolist(), lengths.tolist())
    assert found.controlled is not None
    assert found.controlled.low < 0.55 < found.controlled.high < outcomes.mean()
    assert found.scale == pytest.approx(40, rel=0.1)
    assert found.why == ""


def test_the_maximum_is_one() -> None:
    """The gradient is 0 there, and no neighbor has more likelihood."""
    outcomes, lengths = draw_lengths(10, 300)
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
    outcomes, lengths = draw_lengths(10, 100)
    x = np.tanh(lengths / 40)
    weights = np.random.default_rng(1).integers(0, 3, size=(1, 100))
    copies = np.repeat(np.arange(100), weights[0])
    once = fit_length(outcomes[copies], x[copies], np.ones((1, len(copies))))
    assert fit_length(outcomes, x, weights.astype(float)) == pytest.approx(once, abs=1e-8)


def test_the_order_of_rows_changes_nothing() -> None:
    outcomes, lengths = (each.tolist() for each in draw_lengths(10, 90))
    prompts = [f"p{i // 3}" for i in range(90)]
    turned = control(outcomes[::-1], lengths[::-1], prompts[::-1])
    assert turned == control(outcomes, lengths, prompts)


def test_without_any_length_difference_it_is_the_win_rate() -> None:
    found = control([1, 1, 0, 0.5], [0] * 4)
    assert found.controlled is not None
    assert found.controlled.value == 0.625
    assert found.why == ALL_AS_LONG


def test_one_length_difference_everywhere_tells_nothing() -> None:
    found = control([1, 1, 0, 0.5], [0.1] * 4)
    assert (found.controlled, found.why) == (None, SAME_DIFFERENCE)


@pytest.mark.parametrize("outcomes", [[0, 0, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0], [0, 0.5, 1, 1]])
def test_outcomes_that_length_tells_apart_have_no_fit(outcomes: list[float]) -> None:
    found = control(outcomes, [-5, 1, 2, 9])
    assert (found.controlled, found.why) == (None, SEPARABLE)


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
        control_length(outcomes, lengths, prompts, Sampling(100, 0.95, 0))


def test_length_control_is_clustered_by_prompt() -> None:
    outcomes, lengths = (each.repeat(10).tolist() for each in draw_lengths(10, 100))
    apart, together = (
        control(outcomes, lengths, [f"p{row // size:06d}" for row in range(1000)]).controlled for size in (1, 10)
    )
    assert apart is not None
    assert together is not None
    assert together.high - together.low > 2 * (apart.high - apart.low)
