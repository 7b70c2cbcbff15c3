"""From section evaluate of params.yaml to a judge that can be asked."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dpo_cli.core import paths
from dpo_cli.core.artifacts import digest_json
from dpo_cli.core.errors import DataError, MachineError, ParamsError
from dpo_cli.core.manifest import REWARD
from dpo_cli.core.params import EvaluateParams
from dpo_cli.judging.answers import Answer
from dpo_cli.judging.cache import CachedJudge
from dpo_cli.judging.judge import IdentifiedJudge, Judge
from dpo_cli.judging.known_reward import RewardJudge, known_reward
from dpo_cli.judging.language_model import HfJudge
from dpo_cli.judging.openai import OpenAiJudge
from dpo_cli.judging.reward_model import RewardModel, text_group
from dpo_cli.judging.server import Server
from dpo_cli.judging.templates import TEMPLATES, Template, open_template
from dpo_cli.judging.votes import VotesJudge, read_votes
from dpo_cli.models.folder import check_model_folder
from dpo_cli.models.heads import check_reward_model
from dpo_cli.models.project import Project

API_KEY = "DPO_JUDGE_API_KEY"
JUDGE_PATH = "DPO_JUDGE_PATH"


@dataclass(frozen=True)
class ReadyJudge:
    """A judge that can be asked.

    Attributes:
        judge: Who is asked.
        name: What it is called.
        rater: Its kind as a rater in a votes file: with another model, training or template it is another one.
        reads: Whether it reads two texts, one before the other, so that their order may move it.
    """

    judge: Judge
    name: str
    rater: str
    reads: bool = False

    @property
    def reward(self) -> Callable[[str, str], float] | None:
        """From prompt and answer to its reward, where it has one; a reward model's is fixed but for a constant."""
        return self.judge.reward if isinstance(self.judge, RewardJudge) else None

    @property
    def is_exact(self) -> bool:
        """Whether it knows the reward, which is 0 or 1."""
        return isinstance(self.judge, RewardJudge) and self.judge.is_exact


LoadJudge = Callable[[Sequence[Answer]], ReadyJudge]
"""Opens a judge that was prepared, for the answers that it will be asked about."""


def prepare_judge(
    settings: EvaluateParams,
    project: Project,
    names: tuple[str, str],
    memory: Path,
) -> LoadJudge | None:
    """Find out whether the judge that is asked for can be had, before any long work; None where there is none.

    What needs the models' memory is loaded when it is opened.

    Args:
        settings: Section evaluate.
        project: Of the policy that is judged.
        names: Policy and opponent, as a votes file calls them.
        memory: Folder of judgments that were made before.

    Raises:
        ParamsError: A setting is wrong: there is no such template, or the server's host is not allowed.
        MachineError: The judge's model is no model, or its server does not answer.
        StaleArtifactError: There is no reward model, or it is of another graph or other data.
        DataError: The votes file is missing or damaged.
    """
    if settings.judge == "none":
        return None
    if (exact := known_reward(settings)) is not None:
        rater = settings.rule or settings.judge
        return lambda _: ReadyJudge(exact, exact.name, rater)
    if settings.judge == "reward-model":
        check_reward_model(paths.REWARD_MODEL, project.made_of())
        return lambda judged: _learned_rewards(project, judged)
    if settings.judge == "votes":
        votes = read_votes(_votes_file(settings.votes.file))
        voters = VotesJudge(votes, settings.votes.rule, *names, settings.votes.kind)
        return lambda _: ReadyJudge(voters, f"votes in {settings.votes.file}", settings.judge)
    if settings.judge == "openai":
        asked = _open_openai(settings, project, memory)
        return lambda _: asked
    return _prepare_hf(settings, project, memory)


def _learned_rewards(project: Project, judged: Sequence[Answer]) -> ReadyJudge:
    """Rewards of answers as texts, as all judges see them: equal texts have equal rewards, whatever their tokens."""
    by_prompt: dict[str, dict[str, Answer]] = {}
    for each in judged:
        by_prompt.setdefault(each.asked, {})[each.text] = each
    groups = [
        text_group(project.encoder, str(number), next(iter(answers.values())).messages, [*answers])
        for number, answers in enumerate(by_prompt.values())
    ]
    found = RewardModel.load(paths.REWARD_MODEL, project).rewards(groups)
    rewards = {
        (prompt, text): reward
        for (prompt, answers), some in zip(by_prompt.items(), found, strict=True)
        for text, reward in zip(answers, some, strict=True)
    }
    judge = RewardJudge("the reward model", lambda prompt, answer: rewards[prompt, answer], is_exact=False)
    trained = digest_json(REWARD.read().files)[:6]  # one that was trained anew is another rater
    return ReadyJudge(judge, judge.name, f"reward-model-{trained}")


def _votes_file(name: str) -> Path:
    path = Path(name)
    if not paths.is_raw(path):
        raise ParamsError(f"evaluate.votes.file must be under {paths.RAW}, where DVC sees a change, got {name}")
    if not path.is_file():
        raise DataError(f"{path} is missing; dpo-cli rating-sheet makes a file to be filled in")
    return path


def _prepare_hf(settings: EvaluateParams, project: Project, memory: Path) -> LoadJudge:
    given = os.environ.get(JUDGE_PATH) or project.runtime.judge_path
    if not given:
        raise ParamsError(f"judge hf needs its model: set runtime.judge_path (or {JUDGE_PATH}) to a directory")
    folder = paths.from_root(given)
    if not folder.is_dir():
        raise MachineError(f"the judge's model directory {folder} is missing; check runtime.judge_path or {JUDGE_PATH}")
    check_model_folder(folder)
    template = _template(settings.hf.template, "evaluate.hf.template")

    def open_(_: Sequence[Answer]) -> ReadyJudge:
        judge = HfJudge.load(folder, template, settings.hf, project, policy=project.base)
        return _ready(judge, settings.hf.name or folder.name, template, project, memory)

    return open_


def _ready(judge: IdentifiedJudge, model: str, template: Template, project: Project, memory: Path) -> ReadyJudge:
    """A language model as judge, which is asked once; its kind as a rater has no colon, which ends one."""
    cached = CachedJudge(judge, memory, project.runtime.checkpoint_minutes)
    return ReadyJudge(cached, model, f"{model} {template.name}".replace(":", "-"), reads=True)


def _template(name: str, source: str) -> Template:
    if name not in TEMPLATES and not paths.is_raw(Path(name)):
        named = ", ".join(TEMPLATES)
        raise ParamsError(
            f"{source} must be one of {named}, or a file under {paths.RAW}, where DVC sees a change; got {name}"
        )
    return open_template(name, source)


def _open_openai(settings: EvaluateParams, project: Project, memory: Path) -> ReadyJudge:
    asked = settings.openai
    template = _template(asked.template, "evaluate.openai.template")
    key = os.environ.get(API_KEY, "")
    server = Server(asked.url, allowed_hosts=asked.allowed_hosts, api_key=key, timeout_s=asked.timeout_s)
    if key and not server.is_private:
        raise ParamsError(f"{API_KEY} would go to {server.url} in clear text; use https, or unset it")
    judge = OpenAiJudge.connect(
        server, asked.model, template, project.reporter, parallel=asked.parallel, extra=asked.extra
    )
    return _ready(judge, str(judge.identity["model"]), template, project, memory)
