"""Every loss, the reward model and the passes without gradients, on a CUDA device that is not there."""

from __future__ import annotations

import pytest

from tests.cuda_dry_run.cases import PASSES, Case, work_cases
from tests.cuda_dry_run.checks import faults
from tests.cuda_dry_run.conftest import Outcomes

STEPS = [case for case in work_cases() if case.work not in PASSES]


@pytest.mark.parametrize("case", STEPS, ids=str)
def test_a_step_raises_nothing_and_waits_for_nothing(case: Case, outcomes: Outcomes) -> None:
    found = outcomes("work")[str(case)]
    assert faults(found) == []
    assert found["async_copies"] > 0


@pytest.mark.parametrize("work", PASSES)
def test_a_pass_without_gradients_runs(work: str, outcomes: Outcomes) -> None:
    found = outcomes("work")[str(Case(grade="none", work=work))]
    assert found["error"] is None
    assert found["strays"] == {}
    assert found["kernels"] > 0
