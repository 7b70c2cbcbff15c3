"""Objectives as the training loop sees them: each can be learned, and none depends on how memory deals out groups."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from dpo_cli.core.errors import ParamsError
from dpo_cli.core.interrupts import StopRequest
from dpo_cli.core.load_params import parse_params
from dpo_cli.core.params import RuntimeParams, TrainParams
from dpo_cli.data.tokens import TokenGroup
from dpo_cli.losses.catalogue import LOSSES
from dpo_cli.losses.changes import shared_length_logps
from dpo_cli.models.project import Workplace
from dpo_cli.scoring.head import TokenStatistics
from dpo_cli.scoring.scorer import Scorer, Scores
from dpo_cli.training.accumulation import Accumulator, Limits, Means
from dpo_cli.training.gate import check_step_zero
from dpo_cli.training.objective import PairObjective, PreferenceObjective, preference_objective
from dpo_cli.training.protocols import Learner
from tests.small_training import CPU, train
from tests.waiting import NoWaiting

Sides = Mapping[str, Sequence[torch.Tensor]]
"""Log-probabilities of each token, by row id and completion."""
NEEDED = {"label_smoothing": 0.1, "gamma": 0.5, "rdpo_alpha": 0.05, "weighting": "none"}


def section(loss: Any, **changes: Any) -> TrainParams:
    """Section train with a loss and what it needs, as params.yaml would be read."""
    names = list(loss) if isinstance(loss, dict) else [loss]
    needed = {name: NEEDED[name] for loss_name in names for name in LOSSES[loss_name].needs}
    settings = {"learning_rate": 1e-3, "batch_size": 8, "epochs": 1.0, "eval_steps": 0, **needed, **changes}
    return parse_params({"train": {"loss": loss, **settings}}).train


@pytest.fixture(scope="module")
def groups(make_groups: Callable[..., list[TokenGroup]]) -> list[TokenGroup]:
    return make_groups(16, seed=1)


@pytest.fixture(scope="module")
def scorer(policy: Callable[..., Any]) -> Iterator[Scorer]:
    """Of a policy that no test changes."""
    model = policy()
    model.eval()
    with Scorer(model, torch.float32, "shared") as opened:
        opened.model = model  # type: ignore[attr-defined]
        yield opened


@torch.no_grad()
def sides_of(scorer: Scorer, groups: Sequence[TokenGroup]) -> dict[str, list[torch.Tensor]]:
    found = {}
    for group in groups:
        found[group.id] = list(scorer.score([group]).token_logps_M.split([*map(len, group.completions)]))
    return found


def moved(sides: Sides, by: float) -> dict[str, list[torch.Tensor]]:
    """Tokens of second answers are likelier by so much, and so on; all of an answer by a little that no other has."""
    rng = random.Random(0)
    return {
        name: [side + by * place + rng.uniform(-0.05, 0.05) for place, side in enumerate(each)]
        for name, each in sides.items()
    }


def objective_of(
    settings: TrainParams, sides: Sides, ranks: Mapping[str, Sequence[int]] | None = None
) -> PreferenceObjective:
    """The objective against a reference that has these log-probabilities; each row has another gap of its scores."""
    reference = {name: [side.double().sum().item() for side in each] for name, each in sides.items()}
    shared = {}
    for name, each in sides.items() if settings.ld_alpha is not None else ():
        lengths = torch.tensor([[len(side) for side in each]])
        shared[name] = shared_length_logps(torch.cat([*each]), lengths, settings.ld_alpha or 0.0)[0].tolist()
    scores = {name: (1 + 0.5 * index, 1.0) for index, name in enumerate(sides)}
    good = {name: index % 3 > 0 for index, name in enumerate(sides)}
    return preference_objective(settings, reference, shared_length=shared, scores=scores, ranks=ranks, good=good)


def step(
    model: Any, scorer: Scorer, objective: PreferenceObjective, groups: Sequence[TokenGroup], max_tokens: int
) -> tuple[Means, torch.Tensor, Accumulator[Scores]]:
    """The means and the gradient of a batch, and what they were made by."""
    work = Workplace("train", None, RuntimeParams(), CPU)  # type: ignore[arg-type]  # nothing is reported
    accumulator = Accumulator(Learner(model, scorer, objective), Limits.of(work, max_tokens), StopRequest())
    model.zero_grad()
    means, _ = accumulator.gradient(groups, 0)
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    return means, torch.cat([parameter.grad.flatten() for parameter in parameters]), accumulator


CHANGED: dict[str, dict[str, Any]] = {
    "label_smoothing": {"label_smoothing": 0.2},
    "gamma": {"gamma": 0.3},
    "discopop_tau": {"discopop_tau": 0.5},
    "unlikelihood_alpha": {"unlikelihood_alpha": 0.3},
    "dpop_lambda": {"dpop_lambda": 5.0},
    "rdpo_alpha": {"rdpo_alpha": 0.2},
    "beta_dpo_alpha": {"beta_dpo_alpha": 0.3},
    "alphapo_alpha": {"alphapo_alpha": 0.5},
    "rpo_eta": {"rpo_eta": 0.4},
    "desirable_weight": {"desirable_weight": 1.5},
    "undesirable_weight": {"undesirable_weight": 0.5},
    "divergence": {"divergence": "js"},
    "ld_alpha": {"ld_alpha": 0.3},
    "weighting": {"weighting": "wpo"},
    "margin_scale": {"margin_scale": 0.2},
}
READS = [(name, CHANGED[setting]) for name, info in LOSSES.items() for setting in info.reads if setting in CHANGED]
KINDS: list[tuple[Any, dict[str, Any]]] = [
    *((name, {}) for name in LOSSES if name != "plackett_luce"),
    ({"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0}, {}),
    ({"sigmoid": 1.0, "sft": 0.5}, {"ld_alpha": 0.3}),
    ("sigmoid", {"weighting": "wpo"}),
    ("aot", {"ld_alpha": 0.3}),
    ("sigmoid", {"margin_scale": 0.2}),
    ("sigmoid", {"divergence": "js"}),
    ("ipo", {"divergence": "forward_kl"}),
    ("hinge", {"divergence": "alpha", "divergence_alpha": 0.4}),
]


def check_step(scorer: Any, objective: PreferenceObjective, groups: Sequence[TokenGroup]) -> None:
    """The token budget changes neither the means nor the gradient, and a small step against that lowers the loss."""
    (apart, gradient_apart, _), (means, gradient, accumulator) = (
        step(scorer.model, scorer, objective, groups, max_tokens) for max_tokens in (60, 8192)
    )
    assert apart.loss == pytest.approx(means.loss, rel=1e-5, abs=1e-6)
    assert apart.metrics == pytest.approx(means.metrics, rel=1e-4, abs=2e-5)
    assert (gradient_apart - gradient).norm() <= 1e-4 * gradient.norm()
    trained = [parameter for parameter in scorer.model.parameters() if parameter.grad is not None]
    before = [parameter.detach().clone() for parameter in trained]
    with torch.no_grad():
        for parameter in trained:
            parameter -= 0.02 / gradient.norm() * parameter.grad
        after = accumulator.measure(groups).loss
        for parameter, value in zip(trained, before, strict=True):
            parameter.copy_(value)
    assert after < means.loss - 1e-5


@pytest.mark.parametrize(("loss", "changes"), KINDS, ids=str)
def test_the_token_budget_changes_no_step_and_a_step_lowers_the_loss(
    loss: Any, changes: Any, scorer: Scorer, groups: list[TokenGroup]
) -> None:
    """Also of losses that compare all pairs of a step, and of those that divide by its tokens."""
    check_step(scorer, objective_of(section(loss, beta=0.5, **changes), moved(sides_of(scorer, groups), 0.1)), groups)


@pytest.mark.parametrize("ties", ["average", "groups"])
def test_rankings_of_any_length_make_a_step_together(
    ties: str, scorer: Scorer, make_groups: Callable[..., list[TokenGroup]]
) -> None:
    groups = [
        replace(group, id=f"{count} {group.id}", group=f"{count} {group.group}")
        for count in (2, 3, 5)
        for group in make_groups(6, completions=count, seed=count)
    ]
    ranks = {
        group.id: [1, 2, 2, 3, 4][: len(group.completions)] if index % 2 else [*range(1, len(group.completions) + 1)]
        for index, group in enumerate(groups)
    }
    changes = {} if ties == "average" else {"ties": ties}
    settings = section("plackett_luce", beta=0.5, **changes)
    check_step(scorer, objective_of(settings, moved(sides_of(scorer, groups), 0.1), ranks), groups)


def scores_with(device: str, groups: Sequence[TokenGroup]) -> Scores:
    """Random log-probabilities that no model gave; gradients are those of the tokens'."""
    lengths = torch.tensor([[*map(len, group.completions)] for group in groups])
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(4, int(lengths.sum()), generator=generator).to(device)
    tokens_M = (-3 * values[0]).requires_grad_()
    owners = torch.arange(lengths.numel()).repeat_interleave(lengths.flatten()).to(device)
    sums = torch.zeros(lengths.numel(), dtype=torch.float64, device=device).index_add(0, owners, tokens_M.double())
    statistics = TokenStatistics(values[1], values[2].round(), -values[3])
    return Scores(sums.view(lengths.shape), lengths.to(device), tokens_M, statistics)


