"""Our side: the engine, driven as the stages precompute_ref and train drive it."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.comparison.cases import (
    BETA,
    LEARNING_RATE,
    MAX_GRAD_NORM,
    PAIRS_A_STEP,
    Case,
    Logps,
    Meter,
    Outcome,
    Steps,
)
from dpo_cli.core.progress import SilentReporter


class ToStderr(SilentReporter):
    """A reporter that says its lines on standard error."""

    def say(self, text: str) -> None:
        """One line."""
        print(text, file=sys.stderr)

    warn = say


class Watching(ToStderr):
    """Notes when each optimizer step ends, and what memory all of them take."""

    def __init__(self, meter: Meter, case: Case) -> None:
        self._meter = meter
        self._now = case.now
        self.steps = Steps([], [])

    @contextmanager
    def meter(self, label: str, total: int, unit: str) -> Iterator[Watching]:  # type: ignore[override]
        """The training."""
        self._meter.reset()
        yield self
        self.steps.mib = self._meter.peak_mib()

    def advance(self, amount: int) -> None:
        """A step is done, or the steps of an earlier run are counted: none here."""
        if amount:
            self.steps.ends.append(self._now())

    def note(self, text: str) -> None:
        """Nothing."""


def our_references(scorer: Any, groups: Sequence[Any], max_tokens: int) -> list[Logps]:
    """Log-probabilities of pairs, found as the stage precompute_ref finds them."""
    from dpo_cli.scoring.budget import TokenBudget
    from dpo_cli.scoring.reference import missing_groups, score_groups

    budget = TokenBudget(max_tokens, "precompute_ref", ToStderr())
    batches = score_groups(scorer, missing_groups(groups, set(), max_tokens), budget)
    found = {row["key"]: row["logp"] for rows in batches for row in rows}
    return [(found[chosen], found[rejected]) for chosen, rejected in (group.keys for group in groups)]


def run_ours(case: Case) -> Outcome:
    """Our engine, driven as the stages precompute_ref and train drive it."""
    import dpo_cli.training.fit
    from dpo_cli.core.params import RuntimeParams, TrainParams
    from dpo_cli.core.training_params import LoraParams
    from dpo_cli.data.tokens import TokenGroup
    from dpo_cli.models.adapters import FrozenBase, SftResult
    from dpo_cli.models.device import prepare_machine, token_budget
    from dpo_cli.models.project import Workplace
    from dpo_cli.scoring.probe import open_scorer
    from dpo_cli.training.objective import PairObjective
    from dpo_cli.training.parallel import Job
    from dpo_cli.training.protocols import BatchSource, Learner

    pairs, references = case.read()
    groups = [
        TokenGroup(f"{index:04d}", f"{index:04d}", tuple(prompt), (tuple(chosen), tuple(rejected)))
        for index, (prompt, chosen, rejected) in enumerate(pairs)
    ]
    os.chdir(case.workspace)
    runtime = RuntimeParams.model_validate({"device": case.device})
    machine = prepare_machine(runtime, embedded=False)
    sft = SftResult("lora", "")
    policy: Any = FrozenBase(case.base, sft, machine, case.quantization).policy(LoraParams(), 0)
    meter = Meter(case)
    max_tokens = token_budget(runtime, machine.device)
    with open_scorer(policy.eval(), machine.compute_dtype, runtime, ToStderr(), "train")[0] as scorer:
        our_references(scorer, groups[:2], max_tokens)
        meter.reset()
        begun = case.now()
        logps = our_references(scorer, groups[PAIRS_A_STEP:], max_tokens)
        reference_s = case.now() - begun
        reference_mib = meter.peak_mib()

        class InOrder(BatchSource[TokenGroup]):
            def __init__(self, items: Sequence[TokenGroup], batch_size: int, seed: int) -> None:
                self._items = items

            def batch(self, step: int) -> Sequence[TokenGroup]:
                start = step * PAIRS_A_STEP % len(self._items)
                return self._items[start : start + PAIRS_A_STEP]

        dpo_cli.training.fit.Shuffled = InOrder  # type: ignore[misc]
        reporter = Watching(meter, case)
        params = TrainParams(
            learning_rate=LEARNING_RATE,
            batch_size=PAIRS_A_STEP,
            max_steps=case.num_steps,
            schedule="constant",
            warmup_ratio=0.0,
            max_grad_norm=MAX_GRAD_NORM,
            beta=BETA,
        )
        by_id = {group.id: row for group, row in zip(groups, references, strict=True)}
        with tempfile.TemporaryDirectory() as work:
            learner = Learner(policy, scorer, PairObjective(TrainParams(beta=BETA), by_id))
            job = Job(Workplace("train", reporter, runtime, machine), Path(work))
            fitted = dpo_cli.training.fit.fit(learner, groups, groups[:1], params, job)
    steps = reporter.steps
    steps.losses = [entry["loss"] for entry in fitted.history if "loss" in entry]
    losses = steps.step_losses(case.num_steps)
    seconds, mib = {"step": steps.seconds, "reference": reference_s}, {"step": steps.mib, "reference": reference_mib}
    return Outcome(seconds, mib, logps, losses, meter.process_mib, meter.cpu_share())
