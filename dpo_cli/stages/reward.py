"""Stage reward: the reward model that DPO does without, to judge with and for PPO to raise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from dpo_cli.core import paths
from dpo_cli.core.artifacts import digest_json, publish_folder
from dpo_cli.core.environment import importing
from dpo_cli.core.errors import DataError
from dpo_cli.core.manifest import REWARD, Manifest
from dpo_cli.core.params import Params
from dpo_cli.core.progress import Reporter
from dpo_cli.core.scratch import Scratch, stage_scratch
from dpo_cli.core.text import markdown
from dpo_cli.core.training_params import RewardParams
from dpo_cli.data.tokenize import TokenTable, explain_found, explain_rejects
from dpo_cli.data.tokens import TokenGroup
from dpo_cli.models.card import Card, publish_adapter
from dpo_cli.models.device import memory_in_words
from dpo_cli.models.heads import reward_head
from dpo_cli.statistics.intervals import Sampling
from dpo_cli.training.history import with_held_out, write_reports

if TYPE_CHECKING:  # what computes is imported where there is something to compute
    from dpo_cli.judging.reward_model import RewardModel
    from dpo_cli.models.project import Project
    from dpo_cli.training.objective import RewardObjective

_COLUMNS = with_held_out(
    (
        "rewards/chosen",
        "rewards/rejected",
        "rewards/margins",
        "rewards/accuracies",
        "rewards/ties",
        "rewards/kendall_tau",
        "gradient_weight",
    )
)
_DRAWS, _CONFIDENCE = 2000, 0.95


def run(params: Params, reporter: Reporter) -> dict[str, Any]:
    """Write models/reward: adapter and head, tokenizer, model card and manifest; a marker with reward.loss none.

    Raises:
        StaleArtifactError: models/base, models/sft or data/preference is missing or stale.
        DataError: No pair or ranking of a split is within reference.max_length.
        Interrupted: The user asked to stop; a checkpoint is kept.
    """
    if params.reward.loss == "none":
        with stage_scratch("reward", "none") as scratch:
            return _publish_none(scratch, reporter)
    return _train(params, reporter)


def _train(params: Params, reporter: Reporter) -> dict[str, Any]:
    with importing():
        from dpo_cli.data.tokenize import SPLITS, all_rejects, refuse_empty
        from dpo_cli.judging.reward_model import RewardModel
        from dpo_cli.models.load import quiet_libraries
        from dpo_cli.models.project import open_project
        from dpo_cli.scoring.reward_scorer import RewardScorer
        from dpo_cli.training.fit import fit
        from dpo_cli.training.parallel import Job
        from dpo_cli.training.protocols import Learner

    quiet_libraries()
    settings = params.reward
    project = open_project(params, reporter, "reward")
    ranked = settings.loss == "plackett_luce"
    train, held_out = (
        project.tokenize_rankings(split) if ranked else project.tokenize_pairs(split) for split in SPLITS
    )
    refuse_empty((train, held_out), project.max_length, section="reward", of="rankings" if ranked else "pairs")
    pairs = project.tokenize_pairs("eval") if ranked else held_out
    if not pairs.groups:
        raise DataError(f"{paths.preference_table('eval').as_posix()}: no pair is held out to measure with")
    if warning := explain_rejects([train, held_out], "reference.max_length", project.max_length):
        reporter.warn(f"reward: {warning}")
    if warning := explain_found([train, held_out]):
        reporter.warn(f"reward: {warning}")
    manifest = project.manifest(params, "reward")
    with stage_scratch("reward", digest_json(asdict(manifest))) as scratch:
        model = project.reward_model_at_start(settings.lora, settings.seed)
        inner, layout = project.scorer(model)
        scorer = RewardScorer(inner, reward_head(model))
        learner = Learner(model, scorer, _objective(settings, [*train.groups, *held_out.groups]))
        result = fit(learner, train.groups, held_out.groups, settings, Job(project, scratch.folder))
        model.eval()
        figures = _figures(RewardModel(scorer, project.encoder, project.budget()), pairs, settings.seed)
        metrics = {"method": settings.loss} | figures
        metrics |= result.metrics("groups", (train, held_out), project.machine, layout)
        if ranked:
            metrics["eval_kendall_tau"] = result.kept("eval_rewards/kendall_tau")
        publish_adapter(REWARD, manifest, _card(params, project, metrics), project, model, scratch.build_folder())
        write_reports("reward", metrics, _COLUMNS, result.history, all_rejects([train, held_out]))
        scratch.clear()
    _print_summary(settings, metrics, result.steps_in_words, reporter)
    return metrics


def _publish_none(scratch: Scratch, reporter: Reporter) -> dict[str, Any]:
    """There is no reward model: only a marker is written."""
    built = scratch.build_folder()
    REWARD.write(built, Manifest(settings={"reward": {"loss": "none"}}))
    publish_folder(built, paths.REWARD_MODEL)
    metrics: dict[str, Any] = {"method": "none"}
    write_reports("reward", metrics, _COLUMNS)
    scratch.clear()
    reporter.table("reward", [("loss", "none: no reward model is made (reward.loss)")])
    return metrics


def _objective(settings: RewardParams, groups: Sequence[TokenGroup]) -> RewardObjective:
    from dpo_cli.data.tokenize import read_ranks
    from dpo_cli.training.objective import RewardObjective

    if settings.loss == "bradley_terry":
        return RewardObjective()
    return RewardObjective(read_ranks(groups, settings.ties, "reward"), settings.ties)


def _figures(model: RewardModel, pairs: TokenTable, seed: int) -> dict[str, Any]:
    from dpo_cli.evaluation.rewards import ScoredGroup, reward_metrics

    rewards = model.rewards(pairs.groups)
    rows = [
        ScoredGroup(group.id, group.group, (found[0], found[1]), group.sizes[1:])
        for group, found in zip(pairs.groups, rewards, strict=True)
    ]
    return reward_metrics(rows, Sampling(_DRAWS, _CONFIDENCE, seed))


def _card(params: Params, project: Project, metrics: dict[str, Any]) -> Card:
    settings = params.reward
    unit = _unit(settings)
    low, high = metrics["accuracy_ci"]
    return Card(
        tags=("reward-model", "lora"),
        text=f"""# A reward model on {markdown(params.model.name)}

