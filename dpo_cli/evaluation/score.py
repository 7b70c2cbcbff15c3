"""The implicit reward r = beta log(pi / pi_ref) of any pairs and rankings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import polars as pl

from dpo_cli.core import paths
from dpo_cli.core.data_params import Source
from dpo_cli.core.manifest import DPO, Manifest
from dpo_cli.core.params import Params
from dpo_cli.core.progress import Reporter
from dpo_cli.data.tokenize import prompt_ids, table_digests
from dpo_cli.evaluation.implicit_reward import (
    Agreement,
    RankedAnswers,
    RewardSummary,
    agreements,
    summarize_rewards,
)
from dpo_cli.evaluation.log_ratios import ScoredAnswers, score_both
from dpo_cli.evaluation.score_rows import InputRow, InputRows, read_rows
from dpo_cli.losses.catalogue import learns_log_ratio
from dpo_cli.models.load import quiet_libraries
from dpo_cli.models.project import Project, open_project
from dpo_cli.reference.cache import group_keys


@dataclass(frozen=True)
class ScoredRow:
    """A scored row.

    Attributes:
        input: The row.
        answers: Its answers' figures.
        agreement: How their rewards agree with their ranks.
        logps: Under the policy, of each answer.
        ratios: log(pi / pi_ref) of each token of each answer, nats.
        in_training: Whether its prompt was trained on.
    """

    input: InputRow
    answers: RankedAnswers
    agreement: Agreement
    logps: list[float]
    ratios: list[list[float]]
    in_training: bool


@dataclass(frozen=True)
class Scored:
    """Files scored.

    Attributes:
        model: Folder of the adapter.
        beta: Of the rewards.
        confidence: Of the intervals.
        given: What was read, and what is left out.
        rows: The rows that were scored.
        policy: The answers under the policy.
        reference: The same under the reference.
        summaries: Figures of ``all`` rows, then of each source.
        tokenizer: Of both models.
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
    project = open_project(params, reporter, "score")
    manifest = DPO.check({"graph": project.identity}, model)
    beta = float(manifest.settings["train"]["beta"]) if beta is None else beta
    given = read_rows(sources, max_rows, params, project, reporter)
    policy, reference = score_both(project, model, [row.tokens for row in given.rows])
    rows = _scored(given.rows, policy, reference, beta, _trained_prompts(given.rows, project))
    settings = params.evaluate
    summaries = _summaries(rows, draws=settings.bootstrap_draws, confidence=settings.confidence, seed=settings.seed)
    found = Scored(model, beta, settings.confidence, given, rows, policy, reference, summaries, project.tokenizer)
    return found, _warnings(rows, manifest, project, model)


def _scored(
    rows: Sequence[InputRow], policy: ScoredAnswers, reference: ScoredAnswers, beta: float, trained: set[str]
) -> list[ScoredRow]:
    keys = [group_keys(row.tokens) for row in rows]
    ranked = [
        RankedAnswers(
            group=row.tokens.group,
            ranks=row.ranks,
            rewards=tuple(beta * (policy.logps[key] - reference.logps[key]) for key in mine),
            reference=tuple(reference.logps[key] for key in mine),
            num_tokens=tuple(map(len, row.tokens.completions)),
        )
        for row, mine in zip(rows, keys, strict=True)
    ]
    return [
        ScoredRow(
            row,
            answers,
            agreement,
            [policy.logps[key] for key in mine],
            [_differences(policy.token_logps[key], reference.token_logps[key]) for key in mine],
            row.tokens.group in trained,
        )
        for row, answers, agreement, mine in zip(rows, ranked, agreements(ranked), keys, strict=True)
    ]


def _differences(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    return [mine - other for mine, other in zip(ours, theirs, strict=True)]


def _summaries(rows: Sequence[ScoredRow], **bootstrap: Any) -> dict[str, RewardSummary]:
    """Figures of all rows, then of each source."""
    sources = list(dict.fromkeys(row.input.source for row in rows))
    found = {}
    for name in ["all", *sources]:
        mine = [row for row in rows if name == "all" or row.input.source == name]
        found[name] = summarize_rewards([row.answers for row in mine], [row.agreement for row in mine], **bootstrap)
    return found


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
