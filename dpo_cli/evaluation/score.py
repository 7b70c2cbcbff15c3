"""The implicit reward r = beta log(pi / pi_ref) of any pairs and rankings.

Log-probabilities are taken from what is known, the rest is computed and kept. The reference's lie in data/reference and
in the scratch area of stage precompute_ref, which both know a completion by its token ids; the policy's in a scratch
area of their own, under a digest of the graph and the adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from dpo_cli.core import paths
from dpo_cli.core.artifacts import atomic_path, digest_json, write_json_lines
from dpo_cli.core.data_params import Source
from dpo_cli.core.errors import StaleArtifactError
from dpo_cli.core.manifest import DPO, REFERENCE, Manifest
from dpo_cli.core.params import Params
from dpo_cli.core.progress import Reporter
from dpo_cli.core.row_store import RowStore, forget_other_stores
from dpo_cli.core.scratch import stage_scratch
from dpo_cli.data.schema import MESSAGES, table_of
from dpo_cli.data.tokenize import prompt_ids, table_digests
from dpo_cli.data.tokens import TokenGroup
from dpo_cli.evaluation.models import adapter_models
from dpo_cli.evaluation.rewards import Agreement, RewardSummary, ScoredGroup, agreements, summarize_agreements
from dpo_cli.evaluation.score_rows import InputRow, InputRows, read_rows
from dpo_cli.evaluation.steps import ScoredAnswers, score_answers
from dpo_cli.losses.catalogue import learns_log_ratio
from dpo_cli.models.load import quiet_libraries
from dpo_cli.models.project import Project, open_project
from dpo_cli.scoring.reference import SCHEMA as LOGP_SCHEMA
from dpo_cli.scoring.reference import read_cache_rows
from dpo_cli.statistics.intervals import Sampling

_OTHER_STORES_KEPT = 3


@dataclass(frozen=True)
class ScoredRow:
    """A scored row.

    Attributes:
        agreement: How the answers' rewards agree with their ranks.
        ratios: log(pi / pi_ref) of each token of each answer, nats.
        in_training: Whether its prompt was trained on.
    """

    input: InputRow
    answers: ScoredGroup
    agreement: Agreement
    ratios: list[list[float]]
    in_training: bool


@dataclass(frozen=True)
class Scored:
    """Files scored.

    Attributes:
        model: Folder of the adapter.
        given: What was read, and what is left out.
        rows: The rows that were scored.
        summaries: Figures of ``all`` rows, then of each source.
    """

    model: Path
    beta: float
    confidence: float
    given: InputRows
    rows: list[ScoredRow]
    policy: ScoredAnswers
    reference: ScoredAnswers
    summaries: dict[str, RewardSummary]
    tokenizer: Any

    def figures(self) -> dict[str, Any]:
        """As one JSON object."""
        return {
            "model": self.model.as_posix(),
            "beta": self.beta,
            "num_read": self.given.num_read,
            "num_scored": self.given.num_scored,
            "num_in_training": sum(row.in_training for row in self.rows),
            "reference": {"num_cached": self.reference.num_cached, "num_computed": self.reference.num_computed},
            "policy": {"num_cached": self.policy.num_cached, "num_computed": self.policy.num_computed},
            "all": asdict(self.summaries["all"]),
            "sources": {name: asdict(one) for name, one in self.summaries.items() if name != "all"},
            "left_out": self.given.left_out,
        }


def score_sources(
    sources: Sequence[Source], model: Path, beta: float | None, max_rows: int | None, params: Params, reporter: Reporter
) -> tuple[Scored, list[str]]:
    """Score the rows of some files with policy and reference.

    Args:
        sources: The files.
        model: Folder of the adapter.
        beta: Of the reward; None: what the adapter was trained with.
        max_rows: Rows to read of each file; None: all.
        params: All settings.
        reporter: Shows progress.

    Returns:
        What came of it, and what to know of the figures, a sentence each.

    Raises:
        DataError: A file cannot be read, or no row of it can be scored.
        StaleArtifactError: The model or its reference is missing, damaged, or of another graph.
        Interrupted: The user asked to stop; what was scored is kept.
    """
    quiet_libraries()
    project = open_project(params, reporter, "score", any_data=True)
    manifest = DPO.check({"graph": project.identity}, model)
    beta = float(manifest.settings["train"]["beta"]) if beta is None else beta
    given = read_rows(sources, max_rows, params, project, reporter)
    policy, reference = _score_both(project, model, [row.tokens for row in given.rows])
    rows = _scored(given.rows, policy, reference, beta, _trained_prompts(given.rows, project))
    settings = params.evaluate
    sampling = Sampling(settings.bootstrap_draws, settings.confidence, settings.seed)
    summaries = {}
    for name in ["all", *dict.fromkeys(row.input.source for row in rows)]:
        mine = [row for row in rows if name == "all" or row.input.source == name]
        summaries[name] = summarize_agreements([row.answers for row in mine], [row.agreement for row in mine], sampling)
    found = Scored(model, beta, settings.confidence, given, rows, policy, reference, summaries, project.tokenizer)
    return found, _warnings(rows, manifest, project, model)


def _score_both(project: Project, adapter: Path, groups: Sequence[TokenGroup]) -> tuple[ScoredAnswers, ScoredAnswers]:
    """All completions of some groups under policy and reference."""
    models = adapter_models(project, adapter)
    with stage_scratch("precompute_ref", digest_json(project.identity)) as scratch:
        store = RowStore(scratch.folder / "rows", LOGP_SCHEMA)
        cached = _reference_rows(project, {key for group in groups for key in group.keys})
        reference = score_answers(project, models.reference, groups, store, f"answers under {models.reference}", cached)
    with stage_scratch("score", models.policy.digest) as scratch:
        store = RowStore(scratch.folder / "rows", LOGP_SCHEMA)
        policy = score_answers(project, models.policy, groups, store, f"answers under {models.policy}")
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


def _scored(
    rows: Sequence[InputRow], policy: ScoredAnswers, reference: ScoredAnswers, beta: float, trained: set[str]
) -> list[ScoredRow]:
    keys = [row.tokens.keys for row in rows]
    answers = [
        ScoredGroup.implicit(
            (row.tokens.id, row.tokens.group),
            [policy.logps[key] for key in mine],
            [reference.logps[key] for key in mine],
            row.tokens.sizes[1:],
            beta,
            row.ranks,
        )
        for row, mine in zip(rows, keys, strict=True)
    ]
    ours, theirs = policy.token_logps, reference.token_logps
    ratios = [[[a - b for a, b in zip(ours[key], theirs[key], strict=True)] for key in mine] for mine in keys]
    in_training = [row.tokens.group in trained for row in rows]
    return [
        ScoredRow(*columns) for columns in zip(rows, answers, agreements(answers), ratios, in_training, strict=True)
    ]


# --- what was trained on ------------------------------------------------------------------


def _trained_prompts(rows: Sequence[InputRow], project: Project) -> set[str]:
    """Those of the rows' prompts that are in the training data as it lies there now."""
    wanted = {row.tokens.group for row in rows}
    found: set[str] = set()
    for path in (paths.preference_table("train"), paths.ranking_table("train")):
        if path.is_file():
            found |= wanted & set(pl.read_parquet(path, columns=["group"], glob=False)["group"].to_list())
    path = paths.SFT_DATA / "train.parquet"
    if project.sft.data is not None and path.is_file():
        found |= wanted & prompt_ids(path)
    return found


