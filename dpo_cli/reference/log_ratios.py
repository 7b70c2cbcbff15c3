"""Log-probabilities of any answers under policy and reference: taken from what is known, the rest computed and kept.

The reference's lie in data/reference and in the scratch area of stage precompute_ref, which both
know a completion by its token ids; the policy's in a scratch area of their own, under a digest of
the graph and the adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import polars as pl

from dpo_cli.core import paths
from dpo_cli.core.artifacts import digest_files, digest_json
from dpo_cli.core.errors import StaleArtifactError
from dpo_cli.core.manifest import REFERENCE
from dpo_cli.core.params import RuntimeParams
from dpo_cli.core.progress import Reporter
from dpo_cli.core.row_store import RowStore, forget_other_stores
from dpo_cli.core.scratch import stage_scratch
from dpo_cli.data.tokenise import TokenGroup
from dpo_cli.models.adapters import ADAPTER_FILES, ModelPair, load_pair
from dpo_cli.models.device import token_budget
from dpo_cli.reference.cache import SCHEMA, group_keys, read_cache_rows, rows_of
from dpo_cli.reference.graph import Graph
from dpo_cli.reference.scoring import missing_groups, score_into_store
from dpo_cli.scoring.budget import TokenBudget
from dpo_cli.scoring.probe import open_scorer
from dpo_cli.scoring.scorer import Scorer

_OTHER_STORES_KEPT = 3


@dataclass(frozen=True)
class Answers:
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


def score_both(
    graph: Graph, adapter: Path, groups: Sequence[TokenGroup], runtime: RuntimeParams, reporter: Reporter, command: str
) -> tuple[Answers, Answers]:
    """All completions of some groups under policy and reference.

    Args:
        graph: The graph that both share.
        adapter: Folder of the policy's adapter.
        groups: Prompts with their completions.
        runtime: This machine.
        reporter: Shows progress, and of a cache that is not used.
        command: Who asks, for messages.

    Returns:
        Policy and reference; models are loaded only where something is missing.

    Raises:
        StaleArtifactError: There is no adapter in the folder.
        Interrupted: The user asked to stop; what was computed is kept.
        MachineError: Another run of this command, or of stage precompute_ref, is at work here.
    """
    wanted = {key for group in groups for key in group_keys(group)}
    models = _Models(graph, adapter, runtime, reporter, command)
    with stage_scratch("precompute_ref", digest_json(graph.identity)) as scratch:
        store = RowStore(scratch.folder / "rows", SCHEMA)
        cached = _reference_rows(graph, wanted, reporter, command)
        reference = models.complete("reference", groups, wanted, cached, store)
    with stage_scratch("score", policy_digest(graph, adapter)) as scratch:
        store = RowStore(scratch.folder / "rows", SCHEMA)
        policy = models.complete("policy", groups, wanted, None, store)
        forget_other_stores(scratch.folder.parent, scratch.folder, _OTHER_STORES_KEPT)
    return policy, reference


def policy_digest(graph: Graph, adapter: Path) -> str:
    """One digest of all that the policy's log-probabilities depend on.

    Raises:
        StaleArtifactError: There is no adapter in the folder.
    """
    try:
        return digest_json({"graph": graph.identity, "adapter": digest_files(adapter, ADAPTER_FILES)})
    except FileNotFoundError as error:
        raise StaleArtifactError(f"{error.filename} is missing; run: dpo-cli train") from None


def _reference_rows(graph: Graph, wanted: set[str], reporter: Reporter, command: str) -> pl.DataFrame | None:
    """What data/reference knows; a cache of another graph, or a damaged one, is left alone."""
    if not (paths.REFERENCE / REFERENCE.name).is_file():
        return None
    try:
        return read_cache_rows(paths.REFERENCE, graph.identity, wanted)
    except StaleArtifactError as error:
        reporter.warn(f"{command}: {paths.REFERENCE.as_posix()} is not used: {error.problems[0]}")
        return None


class _Models:
    """Policy and reference, loaded when they are needed."""

    def __init__(self, graph: Graph, adapter: Path, runtime: RuntimeParams, reporter: Reporter, command: str) -> None:
        self._graph = graph
        self._adapter = adapter
        self._runtime = runtime
        self._reporter = reporter
        self._command = command

    @cached_property
    def _loaded(self) -> tuple[ModelPair, Scorer]:
        graph = self._graph
        pair = load_pair(graph.base, graph.sft, graph.machine, graph.quantization, self._adapter)
        dtype = graph.machine.compute_dtype
        scorer, _ = open_scorer(pair.use_policy(), dtype, self._runtime, self._reporter, self._command)
        return pair, scorer

    def complete(
        self, name: str, groups: Sequence[TokenGroup], wanted: set[str], cached: pl.DataFrame | None, store: RowStore
    ) -> Answers:
        """All wanted rows of one model; what neither the cache nor the store has is computed and stored."""
        known = _known(cached, store, wanted)
        budget = TokenBudget(token_budget(self._runtime, self._graph.machine.device), self._command, self._reporter)
        missing = missing_groups(groups, set(known["key"].to_list()), budget.max_tokens)
        if missing:
            pair, scorer = self._loaded
            _ = pair.use_policy() if name == "policy" else pair.use_reference()
            with scorer:
                score_into_store(
                    scorer,
                    missing,
                    store,
                    budget,
                    checkpoint_minutes=self._runtime.checkpoint_minutes,
                    command=self._command,
                    what=f"answers under the {name}",
                    reporter=self._reporter,
                )
        rows = _known(cached, store, wanted) if missing else known
        keys = rows["key"].to_list()
        return Answers(
            logps=dict(zip(keys, rows["logp"].to_list(), strict=True)),
            token_logps=dict(zip(keys, rows["token_logps"].to_list(), strict=True)),
            num_cached=known.height,
            num_computed=len(wanted) - known.height,
        )


def _known(cached: pl.DataFrame | None, store: RowStore, wanted: set[str]) -> pl.DataFrame:
    stored = rows_of(store.load(), wanted)
    return stored if cached is None else pl.concat([cached, stored]).unique("key", keep="first", maintain_order=True)
