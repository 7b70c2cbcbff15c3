"""Progress, checkpoints by time, a graceful stop, and TensorBoard's files, as callbacks of the training loop."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dpo_cli.core.errors import MachineError
from dpo_cli.core.interrupts import StopRequest
from dpo_cli.core.progress import Meter


class ProgressCallback(TrainerCallback):
    """Moves the meter, with the latest loss beside it."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self._loss = ""

    def on_measure(self) -> None:
        """The held-out loss is about to be measured, which takes its time."""
        self._meter.note("measuring the held-out loss")

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """It is measured."""
        self._meter.note(self._loss)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count the steps of an earlier run."""
        self._meter.advance(state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """One more step."""
        self._meter.advance(1)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Show the loss of the last step."""
        logs: dict[str, float] = kwargs.get("logs") or {}
        if "loss" in logs:
            self._loss = f"loss {logs['loss']:.4f}"
            self._meter.note(self._loss)


class CheckpointCallback(TrainerCallback):
    """Saves after so many seconds, and when the user asks to stop.

    Args:
        stop: Whether the user asked; the same for all processes at the same step.
        every_s: Seconds between two checkpoints.
        saves: Whether this process saves; where several train together, one does.
        saves_first_step: Whether it saves after the first step, too. A library that runs out of GPU memory may end the
            process, most likely while what a step takes is taken for the first time.

    Attributes:
        stopped: Whether training ended because the user asked.
    """

    def __init__(
        self, stop: StopRequest, every_s: float, *, saves: bool = True, saves_first_step: bool = False
    ) -> None:
        self._stop = stop
        self._every_s = every_s
        self._saves = saves
        self._saves_first_step = saves_first_step
        self._saved_at = time.monotonic()
        self.stopped = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Decide between two steps, when the state is whole."""
        if self._stop.requested:
            self.stopped = control.should_training_stop = True
            control.should_save = self._saves
        elif self._saves and self._is_due(state.global_step):
            control.should_save = True
            self._saved_at = time.monotonic()

    def _is_due(self, step: int) -> bool:
        return (self._saves_first_step and step == 1) or time.monotonic() - self._saved_at >= self._every_s


class TensorBoardCallback(TrainerCallback):
    """Writes what is logged as event files.

    Args:
        folder: Where they go; one of a run that was killed is gone on with.
        first_step: The step from which this run goes on; what an earlier one wrote of later steps is hidden.

    Raises:
        MachineError: The package tensorboard is not installed.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise MachineError(
                "params.yaml: runtime.tensorboard needs the package tensorboard; run: pip install tensorboard, or set"
                " it to false"
            ) from None
        self._writer = SummaryWriter(str(folder), purge_step=first_step + 1)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """One point for each figure of a step, or of the held-out data."""
        logs: dict[str, float] = kwargs.get("logs") or {}
        for name in logs if "loss" in logs or "eval_loss" in logs else ():
            held_out = name.startswith("eval_")
            self._writer.add_scalar(
                f"{'eval' if held_out else 'train'}/{name.removeprefix('eval_')}", logs[name], state.global_step
            )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Nothing more comes."""
        self._writer.close()
