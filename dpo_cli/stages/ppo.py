"""Stage ppo: reinforcement learning of the same policy from a reward, the way that DPO replaces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from statistics import fmean
from typing import TYPE_CHECKING, Any

from dpo_cli.core import paths
from dpo_cli.core.artifacts import digest_json, publish_folder
from dpo_cli.core.environment import importing
from dpo_cli.core.manifest import PPO, REWARD, Manifest
from dpo_cli.core.params import Params
from dpo_cli.core.progress import Reporter
from dpo_cli.core.scratch import Scratch, stage_scratch
from dpo_cli.core.text import markdown
from dpo_cli.core.training_params import PpoParams
from dpo_cli.models.card import Card, publish_adapter
from dpo_cli.models.device import memory_in_words, memory_metrics
from dpo_cli.training.history import write_reports

if TYPE_CHECKING:  # what computes is imported where there is something to compute
    from dpo_cli.training.loop import Loop


def run(params: Params, reporter: Reporter) -> dict[str, Any]:
    """Write models/ppo: the tuned adapter, its tokenizer, a model card and its manifest; a marker with ppo.reward none.

    Raises:
        StaleArtifactError: models/base, models/sft, data/preference or models/reward is missing or stale.
        DataError: There are fewer prompts than a round takes.
        Interrupted: The user asked to stop; a checkpoint is kept.
    """
    if params.ppo.reward == "none":
        with stage_scratch("ppo", "none") as scratch:
            return _publish_none(scratch, reporter)
    return _train(params, reporter)


def _train(params: Params, reporter: Reporter) -> dict[str, Any]:
    with importing():
        from dpo_cli.evaluation import SFT
        from dpo_cli.judging.prepare import prepare_judge
        from dpo_cli.models.heads import check_reward_model
        from dpo_cli.models.load import quiet_libraries
        from dpo_cli.models.project import open_project
        from dpo_cli.rlhf.objective import METRICS
        from dpo_cli.rlhf.opening import open_reinforcement, training_prompts
        from dpo_cli.rlhf.rewards import open_rewarder
        from dpo_cli.training.accumulation import Limits, LossScale
        from dpo_cli.training.fit import make_descent
        from dpo_cli.training.loop import Course, Data, Loop
        from dpo_cli.training.parallel import Job

    quiet_libraries()
    settings = params.ppo
    project = open_project(params, reporter, "ppo")
    prompts = training_prompts(project, settings.prompts_a_round)
    longest = max(len(prompt.tokens) for prompt in prompts)
    project.check_context(longest + settings.max_new_tokens, "ppo.max_new_tokens + the longest prompt")
    manifest = project.manifest(params, "ppo")
    if settings.reward == "reward-model":
        check_reward_model(paths.REWARD_MODEL, project.made_of())  # before the policy is loaded
        manifest = replace(manifest, made_of={**manifest.made_of, "models/reward": REWARD.read().files})
    if settings.reward in ("hf", "openai"):
        own = {settings.reward: getattr(params.evaluate, settings.reward).model_dump()}
        manifest = replace(manifest, settings={**manifest.settings, "evaluate": own})
    asked = {prompt.id: prompt.messages for prompt in prompts}
    with stage_scratch("ppo", digest_json(asdict(manifest))) as scratch:
        judge = None
        if settings.reward in ("hf", "openai"):
            judging = params.evaluate.model_copy(update={"judge": settings.reward})
            judge = prepare_judge(judging, project, ("ppo", SFT), scratch.folder.parent / "judgments")
        opened = open_reinforcement(
            project,
            settings,
            prompts,
            lambda pair: open_rewarder(project, pair, settings, asked, judge),
            scratch.folder / "token_budget.json",
        )
        learner, num_steps = opened.learner, opened.num_steps
        descent = make_descent(learner.model, settings, num_steps, project.machine.device, "ppo")
        limits = Limits(opened.budget, LossScale(project, scratch.folder / "loss_scale.json"))
        job, course = Job(project, scratch.folder), Course(num_steps, settings.seed)
        loop = Loop(learner, Data(opened.source), descent, course, limits, job)
        loop.run()
        opened.scorer.close()
        metrics = {"method": settings.estimator, "reward": settings.reward, "num_prompts": len(prompts)}
        metrics |= {
            "num_steps": loop.step,
            **_ends(loop, settings),
            **memory_metrics(project.machine),
            **opened.layout.metrics(),
        }
        metrics |= {"recompute": opened.recompute, "max_tokens_per_microbatch": opened.budget.max_tokens}
        publish_adapter(PPO, manifest, _card(params, metrics), project, opened.pair.model, scratch.build_folder())
        columns, rejects = ("loss", *METRICS, "grad_norm", "learning_rate"), project.tokenize_pairs("train").rejects
        write_reports("ppo", metrics, columns, loop.history, rejects)
        scratch.clear()
    _print_summary(settings, metrics, reporter)
    return metrics


def _ends(loop: Loop[Any], settings: PpoParams) -> dict[str, float]:
    """Reward, KL and entropy of the first round's answers and of the last one's: means over the prompts of a pass.

    Of a round that ended within its first pass, only the answers that were trained on count.
    """
    size, found = settings.batch_size, {}
    weights = [min(size, settings.prompts_a_round - start) for start in range(0, settings.prompts_a_round, size)]
    for end, number in (("_start", 1), ("", loop.history[-1]["objective/round"])):
        steps = [step for step in loop.history if step["objective/round"] == number][: len(weights)]
        for name, key in (("score", "scores"), ("kl", "kl"), ("entropy", "entropy")):
            found[f"{name}{end}"] = fmean([step[f"objective/{key}"] for step in steps], weights[: len(steps)])
    return found


def _publish_none(scratch: Scratch, reporter: Reporter) -> dict[str, Any]:
    """There is no such training: only a marker is written."""
    built = scratch.build_folder()
    PPO.write(built, Manifest(settings={"ppo": {"reward": "none"}}))
    publish_folder(built, paths.PPO_MODEL)
    metrics: dict[str, Any] = {"method": "none"}
    write_reports("ppo", metrics, ())
    scratch.clear()
    reporter.table("ppo", [("reward", "none: no model is trained by reinforcement (ppo.reward)")])
    return metrics


def _card(params: Params, metrics: dict[str, Any]) -> Card:
    settings = params.ppo
    return Card(
        tags=("ppo", "lora"),
        text=f"""# {markdown(params.model.name)}, tuned by reinforcement

A LoRA adapter, trained by dpo-cli on its own answers and what they earned. It goes on with the adapter of SFT.""",
        rows=(
            ("reward", settings.reward),
            ("estimator", settings.estimator),
            ("steps", str(metrics["num_steps"])),
            ("reward of its answers", f"{metrics['score_start']:.3f} -> {metrics['score']:.3f}"),
            ("KL from the SFT model", f"{metrics['kl']:.2f} nats a sequence"),
        ),
    )


def _print_summary(settings: PpoParams, metrics: dict[str, Any], reporter: Reporter) -> None:
    rows: Sequence[tuple[str, str]] = (
        ("reward", settings.reward),
        ("estimator", settings.estimator),
        ("prompts", f"{metrics['num_prompts']}, {settings.prompts_a_round} a round, {settings.answers} answers each"),
        ("steps", str(metrics["num_steps"])),
        ("reward of its answers", f"{metrics['score_start']:.4f} -> {metrics['score']:.4f}"),
        ("KL from the reference", f"{metrics['kl']:.3f} nats a sequence"),
        ("peak memory", memory_in_words(metrics)),
    )
    reporter.table("ppo", list(rows))
