"""Faults that are planted into a step which is right without them are found."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.cuda_dry_run.cases import FAULT_CASES, LARGE, Case
from tests.cuda_dry_run.checks import faults
from tests.cuda_dry_run.conftest import Outcomes

SAYS = {
    "number read": "DataDependentOutputException",
    "tensor read": "read back from the device",
    "copy waited for": "copied to the device while the host waits",
    "tensor on the host": "left on the host",
    "narrow gradient": "wrong gradient",
    "estimate too high": "memory estimate: 1.",
    "estimate too low": "memory estimate: 0.",
}


@pytest.mark.parametrize("case", FAULT_CASES, ids=lambda case: case.fault)
def test_a_planted_fault_is_found(case: Case, outcomes: Outcomes) -> None:
    found = faults(outcomes("faults")[str(case)])
    assert found
    assert all(SAYS[case.fault or ""] in fault for fault in found)


@pytest.mark.parametrize("case", FAULT_CASES, ids=lambda case: case.fault)
def test_without_it_the_step_is_right(case: Case, outcomes: Outcomes) -> None:
    suite = "large" if case.model == LARGE else "faults"
    assert faults(outcomes(suite)[str(replace(case, fault=None))]) == []
