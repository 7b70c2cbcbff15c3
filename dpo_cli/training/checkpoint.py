"""What a training keeps in scratch: its checkpoints, and the weights of the step with the lowest held-out loss.

Which step that is follows from the log, which is part of every checkpoint; so a run that was killed finds the same
one when it goes on.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from dpo_cli.core.artifacts import atomic_path, write_text

History = Sequence[Mapping[str, Any]]
"""The log of a training, one entry a logged event."""

_VERSION = 2
"""Of what a checkpoint holds; one of another version is not gone on from."""
_STATE, _WEIGHTS, _REST = "state.json", "weights.safetensors", "rest.pt"
_KEPT = 2


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


def step_of(checkpoint: Path | None) -> int:
    """Optimizer steps that were taken up to a checkpoint; none without one."""
    return int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0


def save_checkpoint(
    folder: Path, trained: Mapping[str, torch.Tensor], step: int, history: History, rest: Mapping[str, Any]
) -> None:
    """Save the state after a step; of the checkpoints before it one is kept.

    Args:
        folder: The run's scratch folder.
        trained: The parameters that are trained, by name.
        step: Optimizer steps that were taken.
        history: The log up to there.
        rest: What else the run needs to go on.
    """
    place = folder / f"checkpoint-{step}"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    _save_weights(place / _WEIGHTS, trained)
    torch.save(dict(rest), place / _REST)
    write_text(place / _STATE, json.dumps({"version": _VERSION, "history": list(history)}))  # last: it is whole
    kept = dict([pair for pair in _checkpoints(folder) if step_of(pair[0]) <= step][:_KEPT])
    for path in {*folder.glob("checkpoint-*")} - kept.keys():
        shutil.rmtree(path)
    best = {best_step(history) for history in kept.values()}
    for path in {*folder.glob("best-*.safetensors")} - {_best_file(folder, step) for step in best if step is not None}:
        path.unlink()


def load_checkpoint(checkpoint: Path, trained: Mapping[str, torch.nn.Parameter]) -> tuple[History, dict[str, Any]]:
    """Give the parameters the values of a whole checkpoint; returns its log, and what else was saved."""
    _load_weights(checkpoint / _WEIGHTS, trained)
    history = _read_history(checkpoint)
    assert history is not None
    return history, torch.load(checkpoint / _REST, map_location="cpu", weights_only=True)


def _checkpoints(folder: Path) -> Iterator[tuple[Path, History]]:
    """All whole checkpoints with their logs, the newest first."""
    for path in sorted(folder.glob("checkpoint-*"), key=step_of, reverse=True):
        history = _read_history(path)
        if history is not None:
            yield path, history


def _read_history(checkpoint: Path) -> History | None:
    try:
        state = json.loads((checkpoint / _STATE).read_text(encoding="utf-8"))
        return state["history"] if state["version"] == _VERSION else None
    except (OSError, ValueError, KeyError):
        return None


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


def save_best(folder: Path, step: int, trained: Mapping[str, torch.Tensor]) -> None:
    """Save the weights of the best step so far; the checkpoint of the same step comes later."""
    _save_weights(_best_file(folder, step), trained)


def restore_best(folder: Path, step: int, trained: Mapping[str, torch.nn.Parameter]) -> None:
    """Give the parameters the values that they had at the best step."""
    _load_weights(_best_file(folder, step), trained)


def _has_best(folder: Path, history: History) -> bool:
    step = best_step(history)
    if step is None:
        return False
    try:
        with safe_open(_best_file(folder, step), framework="pt"):
            return True
    except (OSError, SafetensorError):
        return False


def _best_file(folder: Path, step: int) -> Path:
    return folder / f"best-{step}.safetensors"


def _save_weights(path: Path, trained: Mapping[str, torch.Tensor]) -> None:
    tensors = {name: value.detach().cpu().contiguous() for name, value in trained.items()}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary)


@torch.no_grad()
def _load_weights(path: Path, trained: Mapping[str, torch.nn.Parameter]) -> None:
    for name, value in load_file(path).items():
        trained[name].copy_(value)
