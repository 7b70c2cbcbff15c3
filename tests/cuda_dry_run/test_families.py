"""A training step of every family of models, on a CUDA device that is not there."""

from __future__ import annotations

import itertools

import pytest

from tests.cuda_dry_run.cases import DTYPES, FAMILIES, GRADES, LAYOUTS, QUANTIZATIONS, Case, family_cases
from tests.cuda_dry_run.checks import faults
from tests.cuda_dry_run.conftest import Outcomes


@pytest.mark.parametrize("case", family_cases(), ids=str)
def test_a_step_raises_nothing_and_waits_for_nothing(case: Case, outcomes: Outcomes) -> None:
    assert faults(outcomes("families")[str(case)]) == []


def test_each_family_is_run_in_each_pair_of_ways() -> None:
    dimensions = (QUANTIZATIONS, LAYOUTS, GRADES, DTYPES)
    wanted = {pair for one, other in itertools.combinations(dimensions, 2) for pair in itertools.product(one, other)}
    for family in FAMILIES:
        ways = [(c.quantization, c.layout, c.grade, c.dtype) for c in family_cases() if c.model == family]
        assert wanted <= {pair for way in ways for pair in itertools.combinations(way, 2)}
