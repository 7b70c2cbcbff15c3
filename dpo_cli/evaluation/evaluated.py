"""What is evaluated: a model, how it was trained, and whether it may have read the held-out prompts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dpo_cli.core import paths
from dpo_cli.core.errors import StaleArtifactError
from dpo_cli.core.manifest import DPO
from dpo_cli.core.params import TrainParams
from dpo_cli.core.progress import Reporter
from dpo_cli.data.tokenize import TokenTable, prompt_ids
from dpo_cli.models.project import Project


@dataclass(frozen=True)
class Evaluated:
    """What is judged, and what is known of it.

    Attributes:
        folder: An adapter for the project's SFT model, or a whole model.
        name: Of the policy as a method in a votes file.
        train: The settings of its training: beta, and whether a log-ratio was learned.
        out: Where its files go.
        is_of_this_data: Whether it is known to have been trained on this project's data.
        trained: How long it was trained; None where nothing is known of its training.
    """

    folder: Path
    name: str
    train: TrainParams
    out: Path
    is_of_this_data: bool = True
    trained: Mapping[str, int] | None = None


def training_of(
    folder: Path, default: TrainParams, project: Project, reporter: Reporter
) -> tuple[TrainParams, Mapping[str, int] | None, bool]:
    """How a model was trained, how long (None: not known), and whether on this project's graph and data.

    Raises:
        StaleArtifactError: It is not as its training left it.
    """
    path = folder / DPO.name
    if not path.is_file():
        reporter.warn(
            f"evaluate: {folder} does not say what it was trained on; its held-out figures mean nothing if it has read"
            " the held-out prompts"
        )
        return default, None, False
    try:
        manifest = DPO.read(folder)
        train = TrainParams.model_validate(manifest.settings["train"])
    except (StaleArtifactError, ValueError, KeyError):
        reporter.warn(f"evaluate: {path} is not one of this version, and is not read; beta is train.beta's")
        return default, None, False
    DPO.refuse_changed(manifest, folder)
    is_ours = all(manifest.made_of.get(name) == now for name, now in project.made_of().items())
    if not is_ours:
        reporter.warn(
            f"evaluate: {folder} was trained on another graph or other data than the project's: it may have read the"
            " held-out prompts"
        )
    return train, manifest.facts, is_ours


def count_leaked_prompts(held_out: TokenTable) -> int:
    """Held-out prompts that are in any training data.

    Raises:
        StaleArtifactError: There is none.
    """
    seen: set[str] = set()
    for path in (paths.SFT_DATA / "train.parquet", paths.PREFERENCE_DATA / "train.parquet"):
        if not path.is_file():
            raise StaleArtifactError(f"{path} is missing; run: dpo-cli repro")
        seen |= prompt_ids(path)
    return sum(group in seen for group in held_out.prompts)
