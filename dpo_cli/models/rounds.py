"""Rounds: a project that begins with the adapter which another one trained, and what is known of the rounds before.

Each round is one entry, the oldest first: project, model, and digest of the adapter. The entries stand under ``rounds``
in what models/sft was made of, and so in what is trained on it, from where the next round takes them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dpo_cli.core import paths
from dpo_cli.core.artifacts import digest_files, digest_json
from dpo_cli.core.errors import StaleArtifactError
from dpo_cli.core.manifest import DPO, PPO, SFT, Manifest
from dpo_cli.core.progress import Reporter
from dpo_cli.models.folder import ADAPTER_FILES
from dpo_cli.models.identity import BaseLock

Rounds = list[dict[str, Any]]

_OF_EVALUATE = ("win_rate", "win_rate_ci", "kl", "reward_sft", "reward_dpo")


def rounds_behind(adapter: Path, base: BaseLock, reporter: Reporter) -> Rounds:
    """The rounds that made an adapter, itself the last one; none where dpo-cli did not train it.

    Raises:
        StaleArtifactError: It was trained on another model than the base, or is not as its training left it.
    """
    artifact = next((one for one in (DPO, PPO) if (adapter / one.name).is_file()), None)
    if artifact is None:
        return []
    try:
        manifest = artifact.read(adapter)
    except StaleArtifactError as error:
        reporter.warn(f"sft: {error}; the adapter is taken, and nothing is known of the rounds before")
        return []
    artifact.refuse_changed(manifest, adapter)
    if not _stands_on(manifest, base):
        raise StaleArtifactError(
            f"{adapter / artifact.name}: trained on another model than {base.name}, the base model here; give the one"
            " that it was trained on as runtime.model_path, or another adapter as runtime.adapter_path"
        )
    model = artifact.folder.as_posix()
    project = _project_of(adapter, model)
    entry = {"project": (project or adapter).name, "model": model, "digest": digest_files(adapter, ADAPTER_FILES)}
    return [*manifest.made_of.get("rounds", []), entry]


def _stands_on(manifest: Manifest, base: BaseLock) -> bool:
    """Whether an adapter was trained on this base, or on what SFT of that project made of all its weights."""
    graph = manifest.made_of["graph"]
    tuned = {name: digest for name, digest in base.files.items() if name != SFT.name}
    whole = {"method": "full", "base": graph["base"], "files": digest_json(tuned)}
    return manifest.made_of["base"]["files"] == base.files or graph["sft"] == digest_json(whole)


def _project_of(adapter: Path, model: str) -> Path | None:
    """The project that an adapter lies in; None where it was moved elsewhere."""
    return adapter.parents[1] if adapter.as_posix().endswith(f"/{model}") else None


def figures_behind(adapter: Path, rounds: Rounds) -> Rounds:
    """What was measured of the rounds that made an adapter, as far as the project that it lies in knows.

    Returns:
        An entry a round: its project, pairs (``num_pairs``), and of stage evaluate win rate, KL and rewards.
    """
    if not rounds:
        return []
    last = rounds[-1]
    project = _project_of(adapter, last["model"])
    before = [] if project is None else _metrics(project, "sft").get("rounds", [])
    figures: dict[str, Any] = {}
    if project is not None and last["model"] == DPO.folder.as_posix():
        evaluated, trained = _metrics(project, "evaluate"), _metrics(project, "train")
        figures = {name: evaluated.get(name) for name in _OF_EVALUATE} | {"num_pairs": trained.get("num_pairs")}
    if [each["project"] for each in before] != [each["project"] for each in rounds[:-1]]:
        before = [{"project": each["project"]} for each in rounds[:-1]]
    return [*before, {"project": last["project"], **figures}]


def _metrics(project: Path, stage: str) -> dict[str, Any]:
    try:
        return dict(json.loads((project / paths.metrics_file(stage)).read_text(encoding="utf-8"))[stage])
    except (OSError, ValueError, KeyError, TypeError):
        return {}
