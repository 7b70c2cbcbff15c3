"""Runs cases on the dry device; import it after the stub is loaded."""

from __future__ import annotations

import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch

from dpo_cli.core.params import TrainParams
from dpo_cli.core.progress import SilentReporter
from dpo_cli.core.training_params import LoraParams
from dpo_cli.data.tokens import TokenGroup
from dpo_cli.dry_run.counts import Counting, Counts
from dpo_cli.dry_run.device import CUDA, dry_cuda, read_backs_give_zeros
from dpo_cli.dry_run.model import DryAccumulator, dry_model, mean_visible_pairs, open_dry_scorer
from dpo_cli.evaluation.decoding import Decoding
from dpo_cli.evaluation.generation import PromptTokens, sample_answers
from dpo_cli.evaluation.kl import sequence_kl
from dpo_cli.models.device import Machine
from dpo_cli.models.shapes import SHAPES, random_pairs
from dpo_cli.scoring.budget import TokenBudget
from dpo_cli.scoring.layout import Layout, lay_out
from dpo_cli.scoring.recompute import KeptBytes, set_recompute
from dpo_cli.scoring.reference import score_groups
from dpo_cli.scoring.reward_scorer import RewardScorer
from dpo_cli.scoring.scorer import Scorer
from dpo_cli.training.memory import kept_bytes
from dpo_cli.training.objective import PairObjective, RewardObjective, SftObjective, preference_objective
from dpo_cli.training.protocols import Learner
from tests.cuda_dry_run.cases import FAMILIES, PASSES, Case


@dataclass
class Outcome:
    """What a case came to.

    Attributes:
        case: Its name.
        seconds: Of this process's CPU that it took.
        error: What was raised, with its place; None where nothing was.
        num_layers: Layers of the model.
        wrong_gradients: Trainable parameters whose gradient is missing, not float32 or not on the device.
        estimated_bytes: What is kept from forward to backward by the estimate that training goes by; None where it was
            not asked for.
        reads: How often numbers were read back, by what read them; in passes, where it is allowed.
        counts: What was counted.
    """

    case: str
    seconds: float = 0.0
    error: str | None = None
    num_layers: int = 0
    wrong_gradients: Sequence[str] = ()
    estimated_bytes: float | None = None
    reads: Counter[str] | None = None
    counts: Counts | None = None

    def as_json(self) -> dict[str, Any]:
        """For a line of its own."""
        counts = self.counts or Counts()
        total = counts.total
        return {
            **{name: value for name, value in vars(self).items() if name != "counts"},
            "kernels": total.kernels,
            "bytes": total.bytes,
            "flops": total.flops,
            "by_kind": {kind: vars(work) for kind, work in counts.by_kind.items()},
            "base_bytes": counts.base_bytes,
            "peak_bytes": counts.peak_bytes,
            "async_copies": counts.num_async_copies,
            "blocking_copies": counts.blocking_copies,
            "read_backs": counts.read_backs,
            "strays": counts.strays,
        }


def run(case: Case) -> Outcome:
    """Do a case's work on the dry device."""
    outcome, counting, begun = Outcome(str(case)), Counting(), time.process_time()
    in_pieces = case.layout == "pieces"
    capability = (7, 5) if in_pieces and case.dtype == "float16" else (8, 9)
    with dry_cuda(capability, allocated_bytes=lambda: counting.live_bytes, has_varlen=not in_pieces), counting:
        try:
            _run(case, counting, outcome)
        except Exception as raised:
            lines = str(raised).strip().splitlines() or [""]
            outcome.error = f"{type(raised).__name__}: {lines[0][:200]} at {_where(raised)}"
        outcome.counts = counting.counts
    outcome.seconds = time.process_time() - begun
    return outcome


def _run(case: Case, counting: Counting, outcome: Outcome) -> None:
    shape = {"model_type": case.model, **FAMILIES[case.model]} if case.model in FAMILIES else SHAPES[case.model]
    machine = Machine(CUDA, getattr(torch, case.dtype))
    model = dry_model(shape, machine, case.quantization, LoraParams())
    scorer = open_dry_scorer(model, machine, "shared" if case.layout == "pieces" else case.layout)  # type: ignore[arg-type]
    outcome.num_layers = scorer.config.num_hidden_layers
    groups = random_pairs("harmless", case.num_pairs, scorer.config.vocab_size)
    counting.attention_pairs = mean_visible_pairs(scorer, groups, case.max_tokens)
    if case.work in PASSES:
        outcome.reads = Counter()
        counting.restart()
        with read_backs_give_zeros(lambda name: outcome.reads.update([name])):  # type: ignore[union-attr]
            _PASSES[case.work](case, model, scorer, groups)
        return
    with _FAULTS.get(case.fault, nullcontext)():
        if case.model in SHAPES:
            tokens = lay_out(groups, scorer.layout).num_tokens
            outcome.estimated_bytes = kept_bytes(model, scorer, groups).of(case.grade, tokens)  # type: ignore[arg-type]
        set_recompute(model, case.grade)  # type: ignore[arg-type]
        accumulator = _accumulator(case, model, scorer, groups)
        model.train()
        counting.restart()
        accumulator.gradient(_first(groups) if case.work == "stage/sft" else groups, 0)
        outcome.wrong_gradients = list(_wrong_gradients(model))


# --- training -----------------------------------------------------------------------------


