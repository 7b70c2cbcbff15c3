"""A training that takes a second: a tiny policy, DPO from its own references, and what is looked at afterwards."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dpo_cli.core.params import RuntimeParams
from dpo_cli.core.training_params import LoraParams, TrainingParams
from dpo_cli.data.tokens import TokenGroup
from dpo_cli.models.adapters import add_adapter
from dpo_cli.models.device import Machine
from dpo_cli.models.load import keep_weights_unpacked, load_model
from dpo_cli.models.project import Workplace
from dpo_cli.scoring.scorer import Scorer
from dpo_cli.training.fit import Fit, fit
from dpo_cli.training.parallel import ALONE, Job, Replicas
from dpo_cli.training.protocols import Learner

CPU = Machine(torch.device("cpu"), torch.float32)
Groups = tuple[Sequence[TokenGroup], Sequence[TokenGroup]]
"""What is trained on, and what is held out."""


@dataclass(frozen=True)
class Lab:
    """What most tests of training need.

    Attributes:
        policy: ``policy(dropout=0.0)``: a fresh policy, every time the same.
        folder: An empty folder.
        reporter: ``reporter(on_advance)``: a reporter that records.
    """

    policy: Callable[..., Any]
    folder: Path
    reporter: Callable[..., Any]


class Killed(BaseException):
    """The process is gone, for the code under test."""


def kill_at(step: int) -> Callable[[int], None]:
    """For a reporter: at this step the process is killed."""

    def on_advance(done: int) -> None:
        if done == step:
            raise Killed

    return on_advance


def stop_at(step: int) -> Callable[[int], None]:
    """For a reporter: at this step the user presses Ctrl-C."""

    def on_advance(done: int) -> None:
        if done == step:
            os.kill(os.getpid(), signal.SIGINT)

    return on_advance


def make_policy(folder: Path, dropout: float = 0.0, seed: int = 0) -> Any:
    """A model in nf4 with a fresh adapter; every call gives the same weights."""
    model = load_model(folder, CPU, quantization="nf4")
    model = add_adapter(model, LoraParams(r=4, alpha=8.0, dropout=dropout), seed=seed)
    keep_weights_unpacked(model)
    return model


@torch.no_grad()
def reference(scorer: Scorer, groups: Sequence[TokenGroup]) -> dict[str, list[float]]:
    """Log-probabilities by row id."""
    scores = Scorer.score(scorer, groups)
    return {group.id: row for group, row in zip(groups, scores.logps_BK.tolist(), strict=True)}


def train(
    learner: Learner[Any],
    groups: Groups,
    folder: Path,
    reporter: Any,
    settings: TrainingParams,
    replicas: Replicas = ALONE,
    stage: str = "train",
    **runtime: Any,
) -> Fit:
    """Train as a stage does; goes on from a checkpoint in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    job = Job(Workplace(stage, reporter, RuntimeParams(**runtime), CPU), folder, replicas)
    return fit(learner, *groups, settings, job)


def adapter(model: Any) -> dict[str, torch.Tensor]:
    """A copy of what is trained."""
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}


def same_bytes(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Whether two adapters are equal, to the bit."""
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def logged(fitted: Fit, *names: str) -> list[float]:
    """Logged values of every step."""
    return [entry[name] for name in names for entry in fitted.history if name in entry]
