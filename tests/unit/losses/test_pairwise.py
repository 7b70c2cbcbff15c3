"""The losses against their formulas, written again with plain floats."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch

from dpo_cli.core.params import TrainParams
from dpo_cli.losses.catalogue import LOSSES, Loss, readers
from dpo_cli.losses.likelihood import sft
from dpo_cli.losses.pairwise import Pairs, cdpo, hinge, ipo, log_ratios, sigmoid


def named(name: str, pairs: Pairs, beta: float, label_smoothing: float = 0.0) -> torch.Tensor:
    """The loss of a name, as section train sets it."""
    return LOSSES[name].of(pairs, TrainParams(beta=beta, label_smoothing=label_smoothing))


BETAS = [0.05, 0.1, 0.5, 2.0]
ROWS = [
    # policy (chosen, rejected), reference (chosen, rejected), tokens (chosen, rejected)
    ((-10.0, -12.0), (-10.0, -12.0), (3, 4)),
    ((-10.0, -12.0), (-11.0, -11.0), (3, 4)),
    ((-31.5, -7.25), (-30.0, -9.0), (17, 2)),
    ((-100.0, -1.0), (-90.0, -30.0), (40, 1)),
    ((-0.125, -55.0), (-9.0, -20.0), (1, 25)),
]


def scored() -> Pairs:
    policy, reference, num_tokens = (list(column) for column in zip(*ROWS, strict=True))
    return Pairs(
        torch.tensor(policy, dtype=torch.float64),
        torch.tensor(reference, dtype=torch.float64),
        torch.tensor(num_tokens),
    )


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def expected(name: str, beta: float, smoothing: float, row: tuple[tuple[float, ...], ...]) -> float:
    (policy_w, policy_l), (reference_w, reference_l), (tokens_w, tokens_l) = row
    ratio_w, ratio_l = policy_w - reference_w, policy_l - reference_l
    margin = beta * (ratio_w - ratio_l)
    match name:
        case "sigmoid":
            return -log_sigmoid(margin)
        case "cdpo":
            return -(1 - smoothing) * log_sigmoid(margin) - smoothing * log_sigmoid(-margin)
        case "ipo":
            return (ratio_w / tokens_w - ratio_l / tokens_l - 1 / (2 * beta)) ** 2
        case "hinge":
            return max(0.0, 1 - margin)
    raise AssertionError(name)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize(
    ("name", "smoothing"), [("sigmoid", 0.0), ("cdpo", 0.1), ("cdpo", 0.4), ("ipo", 0.0), ("hinge", 0.0)]
)
def test_a_loss_is_its_formula(name: str, smoothing: float, beta: float) -> None:
    losses = named(name, scored(), beta, smoothing)
    assert losses.dtype == torch.float64
    assert losses.tolist() == pytest.approx([expected(name, beta, smoothing, row) for row in ROWS], rel=1e-12)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize(
    ("loss", "value"),
    [
        (sigmoid, math.log(2)),
        (partial(cdpo, label_smoothing=0.3), math.log(2)),
        (hinge, 1.0),
    ],
)
def test_before_the_first_step_a_loss_knows_nothing(
    loss: Callable[..., torch.Tensor], value: float, beta: float
) -> None:
    pairs = replace(scored(), reference_B2=scored().policy_B2)
    assert loss(pairs, beta=beta).tolist() == pytest.approx([value] * len(ROWS), rel=1e-12)
    assert ipo(pairs, beta).tolist() == pytest.approx([1 / (2 * beta) ** 2] * len(ROWS))


@pytest.mark.parametrize("beta", BETAS)
def test_the_gradient_of_dpo_is_the_papers(beta: float) -> None:
    """Rafailov et al. 2023, section 4: -beta * sigma(r_l - r_w) * (grad log pi_w - grad log pi_l)."""
    pairs = scored()
    pairs.policy_B2.requires_grad_()
    sigmoid(pairs, beta).sum().backward()
    assert pairs.policy_B2.grad is not None
    gradients = pairs.policy_B2.grad
    for found, ((policy_w, policy_l), (reference_w, reference_l), _) in zip(gradients.tolist(), ROWS, strict=True):
        reward_w, reward_l = beta * (policy_w - reference_w), beta * (policy_l - reference_l)
        weight = beta / (1 + math.exp(reward_w - reward_l))
        assert found == pytest.approx([-weight, weight], rel=1e-12)


def test_cdpo_without_noise_is_dpo() -> None:
    assert torch.equal(cdpo(scored(), 0.1, 0.0), sigmoid(scored(), 0.1))


def test_cdpo_is_least_where_the_margin_fits_the_noise() -> None:
    """Its minimum is at sigma(margin) = 1 - e: the certainty that the labels deserve."""
    noise, beta = 0.2, 0.5
    best = math.log((1 - noise) / noise) / beta
    zero = torch.zeros(3, 2, dtype=torch.float64)
    policy = torch.tensor([[best - 0.1, 0.0], [best, 0.0], [best + 0.1, 0.0]], dtype=torch.float64)
    around = cdpo(Pairs(policy, zero, zero + 1), beta, noise).tolist()
    assert around[1] < min(around[0], around[2])


def test_ipo_is_zero_at_its_target() -> None:
    policy = torch.tensor([[10.0, 0.0]], dtype=torch.float64)
    zero = torch.zeros_like(policy)
    assert ipo(Pairs(policy, zero, torch.tensor([[5, 7]])), 0.25).item() == 0


@pytest.mark.parametrize("alpha", [0.0, 0.05, 1.0])
def test_unlikelihood_is_its_formula_and_its_gradient_a_difference_of_it(alpha: float) -> None:
    """-log pi_w + alpha log pi_l, over 13 tokens of a mean chosen answer; the slope by central differences."""

    def losses_of(policy_B2: torch.Tensor) -> torch.Tensor:
        pairs = replace(scored(), policy_B2=policy_B2, mean_chosen_tokens=13.0)
        return LOSSES["unlikelihood"].of(pairs, TrainParams(unlikelihood_alpha=alpha))

    policy = scored().policy_B2.requires_grad_()
    losses = losses_of(policy)
    assert losses.tolist() == pytest.approx([(alpha * lost - won) / 13 for (won, lost), *_ in ROWS], rel=1e-14)
    if alpha == 0:
        assert torch.equal(losses, sft(replace(scored(), mean_chosen_tokens=13.0)))
    (gradient,) = torch.autograd.grad(losses.sum(), policy)
    for column in range(2):
        shift = 0.25 * torch.eye(2)[column]
        slopes = (losses_of(policy.detach() + shift) - losses_of(policy.detach() - shift)) / 0.5
        torch.testing.assert_close(gradient[:, column], slopes, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", ["sigmoid", "cdpo", "hinge", "ipo"])
@pytest.mark.parametrize("margin", [-1e6, 1e6])
def test_no_margin_is_too_large(name: str, margin: float) -> None:
    policy = torch.tensor([[margin, 0.0]], dtype=torch.float64, requires_grad=True)
    loss = named(name, Pairs(policy, torch.zeros(1, 2), torch.ones(1, 2)), 0.1, 0.1)
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert policy.grad is not None
    assert torch.isfinite(policy.grad).all()


def test_float32_log_probabilities_are_subtracted_in_float64() -> None:
    policy = torch.tensor([[-1000.125, -1000.25]], dtype=torch.float32)
    reference = torch.tensor([[-1000.1250001, -1000.2500002]], dtype=torch.float64)
    ratios = log_ratios(policy, reference)
    assert ratios.dtype == torch.float64
    assert ratios.tolist()[0] == pytest.approx([1e-7, 2e-7], rel=1e-4)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("sigmoid", sigmoid), ("ipo", ipo), ("hinge", hinge), ("cdpo", partial(cdpo, label_smoothing=0.3))],
)
def test_a_loss_is_found_by_its_name_and_given_its_settings(name: str, kind: Callable[..., torch.Tensor]) -> None:
    assert torch.equal(named(name, scored(), 0.3, 0.3), kind(scored(), beta=0.3))


def test_settings_are_checked_without_torch() -> None:
    code = "import sys, dpo_cli.core.params; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_new_loss_is_one_function() -> None:
    """What CONTRIBUTING shows: its settings come from its parameters, and it can be named at once."""
    try:

        @Loss("m²", "nobody", "never", ("weighting",), needs=("gamma",))
        def squared(pairs: Pairs, /, beta: float, gamma: float) -> torch.Tensor:
            return (beta * pairs.deltas_B - gamma) ** 2

        entry = LOSSES["squared"]
        assert entry.reads == ("gamma", "weighting")
        train = TrainParams(beta=0.5, gamma=2.0)
        assert torch.equal(entry.of(scored(), train), squared(scored(), 0.5, 2.0))
        assert readers("gamma")[-1] == "squared"
    finally:
        LOSSES.pop("squared", None)
