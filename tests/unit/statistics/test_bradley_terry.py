"""Bradley-Terry strengths against Hunter's MM algorithm, planted truths and their degenerate cases."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dpo_cli.statistics.bradley_terry import Outcome, Strengths, bradley_terry, fit_strengths

TRUE = {"a": 0.0, "b": 0.7, "c": -0.5, "d": 1.2}


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def draw(num_prompts: int, seed: int = 0) -> list[Outcome]:
    rng = np.random.default_rng(seed)
    outcomes = []
    for number in range(num_prompts):
        for first, second in (("a", "b"), ("b", "c"), ("c", "d"), ("d", "a")):
            win = float(rng.random() < sigma(TRUE[first] - TRUE[second]))
            outcomes.append(Outcome(f"p{number}", first, second, 0.5 if rng.random() < 0.1 else win))
    return outcomes


def fit(outcomes: list[Outcome], anchor: str = "a", draws: int = 200) -> Strengths:
    return fit_strengths(outcomes, anchor, draws=draws, confidence=0.95, seed=0)


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
        assert found.strengths[name].value == pytest.approx(value, abs=1e-8)


def test_planted_strengths_lie_in_their_intervals() -> None:
    found = fit(draw(2000, seed=1), draws=500)
    shrink = 0.9  # a tenth of the outcomes is a tie, so strengths are drawn towards each other
    for name, value in TRUE.items():
        assert found.strengths[name].value == pytest.approx(shrink * value, abs=0.12)
        if name != "a":
            assert found.strengths[name].low < found.strengths[name].value < found.strengths[name].high
    assert (found.num_outcomes, found.num_prompts) == (8000, 2000)


def test_two_models_give_the_win_rate() -> None:
    outcomes = [Outcome(f"{i}", "dpo", "sft", win) for i, win in enumerate([1, 1, 0, 0.5, 1])]
    found = fit(outcomes, "sft")
    assert found.win_probability["dpo", "sft"].value == pytest.approx(3.5 / 5)
    assert found.strengths["dpo"].value == pytest.approx(math.log(3.5 / 1.5))


def test_the_anchor_moves_all_strengths_and_no_probability() -> None:
    outcomes = draw(60)
    a, d = fit(outcomes, "a"), fit(outcomes, "d")
    assert a.strengths["a"].value == a.strengths["a"].low == a.strengths["a"].high == 0
    for name in TRUE:
        moved = a.strengths[name].value - a.strengths["d"].value
        assert d.strengths[name].value == pytest.approx(moved, abs=1e-9)
    for pair, estimate in a.win_probability.items():
        assert d.win_probability[pair].value == pytest.approx(estimate.value, abs=1e-9)
        opposite = a.win_probability[pair[::-1]]
        assert estimate.value + opposite.value == pytest.approx(1)
        assert estimate.low + opposite.high == pytest.approx(1)


def test_neither_the_order_of_rows_nor_that_of_sides_counts() -> None:
    outcomes = draw(40)
    turned = [Outcome(each.prompt, each.second, each.first, 1 - each.win) for each in outcomes[::-1]]
    for name, estimate in fit(turned).strengths.items():
        mine = fit(outcomes).strengths[name]
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
