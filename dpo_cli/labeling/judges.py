"""Judges as raters: world, a rule of one's own, a reward model or a language model write the same votes as people.

Like a person, a judge sees the answers of an item in an order that is drawn, and some items again the other way round,
so that the same figures say whether it prefers a position. One that knows a reward ranks answers by it, too.
"""

from __future__ import annotations

import math
import runpy
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from dpo_cli.core import paths
from dpo_cli.core.artifacts import sha256_file
from dpo_cli.core.errors import DataError, ParamsError, first_line
from dpo_cli.core.judges import JUDGES
from dpo_cli.core.progress import Reporter
from dpo_cli.data.formats.rankings import ranks_of_scores
from dpo_cli.data.votes import DOWN, UP
from dpo_cli.data.world import task_of
from dpo_cli.judging.answers import Answer
from dpo_cli.judging.judge import Judge, Question
from dpo_cli.judging.known_reward import RewardJudge
from dpo_cli.judging.templates import transcript
from dpo_cli.labeling.engine import Asked, Engine
from dpo_cli.labeling.items import Item

KINDS = ("world", "reward-model", "hf", "openai", "rule:FILE.py")
RULE = "rule:"
REWARD = "reward"
"""The function that a file with a rule has: ``reward(prompt, answer) -> float``, both texts; the higher, the better."""
_MODELS = ("reward-model", "hf", "openai")
_AT_ONCE = 512


def rule_in(path: Path) -> RewardJudge:
    """The rule in a file of the user's, which is run.

    Raises:
        DataError: It is missing, does not run, or has no such function.
    """
    if not path.is_file():
        raise DataError(f"{path} is missing; name a Python file with a function {REWARD}(prompt, answer)")
    try:
        found = runpy.run_path(str(path)).get(REWARD)
    except (Exception, SystemExit) as error:
        raise DataError(f"{path} does not run: {type(error).__name__}: {first_line(error)}") from error
    if not callable(found):
        raise DataError(f"{path} has no function {REWARD}(prompt, answer); write one that returns a number")

    rule: Callable[[str, str], Any] = found

    def reward(prompt: str, answer: str) -> float:
        try:
            value = float(rule(prompt, answer))
        except Exception as error:
            raise DataError(
                f"{path}: {REWARD} fails on an answer: {type(error).__name__}: {first_line(error)}; it must return a"
                f" number; the answer is {answer[:60]!r}"
            ) from error
        if math.isnan(value):
            raise DataError(f"{path}: {REWARD} returns NaN; the answer is {answer[:60]!r}")
        return value

    return RewardJudge(f"the rule in {path}", reward)


def _world_reward(prompt: str, answer: str) -> float:
    if (task := task_of(prompt)) is None:
        raise DataError(f"--judge world: the prompt {prompt[:60]!r} is not of the embedded world; take another judge")
    return task.reward(answer)


OpenJudge = Callable[[Sequence[Answer]], tuple[Judge, str]]
"""Opens a judge for the answers that it will be asked about; with its name as a rater."""


