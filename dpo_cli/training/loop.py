"""The training loop: a batch, its gradient, an optimizer step; in between the held-out loss and checkpoints.

It knows neither where batches come from nor what is minimized: a :class:`~dpo_cli.training.protocols.BatchSource` gives
the one, an :class:`~dpo_cli.training.protocols.Objective` the other. All that a step depends on follows from the
parameters, the optimizer's state, the source's and the number of the step, dropout included. So a run that was killed
goes on from its last checkpoint to the same bytes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch.optim.lr_scheduler import LRScheduler

from dpo_cli.core.artifacts import digest_json
from dpo_cli.core.environment import is_gpu
from dpo_cli.core.errors import Interrupted, ParamsError
from dpo_cli.core.interrupts import StopRequest, graceful_stop
from dpo_cli.core.live_log import LiveLog
from dpo_cli.core.progress import Meter
from dpo_cli.training.accumulation import Accumulator, Limits
from dpo_cli.training.checkpoint import (
    best_step,
    last_checkpoint,
    load_checkpoint,
    out_of_patience,
    restore_best,
    save_best,
    save_checkpoint,
    step_of,
)
from dpo_cli.training.history import EventFiles
from dpo_cli.training.parallel import Job, open_accelerator
from dpo_cli.training.protocols import Adaptive, BatchSource, Learner

Scored = TypeVar("Scored")


@dataclass(frozen=True)
class Data:
    """What is trained on, and what the held-out loss is measured with, if anything."""

    source: BatchSource[Any]
    held_out: Sequence[Any] = ()


@dataclass(frozen=True)
class Course:
    """How long a training goes on.

    Attributes:
        num_steps: Optimizer steps in all.
        seed: Of dropout.
        eval_steps: Steps between two measurements of the held-out loss, besides that before the first step and that
            after the last; 0: only those.
        keeps_best: Whether the weights of the step with the lowest held-out loss are kept, not the last step's.
        patience: With ``keeps_best``, training ends when so many measurements in a row brought no lower one.
        what: What it is called beside its progress.
    """

    num_steps: int
    seed: int = 0
    eval_steps: int = 0
    keeps_best: bool = False
    patience: int | None = None
    what: str = "training"


@dataclass(frozen=True)
class Descent:
    """How gradients become steps.

    Attributes:
        optimizer: Holds the trained parameters.
        schedule: Its learning rates.
        max_grad_norm: L2 norm to which gradients are clipped.
    """

    optimizer: torch.optim.Optimizer
    schedule: LRScheduler
    max_grad_norm: float


class Loop(Generic[Scored]):
    """One training, from its start or its last checkpoint to its end.

    Args:
        learner: The model, what scores groups with it, and what is minimized.
        data: What is trained on.
        descent: The optimizer, its schedule and the norm to which gradients are clipped.
        course: How long.
        limits: How much goes through at once.
        job: Where it works.

    Attributes:
        step: Optimizer steps that were taken, in all runs together.
        first_step: The step from which this run went on.
        kept_step: The step whose weights the model has at the end; 0 is before the first.
        history: The log, one entry a logged event.
        num_groups: Groups that this run trained on.
        elapsed_s: Seconds that it took, held-out passes included.
    """

    def __init__(
        self, learner: Learner[Scored], data: Data, descent: Descent, course: Course, limits: Limits, job: Job
    ) -> None:
        self._learner, self._data, self._course, self._limits, self._job = learner, data, course, limits, job
        self._model: Any = learner.model
        self._trained = learner.trained
        self._schedule = descent.schedule
        self._max_grad_norm = descent.max_grad_norm
        self._optimizer = open_accelerator(job.work.machine.device).prepare_optimizer(descent.optimizer)
        self._checkpoint = last_checkpoint(job.folder, with_best=course.keeps_best)
        self._saved_at = time.monotonic()
        self._events: EventFiles | None = None
        self._live: LiveLog | None = None
        self._patience_ended = False
        self.step = self.first_step = self.kept_step = step_of(self._checkpoint)
        self.history: list[dict[str, Any]] = []
        self.num_groups, self.elapsed_s = 0, 0.0

    def run(self) -> None:
        """Train to the end.

        Raises:
            Interrupted: The user asked to stop, any of the processes; a checkpoint is in the job's folder.
            MachineError: Another process is gone, or has other parameters; or there are no event files to be written.
            ParamsError: The loss is no number any more.
        """
        job, course, trained = self._job, self._course, [*self._trained.values()]
        job.replicas.agree("the last checkpoint", self._checkpoint.name if self._checkpoint else None)
        job.replicas.agree_on_parameters("before the first step", trained)
        if self._checkpoint is not None:
            self._go_on(self._checkpoint)
        label = f"{job.work.command}: {course.what}"
        with (
            ExitStack() as logs,
            graceful_stop() as stop,
            job.work.reporter.meter(label, course.num_steps, "steps") as meter,
        ):
            if job.replicas.is_first:
                self._open_logs(logs)
            begun = time.monotonic()
            stopped = self._train(Accumulator(self._learner, self._limits, stop, job.replicas), stop, meter)
            self.elapsed_s = time.monotonic() - begun
            job.replicas.wait()  # nobody leaves while the first one saves
            stop.is_answered = True  # of what asks after the last step: the work is done, and is published
        if stopped and not self._is_over():
            at = f"step {self.step} of {course.num_steps}"
            raise Interrupted(f"{job.work.command}: stopped and saved at {at}; run it again to resume")
        best = best_step(self.history) if course.keeps_best else None
        self.kept_step = self.step if best is None else best
        if self.kept_step != self.step:
            restore_best(job.folder, self.kept_step, self._trained)
        job.replicas.agree_on_parameters("after the last step", trained)

    def _open_logs(self, logs: ExitStack) -> None:
        """Where the log goes as it comes."""
        job = self._job
        self._live = logs.enter_context(closing(LiveLog(job.folder, self._course.num_steps, self.history)))
        if job.work.runtime.tensorboard:
            folder = job.folder.parents[1] / "tensorboard" / f"{job.work.command}-{job.folder.name}"
            self._events = logs.enter_context(closing(EventFiles(folder, self.first_step)))

    def _train(self, accumulator: Accumulator[Scored], stop: StopRequest, meter: Meter) -> bool:
        """Steps until the last one, or until someone asks to stop; returns whether someone did."""
        course, stopped = self._course, False
        meter.advance(self.step)
        if self._checkpoint is None:
            self._measure(accumulator, meter, "")
        while not stopped and not self._is_over():
            loss = self._take_step(accumulator, meter)
            alone = self._job.replicas.size == 1
            stopped = stop.requested if alone else accumulator.anyone_asked_to_stop
            if self.step == course.num_steps or (course.eval_steps and self.step % course.eval_steps == 0):
                self._measure(accumulator, meter, loss)
            if stopped or self._is_due():
                self._save()
        return stopped

    def _is_over(self) -> bool:
        return self.step >= self._course.num_steps or self._patience_ended

    # --- one step -------------------------------------------------------------------------

    def _take_step(self, accumulator: Accumulator[Scored], meter: Meter) -> str:
        """One optimizer step; returns its loss in words."""
        batch = self._data.source.batch(self.step)
        numbers = digest_json([self._course.seed, self.step, self._job.replicas.rank])
        self._model.train()
        means, norm = accumulator.gradient(batch, int(numbers[:15], 16))
        rate = float(self._schedule.get_last_lr()[0])
        for what, value in (("loss", means.loss), ("gradient", math.inf if means.num_infinite else 0.0)):
            if not math.isfinite(value):
                raise diverged(self._job.work.command, what, value, self.step + 1, float(self._schedule.base_lrs[0]))
        torch.nn.utils.clip_grads_with_norm_(self._trained.values(), self._max_grad_norm, norm)
        self._optimizer.step()
        self._schedule.step()
        self._model.zero_grad(set_to_none=True)
        self.step += 1
        self.num_groups += len(batch)
        self._data.source.after_step(means.metrics)
        if isinstance(self._learner.objective, Adaptive):
            self._learner.objective.after_step(means.metrics)
        meter.advance(1)
        self._log({"loss": means.loss, "grad_norm": norm.item(), "learning_rate": rate, **means.metrics})
        loss = f"loss {means.loss:.4f}"
        meter.note(loss)
        return loss

    # --- between two steps ----------------------------------------------------------------

    def _measure(self, accumulator: Accumulator[Scored], meter: Meter, note: str) -> None:
        """Held-out loss and metrics, weighted by example whatever the micro-batches."""
        if not self._data.held_out:
            return
        meter.note("measuring the held-out loss")
        self._model.eval()
        means = accumulator.measure(self._data.held_out)
        self._log({"eval_loss": means.loss, **{f"eval_{name}": value for name, value in means.metrics.items()}})
        meter.note(note)
        self._patience_ended = out_of_patience(self.history, self._course.patience)
        if self._course.keeps_best and self._job.replicas.is_first and best_step(self.history) == self.step:
            save_best(self._job.folder, self.step, self._trained)

    def _log(self, values: dict[str, float]) -> None:
        self.history.append({**values, "step": self.step})
        if self._live is not None:
            self._live.add(self.history[-1])
        if self._events is not None:
            self._events.add(values, self.step)

    def _is_due(self) -> bool:
        """Whether it is time for a checkpoint.

        On a GPU one follows the first step, too: a library that runs out of its memory may end the process, most likely
        while what a step takes is taken for the first time.
        """
        is_first = self.step == 1 and is_gpu(self._job.work.machine.device)
        return is_first or time.monotonic() - self._saved_at >= self._job.work.runtime.checkpoint_minutes * 60

    def _save(self) -> None:
        if self._job.replicas.is_first:
            rest = {
                "optimizer": self._optimizer.state_dict(),
                "schedule": self._schedule.state_dict(),
                "source": dict(self._data.source.state()),
            }
            save_checkpoint(self._job.folder, self._trained, self.step, self.history, rest)
            self._saved_at = time.monotonic()

    def _go_on(self, checkpoint: Path) -> None:
        """Take up the state of a checkpoint."""
        self._job.work.reporter.say(f"{self._job.work.command}: going on from {checkpoint.name}")
        history, rest = load_checkpoint(checkpoint, self._trained)
        self.history = [dict(entry) for entry in history]
        self._patience_ended = out_of_patience(history, self._course.patience)
        self._optimizer.load_state_dict(rest["optimizer"])
        self._schedule.load_state_dict(rest["schedule"])
        self._data.source.restore(rest["source"])
        if isinstance(self._learner.objective, Adaptive):
            for entry in self.history:
                if "loss" in entry:
                    self._learner.objective.after_step(entry)


def diverged(section: str, what: str, value: float, step: int, learning_rate: float) -> ParamsError:
    """The error for a loss that is no number any more."""
    return ParamsError(
        f"params.yaml: {section}.learning_rate is too high: the {what} became {value} at step {step};"
        f" lower it, now {learning_rate:g}"
    )