def _accumulator(case: Case, model: Any, scorer: Scorer, groups: Sequence[TokenGroup]) -> DryAccumulator:
    kind, _, loss = case.work.rpartition("/")
    ranks = {group.id: [1, 2] for group in groups}
    if kind == "reward":
        head = torch.nn.Linear(scorer.config.hidden_size, 1, bias=False, device=CUDA)
        objective = RewardObjective(ranks if loss == "plackett_luce" else None)
        return DryAccumulator(Learner(model, RewardScorer(scorer, head), objective), case.max_tokens)
    if kind == "stage":
        return DryAccumulator(Learner(model, scorer, SftObjective()), case.max_tokens)
    reference = {group.id: [-1.0, -2.0] for group in groups}
    objective = preference_objective(
        TrainParams(loss=loss, **dict(case.settings)),  # type: ignore[arg-type]
        reference,
        shared_length=reference,
        scores={group.id: (2.0, 1.0) for group in groups},
        ranks=ranks,
        good={group.id: True for group in groups},
    )
    return DryAccumulator(Learner(model, scorer, objective), case.max_tokens)


def _first(groups: Sequence[TokenGroup]) -> list[TokenGroup]:
    return [replace(group, completions=group.completions[:1]) for group in groups]


def _wrong_gradients(model: torch.nn.Module) -> Iterator[str]:
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.grad is None:
            yield f"{name}: none"
        elif parameter.grad.dtype != torch.float32 or parameter.grad.device != CUDA:
            yield f"{name}: {parameter.grad.dtype} on {parameter.grad.device}"


# --- passes without gradients -------------------------------------------------------------


def _score_reference(case: Case, model: Any, scorer: Scorer, groups: Sequence[TokenGroup]) -> None:
    for _ in score_groups(scorer, groups, TokenBudget(case.max_tokens, "dry run", SilentReporter())):
        pass


def _diverge(case: Case, model: Any, scorer: Scorer, groups: Sequence[TokenGroup]) -> None:
    """One answer of 256 tokens."""
    prompt, answer = groups[0].prompt, tuple(range(1, 257))
    group = TokenGroup("answer", "answer", prompt, (answer,))
    predicted = [scorer.predict([group]) for _ in range(2)]
    for begin in range(0, len(answer), scorer.max_distribution_rows):
        rows = slice(begin, begin + scorer.max_distribution_rows)
        policy, reference = (scorer.next_token_logps(found[rows]) for found in predicted)
        sequence_kl(policy, reference, answer[rows])


def _generate(case: Case, model: Any, scorer: Scorer, groups: Sequence[TokenGroup]) -> None:
    with SilentReporter().meter("", 1, "") as meter:
        sample_answers(
            model.eval(),
            [PromptTokens(group.id, group.prompt) for group in groups],
            Decoding(1.0, 24, (1,), 0, "policy"),
            budget=TokenBudget(case.max_tokens, "dry run", SilentReporter()),
            autocast_dtype=scorer.compute_dtype,
            meter=meter,
        )


_PASSES: dict[str, Callable[[Case, Any, Scorer, Sequence[TokenGroup]], None]] = {
    "reference": _score_reference,
    "kl": _diverge,
    "generation": _generate,
}

# --- what is planted ----------------------------------------------------------------------


@contextmanager
def _after_losses(spoil: Callable[[torch.Tensor], Any]) -> Iterator[None]:
    losses = PairObjective.losses

    def spoiled(*args: Any) -> Any:
        found = losses(*args)
        spoil(found.losses_B)
        return found

    with patch.object(PairObjective, "losses", spoiled):
        yield


@contextmanager
def _waiting() -> Iterator[None]:
    def to(layout: Layout, device: torch.device) -> Layout:
        tensors = {name: value for name, value in vars(layout).items() if isinstance(value, torch.Tensor)}
        return replace(layout, **{name: value.to(device) for name, value in tensors.items()})

    with patch.object(Layout, "to", to):
        yield


@contextmanager
def _left_on_host() -> Iterator[None]:
    move = Layout.to
    with patch.object(Layout, "to", lambda layout, device: replace(move(layout, device), scored_M=layout.scored_M)):
        yield


@contextmanager
def _narrow() -> Iterator[None]:
    gradient = DryAccumulator.gradient

    def narrow(accumulator: DryAccumulator, *args: Any) -> Any:
        for parameter in accumulator._trained:
            parameter.data = parameter.data.bfloat16()
        return gradient(accumulator, *args)

    with patch.object(DryAccumulator, "gradient", narrow):
        yield


@contextmanager
def _off_by(factor: float) -> Iterator[None]:
    of = KeptBytes.of
    with patch.object(KeptBytes, "of", lambda *args: factor * of(*args)):
        yield


_FAULTS: dict[str | None, Callable[[], AbstractContextManager[None]]] = {
    "number read": lambda: _after_losses(lambda losses: losses.sum().item()),
    "tensor read": lambda: _after_losses(lambda losses: losses.detach().cpu()),
    "copy waited for": _waiting,
    "tensor on the host": _left_on_host,
    "narrow gradient": _narrow,
    "estimate too high": lambda: _off_by(1.2),
    "estimate too low": lambda: _off_by(0.8),
}


def _where(raised: BaseException) -> str:
    frames = traceback.extract_tb(raised.__traceback__)
    own = [frame for frame in frames if "/dpo_cli/" in frame.filename and "/dry_run/" not in frame.filename]
    frame = (own or frames)[-1]
    return f"{'/'.join(frame.filename.split('/')[-2:])}:{frame.lineno}"
