"""Stage train: Direct Preference Optimization against the cached reference."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from dpo_cli.core import paths
from dpo_cli.core.artifacts import digest_json
from dpo_cli.core.errors import DataError, ParamsError
from dpo_cli.core.manifest import DPO
from dpo_cli.core.params import EMBEDDED, Params, TrainParams
from dpo_cli.core.progress import Reporter
from dpo_cli.core.text import markdown
from dpo_cli.data.tokenize import SPLITS, Kind, all_rejects, read_columns, read_ranks, refuse_empty
from dpo_cli.data.tokens import TokenGroup
from dpo_cli.losses.changes import shared_length_logps
from dpo_cli.models.adapters import adapter_size, size_in_words
from dpo_cli.models.card import Card, publish_adapter
from dpo_cli.models.device import memory_in_words, token_budget
from dpo_cli.models.load import quiet_libraries
from dpo_cli.models.project import Project, open_project
from dpo_cli.scoring.reference import read_cache, read_cache_tokens, reference_logps
from dpo_cli.training.fit import Fit, fit
from dpo_cli.training.gate import StepZero, check_step_zero
from dpo_cli.training.history import with_held_out, write_reports
from dpo_cli.training.objective import PreferenceObjective, preference_objective, reads_scores
from dpo_cli.training.parallel import Job, Replicas, join_replicas, shared_scratch
from dpo_cli.training.protocols import Learner


def run(params: Params, reporter: Reporter) -> dict[str, Any]:
    """Write models/dpo: the tuned adapter, its tokenizer, a model card and its provenance.

    Where torchrun started several processes they share the training; the first one writes and
    reports, the others return nothing.

    Raises:
        StaleArtifactError: Something an earlier stage made is missing, damaged or of another
            graph, or policy and reference differ before the first step.
        ParamsError: The loss cannot be shared by several processes.
        DataError: No pair of a split is within reference.max_length.
        Interrupted: The user asked to stop; a checkpoint is kept.
    """
    quiet_libraries()
    with join_replicas(params.runtime, embedded=params.model.name == EMBEDDED) as replicas:
        return _run(params, replicas.reporter(reporter), replicas)


def _run(params: Params, reporter: Reporter, replicas: Replicas) -> dict[str, Any]:
    settings = params.train
    project = open_project(params, reporter, "train")
    kind = _kind(settings)
    good: dict[str, bool] = {}
    tables = []
    for split in SPLITS:
        if kind == "answers":
            table, labels = project.tokenize_single_answers(split)
            good |= labels
        else:
            table = project.tokenize_rankings(split) if kind == "rankings" else project.tokenize_pairs(split)
        tables.append(table)
    train, held_out = tables
    refuse_empty(tables, project.max_length, section="train", of=kind)
    objective = _objective(settings, project, [*train.groups, *held_out.groups], good)
    if objective.is_coupled and replicas.size > 1:
        raise ParamsError(
            f"params.yaml: train.loss {_named(settings)} looks at all {kind} of a step together and runs as one"
            f" process; {replicas.size} were started"
        )
    manifest = project.manifest(params, "train")
    with shared_scratch("train", digest_json(asdict(manifest)), replicas) as scratch:
        policy = project.policy(settings.lora, settings.seed)
        scorer, layout = project.scorer(policy)
        step_zero = check_step_zero(
            policy, scorer, objective, train.groups, token_budget(params.runtime, scorer.device)
        )
        if step_zero.doubt is not None:
            reporter.warn(f"train: {step_zero.doubt}")
        learner, job = Learner(policy, scorer, objective), Job(project, scratch.folder, replicas)
        result = fit(learner, train.groups, held_out.groups, settings, job)
        scorer.close()
        if not replicas.is_first:
            return {}
        metrics = _metrics(step_zero, result) | result.metrics("pairs", (train, held_out), project.machine, layout)
        metrics |= adapter_size(policy)
        if kind == "rankings":
            metrics["eval_kendall_tau"] = result.kept("eval_rewards/kendall_tau")
        trained = {"num_steps": result.num_steps, "kept_step": result.kept_step}
        card = _card(params, project, metrics)
        publish_adapter(DPO, replace(manifest, facts=trained), card, project, policy, scratch.build_folder())
        columns = with_held_out(objective.metric_names)
        write_reports("train", metrics, columns, result.history, all_rejects([train, held_out]))
        scratch.clear()
    _print_summary(settings, metrics, result.steps_in_words, reporter)
    return metrics


def _objective(
    settings: TrainParams, project: Project, groups: Sequence[TokenGroup], good: Mapping[str, bool]
) -> PreferenceObjective:
    """What is minimized, with the reference's log-probabilities and what else it reads of the data."""
    reference = reference_logps(read_cache(paths.REFERENCE, project.identity), groups)
    shared_length = None
    if settings.ld_alpha is not None:
        tokens = reference_logps(read_cache_tokens(paths.REFERENCE, project.identity), groups)
        shared_length = {id: _shared_length(sides, settings.ld_alpha) for id, sides in tokens.items()}
    if "plackett_luce" in settings.losses:
        return preference_objective(settings, reference, ranks=read_ranks(groups, settings.ties, "train"))
    if "kto" in settings.losses:
        return preference_objective(settings, reference, good=good)
    scores = _scores(settings, groups) if reads_scores(settings) else None
    return preference_objective(settings, reference, shared_length=shared_length, scores=scores)


