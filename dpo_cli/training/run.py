"""One training from start or checkpoint to its end, with progress and a graceful stop."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_cli.core.errors import Interrupted
from dpo_cli.core.interrupts import graceful_stop
from dpo_cli.core.params import RuntimeParams, TrainingParams
from dpo_cli.core.progress import Reporter
from dpo_cli.data.tokenise import TokenGroup
from dpo_cli.models.device import Machine
from dpo_cli.scoring.scorer import Scorer
from dpo_cli.training.callbacks import CheckpointCallback, ProgressCallback
from dpo_cli.training.objective import Objective
from dpo_cli.training.trainer import GroupTrainer, Plan, diverged, last_checkpoint, training_arguments


@dataclass(frozen=True)
class Fit:
    """A finished training.

    Attributes:
        num_steps: Optimizer steps in all.
        history: The trainer's log, one entry a logged event.
        groups_per_s: Groups trained a second of this process's steps, held-out passes included.
    """

    num_steps: int
    history: list[dict[str, Any]]
    groups_per_s: float

    def last(self, name: str) -> float:
        """The last logged value of a metric."""
        return next(entry[name] for entry in reversed(self.history) if name in entry)

    def first(self, name: str) -> float:
        """The first logged value of a metric."""
        return next(entry[name] for entry in self.history if name in entry)


def fit(
    model: Any,
    scorer: Scorer,
    objective: Objective,
    train_groups: Sequence[TokenGroup],
    held_out: Sequence[TokenGroup],
    *,
    section: str,
    params: TrainingParams,
    runtime: RuntimeParams,
    machine: Machine,
    work: Path,
    reporter: Reporter,
) -> Fit:
    """Train the marked parameters of a model in place.

    Args:
        model: The model; goes on from the last checkpoint in ``work`` where there is one.
        scorer: Scores groups with that model.
        objective: What is minimised.
        train_groups: Training data.
        held_out: Groups for the held-out loss, taken before the first step and along the way.
        section: Name of the stage, for messages.
        params: Knobs of the training.
        runtime: Token budget and checkpoint interval.
        machine: Where it runs.
        work: Folder for checkpoints.
        reporter: Hears of the progress.

    Raises:
        Interrupted: The user asked to stop; a checkpoint is in ``work``.
        ParamsError: The loss is no number any more.
    """
    plan = Plan.of(params, len(train_groups))
    checkpoint = last_checkpoint(work)
    arguments = training_arguments(params, plan, machine, work, section, evaluate_at_start=checkpoint is None)
    if machine.device.type == "cuda":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if checkpoint is not None:
        reporter.say(f"{section}: going on from {checkpoint.name}")
    with graceful_stop() as stop, reporter.meter(f"{section}: training", plan.num_steps, "steps") as meter:
        saver = CheckpointCallback(stop, runtime.checkpoint_minutes * 60)
        trainer = GroupTrainer(
            model,
            scorer,
            objective,
            train_groups,
            held_out,
            runtime.max_tokens_per_microbatch,
            arguments,
            [ProgressCallback(meter), saver],
            section,
        )
        begun = time.monotonic()
        first_step = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
        if checkpoint is None:
            trainer.train()
        elif first_step < plan.num_steps:
            trainer.train(resume_from_checkpoint=str(checkpoint))
        else:  # killed between the last step and the end of the stage
            trainer.load_finished(checkpoint)
            meter.advance(first_step)
        elapsed_s = time.monotonic() - begun
    if saver.stopped and trainer.state.global_step < plan.num_steps:
        raise Interrupted(
            f"{section}: stopped and saved at step {trainer.state.global_step} of {plan.num_steps};"
            " run it again to go on"
        )
    groups_per_step = min(params.batch_size, len(train_groups))
    done = plan.num_steps - first_step
    fitted = Fit(plan.num_steps, trainer.state.log_history, groups_per_s=done * groups_per_step / max(elapsed_s, 1e-9))
    if not math.isfinite(fitted.last("eval_loss")):
        raise diverged(section, "held-out loss", fitted.last("eval_loss"), plan.num_steps, params.learning_rate)
    return fitted
