"""From section evaluate of params.yaml to a judge that can be asked."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dpo_cli.core import paths
from dpo_cli.core.errors import DataError, ParamsError
from dpo_cli.core.params import EvaluateParams, RuntimeParams
from dpo_cli.core.progress import Reporter
from dpo_cli.data.tokenise import TokenGroup
from dpo_cli.evaluation.judges.base import Judge
from dpo_cli.evaluation.judges.cache import CachedJudge
from dpo_cli.evaluation.judges.exact import WorldJudge
from dpo_cli.evaluation.judges.hf import HfJudge
from dpo_cli.evaluation.judges.openai import OpenAiJudge
from dpo_cli.evaluation.judges.prompts import open_template
from dpo_cli.evaluation.judges.reward_model import KnownRewards, RewardModel
from dpo_cli.evaluation.judges.server import Server
from dpo_cli.evaluation.judges.votes import VotesJudge
from dpo_cli.evaluation.votes import read_votes
from dpo_cli.reference.graph import Graph

API_KEY = "DPO_JUDGE_API_KEY"
JUDGE_PATH = "DPO_JUDGE_PATH"


@dataclass(frozen=True)
class Candidate:
    """An answer that may be judged.

    Attributes:
        group: The prompt's id.
        prompt: The prompt as a judge reads it.
        text: The answer as a judge reads it.
        prompt_tokens: Token ids of the prompt.
        tokens: Token ids of the answer, as it was sampled.
    """

    group: str
    prompt: str
    text: str
    prompt_tokens: tuple[int, ...]
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class OpenedJudge:
    """A judge that can be asked.

    Attributes:
        judge: Who is asked.
        name: What it is called.
        reads: Whether it reads two texts, one before the other, so that their order may move it.
        reward: From prompt and answer to its reward, where it has one; a reward model's is fixed but for a constant
            a prompt.
    """

    judge: Judge
    name: str
    reads: bool = False
    reward: Callable[[str, str], float] | None = None


def open_judge(
    knobs: EvaluateParams,
    graph: Graph,
    candidates: Sequence[Candidate],
    names: tuple[str, str],
    runtime: RuntimeParams,
    reporter: Reporter,
    command: str,
    memory: Path,
) -> OpenedJudge | None:
    """The judge that is asked for; None where there is none.

    Args:
        knobs: Section evaluate.
        graph: The graph of the policy that is judged.
        candidates: All answers that it will be asked about.
        names: Policy and opponent, as a votes file calls them.
        runtime: This machine.
        reporter: Hears what the judge is like.
        command: Who asks, for messages.
        memory: Folder of judgments that were made before, in the scratch area.

    Raises:
        ParamsError: A setting is wrong: there is no such template, or the server's host is not allowed.
        MachineError: The judge's model cannot be loaded, or its server does not answer.
        DataError: The votes file is missing or damaged, or the prompts are not of the embedded world.
    """
    if knobs.judge == "none":
        return None
    if knobs.judge == "world":
        judge = WorldJudge()
        return OpenedJudge(judge, "the embedded world's known reward", reward=judge.reward)
    if knobs.judge == "reward-model":
        rewards = _learned_rewards(graph, candidates, runtime, reporter, command)
        return OpenedJudge(rewards, "the reward model", reward=rewards.reward)
    if knobs.judge == "votes":
        votes = read_votes(_votes_file(knobs.votes.file))
        judge = VotesJudge(votes, knobs.votes.rule, *names, knobs.votes.kind)
        return OpenedJudge(judge, f"votes in {knobs.votes.file}")
    if knobs.judge == "hf":
        return _open_hf(knobs, graph, runtime, reporter, command, memory)
    return _open_openai(knobs, reporter, memory)


def _learned_rewards(
    graph: Graph, candidates: Sequence[Candidate], runtime: RuntimeParams, reporter: Reporter, command: str
) -> KnownRewards:
    model = RewardModel.load(
        paths.REWARD_MODEL,
        graph.base,
        graph.sft,
        graph.machine,
        graph.quantization,
        graph.encoder,
        runtime,
        reporter,
        command,
    )
    by_prompt: dict[tuple[str, tuple[int, ...]], dict[str, tuple[int, ...]]] = {}
    for each in candidates:
        by_prompt.setdefault((each.prompt, each.prompt_tokens), {})[each.text] = each.tokens
    groups = [
        TokenGroup(str(number), str(number), tokens, tuple(answers.values()))
        for number, ((_, tokens), answers) in enumerate(by_prompt.items())
    ]
    found = zip(by_prompt.items(), model.rewards(groups), strict=True)
    return KnownRewards(
        {
            (prompt, text): reward
            for ((prompt, _), answers), rewards in found
            for text, reward in zip(answers, rewards, strict=True)
        }
    )


def _votes_file(name: str) -> Path:
    path = Path(name)
    if paths.RAW not in path.parents:
        raise ParamsError(f"evaluate.votes.file must be under {paths.RAW}, where DVC sees a change, got {name}")
    if not path.is_file():
        raise DataError(f"{path} is missing; dpo-cli rating-sheet makes a file to be filled in")
    return path


def _open_hf(
    knobs: EvaluateParams, graph: Graph, runtime: RuntimeParams, reporter: Reporter, command: str, memory: Path
) -> OpenedJudge:
    given = os.environ.get(JUDGE_PATH) or runtime.judge_path
    if not given:
        raise ParamsError(f"evaluate.judge hf needs its model: set runtime.judge_path (or {JUDGE_PATH}) to a directory")
    folder = Path(given).expanduser()
    judge = HfJudge.load(
        folder,
        open_template(knobs.hf.template, "evaluate.hf.template"),
        graph.machine,
        knobs.hf.quantization,
        knobs.hf.chat_template,
        runtime,
        reporter,
        command,
        policy=graph.base,
    )
    return OpenedJudge(CachedJudge(judge, memory), knobs.hf.name or folder.name, reads=True)


def _open_openai(knobs: EvaluateParams, reporter: Reporter, memory: Path) -> OpenedJudge:
    asked = knobs.openai
    template = open_template(asked.template, "evaluate.openai.template")
    server = Server(
        asked.url, allowed_hosts=asked.allowed_hosts, api_key=os.environ.get(API_KEY, ""), timeout_s=asked.timeout_s
    )
    judge = OpenAiJudge.connect(server, asked.model, template, reporter, parallel=asked.parallel, extra=asked.extra)
    return OpenedJudge(CachedJudge(judge, memory), str(judge.identity["model"]), reads=True)