def _shared_length(sides: Sequence[Sequence[float]], weight: float) -> list[float]:
    lengths = torch.tensor([[len(side) for side in sides]])
    logps = torch.tensor([logp for side in sides for logp in side], dtype=torch.float32)
    return shared_length_logps(logps, lengths, weight)[0].tolist()


def _scores(settings: TrainParams, groups: Sequence[TokenGroup]) -> dict[str, tuple[float, float]]:
    """Chosen and rejected score by row id.

    Raises:
        DataError: A pair has no scores, or, for soft_label, scores that cannot be numbers of votes.
    """
    found = {
        id: scores
        for split in SPLITS
        for id, scores in read_columns(paths.preference_table(split), "chosen_score", "rejected_score").items()
        if None not in scores and math.isfinite(scores[0] - scores[1])
    }
    without = [group.id for group in groups if group.id not in found]
    if without:
        reader, remedy = "train.margin_scale", "set it to 0"
        if not settings.margin_scale:
            reader, remedy = f"train.loss {_named(settings)}", "take another loss"
        raise DataError(
            f"data/preference: {len(without)} of {len(groups)} pairs have no scores, or none with a finite difference;"
            f" the first is {without[0]}; params.yaml: {reader} reads them, {remedy}"
        )
    found = {group.id: found[group.id] for group in groups}
    for id, scores in found.items() if "soft_label" in settings.losses else ():
        if min(scores) < 0 or sum(scores) == 0:
            raise DataError(
                f"data/preference: the scores of pair {id} are {scores[0]:g} and {scores[1]:g}, which cannot be numbers"
                " of votes; params.yaml: train.loss soft_label reads votes or shares of them, rpo_bwd_kl any scores"
            )
    return found


def _metrics(step_zero: StepZero, result: Fit) -> dict[str, Any]:
    return {
        "step0_loss": step_zero.loss,
        "step0_max_abs_margin": step_zero.max_abs_margin,
        "step0_max_abs_logp_difference": step_zero.max_abs_logp_difference,
        "eval_accuracy": result.kept("eval_rewards/accuracies"),
        "eval_margin": result.kept("eval_rewards/margins"),
    }


def _card(params: Params, project: Project, metrics: dict[str, Any]) -> Card:
    settings = params.train
    unit = _kind(settings)
    held = "4-bit nf4 with double quantization" if project.quantization == "nf4" else "plain"
    return Card(
        tags=("dpo", "lora"),
        text=f"# {markdown(params.model.name)}, tuned with DPO\n\nA LoRA adapter trained with Direct Preference"
        " Optimization (Rafailov et al. 2023) by dpo-cli.",
        rows=(
            ("loss", f"{_named(settings)}, beta {settings.beta:g}"),
            (unit, f"{metrics['num_pairs']} for training, {metrics['num_eval']} held out"),
            ("steps", f"{metrics['kept_step']} of {settings.batch_size} {unit}"),
            ("held-out loss", f"{metrics['eval_loss_start']:.4f} before, {metrics['eval_loss']:.4f} after"),
            ("held-out accuracy", f"{metrics['eval_accuracy']:.3f}"),
            ("trained", size_in_words(metrics)),
            ("frozen weights", f"{held}, computed in {project.machine.dtype_name}"),
        ),
    )


def _named(settings: TrainParams) -> str:
    """The objective in words: its name, or names with their weights."""
    return ", ".join(name if weight == 1 else f"{weight:g} {name}" for name, weight in settings.losses.items())


def _kind(settings: TrainParams) -> Kind:
    """What the loss learns from."""
    return "rankings" if "plackett_luce" in settings.losses else "answers" if "kto" in settings.losses else "pairs"


def _print_summary(settings: TrainParams, metrics: dict[str, Any], steps: str, reporter: Reporter) -> None:
    expected = f" (ln 2 = {math.log(2):.6f})" if list(settings.losses) == ["sigmoid"] else ""
    unit = _kind(settings)
    speed, tokens = f"{metrics['pairs_per_s']:.1f}", f"{metrics['logical_tokens_per_s']:.0f}"
    reporter.table(
        "train",
        [
            ("loss", f"{_named(settings)}, beta {settings.beta:g}"),
            ("trained", size_in_words(metrics)),
            (unit, f"{metrics['num_pairs']} train, {metrics['num_eval']} held out"),
            (f"{unit} left out", f"{metrics['num_rejected']} (listed in {paths.rejects_file('train').as_posix()})"),
            ("steps", steps),
            ("step-0 loss", f"{metrics['step0_loss']:.6f}{expected}"),
            ("step-0 largest margin", f"{metrics['step0_max_abs_margin']:.2g}"),
            ("held-out loss", f"{metrics['eval_loss_start']:.4f} -> {metrics['eval_loss']:.4f}"),
            ("held-out accuracy", f"{metrics['eval_accuracy']:.3f}"),
            *(
                [("held-out Kendall tau", f"{metrics['eval_kendall_tau']:.3f}")]
                if "eval_kendall_tau" in metrics
                else []
            ),
            *([("speed", f"{speed} {unit}/s, {tokens} logical tokens/s")] if metrics["pairs_per_s"] else []),
            ("peak memory", memory_in_words(metrics)),
            ("the adapter", f"{paths.DPO_MODEL.as_posix()}; its README.md says how to load and merge it"),
        ],
    )
