"""What a step of an 8B model takes of memory, kernels and bytes: counted, and under bounds that stand here."""

from __future__ import annotations

import pytest

from tests.cuda_dry_run.cases import LARGE_CASES, LARGE_PASSES, PIECES_CASE, SMALL_CASE, Case
from tests.cuda_dry_run.checks import faults
from tests.cuda_dry_run.conftest import Outcomes

GIB = 2**30

PEAK_GIB = {"none": 21.5, "elementwise": 17.3, "layers": 7.3}
"""Of tensors, weights included, by grade: 3,915 tokens of an 8B in nf4."""


@pytest.mark.parametrize("case", [*LARGE_CASES, SMALL_CASE], ids=str)
def test_a_step_waits_for_nothing_and_the_memory_estimate_is_right(case: Case, outcomes: Outcomes) -> None:
    assert faults(outcomes("large")[str(case)]) == []


@pytest.mark.parametrize("case", LARGE_CASES, ids=lambda case: case.grade)
def test_the_peak_of_an_8b_is_known(case: Case, outcomes: Outcomes) -> None:
    found = outcomes("large")[str(case)]
    assert found["base_bytes"] / GIB == pytest.approx(5.47, abs=0.02)
    assert 0.9 * PEAK_GIB[case.grade] <= found["peak_bytes"] / GIB <= PEAK_GIB[case.grade]


BOUNDS = {
    str(LARGE_CASES[0]): (175, 10.0),
    str(LARGE_CASES[1]): (190, 11.0),
    str(LARGE_CASES[2]): (220, 13.5),
    str(SMALL_CASE): (180, 3.0),
    str(PIECES_CASE): (1100, 1.3),
}
"""Kernels and GB a layer, both an upper bound that is not far off: lower it when less is done."""


@pytest.mark.parametrize("name", BOUNDS)
def test_kernels_and_bytes_a_layer_stay_under_their_bounds(name: str, outcomes: Outcomes) -> None:
    found = outcomes("large")[name]
    kernels, gigabytes = (found["kernels"] / found["num_layers"], found["bytes"] / 1e9 / found["num_layers"])
    most_kernels, most_gigabytes = BOUNDS[name]
    assert 0.85 * most_kernels <= kernels <= most_kernels
    assert 0.85 * most_gigabytes <= gigabytes <= most_gigabytes


def test_the_divergence_of_an_answer_takes_little_beside_the_model(outcomes: Outcomes) -> None:
    """256 tokens, a vocabulary of 128,256: the distributions of two models in float64 would be 0.5 GiB."""
    found = outcomes("large")[str(LARGE_PASSES[1])]
    assert (found["peak_bytes"] - found["base_bytes"]) / GIB < 0.35
