"""Every objective that TRL 1.16 has, value and gradient, on random log-probabilities.

TRL's own code is run: ``DPOTrainer._compute_loss`` on a model that returns given log-probabilities,
``CPOTrainer.cpo_loss`` and ``ORPOTrainer.odds_ratio_loss``. All in float64 where TRL lets it be.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dpo_cli.core.params import TrainParams
from dpo_cli.data.tokens import TokenGroup
from dpo_cli.losses.catalogue import LOSSES
from dpo_cli.losses.changes import shared_length_logps
from dpo_cli.losses.pairwise import Pairs
from dpo_cli.losses.reference_free import orpo
from dpo_cli.scoring.head import TokenStatistics
from dpo_cli.scoring.scorer import Scores
from dpo_cli.training.objective import PairObjective, UnpairedObjective

TOLERANCE = 1e-6
NUM_PAIRS = 7


@dataclass(frozen=True)
class Batch:
    """Random pairs: log-probabilities of every token, right-padded, with a prompt of one token before."""

    policy: torch.Tensor  # float64 [2 B, T], chosen rows first
    reference: torch.Tensor
    log_sum_sq: torch.Tensor
    lengths: torch.Tensor  # int64 [2 B]

    @classmethod
    def draw(cls, seed: int, dtype: torch.dtype = torch.float64) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(1, 9, (2 * NUM_PAIRS,), generator=generator)
        shape = (2 * NUM_PAIRS, int(lengths.max()))
        reference = -3 * torch.rand(shape, generator=generator, dtype=torch.float64)
        policy = (reference + 0.6 * torch.randn(shape, generator=generator, dtype=torch.float64)).clamp(max=-1e-3)
        log_sum_sq = -2 * torch.rand(shape, generator=generator, dtype=torch.float64)
        return cls(policy.to(dtype).requires_grad_(), reference.to(dtype), log_sum_sq.to(dtype), lengths)

    @property
    def mask(self) -> torch.Tensor:
        """bool [2 B, T], the tokens that are there."""
        return torch.arange(self.policy.shape[1]) < self.lengths[:, None]

    def sums(self, values: torch.Tensor) -> torch.Tensor:
        """[2 B]."""
        return (values * self.mask).sum(1)


def trl_loss(batch: Batch, names: list[str], weights: list[float], **settings: Any) -> torch.Tensor:
    """The loss that TRL's DPOTrainer makes of a batch."""
    from trl import DPOTrainer

    zeros = torch.zeros_like(batch.policy)
    completion_mask = torch.cat([torch.zeros(len(zeros), 1, dtype=torch.long), batch.mask.long()], dim=1)

    def model(**_: Any) -> SimpleNamespace:
        return SimpleNamespace(
            log_probs=batch.policy * batch.mask,  # as TRL's head leaves them
            log_sum_sq_probs=batch.log_sum_sq,
            entropy=zeros,
            mean_logits=zeros,
            is_top1=torch.ones_like(batch.mask),
        )

    reference = batch.sums(batch.reference)
    if settings.get("ld_alpha") is not None:
        reference = shared_length_of(batch, batch.reference, settings["ld_alpha"]).T.reshape(-1)
    model.training = True  # type: ignore[attr-defined]
    accelerator = SimpleNamespace(
        device=torch.device("cpu"), gather=lambda value: value, gather_for_metrics=lambda value: value
    )
    trainer = SimpleNamespace(
        model=model,
        accelerator=accelerator,
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        loss_types=names,
        loss_weights=weights,
        beta=settings.get("beta", 0.1),
        ld_alpha=settings.get("ld_alpha"),
        label_smoothing=settings.get("label_smoothing", 0.0),
        f_divergence_type=settings.get("f_divergence_type", "reverse_kl"),
        f_alpha_divergence_coef=settings.get("f_alpha_divergence_coef", 0.5),
        use_weighting=settings.get("use_weighting", False),
        args=SimpleNamespace(discopop_tau=settings.get("discopop_tau", 0.05)),
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {
        "input_ids": torch.zeros_like(completion_mask),
        "attention_mask": torch.ones_like(completion_mask),
        "completion_mask": completion_mask,
        "ref_chosen_logps": reference[:NUM_PAIRS],
        "ref_rejected_logps": reference[NUM_PAIRS:],
    }
    return DPOTrainer._compute_loss(trainer, model, inputs, return_outputs=False)  # type: ignore[arg-type]


def in_pairs(values: torch.Tensor) -> torch.Tensor:
    """[2 B, ...], chosen rows first, as [B, 2, ...]."""
    return torch.stack([values[:NUM_PAIRS], values[NUM_PAIRS:]], dim=1)


def flat_tokens(batch: Batch, values: torch.Tensor) -> torch.Tensor:
    """[M], the tokens that are there, pair after pair."""
    return in_pairs(values)[in_pairs(batch.mask)]


def shared_length_of(batch: Batch, values: torch.Tensor, weight: float) -> torch.Tensor:
    """[B, 2]."""
    return shared_length_logps(flat_tokens(batch, values), in_pairs(batch.lengths), weight)


def our_loss(batch: Batch, settings: TrainParams) -> torch.Tensor:
    """The loss that our objective makes of it."""
    lengths = in_pairs(batch.lengths)
    groups = [
        TokenGroup(str(index), str(index), (0,), tuple((0,) * int(length) for length in row))
        for index, row in enumerate(lengths)
    ]
    reference = in_pairs(batch.sums(batch.reference))
    shared = shared_length_of(batch, batch.reference, settings.ld_alpha or 0.0)
    by_id, shared_by_id = (
        {group.id: row for group, row in zip(groups, values.tolist(), strict=True)} for values in (reference, shared)
    )
    tokens, squares = flat_tokens(batch, batch.policy), flat_tokens(batch, batch.log_sum_sq)
    statistics = TokenStatistics(torch.zeros_like(squares), torch.zeros_like(squares), squares)
    scores = Scores(in_pairs(batch.sums(batch.policy)).double(), lengths, tokens, statistics)
    objective = PairObjective(settings, by_id, shared_by_id)
    return objective.losses(groups, scores, groups).losses_B.sum() / objective.weight(groups)


def assert_equal(ours: torch.Tensor, trls: torch.Tensor, policy: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    """Values and gradients."""
    (our_grad,) = torch.autograd.grad(ours, policy, retain_graph=True)
    (trl_grad,) = torch.autograd.grad(trls, policy)
    assert ours.item() == pytest.approx(trls.item(), abs=tolerance, rel=tolerance)
    assert trl_grad.abs().max() > 1e-3, "a gradient of nothing proves nothing"
    torch.testing.assert_close(our_grad, trl_grad, atol=tolerance, rtol=tolerance)


SMOOTHED = {"robust": 0.1, "exo_pair": 1e-3, "aot": 0.1, "aot_unpaired": 0.2}
PLAIN = [
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
]  # fmt: skip


def test_these_are_all_that_trl_has() -> None:
    """Read off the message with which TRL refuses an unknown one; ours have the same names."""
    with pytest.raises(ValueError, match="Unknown loss type") as refusal:
        trl_loss(Batch.draw(0), ["nonsense"], [1.0])
    names = str(refusal.value).split("[")[1].rstrip("]").replace("'", "").split(", ")
    assert sorted(names) == sorted(PLAIN)
    assert set(PLAIN) <= set(LOSSES)


DIVERGENCES = {"forward_kl": "forward_kl", "js": "js_divergence", "alpha": "alpha_divergence"}


def cases() -> Iterator[Any]:
    """A loss or a mixture, settings that have one name in both, and our divergence."""
    for name in PLAIN:
        smoothing = {"label_smoothing": SMOOTHED[name]} if name in SMOOTHED else {}
        reads = LOSSES[name].reads
        several: list[tuple[dict[str, Any], str | None]] = [({"beta": beta} | smoothing, None) for beta in (0.1, 1.0)]
        several += [({}, None)] if name.startswith("aot") else []
        several += [({"discopop_tau": 1.0, "beta": 0.5}, None)] if name == "discopop" else []
        several += [({"ld_alpha": weight} | smoothing, None) for weight in (0.0, 0.4) if "ld_alpha" in reads]
        several += [(smoothing, divergence) for divergence in DIVERGENCES if "divergence" in reads]
        for settings, divergence in several:
            said = [name, divergence, *(f"{key}={value}" for key, value in settings.items())]
            yield pytest.param({name: 1.0}, settings, divergence, id=" ".join(filter(None, said)))
    yield {"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0}, {"beta": 0.5}, None
    yield {"ipo": 2.0, "apo_zero": 0.1}, {"beta": 0.5}, None
    yield {"sigmoid": 1.0, "sft": 1.0}, {"ld_alpha": 0.4}, None  # the SFT term reads the plain sums, with TRL and here


@pytest.mark.parametrize(("mixture", "settings", "divergence"), cases())
def test_a_loss_is_trls(mixture: Any, settings: dict[str, Any], divergence: Any) -> None:
    """TRL's alpha-divergence knows no float64 and clamps what would overflow: there it is float32."""
    batch = Batch.draw(0, torch.float32 if divergence == "alpha" else torch.float64)
    ours, theirs = {}, {}
    if divergence:
        theirs = {"f_divergence_type": DIVERGENCES[divergence], "f_alpha_divergence_coef": 0.3}
        ours = {"divergence": divergence} | ({"divergence_alpha": 0.3} if divergence == "alpha" else {})
    trls = trl_loss(batch, list(mixture), list(mixture.values()), **settings, **theirs)
    loss = mixture if len(mixture) > 1 else next(iter(mixture))
    assert_equal(our_loss(batch, TrainParams(loss=loss, **settings, **ours)), trls, batch.policy)


@pytest.mark.parametrize("name", [name for name in PLAIN if "weighting" in LOSSES[name].reads])
def test_wpo_is_trls(name: Any) -> None:
    """But for hinge, which TRL cannot differentiate with weights: it multiplies what relu has saved in place."""
    batch = Batch.draw(8)
    smoothing = SMOOTHED.get(name, 0.0)
    trls = trl_loss(batch, [name], [1.0], label_smoothing=smoothing, use_weighting=True)
    ours = our_loss(batch, TrainParams(loss=name, label_smoothing=smoothing, weighting="wpo"))
    (gradient,) = torch.autograd.grad(ours, batch.policy, retain_graph=True)
    assert ours.item() == pytest.approx(trls.item(), rel=TOLERANCE)
    if name == "hinge":
        return
    torch.testing.assert_close(gradient, torch.autograd.grad(trls, batch.policy)[0], atol=TOLERANCE, rtol=TOLERANCE)
    assert gradient.abs().max() > 1e-5


# --- without a reference ------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["cpo", "simpo", "alphapo"])
def test_cpo_simpo_and_alphapo_are_trls(kind: str, smoothing: float) -> None:
    from trl.experimental.cpo import CPOTrainer

    batch = Batch.draw(6)
    lengths, beta, gamma = in_pairs(batch.lengths), 2.0, 0.7
    sums = in_pairs(batch.sums(batch.policy))
    trainer = SimpleNamespace(
        alpha=0.25 if kind == "alphapo" else 0.0,
        loss_type="sigmoid" if kind == "cpo" else "simpo",
        beta=beta,
        simpo_gamma=gamma,
        label_smoothing=smoothing,
        accelerator=SimpleNamespace(device=torch.device("cpu")),
    )
    seen = sums if kind == "cpo" else sums / lengths
    trls = CPOTrainer.cpo_loss(trainer, seen[:, 0], seen[:, 1])[0]  # type: ignore[arg-type]
    pairs = Pairs(sums, torch.zeros_like(sums), lengths)
    settings = TrainParams(beta=beta, gamma=gamma, alphapo_alpha=0.25, label_smoothing=smoothing)
    ours = LOSSES[kind].of(pairs, settings)
    assert_equal(ours.mean(), trls.mean(), batch.policy)


def test_orpo_is_trls() -> None:
    """TRL's is float32, and its sign is turned by its caller."""
    from trl.experimental.orpo import ORPOTrainer

    batch = Batch.draw(7)
    lengths, beta = in_pairs(batch.lengths), 0.5
    sums = in_pairs(batch.sums(batch.policy))
    trainer = SimpleNamespace(beta=beta, accelerator=SimpleNamespace(device=torch.device("cpu")))
    mean = sums / lengths
    trls = -ORPOTrainer.odds_ratio_loss(trainer, mean[:, 0], mean[:, 1])[0]  # type: ignore[arg-type]
    assert_equal(orpo(Pairs(sums, torch.zeros_like(sums), lengths), beta).mean(), trls.mean(), batch.policy, 1e-6)


# --- single answers ------------------------------------------------------------------------------


@pytest.mark.parametrize("labels", [[1, 0, 1, 1, 0, 0, 1], [1] * 7, [0] * 7])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.3, 0.6)])
def test_kto_is_trls(labels: list[int], weights: tuple[float, float]) -> None:
    """TRL's ``KTOTrainer._compute_loss`` on the same answers and the same answers of other prompts."""
    from trl import KTOTrainer

    batch = Batch.draw(9)  # the first rows are the rows' own answers, the rest those of other prompts
    own, other = slice(0, NUM_PAIRS), slice(NUM_PAIRS, None)
    logps = (batch.policy * batch.mask)[own], (batch.policy * batch.mask)[other]
    ids = torch.zeros(NUM_PAIRS, batch.policy.shape[1] + 1, dtype=torch.long)

    def model(input_ids: torch.Tensor, **_: Any) -> SimpleNamespace:
        found = logps[int(input_ids[0, 0])]
        return SimpleNamespace(log_probs=found, entropy=torch.zeros_like(found), mean_logits=torch.zeros_like(found))

    model.training = True  # type: ignore[attr-defined]
    accelerator = SimpleNamespace(
        device=torch.device("cpu"), gather=lambda value: value, gather_for_metrics=lambda value: value
    )
    trainer = SimpleNamespace(
        model=model,
        accelerator=accelerator,
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        calculate_KL=True,
        loss_type="kto",
        beta=0.5,
        desirable_weight=weights[0],
        undesirable_weight=weights[1],
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    trainer._compute_kl_logps = lambda model, batch: KTOTrainer._compute_kl_logps(trainer, model, batch)  # type: ignore[attr-defined, arg-type]
    reference = batch.sums(batch.reference)
    mask = torch.ones_like(ids)
    inputs = {"input_ids": ids, "attention_mask": mask, "completion_mask": mask}
    inputs |= {f"KL_{name}": value for name, value in inputs.items()} | {"KL_input_ids": ids + 1}
    inputs |= {
        "label": torch.tensor(labels, dtype=torch.bool),
        "ref_logps": reference[own],
        "ref_KL_logps": reference[other],
    }
    trls = KTOTrainer._compute_loss(trainer, model, inputs, return_outputs=False)  # type: ignore[arg-type]
    lengths = in_pairs(batch.lengths)
    groups = [
        TokenGroup(str(index), str(index), (0,), tuple((0,) * int(length) for length in row))
        for index, row in enumerate(lengths)
    ]
    scores = Scores(in_pairs(batch.sums(batch.policy)), lengths, flat_tokens(batch, batch.policy), None)
    settings = TrainParams(loss="kto", beta=0.5, desirable_weight=weights[0], undesirable_weight=weights[1])
    rows = dict(zip(map(str, range(NUM_PAIRS)), in_pairs(reference).tolist(), strict=True))
    objective = UnpairedObjective(settings, rows, {group.id: labels[int(group.id)] > 0 for group in groups})
    ours = objective.losses(groups, scores, groups)
    assert_equal(ours.losses_B.sum() / objective.weight(groups), trls, batch.policy)
    logged = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    for name, theirs in {"kl": "kl"}.items():
        assert ours.metrics[name].mean().item() == pytest.approx(logged[theirs], abs=TOLERANCE)
