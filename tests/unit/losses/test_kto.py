"""KTO against its formula, written again with plain floats, and its slope."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from dpo_cli.losses.batchwise import kto
from dpo_cli.losses.pairwise import Pairs

POLICY = [(-10.0, -31.0), (-12.5, -29.0), (-7.0, -44.0), (-80.0, -20.0)]
REFERENCE = [(-11.0, -33.0), (-11.0, -30.0), (-9.0, -43.5), (-30.0, -21.0)]
GOOD = [True, False, False, True]


def scored() -> Pairs:
    policy, reference = (torch.tensor(values, dtype=torch.float64) for values in (POLICY, REFERENCE))
    return Pairs(policy, reference, torch.ones_like(policy))


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize("beta", [0.05, 0.5, 2.0])
@pytest.mark.parametrize(("desirable", "undesirable"), [(1.0, 1.0), (1.3, 0.4)])
def test_kto_is_its_formula(beta: float, desirable: float, undesirable: float) -> None:
    """Ethayarajh et al. 2024, eq. 8: l = 1, -1.5, 2, -50, and z = mean(2, 1, -0.5, 1) = 0.875."""
    log_ratios, z = [1.0, -1.5, 2.0, -50.0], 0.875
    expected = [
        desirable - desirable * sigma(beta * (l_own - z))
        if good
        else undesirable - undesirable * sigma(beta * (z - l_own))
        for l_own, good in zip(log_ratios, GOOD, strict=True)
    ]
    found = kto(scored(), torch.tensor(GOOD), beta, desirable, undesirable)
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(expected, rel=1e-12)


def test_the_baseline_is_never_below_0() -> None:
    below = scored()
    below.policy_B2[:, 1] -= 100
    at_zero = replace(below, reference_B2=torch.stack([below.reference_B2[:, 0], below.policy_B2[:, 1]], dim=1))
    assert torch.equal(kto(below, torch.tensor(GOOD), 0.3), kto(at_zero, torch.tensor(GOOD), 0.3))


def test_the_gradient_is_the_slope_with_the_baseline_held_fixed() -> None:
    """Of a good answer -beta lambda sigma'(beta (l - z)), of a bad one its negative; of other prompts' answers none."""
    beta, answers = 0.3, scored()
    answers.policy_B2.requires_grad_()
    (gradient,) = torch.autograd.grad(kto(answers, torch.tensor(GOOD), beta, 1.2, 0.7).sum(), answers.policy_B2)
    for row, l_own, good in zip(gradient.tolist(), [1.0, -1.5, 2.0, -50.0], GOOD, strict=True):
        value = sigma(beta * (l_own - 0.875))
        slope = (-1.2 if good else 0.7) * beta * value * (1 - value)
        assert row == pytest.approx([slope, 0.0], rel=1e-9)


def test_before_the_first_step_every_answer_costs_half_of_its_weight() -> None:
    answers = replace(scored(), reference_B2=scored().policy_B2)
    assert kto(answers, torch.tensor(GOOD), 0.1, 1.0, 0.5).tolist() == [0.5, 0.25, 0.25, 0.5]
