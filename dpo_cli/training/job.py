"""What a training is told of its surroundings: the stage that it is for, and where it works."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dpo_cli.core.params import RuntimeParams
from dpo_cli.core.progress import Reporter
from dpo_cli.models.device import Machine
from dpo_cli.training.parallel import ALONE, Replicas


@dataclass(frozen=True)
class Job:
    """A stage's training.

    Attributes:
        section: Name of the stage, for messages.
        folder: Where checkpoints are kept, and found again.
        machine: Where it computes.
        runtime: Token budget, time between checkpoints, event files.
        reporter: Told of the progress.
        replicas: The processes that share each batch; the first one saves, and all end with the same parameters.
    """

    section: str
    folder: Path
    machine: Machine
    runtime: RuntimeParams
    reporter: Reporter
    replicas: Replicas = ALONE
