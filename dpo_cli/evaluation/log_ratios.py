"""Log-probabilities of any answers under policy and reference: taken from what is known, the rest computed and kept.

The reference's lie in data/reference and in the scratch area of stage precompute_ref, which both
know a completion by its token ids; the policy's in a scratch area of their own, under a digest of
the graph and the adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from dpo_cli.core import paths
from dpo_cli.core.artifacts import digest_json
from dpo_cli.core.errors import StaleArtifactError
from dpo_cli.core.manifest import REFERENCE
from dpo_cli.core.row_store import RowStore, forget_other_stores
from dpo_cli.core.scratch import stage_scratch
from dpo_cli.data.tokens import TokenGroup
from dpo_cli.evaluation.models import AdapterModels, EvaluatedModel
from dpo_cli.models.project import Project
from dpo_cli.scoring.reference import SCHEMA, missing_groups, read_cache_rows

_OTHER_STORES_KEPT = 3


@dataclass(frozen=True)
class ScoredAnswers:
    """What one model says of some answers.

    Attributes:
        logps: Sum over the answer's tokens by key, nats.
        token_logps: Of each token by key, nats.
        num_cached: Different answers that were known.
        num_computed: Those that were not.
    """

    logps: dict[str, float]
    token_logps: dict[str, list[float]]
    num_cached: int
    num_computed: int


def score_both(project: Project, adapter: Path, groups: Sequence[TokenGroup]) -> tuple[ScoredAnswers, ScoredAnswers]:
    """All completions of some groups under policy and reference.

    Args:
        project: Whose reference it is.
        adapter: Folder of the policy's adapter.
        groups: Prompts with their completions.

    Returns:
        Policy and reference; models are loaded only where something is missing.

    Raises:
        StaleArtifactError: There is no adapter in the folder.
        Interrupted: The user asked to stop; what was computed is kept.
        MachineError: Another run of this command, or of stage precompute_ref, is at work here.
    """
    wanted = {key for group in groups for key in group.keys}
    models = AdapterModels(project, adapter)
    with stage_scratch("precompute_ref", digest_json(project.identity)) as scratch:
        store = RowStore(scratch.folder / "rows", SCHEMA)
        cached = _reference_rows(project, wanted)
        reference = _complete(project, models.reference, groups, cached, store)
    with stage_scratch("score", models.policy.digest) as scratch:
        store = RowStore(scratch.folder / "rows", SCHEMA)
        policy = _complete(project, models.policy, groups, None, store)
        forget_other_stores(scratch.folder.parent, scratch.folder, _OTHER_STORES_KEPT)
    return policy, reference


def _reference_rows(project: Project, wanted: set[str]) -> pl.DataFrame | None:
    """What data/reference knows; a cache of another graph, or a damaged one, is left alone."""
    if not (paths.REFERENCE / REFERENCE.name).is_file():
        return None
    try:
        return read_cache_rows(paths.REFERENCE, project.identity, wanted)
    except StaleArtifactError as error:
        project.reporter.warn(f"{project.command}: {paths.REFERENCE.as_posix()} is not used: {error.problems[0]}")
        return None


def _complete(
    project: Project, model: EvaluatedModel, groups: Sequence[TokenGroup], cached: pl.DataFrame | None, store: RowStore
) -> ScoredAnswers:
    """All rows of one model; what neither the cache nor the store has is computed and stored."""
    wanted = {key for group in groups for key in group.keys}
    known = wanted & (store.keys() | (set() if cached is None else set(cached["key"])))
    missing = missing_groups(groups, known, project.budget().max_tokens)
    if missing:
        with model.use() as loaded, loaded.scorer as scorer:
            project.score_into(store, scorer, missing, f"answers under {model}")
    rows = store.rows(wanted)
    if cached is not None:
        rows = pl.concat([cached, rows]).unique("key", keep="first", maintain_order=True)
    keys = rows["key"].to_list()
    return ScoredAnswers(
        logps=dict(zip(keys, rows["logp"].to_list(), strict=True)),
        token_logps=dict(zip(keys, rows["token_logps"].to_list(), strict=True)),
        num_cached=len(known),
        num_computed=len(wanted) - len(known),
    )