def _warnings(rows: Sequence[ScoredRow], manifest: Manifest, project: Project, model: Path) -> list[str]:
    found = []
    num_trained = sum(row.in_training for row in rows)
    if num_trained:
        found.append(
            f"{num_trained} of {len(rows)} rows ({num_trained / len(rows):.0%}) have prompts that were trained"
            " on: what they say of new prompts is too good"
        )
    changed = [
        folder.as_posix()
        for folder, digests in (
            (paths.PREFERENCE_DATA, manifest.made_of.get("data/preference")),
            (paths.SFT_DATA, project.sft.data),
        )
        if digests is not None and digests != table_digests(folder)
    ]
    if changed:
        found.append(
            f"{' and '.join(changed)} differ from what {model.as_posix()} was trained on, so more of the prompts may be"
        )
    trained = manifest.settings["train"]
    loss = trained.get("loss", "sigmoid")
    names = list(loss) if isinstance(loss, dict) else [loss]
    if not learns_log_ratio(names, trained.get("divergence", "reverse_kl"), trained.get("ld_alpha")):
        found.append(
            f"{model.as_posix()} was trained with {', '.join(names)} and its settings, whose reward is another"
            " than beta log(pi / pi_ref) (docs/objectives.md)"
        )
    return found


# --- as a file ------------------------------------------------------------------------------

_COMPLETION = pa.struct(
    [
        ("side", pa.string()),
        ("rank", pa.int32()),
        ("messages", MESSAGES),
        ("reward", pa.float64()),
        ("logp", pa.float64()),
        ("ref_logp", pa.float64()),
        ("num_tokens", pa.int32()),
        ("token_ids", pa.list_(pa.int32())),
        ("token_log_ratios", pa.list_(pa.float32())),
    ]
)
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("file", pa.string()),
        ("row", pa.int64()),
        ("part", pa.string()),
        ("source", pa.string()),
        ("kind", pa.string()),
        ("in_training", pa.bool_()),
        ("accuracy", pa.float64()),
        ("margin", pa.float64()),
        ("prompt", MESSAGES),
        ("completions", pa.list_(_COMPLETION)),
    ]
)
"""Columns of ``--out``. Rewards, log-probabilities (``logp``, ``ref_logp``) and margin are in nats."""


def write_rows(path: Path, rows: Sequence[ScoredRow]) -> None:
    """Write the rows as parquet (:data:`SCHEMA`) or JSON lines, by the file's suffix, whole or not at all."""
    entries = (_entry(row) for row in rows)
    if path.suffix == ".jsonl":
        write_json_lines(path, entries)
        return
    with atomic_path(path) as temporary:
        pq.write_table(table_of(list(entries), SCHEMA), temporary, compression="zstd")


def _entry(row: ScoredRow) -> dict[str, Any]:
    """A row as ``--out`` has it (:data:`SCHEMA`)."""
    given, answers = row.input, row.answers
    return {
        "id": given.tokens.id,
        "file": given.file,
        "row": given.row,
        "part": given.part,
        "source": given.source,
        "kind": "pair" if given.is_pair else "ranking",
        "in_training": row.in_training,
        "accuracy": row.agreement.accuracy,
        "margin": row.agreement.margin,
        "prompt": given.prompt,
        "completions": [
            {
                "side": ("chosen", "rejected")[place] if given.is_pair else None,
                "rank": given.ranks[place],
                "messages": messages,
                "reward": answers.rewards[place],
                "logp": answers.policy[place],
                "ref_logp": answers.reference[place],
                "num_tokens": answers.num_tokens[place],
                "token_ids": list(given.tokens.completions[place]),
                "token_log_ratios": row.ratios[place],
            }
            for place, messages in enumerate(given.completions)
        ],
    }
