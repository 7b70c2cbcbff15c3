"""What an answer earns: a reward model's verdict, a reward that is known, or a judge's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from dpo_cli.core import paths
from dpo_cli.core.errors import DataError
from dpo_cli.core.progress import SilentReporter
from dpo_cli.core.training_params import PpoParams
from dpo_cli.data.schema import Messages
from dpo_cli.data.tokens import TokenGroup
from dpo_cli.data.world import task_of
from dpo_cli.evaluation.decoding import Decoding
from dpo_cli.evaluation.generation import PromptTokens, sample_answers
from dpo_cli.judging.known_reward import RULES, world_reward
from dpo_cli.judging.prepare import LoadJudge
from dpo_cli.judging.reward_model import RewardModel
from dpo_cli.judging.templates import transcript
from dpo_cli.judging.win_rate import Pair, compare_all, summarize
from dpo_cli.models.adapters import ModelPair
from dpo_cli.models.heads import REWARD_ADAPTER, add_reward_adapter, check_reward_model
from dpo_cli.models.project import Project
from dpo_cli.rlhf.rollouts import Rewarder
from dpo_cli.scoring.reward_scorer import RewardScorer


def open_rewarder(
    project: Project,
    pair: ModelPair,
    settings: PpoParams,
    messages: Mapping[str, Messages],
    judge: LoadJudge | None = None,
    known: Callable[[str, str], float] | None = None,
) -> Rewarder:
    """The reward that section ppo asks for.

    Args:
        project: Whose models they are.
        pair: The policy, beside which a reward model's adapter is put.
        settings: Section ppo.
        messages: The prompts by their ids.
        judge: Gives the rewards in place of those; it was prepared for ``hf`` or ``openai``.
        known: Gives them in place of what section ppo names: the reward of a prompt's transcript and an answer's text.

    Raises:
        StaleArtifactError: models/reward is missing, damaged, or of another graph or other data.
        DataError: The reward is not known of a prompt.
    """
    stop_ids = set(project.encoder.stop_ids)
    if judge is not None:
        inner = _judged(project, pair, settings, messages, judge)
    elif known is None and settings.reward == "reward-model":
        inner = _learned(project, pair)
    else:
        asked = {id: transcript(prompt) for id, prompt in messages.items()}
        inner = _known(project, known or _named(settings, asked), asked)

    def rewards(groups: Sequence[TokenGroup]) -> list[list[float]]:
        return [
            [
                reward - (0.0 if answer[-1] in stop_ids else settings.missing_eos_penalty)
                for reward, answer in zip(found, group.completions, strict=True)
            ]
            for group, found in zip(groups, inner(groups), strict=True)
        ]

    return rewards


def _learned(project: Project, pair: ModelPair) -> Rewarder:
    """The reward model's, whose adapter shares the policy's frozen weights."""
    check_reward_model(paths.REWARD_MODEL, project.made_of())
    head = add_reward_adapter(pair.model, paths.REWARD_MODEL)
    pair.model.set_adapter(REWARD_ADAPTER)
    scorer = project.scorer(pair.model.eval())[0]
    model = RewardModel(RewardScorer(scorer, head), project.encoder, project.budget())
    pair.use_policy()

    def rewards(groups: Sequence[TokenGroup]) -> list[list[float]]:
        pair.model.enable_adapter_layers()  # type: ignore[operator]
        pair.model.set_adapter(REWARD_ADAPTER)
        try:
            return model.rewards(groups)
        finally:
            pair.use_policy()

    return rewards


def _judged(
    project: Project, pair: ModelPair, settings: PpoParams, messages: Mapping[str, Messages], load: LoadJudge
) -> Rewarder:
    """How probably a judge prefers an answer to the reference's greedy one, in both orders; 0.5 without a verdict."""
    judge, decode = load(()).judge, project.encoder.decode
    baselines: dict[str, str] = {}

    def answer_as_reference(groups: Sequence[TokenGroup]) -> None:
        prompts = [PromptTokens(group.group, group.prompt) for group in groups if group.group not in baselines]
        if not prompts:
            return
        decoding = Decoding(0.0, settings.max_new_tokens, tuple(project.encoder.stop_ids))
        dtype, model = project.machine.compute_dtype, pair.use_reference()
        with SilentReporter().meter("", len(prompts), "answers") as meter:
            found = sample_answers(model, prompts, decoding, budget=project.budget(), autocast_dtype=dtype, meter=meter)
        pair.use_policy()
        baselines.update({id: decode(list(each.tokens)) for id, each in found.items()})

    def rewards(groups: Sequence[TokenGroup]) -> list[list[float]]:
        answer_as_reference(groups)
        comparisons = compare_all(
            judge,
            [
                Pair(transcript(messages[group.group]), decode(list(answer)), baselines[group.group])
                for group in groups
                for answer in group.completions
            ],
        )
        summarize(comparisons, judge.remedy)  # refuses too many without a verdict
        wins = iter([0.5 if each.win is None else each.win for each in comparisons])
        return [[next(wins) for _ in group.completions] for group in groups]

    return rewards


def _named(settings: PpoParams, asked: Mapping[str, str]) -> Callable[[str, str], float]:
    """The function of prompt and answer that section ppo names."""
    if settings.reward == "rule":
        assert settings.rule is not None
        return RULES[settings.rule].reward
    for prompt in asked.values():  # of every prompt or of none, before anything is computed
        if task_of(prompt) is None:
            raise DataError(
                f"ppo.reward is world, but the prompt {prompt[:60]!r} is not of the embedded world; take another reward"
            )
    return world_reward


def _known(project: Project, reward: Callable[[str, str], float], asked: Mapping[str, str]) -> Rewarder:
    """A function of prompt and answer as texts."""
    decode = project.encoder.decode

    def rewards(groups: Sequence[TokenGroup]) -> list[list[float]]:
        return [[reward(asked[group.group], decode(list(answer))) for answer in group.completions] for group in groups]

    return rewards
