"""What a training keeps in scratch: its checkpoints, and the weights of the step with the lowest held-out loss.

Which step that is follows from the trainer's log, which is part of every checkpoint; so a run that
was killed finds the same one when it goes on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dpo_cli.core.artifacts import atomic_path
from dpo_cli.core.params import TrainingParams

History = Sequence[Mapping[str, Any]]
"""A trainer's log, one entry a logged event."""


def last_checkpoint(folder: Path, *, with_best: bool = False) -> Path | None:
    """The newest whole checkpoint in a folder.

    Args:
        folder: The run's scratch folder.
        with_best: Ask for the weights of the best step up to there, too.
    """
    for checkpoint, history in _checkpoints(folder):
        if not with_best or _has_best(folder, history):
            return checkpoint
    return None


def read_history(checkpoint: Path) -> History:
    """The log of a whole checkpoint."""
    return json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]


def _checkpoints(folder: Path) -> Iterator[tuple[Path, History]]:
    """All whole checkpoints with their logs, the newest first; the state file is written last."""
    found = {int(path.name.rpartition("-")[2]): path for path in folder.glob("checkpoint-*")}
    for step in sorted(found, reverse=True):
        try:
            yield found[step], read_history(found[step])
        except (OSError, ValueError):
            continue


# --- the best step ------------------------------------------------------------------------


def best_step(history: History) -> int | None:
    """The step with the lowest held-out loss, the earlier of equal ones; None where none was taken."""
    losses = [(entry["eval_loss"], int(entry["step"])) for entry in history if "eval_loss" in entry]
    return min(((loss if math.isfinite(loss) else math.inf, step) for loss, step in losses), default=(0.0, None))[1]


def out_of_patience(history: History, patience: int | None) -> bool:
    """Whether ``patience`` evaluations followed that of the best step."""
    best = best_step(history)
    if patience is None or best is None:
        return False
    return sum("eval_loss" in entry and entry["step"] > best for entry in history) >= patience


class BestStepCallback(TrainerCallback):
    """Saves the weights of each evaluation that is the best so far, and ends training when patience does.

    Args:
        work: The run's scratch folder.
        trained: The parameters that are trained, by name.
        params: Knobs of the training.
        saves: Whether this process saves; where several train together, one does.
    """

    def __init__(
        self, work: Path, trained: Mapping[str, torch.nn.Parameter], params: TrainingParams, *, saves: bool
    ) -> None:
        self._work = work
        self._trained = trained
        self._patience = params.patience
        self._saves = saves

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save a new best; the checkpoint of the same step comes later."""
        if self._saves and best_step(state.log_history) == state.global_step:
            tensors = {name: value.detach().cpu().contiguous() for name, value in self._trained.items()}
            with atomic_path(_best_file(self._work, state.global_step)) as temporary:
                save_file(tensors, temporary)
        if out_of_patience(state.log_history, self._patience):
            control.should_training_stop = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Delete the weights of steps that are the best in no checkpoint's log."""
        best = {best_step(history) for history in (state.log_history, *dict(_checkpoints(self._work)).values())}
        wanted = {_best_file(self._work, step) for step in best if step is not None}
        for path in {*self._work.glob("best-*.safetensors")} - wanted:
            path.unlink()


@torch.no_grad()
def restore_best(work: Path, step: int, trained: Mapping[str, torch.nn.Parameter]) -> None:
    """Give the parameters the values that they had at the best step."""
    for name, value in load_file(_best_file(work, step)).items():
        trained[name].copy_(value)


def _has_best(work: Path, history: History) -> bool:
    step = best_step(history)
    if step is None:
        return False
    try:
        with safe_open(_best_file(work, step), framework="pt"):
            return True
    except (OSError, SafetensorError):
        return False


def _best_file(work: Path, step: int) -> Path:
    return work / f"best-{step}.safetensors"