def prepare(kind: str, overrides: Sequence[str], reporter: Reporter) -> OpenJudge:
    """Find out whether a judge can be had.

    Args:
        kind: One of :data:`KINDS`.
        overrides: ``--set`` of evaluate.hf or evaluate.openai.
        reporter: Shows progress.

    Raises:
        ParamsError: There is no such judge, or a setting has no effect.
        DataError, StaleArtifactError, MachineError: It cannot be had.
    """
    section = JUDGES[kind].section if kind in _MODELS else None
    if unread := [each for each in overrides if section is None or not each.startswith(f"evaluate.{section}.")]:
        read = f", which reads evaluate.{section}" if section else ""
        raise ParamsError([f"--set {each} has no effect with --judge {kind}{read}" for each in unread])
    if kind not in _MODELS:
        if kind == "world":
            return lambda _: (RewardJudge("the embedded world's known reward", _world_reward), kind)
        if kind.startswith(RULE) and (name := kind.removeprefix(RULE)):
            rule = rule_in(Path(name))
            rater = f"rule-{Path(name).stem}-{sha256_file(Path(name))[:6]}"  # another rule is another rater
            return lambda _: (rule, rater)
        raise ParamsError(f"--judge must be one of {', '.join(KINDS)}, got {kind}")
    from dpo_cli.core.load_params import apply_overrides, load_params  # here, so that other judges do not wait for them
    from dpo_cli.judging.prepare import prepare_judge
    from dpo_cli.models.load import quiet_libraries
    from dpo_cli.models.project import open_project

    params = load_params(paths.PARAMS)
    # whoever judges evaluations, this judge's own settings are those of params.yaml
    own = {f"evaluate.{section}": getattr(params.evaluate, section).model_dump()} if section else {}
    evaluate = apply_overrides({"evaluate.judge": kind, **own}, overrides)[1].evaluate
    quiet_libraries()
    project = open_project(params, reporter, "label")
    load = prepare_judge(evaluate, project, ("", ""), paths.scratch_root() / "evaluate" / "judgments")
    assert load is not None  # there is a judge

    def open_(answers: Sequence[Answer]) -> tuple[Judge, str]:
        ready = load(answers)
        return ready.judge, ready.rater

    return open_


def judge_items(engine: Engine, open_judge: OpenJudge, most: int | None, reporter: Reporter) -> tuple[Path, int, int]:
    """Let a judge vote on what it has not voted on.

    Args:
        engine: Has the items.
        open_judge: The judge.
        most: Items at most; None: all.
        reporter: Shows progress.

    Returns:
        The file, how many votes it gave, and on how many items it had none.

    Raises:
        ParamsError: It compares two answers, and the mode is not pair.
        DataError: It does not know a prompt, or its file is damaged.
    """
    answers = [Answer.of_text(item.prompt_id, item.prompt, text) for item in _each(engine) for text in item.texts]
    judge, rater = open_judge(answers)
    has_reward = isinstance(judge, RewardJudge)
    if engine.settings.mode != "pair" and not (has_reward and judge.is_exact):
        raise ParamsError(f"--judge {rater} compares two answers; take --mode pair, or a judge that knows the reward")
    path = engine.join(rater, "judge").path
    asked = engine.all_for_judge(rater)
    waiting = [each for each in asked if each.drawn != "repeat"][:most]
    if most is None and not has_reward:  # a reward knows no order
        waiting += [each for each in asked if each.drawn == "repeat"]
    num_without = 0
    with reporter.meter(f"label: {rater}", len(waiting), "items") as meter:
        for begin in range(0, len(waiting), _AT_ONCE):
            some = waiting[begin : begin + _AT_ONCE]
            for each, vote in _votes(engine, judge, some):
                if vote is None:
                    num_without += 1
                else:
                    engine.keep_judgment(rater, each, vote)
                meter.advance(1)
    return path, len(waiting) - num_without, num_without


def _each(engine: Engine) -> Iterator[Item]:
    return (engine.items[index] for index in range(len(engine.items)))


def _votes(engine: Engine, judge: Judge, some: Sequence[Asked]) -> Iterator[tuple[Asked, Any]]:
    """What a judge says to some questions; None where it has no verdict."""
    items = [engine.items[each.index] for each in some]
    texts = [[item.texts[place] for place in each.order] for each, item in zip(some, items, strict=True)]
    prompts = [transcript(item.prompt) for item in items]
    if engine.settings.mode == "pair":
        questions = [Question(prompt, *shown) for prompt, shown in zip(prompts, texts, strict=True)]
        for index, judgment in judge.judge(questions):
            yield some[index], None if judgment.verdict == "invalid" else judgment.verdict
        return
    assert isinstance(judge, RewardJudge)
    for each, prompt, shown in zip(some, prompts, texts, strict=True):
        rewards = [judge.reward(prompt, text) for text in shown]
        yield each, ranks_of_scores(rewards) if engine.settings.mode == "ranking" else UP if rewards[0] > 0 else DOWN
