"""One training from start or checkpoint to its end, with progress and a graceful stop."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from transformers import TrainerCallback

from dpo_cli.core.errors import Interrupted, ParamsError
from dpo_cli.core.gpu import is_gpu
from dpo_cli.core.interrupts import StopRequest, graceful_stop
from dpo_cli.core.params import RuntimeParams, TrainingParams
from dpo_cli.core.progress import Reporter
from dpo_cli.data.tokenise import TokenGroup
from dpo_cli.models.device import Machine
from dpo_cli.scoring.budget import TokenBudget
from dpo_cli.scoring.recompute import Recompute
from dpo_cli.training.callbacks import CheckpointCallback, ProgressCallback, TensorBoardCallback
from dpo_cli.training.checkpoint import (
    BestStepCallback,
    best_step,
    last_checkpoint,
    out_of_patience,
    read_history,
    restore_best,
)
from dpo_cli.training.loss_scale import LossScale
from dpo_cli.training.memory import choose_memory
from dpo_cli.training.objective import GroupScorer, Objective
from dpo_cli.training.replicas import ALONE, Replicas
from dpo_cli.training.trainer import GroupTrainer, Plan, RandomState, diverged, training_arguments

Scored = TypeVar("Scored")

_BUDGET = "token_budget.json"
_LOSS_SCALE = "loss_scale.json"


@dataclass(frozen=True)
class Fit:
    """A finished training.

    Attributes:
        num_steps: Optimizer steps that were taken, in all runs together.
        num_planned: Optimizer steps that there would have been without an early stop.
        kept_step: The step whose weights the model has now; 0 is before the first.
        history: The trainer's log, one entry a logged event.
        groups_per_s: Groups trained a second of this run's steps, by all processes, held-out passes included.
        recompute: What the backward pass computed again.
        max_tokens: Tokens of a micro-batch, as it was at the end.
    """

    num_steps: int
    num_planned: int
    kept_step: int
    history: list[dict[str, Any]]
    groups_per_s: float
    recompute: Recompute
    max_tokens: int

    def last(self, name: str) -> float:
        """The last logged value of a metric."""
        return next(entry[name] for entry in reversed(self.history) if name in entry)

    def first(self, name: str) -> float:
        """The first logged value of a metric."""
        return next(entry[name] for entry in self.history if name in entry)

    def kept(self, name: str) -> float:
        """The value of a held-out metric at the step that is kept."""
        return next(
            entry[name] for entry in reversed(self.history) if name in entry and entry["step"] == self.kept_step
        )

    @property
    def steps_in_words(self) -> str:
        """How many steps there were, and whose weights are kept."""
        words = str(self.num_steps)
        if self.num_steps < self.num_planned:
            words += f" of {self.num_planned} (patience ended)"
        return words if self.kept_step == self.num_steps else f"{words}; kept: step {self.kept_step}"


def fit(
    model: Any,
    scorer: GroupScorer[Scored],
    objective: Objective[Scored],
    train_groups: Sequence[TokenGroup],
    held_out: Sequence[TokenGroup],
    *,
    section: str,
    params: TrainingParams,
    runtime: RuntimeParams,
    machine: Machine,
    work: Path,
    reporter: Reporter,
    replicas: Replicas = ALONE,
) -> Fit:
    """Train the marked parameters of a model in place.

    Args:
        model: The model; goes on from the last checkpoint in ``work`` where there is one.
        scorer: Scores groups with that model.
        objective: What is minimized.
        train_groups: Training data.
        held_out: Groups for the held-out loss, taken before the first step and along the way.
        section: Name of the stage, for messages.
        params: Knobs of the training.
        runtime: Token budget and checkpoint interval.
        machine: Where it runs.
        work: Folder for checkpoints.
        reporter: Shows progress.
        replicas: The processes that share each batch; the first one saves, and all end with the same parameters.

    Raises:
        Interrupted: The user asked to stop, any of the processes; a checkpoint is in ``work``.
        MachineError: Another process is gone, or has other parameters.
        ParamsError: The loss is no number any more, or keep best has nothing to choose from.
    """
    plan = Plan.of(params, len(train_groups))
    keeps_best = params.keep == "best"
    if keeps_best and params.eval_steps >= plan.num_steps:
        raise ParamsError(
            f"params.yaml: {section}.keep best has nothing to choose from: of {plan.num_steps} steps none but the last"
            f" is measured with {section}.eval_steps {params.eval_steps}; set that below {plan.num_steps}"
        )
    checkpoint = last_checkpoint(work, with_best=keeps_best)
    arguments = training_arguments(params, plan, machine, work, section, evaluate_at_start=checkpoint is None)
    groups_a_step = math.ceil(params.batch_size / replicas.size)
    chosen = choose_memory(model, scorer, train_groups, groups_a_step, runtime, reporter, section)
    memory = work / (_BUDGET if replicas.is_first else f"{replicas.rank}_{_BUDGET}")
    budget = TokenBudget(chosen.max_tokens, section, reporter, memory)
    loss_scale = LossScale(machine.compute_dtype, section, reporter, work / _LOSS_SCALE)
    loss_scale.value = replicas.from_first(loss_scale.value)
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    trained = [*named.values()]
    if is_gpu(machine.device):
        _warm_up(model, scorer, objective, train_groups)
    replicas.agree("the last checkpoint", checkpoint.name if checkpoint else None)
    replicas.agree_on_parameters("before the first step", trained)
    if checkpoint is not None:
        reporter.say(f"{section}: going on from {checkpoint.name}")
    with graceful_stop() as stop, reporter.meter(f"{section}: training", plan.num_steps, "steps") as meter:
        agreed_stop = stop if replicas.size == 1 else StopRequest()
        saver = CheckpointCallback(
            agreed_stop,
            runtime.checkpoint_minutes * 60,
            saves=replicas.is_first,
            saves_first_step=is_gpu(machine.device),
        )
        callbacks: list[TrainerCallback] = [ProgressCallback(meter), saver]
        if keeps_best:
            callbacks.append(BestStepCallback(work, named, params, saves=replicas.is_first))
        first_step = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
        if runtime.tensorboard and replicas.is_first:
            callbacks.append(
                TensorBoardCallback(work.parents[1] / "tensorboard" / f"{section}-{work.name}", first_step)
            )
        trainer = GroupTrainer(
            model,
            scorer,
            objective,
            train_groups,
            held_out,
            budget,
            loss_scale,
            arguments,
            callbacks,
            section,
            replicas=replicas,
            stop=stop,
            agreed_stop=agreed_stop,
        )
        begun = time.monotonic()
        if checkpoint is None:
            trainer.train()
        elif first_step < plan.num_steps and not out_of_patience(read_history(checkpoint), params.patience):
            trainer.train(resume_from_checkpoint=str(checkpoint))
        else:  # killed between the last step and the end of the stage
            trainer.load_finished(checkpoint)
            meter.advance(first_step)
        elapsed_s = time.monotonic() - begun
        replicas.wait()  # nobody leaves while the first one saves
        stop.is_answered = True  # of what asks after the last step: the work is done, and is published
    num_steps, history = trainer.state.global_step, trainer.state.log_history
    if saver.stopped and num_steps < plan.num_steps and not out_of_patience(history, params.patience):
        raise Interrupted(
            f"{section}: stopped and saved at step {num_steps} of {plan.num_steps}; run it again to go on"
        )
    kept_step = num_steps
    if keeps_best and (best := best_step(history)) is not None and best != num_steps:
        kept_step = best
        restore_best(work, kept_step, named)
    replicas.agree_on_parameters("after the last step", trained)
    groups_per_step = min(params.batch_size, len(train_groups))
    done = num_steps - first_step
    fitted = Fit(
        num_steps,
        plan.num_steps,
        kept_step,
        history,
        groups_per_s=done * groups_per_step / max(elapsed_s, 1e-9),
        recompute=chosen.grade,
        max_tokens=budget.max_tokens,
    )
    if not math.isfinite(fitted.kept("eval_loss")):
        raise diverged(section, "held-out loss", fitted.kept("eval_loss"), kept_step, params.learning_rate)
    if keeps_best and kept_step == 0:
        reporter.warn(
            f"{section}: no step brought the held-out loss below that of the start, so the start is kept; lower"
            f" {section}.learning_rate, now {params.learning_rate:g}"
        )
    return fitted


def _warm_up(
    model: Any, scorer: GroupScorer[Scored], objective: Objective[Scored], groups: Sequence[TokenGroup]
) -> None:
    """Score two short groups, forward and backward, and forget it.

    CUDA loads a kernel when it is first used, and libraries make their handles: that takes memory which is not
    PyTorch's, and where it is lacking then, bitsandbytes ends the process.
    """
    random_state = RandomState.of(scorer.device)
    model.train()
    short = sorted(groups, key=lambda group: (group.longest, group.id))[:2]
    losses = objective.losses(short, scorer.score(short, statistics=objective.statistics), short).losses_B
    losses.sum().backward()
    model.zero_grad(set_to_none=True)
    random_state.restore()