@pytest.mark.parametrize(("loss", "changes"), READS, ids=str)
def test_what_an_objective_reads_changes_its_losses(loss: Any, changes: Any, groups: list[TokenGroup]) -> None:
    """For every setting that the table of objectives says it reads."""
    reference = scores_with("cpu", groups).token_logps_M.detach()
    lengths = [[*map(len, group.completions)] for group in groups]
    parts = iter((reference * 0.9).split([length for each in lengths for length in each]))
    sides = {group.id: [next(parts) for _ in each] for group, each in zip(groups, lengths, strict=True)}
    found = []
    for settings in (section(loss, beta=0.5), section(loss, beta=0.5, **changes)):
        scores = scores_with("cpu", groups)
        losses = objective_of(settings, sides).losses(groups, scores, groups).losses_B
        (gradient,) = torch.autograd.grad(losses.sum(), scores.token_logps_M)
        assert gradient.isfinite().all()
        assert gradient.abs().max() > 0
        found.append(losses.detach())
    assert not torch.allclose(found[0], found[1], rtol=1e-6), "it changes nothing"


@pytest.mark.parametrize("setting", CHANGED)
def test_the_gate_compares_what_the_objective_reads(setting: str, scorer: Any, groups: list[TokenGroup]) -> None:
    loss = next(name for name, info in LOSSES.items() if setting in info.reads)
    objective = objective_of(section(loss, beta=0.5, **CHANGED[setting]), sides_of(scorer, groups))
    check_step_zero(scorer.model, scorer, objective, groups, 200)


