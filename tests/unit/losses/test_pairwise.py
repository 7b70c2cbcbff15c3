"""The losses against their formulas, written again with plain floats."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from dpo_cli.core.params import TrainParams
from dpo_cli.losses.catalogue import LOSSES, Loss, readers
from dpo_cli.losses.likelihood import sft
from dpo_cli.losses.pairwise import Pairs, cdpo, hinge, ipo, log_ratios, sigmoid


def named(name: str, pairs: Pairs, beta: float, label_smoothing: float = 0.0, **settings: Any) -> torch.Tensor:
    """The loss of a name, as section train sets it."""
    return LOSSES[name].of(pairs, TrainParams(beta=beta, label_smoothing=label_smoothing, **settings))


BETAS = [0.05, 0.1, 0.5, 2.0]
ROWS = [
    # policy (chosen, rejected), reference (chosen, rejected), tokens (chosen, rejected)
    ((-10.0, -12.0), (-10.0, -12.0), (3, 4)),
    ((-10.0, -12.0), (-11.0, -11.0), (3, 4)),
    ((-31.5, -7.25), (-30.0, -9.0), (17, 2)),
    ((-100.0, -1.0), (-90.0, -30.0), (40, 1)),
    ((-0.125, -55.0), (-9.0, -20.0), (1, 25)),
]
SCORES = [(3.0, 1.0), (5.0, 0.0), (2.0, 1.0), (4.0, 3.0), (1.0, 0.0)]


def scored() -> Pairs:
    policy, reference, num_tokens = (list(column) for column in zip(*ROWS, strict=True))
    return Pairs(
        torch.tensor(policy, dtype=torch.float64),
        torch.tensor(reference, dtype=torch.float64),
        torch.tensor(num_tokens),
        scores_B2=torch.tensor(SCORES, dtype=torch.float64),
    )


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def expected(name: str, beta: float, setting: float, row: tuple[tuple[float, ...], ...]) -> float:
    (policy_w, policy_l), (reference_w, reference_l), (tokens_w, tokens_l), (score_w, score_l) = row
    ratio_w, ratio_l = policy_w - reference_w, policy_l - reference_l
    margin = beta * (ratio_w - ratio_l)
    match name:
        case "sigmoid":
            return -log_sigmoid(margin)
        case "cdpo":
            return -(1 - setting) * log_sigmoid(margin) - setting * log_sigmoid(-margin)
        case "ipo":
            return (ratio_w / tokens_w - ratio_l / tokens_l - 1 / (2 * beta)) ** 2
        case "hinge":
            return max(0.0, 1 - margin)
        case "dpop":
            return -log_sigmoid(margin - beta * setting * max(0.0, reference_w - policy_w))
        case "r_dpo":
            return -log_sigmoid(margin + setting * (tokens_w - tokens_l))
        case "soft_label":  # a vote is a pair
            votes = [margin] * int(score_w) + [-margin] * int(score_l)
            return -sum(map(log_sigmoid, votes)) / len(votes)
        case "rpo_bwd_kl":
            wanted, found = ([1 / (1 + math.exp(-x)), 1 / (1 + math.exp(x))] for x in
                             (setting * (score_w - score_l), margin))  # fmt: skip
            return sum(p * math.log(p / q) for p, q in zip(wanted, found, strict=True))
        case "alphapo":
            shaped = [(1 - math.exp(logp / tokens) ** -setting) / setting
                      for logp, tokens in ((policy_w, tokens_w), (policy_l, tokens_l))]  # fmt: skip
            return -log_sigmoid(beta * (shaped[0] - shaped[1]) - 0.7)
    raise AssertionError(name)


FORMULAS: list[tuple[str, dict[str, float]]] = [
    ("sigmoid", {}),
    ("cdpo", {"label_smoothing": 0.1}),
    ("cdpo", {"label_smoothing": 0.4}),
    ("ipo", {}),
    ("hinge", {}),
    ("dpop", {"dpop_lambda": 50.0}),
    ("dpop", {"dpop_lambda": 0.3}),
    ("r_dpo", {"rdpo_alpha": 0.01}),
    ("r_dpo", {"rdpo_alpha": 0.2}),
    ("soft_label", {}),
    ("rpo_bwd_kl", {"rpo_eta": 1.0}),
    ("rpo_bwd_kl", {"rpo_eta": 0.1}),
    ("alphapo", {"alphapo_alpha": 0.25, "gamma": 0.7}),
    ("alphapo", {"alphapo_alpha": -0.5, "gamma": 0.7}),
]


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize(("name", "settings"), FORMULAS, ids=str)
def test_a_loss_is_its_formula(name: str, settings: dict[str, float], beta: float) -> None:
    losses = named(name, scored(), beta, **settings)
    assert losses.dtype == torch.float64
    setting = next(iter(settings.values()), 0.0)
    formula = [expected(name, beta, setting, (*row, scores)) for row, scores in zip(ROWS, SCORES, strict=True)]
    assert losses.tolist() == pytest.approx(formula, rel=1e-9, abs=1e-12)


WITH_A_SLOPE = [
    name
    for name, info in LOSSES.items()
    if not (info.is_ranking or info.is_unpaired) and name != "beta_dpo"  # whose beta is held fixed: see below
]


@pytest.mark.parametrize("name", WITH_A_SLOPE)
def test_the_gradient_of_a_loss_is_its_slope(name: str) -> None:
    """By central differences of all log-probabilities, away from where a loss has a corner."""
    needed = {"label_smoothing": 0.2} if "label_smoothing" in LOSSES[name].needs else {}

    def total(policy_B2: torch.Tensor) -> torch.Tensor:
        return named(name, replace(scored(), policy_B2=policy_B2), 0.3, **needed, rdpo_alpha=0.1, gamma=0.4).sum()

    policy = (scored().policy_B2 - 0.003 * torch.arange(1, 11).view(5, 2) ** 2).requires_grad_()
    (gradient,) = torch.autograd.grad(total(policy), policy)
    assert torch.autograd.gradcheck(total, policy, eps=1e-6, atol=1e-6)
    assert gradient.abs().max() > 1e-3


def test_alphapo_at_alpha_0_is_simpo() -> None:
    simpo, near, at = (
        named(name, scored(), 2.0, gamma=0.5, **settings)
        for name, settings in (("simpo", {}), ("alphapo", {"alphapo_alpha": 1e-7}), ("alphapo", {"alphapo_alpha": 0.0}))
    )
    assert torch.equal(at, simpo)
    torch.testing.assert_close(near, simpo, rtol=1e-5, atol=1e-6)


def test_a_wanted_margin_costs_nothing() -> None:
    """rpo_bwd_kl is a divergence: 0 where the margin is eta times the difference of scores, and above it elsewhere."""
    policy = torch.tensor([[5.0, 0.0], [5.1, 0.0], [4.9, 0.0]], dtype=torch.float64)
    zero = torch.zeros_like(policy)
    pairs = Pairs(policy, zero, zero + 1, scores_B2=torch.tensor([[4.0, 2.0]] * 3))
    at, *around = named("rpo_bwd_kl", pairs, 0.2, rpo_eta=0.5).tolist()
    assert abs(at) < 1e-15
    assert min(around) > 1e-5


@pytest.mark.parametrize("usual", [0.0, 0.4, 50.0])
def test_beta_dpo_is_the_sigmoid_loss_with_a_beta_of_the_batch(usual: float) -> None:
    """Value and gradient; a batch far below the usual margin has the least beta, a thousandth."""
    pairs = replace(scored(), policy_B2=scored().policy_B2.requires_grad_(), usual_margin=usual)
    margins = [0.1 * (own - ref - other + its_ref) for (own, other), (ref, its_ref), _ in ROWS]
    beta = max(1e-3, 0.1 * (1 + 0.6 * (sum(margins) / len(margins) - usual)))
    (ours, slopes), (plain, plain_slopes) = (
        (losses, torch.autograd.grad(losses.sum(), pairs.policy_B2)[0])
        for losses in (named("beta_dpo", pairs, 0.1, beta_dpo_alpha=0.6), sigmoid(pairs, beta))
    )
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=0)
    torch.testing.assert_close(slopes, plain_slopes, rtol=1e-12, atol=0)


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


@pytest.mark.parametrize(
    "name", ["sigmoid", "cdpo", "hinge", "ipo", "dpop", "r_dpo", "soft_label", "rpo_bwd_kl", "beta_dpo", "alphapo"]
)
@pytest.mark.parametrize("margin", [-1e6, 1e6])
def test_no_margin_is_too_large(name: str, margin: float) -> None:
    policy = torch.tensor([[margin, 0.0]], dtype=torch.float64, requires_grad=True)
    loss = named(name, Pairs(policy, torch.zeros(1, 2), torch.ones(1, 2), scores_B2=torch.tensor([[2, 1]])), 0.1, 0.1)
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