A LoRA adapter and a scalar head, trained on preferences by dpo-cli. The reward of an answer is the head on the hidden
state at its last token, the one that ends the turn. Rewards are fixed up to a constant a prompt: only the difference
of two answers to one prompt means anything, and σ(r_a - r_b) is the probability that a is preferred.""",
        rows=(
            ("loss", settings.loss),
            (unit, f"{metrics['num_groups']} for training, {metrics['num_eval']} held out"),
            ("steps", f"{metrics['kept_step']} of {settings.batch_size} {unit}"),
            ("held-out accuracy", f"{metrics['accuracy']:.3f}, 95% interval {low:.3f} to {high:.3f}"),
            ("the longer answer instead", f"{metrics['longer_accuracy']:.3f}"),
            ("held-out log-loss", f"{metrics['log_loss']:.4f} nats a pair"),
            ("calibration error", f"{metrics['ece']:.3f}"),
            ("frozen weights while training", "in 4-bit nf4" if project.quantization == "nf4" else "as they are"),
        ),
        kind="SequenceClassification",
        more="""
`model(input_ids).logits` is the reward of one prompt with one whole answer, the token that ends its turn included.
Batches need a padding token that is not the one that ends the turn.
""",
    )


def _unit(settings: RewardParams) -> str:
    return "rankings" if settings.loss == "plackett_luce" else "pairs"


def _print_summary(settings: RewardParams, metrics: dict[str, Any], steps: str, reporter: Reporter) -> None:
    unit = _unit(settings)
    speed, tokens = f"{metrics['groups_per_s']:.1f}", f"{metrics['logical_tokens_per_s']:.0f}"
    reporter.table(
        "reward",
        [
            ("loss", settings.loss),
            (unit, f"{metrics['num_groups']} train, {metrics['num_eval']} held out"),
            (f"{unit} left out", f"{metrics['num_rejected']} (listed in {paths.rejects_file('reward').as_posix()})"),
            ("steps", steps),
            ("held-out loss", f"{metrics['eval_loss_start']:.4f} -> {metrics['eval_loss']:.4f}"),
            ("held-out accuracy", _shown(metrics, "accuracy")),
            ("accuracy of the longer answer", _shown(metrics, "longer_accuracy")),
            ("log-loss", _shown(metrics, "log_loss")),
            ("calibration error", _shown(metrics, "ece")),
            *([("speed", f"{speed} {unit}/s, {tokens} logical tokens/s")] if metrics["groups_per_s"] else []),
            ("peak memory", memory_in_words(metrics)),
        ],
    )


def _shown(metrics: dict[str, Any], name: str) -> str:
    low, high = metrics[f"{name}_ci"]
    return f"{metrics[name]:.3f} [{low:.3f}, {high:.3f}]"