def test_a_mixture_gives_each_loss_the_sums_that_it_reads(scorer: Scorer, groups: list[TokenGroup]) -> None:
    """With ld_alpha the SFT term still trains every token of the chosen answer."""
    sides, scores = sides_of(scorer, groups), scorer.score(groups)
    alone, both, sft = (
        objective_of(section(loss, **changes), sides).losses(groups, scores, groups).losses_B
        for loss, changes in (
            ("sigmoid", {"ld_alpha": 0.0}),
            ({"sigmoid": 1.0, "sft": 0.5}, {"ld_alpha": 0.0}),
            ("sft", {}),
        )
    )
    torch.testing.assert_close(both, alone + 0.5 * sft)


def test_a_gradient_that_is_no_number_stops_before_the_step(
    policy: Callable[..., Any],
    groups: list[TokenGroup],
    tmp_path: Any,
    reporter: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = policy()
    before = {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}
    first = next(parameter for parameter in model.parameters() if parameter.requires_grad)
    scorer = Scorer(model, torch.float32)
    objective = objective_of(section("sigmoid"), sides_of(scorer, groups))
    scorer_pass = Scorer.score

    def poisoned(self: Scorer, groups: Sequence[TokenGroup], **asked: Any) -> Any:
        if torch.is_grad_enabled() and not first._backward_hooks:
            first.register_hook(lambda gradient: gradient / 0.0)
        return scorer_pass(self, groups, **asked)

    monkeypatch.setattr(Scorer, "score", poisoned)
    with pytest.raises(ParamsError, match=r"train\.learning_rate is too high: the gradient became inf at step 1"):
        train(Learner(model, scorer, objective), (groups, groups), tmp_path, reporter, section("sigmoid"))
    after = {name: value for name, value in model.named_parameters() if value.requires_grad}
    assert all(torch.equal(after[name], value) for name, value in before.items())


# --- losses of a whole batch --------------------------------------------------------------


@pytest.mark.parametrize("loss", [name for name, info in LOSSES.items() if info.is_coupled])
def test_a_coupled_loss_has_the_gradient_of_the_whole_batch(loss: Any, scorer: Any, groups: list[TokenGroup]) -> None:
    """What two passes over micro-batches of single pairs give is what autograd gives through all at once."""
    objective = objective_of(section(loss, beta=0.5), moved(sides_of(scorer, groups), 0.1))
    trained = [parameter for parameter in scorer.model.parameters() if parameter.requires_grad]
    whole = torch.autograd.grad(objective.losses(groups, scorer.score(groups), groups).losses_B.mean(), trained)
    _, gradient, _ = step(scorer.model, scorer, objective, groups, 1)
    expected = torch.cat([each.flatten() for each in whole])
    assert (gradient - expected).norm() <= 1e-5 * expected.norm()


def test_a_coupled_loss_drops_the_same_in_both_passes(
    policy: Callable[..., Any], groups: list[TokenGroup], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dropout, what a log-probability weighs and its gradient are of one and the same random network."""
    seen: dict[bool, list[torch.Tensor]] = {False: [], True: []}
    score = Scorer.score
    model = policy(dropout=0.5)
    scorer = Scorer(model, torch.float32, "shared")
    objective = objective_of(section("aot", beta=5.0), moved(sides_of(scorer, groups), 0.1))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)

    def watched(self: Scorer, groups: Sequence[TokenGroup], **asked: Any) -> Any:
        scores = score(self, groups, **asked)
        seen[torch.is_grad_enabled()].append(scores.logps_BK.detach().clone())
        return scores

    monkeypatch.setattr(Scorer, "score", watched)
    model.train()
    step(model, scorer, objective, groups, 1)
    assert len(seen[False]) == len(groups)
    assert torch.equal(torch.cat(seen[False]), torch.cat(seen[True])), "dropout drew other numbers"
    assert len({row.item() for row in torch.cat(seen[True])[:, 0]}) == len(groups)


# --- what is logged, and what is waited for -----------------------------------------------

WAITING: list[tuple[Any, dict[str, Any], list[int] | None]] = [
    *((loss, changes, None) for loss, changes in KINDS),
    ("plackett_luce", {}, [1, 2, 2, 4]),
    ("plackett_luce", {"ties": "groups"}, [1, 2, 2, 4]),
]


@pytest.mark.parametrize(("loss", "changes", "ranks"), WAITING, ids=str)
def test_nothing_waits_for_the_device(
    loss: Any, changes: Any, ranks: list[int] | None, make_groups: Callable[..., list[TokenGroup]]
) -> None:
    """Losses and metrics are queued behind the whole forward pass: what waits for the device waits for all of it."""
    groups = make_groups(3, completions=2 if ranks is None else len(ranks))
    sides = {group.id: [torch.full((len(tokens),), -1.0) for tokens in group.completions] for group in groups}
    objective = objective_of(section(loss, **changes), sides, {group.id: ranks or [] for group in groups})
    scores = scores_with("meta", groups)
    with NoWaiting():
        result = objective.losses(groups, scores, groups)
        result.losses_B.sum().backward()
        torch.stack([result.metrics[name].sum() for name in objective.metric_names])


def test_a_ranking_of_two_is_a_pair(scorer: Scorer, groups: list[TokenGroup]) -> None:
    sides, scores = moved(sides_of(scorer, groups), 0.3), scorer.score(groups)
    ranked = objective_of(section("plackett_luce"), sides, {group.id: [1, 2] for group in groups})
    paired = objective_of(section("sigmoid"), sides)
    assert isinstance(paired, PairObjective)
    ours, theirs = (objective.losses(groups, scores, groups) for objective in (ranked, paired))
    assert torch.equal(ours.losses_B, theirs.losses_B)
    for name, values in theirs.metrics.items():
        assert torch.equal(ours.metrics[name], values), name


def test_the_gradient_weight_is_how_wrong_a_pair_is(scorer: Scorer, groups: list[TokenGroup]) -> None:
    group = groups[0]
    logps = scorer.score([group]).logps_BK[0].tolist()
    objective = PairObjective(TrainParams(beta=2.0), {group.id: [logps[0] + 0.5, logps[1] - 0.25]})
    metrics = objective.losses([group], scorer.score([group]), [group]).metrics
    assert metrics["rewards/margins"].item() == pytest.approx(-1.5)
    assert metrics["gradient_weight"].item() == pytest.approx(1 / (1 + math.exp(-1.5)))
    assert metrics["rewards/ties"].item() == 0
