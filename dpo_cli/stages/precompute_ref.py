"""Stage precompute_ref: score every answer with the reference model once, then unload it for good."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import polars as pl
import torch

from dpo_cli.core import paths
from dpo_cli.core.artifacts import digest_json, publish_folder, write_json, write_json_lines
from dpo_cli.core.errors import DataError, Interrupted
from dpo_cli.core.interrupts import graceful_stop
from dpo_cli.core.params import Params
from dpo_cli.core.progress import Reporter
from dpo_cli.core.scratch import stage_scratch
from dpo_cli.data.tokenise import TokenGroup, explain_found, explain_rejects
from dpo_cli.models.adapters import load_reference
from dpo_cli.models.device import peak_memory_gib
from dpo_cli.models.load import quiet_libraries
from dpo_cli.reference.cache import RowStore, completion_key, forget_other_stores, write_cache
from dpo_cli.reference.graph import SPLITS, Graph, all_rejects, open_graph
from dpo_cli.scoring.layout import split_by_tokens
from dpo_cli.scoring.scorer import Scorer

_OTHER_STORES_KEPT = 3


def run(params: Params, reporter: Reporter) -> dict[str, Any]:
    """Write data/reference: the log-probabilities of all answers of both splits.

    Rows that an earlier run computed for the same graph are taken over, however the data grew.

    Raises:
        StaleArtifactError: models/base, models/sft or data/preference is missing or stale.
        DataError: No pair is within reference.max_length.
        Interrupted: The user asked to stop; what was computed is kept.
    """
    quiet_libraries()
    graph = open_graph(params.model, params.reference, params.runtime)
    tables = [graph.tokenise_pairs(split) for split in SPLITS]
    rejects = all_rejects(tables)
    wanted = _unique_completions([group for table in tables for group in table.groups])
    if not wanted:
        raise DataError(
            f"data/preference: {explain_rejects(tables, 'reference.max_length', graph.max_length) or 'has no pairs'}"
        )
    if warning := explain_rejects(tables, "reference.max_length", graph.max_length):
        reporter.warn(f"precompute-ref: {warning}")
    if warning := explain_found(tables):
        reporter.warn(f"precompute-ref: {warning}")
    identity_digest = digest_json(graph.identity)
    with stage_scratch("precompute_ref", identity_digest) as scratch:
        store = RowStore(scratch.folder / "rows")
        known = set(store.load()["key"].to_list())
        missing = [group for key, group in wanted.items() if key not in known]
        begun = time.monotonic()
        if missing:
            _compute(graph, missing, store, params, reporter)
        elapsed_s = time.monotonic() - begun
        rows = store.load().filter(pl.col("key").is_in(list(wanted)))
        built = scratch.build_folder()
        write_cache(built, rows, graph.identity)
        publish_folder(built, paths.REFERENCE)
        forget_other_stores(scratch.folder.parent, scratch.folder, _OTHER_STORES_KEPT)
    num_tokens = sum(len(group.completions[0]) for group in missing)
    metrics = {
        "num_completions": len(wanted),
        "num_computed": len(missing),
        "num_reused": len(wanted) - len(missing),
        "num_rejected": len(rejects),
        "completions_per_s": len(missing) / max(elapsed_s, 1e-9) if missing else 0.0,
        "completion_tokens_per_s": num_tokens / max(elapsed_s, 1e-9) if missing else 0.0,
        "peak_mem_gib": peak_memory_gib(graph.machine),
    }
    write_json_lines(paths.rejects_file("precompute_ref"), rejects)
    write_json(paths.metrics_file("precompute_ref"), {"precompute_ref": metrics})
    reporter.table(
        "precompute_ref",
        [
            ("completions", str(metrics["num_completions"])),
            ("computed", str(metrics["num_computed"])),
            ("taken over", str(metrics["num_reused"])),
            ("pairs left out", f"{len(rejects)} (listed in {paths.rejects_file('precompute_ref').as_posix()})"),
            ("graph", f"{graph.quantization}, {graph.machine.dtype_name}, sft {graph.sft.method}"),
            ("speed", f"{metrics['completions_per_s']:.1f} completions/s"),
            ("peak memory", f"{metrics['peak_mem_gib']:.2f} GiB"),
        ],
    )
    return metrics


def _unique_completions(groups: Sequence[TokenGroup]) -> dict[str, TokenGroup]:
    """Every different completion once, as a group of its own, by its key."""
    return {
        completion_key(group.prompt, completion): TokenGroup(group.id, group.group, group.prompt, (completion,))
        for group in groups
        for completion in group.completions
    }


def _compute(graph: Graph, missing: Sequence[TokenGroup], store: RowStore, params: Params, reporter: Reporter) -> None:
    """Score completions, longest batches last, and store them as time passes."""
    runtime = params.runtime
    model = load_reference(graph.base, graph.sft, graph.machine, graph.quantization)
    scorer = Scorer(model, graph.machine.compute_dtype)
    pending: list[dict[str, Any]] = []
    saved_at = time.monotonic()
    label = "precompute-ref: scoring answers"
    with graceful_stop() as stop, torch.no_grad(), reporter.meter(label, len(missing), "answers") as meter:
        for indices in split_by_tokens(missing, runtime.max_tokens_per_microbatch):
            batch = [missing[index] for index in indices]
            pending += _score(scorer, batch)
            meter.advance(len(batch))
            due = time.monotonic() - saved_at >= runtime.checkpoint_minutes * 60
            if stop.requested or due:
                store.add(pending)
                pending.clear()
                saved_at = time.monotonic()
            if stop.requested:
                raise Interrupted("precompute-ref: stopped; what was scored is kept, run it again to go on")
    store.add(pending)


def _score(scorer: Scorer, batch: Sequence[TokenGroup]) -> list[dict[str, Any]]:
    """Rows of the cache for some single completions."""
    scores = scorer.score(batch)
    counts = scores.num_tokens_BK[:, 0].tolist()
    pieces = scores.token_logps_N.cpu().split(counts)
    return [
        {
            "key": completion_key(group.prompt, group.completions[0]),
            "logp": logps.double().sum().item(),
            "num_tokens": count,
            "token_logps": logps.tolist(),
        }
        for group, count, logps in zip(batch, counts, pieces, strict=True)
    ]
