"""Stage precompute_ref: score every answer with the reference model once, then unload it for good."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from dpo_cli.core import paths
from dpo_cli.core.artifacts import digest_json, publish_folder, write_json, write_json_lines
from dpo_cli.core.errors import DataError
from dpo_cli.core.params import Params
from dpo_cli.core.progress import Reporter
from dpo_cli.core.row_store import RowStore, forget_other_stores
from dpo_cli.core.scratch import stage_scratch
from dpo_cli.data.tokenize import SPLITS, all_rejects, explain_found, explain_rejects
from dpo_cli.data.tokens import TokenGroup
from dpo_cli.data.unpaired import beside_others, pairs_of
from dpo_cli.models.device import memory_in_words, memory_metrics
from dpo_cli.models.load import quiet_libraries
from dpo_cli.models.project import Project, open_project
from dpo_cli.scoring.probe import LayoutChoice
from dpo_cli.scoring.reference import SCHEMA, missing_groups, write_cache

_OTHER_STORES_KEPT = 3


def run(params: Params, reporter: Reporter) -> dict[str, Any]:
    """Write data/reference: the log-probabilities of all answers of both splits, in pairs and rankings.

    Where the data has single answers, each is scored with another prompt's beside it, which train.loss kto reads.

    Rows that an earlier run computed for the same graph are taken over, however the data grew.

    Raises:
        StaleArtifactError: models/base, models/sft or data/preference is missing or stale.
        DataError: No pair is within reference.max_length.
        Interrupted: The user asked to stop; what was computed is kept.
    """
    quiet_libraries()
    project = open_project(params, reporter, "precompute-ref")
    tables, groups = [], []
    for split in SPLITS:
        table = project.tokenize_preferences(split)
        pairs, (answers, _) = pairs_of(table), beside_others(table, project.max_length)
        tables.append(answers if answers.groups else pairs)
        groups += [*pairs.groups, *answers.groups]
    if params.reference.rankings:
        rankings = [project.tokenize_rankings(split) for split in SPLITS]
        tables += rankings
        groups += [group for table in rankings for group in table.groups]
    rejects = all_rejects(tables)
    wanted = {key for group in groups for key in group.keys}
    if not wanted:
        raise DataError(
            f"data/preference: {explain_rejects(tables, 'reference.max_length', project.max_length) or 'has no pairs'}"
        )
    if warning := explain_rejects(tables, "reference.max_length", project.max_length):
        reporter.warn(f"precompute-ref: {warning}")
    if warning := explain_found(tables):
        reporter.warn(f"precompute-ref: {warning}")
    identity_digest = digest_json(project.identity)
    with stage_scratch("precompute_ref", identity_digest) as scratch:
        store = RowStore(scratch.folder / "rows", SCHEMA)
        missing = missing_groups(groups, store.keys(), project.budget().max_tokens)
        begun = time.monotonic()
        layout = _compute(project, missing, store) if missing else None
        elapsed_s = time.monotonic() - begun
        rows = store.rows(wanted)
        built = scratch.build_folder()
        write_cache(built, rows, project.identity, {"reference": params.reference.model_dump()})
        publish_folder(built, paths.REFERENCE)
        forget_other_stores(scratch.folder.parent, scratch.folder, _OTHER_STORES_KEPT)
    num_computed = sum(len(group.completions) for group in missing)
    num_tokens = sum(len(completion) for group in missing for completion in group.completions)
    metrics = {
        "num_completions": len(wanted),
        "num_computed": num_computed,
        "num_reused": len(wanted) - num_computed,
        "num_rejected": len(rejects),
        "completions_per_s": num_computed / max(elapsed_s, 1e-9) if missing else None,
        "completion_tokens_per_s": num_tokens / max(elapsed_s, 1e-9) if missing else None,
        **memory_metrics(project.machine),
        **(layout.metrics() if layout else {}),
    }
    write_json_lines(paths.rejects_file("precompute_ref"), rejects)
    write_json(paths.metrics_file("precompute_ref"), {"precompute_ref": metrics})
    reporter.table(
        "precompute_ref",
        [
            ("completions", str(metrics["num_completions"])),
            ("computed", str(metrics["num_computed"])),
            ("taken over", str(metrics["num_reused"])),
            ("rows left out", f"{len(rejects)} (listed in {paths.rejects_file('precompute_ref').as_posix()})"),
            ("graph", f"{project.quantization}, {project.machine.dtype_name}, sft {project.sft.method}"),
            *([("speed", f"{metrics['completions_per_s']:.1f} completions/s")] if missing else []),
            ("peak memory", memory_in_words(metrics)),
        ],
    )
    return metrics


def _compute(project: Project, missing: Sequence[TokenGroup], store: RowStore) -> LayoutChoice:
    """Score groups and store their rows as time passes."""
    scorer, verdict = project.scorer(project.reference())
    project.score_into(store, scorer, missing, "scoring answers")
    return verdict
