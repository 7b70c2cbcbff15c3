"""Calibration: the fitted temperature of sigma(margin / T); test_rewards.py has more on error and bins."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dpo_cli.statistics.calibration import calibration_error, fit_temperature, reliability_table
from dpo_cli.statistics.intervals import Sampling

SAMPLING = Sampling(draws=100, confidence=0.95, seed=0)


def draw(num_pairs: int, sureness: float) -> np.ndarray:
    """Margins of pairs whose labels are drawn from Bradley-Terry, times how sure the model is of them."""
    rng = np.random.default_rng(0)
    margins = rng.normal(0, 2, size=num_pairs)
    chosen = rng.random(num_pairs) < 1 / (1 + np.exp(-margins))
    return sureness * np.where(chosen, margins, -margins)


def log_loss(margins: np.ndarray, temperature: float) -> float:
    return float(np.logaddexp(0, -margins / temperature).mean())


@pytest.mark.parametrize("sureness", [0.2, 1.0, 3.0])
def test_the_planted_temperature_is_found(sureness: float) -> None:
    assert fit_temperature(draw(20_000, sureness)) == pytest.approx(sureness, rel=0.05)


def test_no_other_temperature_has_less_loss() -> None:
    margins = draw(500, 3)
    found = fit_temperature(margins)
    for other in np.exp(np.linspace(-3, 5, 400)):
        assert log_loss(margins, found) <= log_loss(margins, other)


def test_it_mends_the_calibration() -> None:
    margins = draw(20_000, 3)
    prompts = [f"{number}" for number in range(len(margins))]
    before, after = (
        calibration_error(each, prompts, SAMPLING).value for each in (margins, margins / fit_temperature(margins))
    )
    assert before > 0.1
    assert after < 0.02


def test_pairs_that_are_all_right_have_temperature_0_and_those_that_mislead_infinity() -> None:
    assert fit_temperature(np.array([0.0, 1.0, 2.0])) == 0
    assert fit_temperature(np.array([1.0, -2.0])) == math.inf
    assert fit_temperature(np.zeros(3)) == math.inf


def test_the_bins_hold_all_pairs_and_give_the_error() -> None:
    margins = draw(400, 2)
    prompts = [f"{number // 2}" for number in range(400)]
    bins = reliability_table(margins, prompts, SAMPLING, num_bins=5)
    assert sum(each.num_pairs for each in bins) == 400
    error = sum(each.num_pairs * abs(each.accuracy.value - each.probability) for each in bins) / 400
    found = calibration_error(margins, prompts, SAMPLING, num_bins=5)
    assert found.value == pytest.approx(error)
