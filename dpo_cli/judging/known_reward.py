"""Judges by reward: the embedded world's, rules that can be checked exactly, or what a reward model says."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from dpo_cli.core.errors import DataError
from dpo_cli.core.judges import RuleName
from dpo_cli.core.params import EvaluateParams
from dpo_cli.data.world import Task, task_of
from dpo_cli.judging.judge import Judgment, Question, one_by_one


@dataclass(frozen=True)
class RewardJudge:
    """Prefers the answer with the higher reward; it has a verdict on all.

    Attributes:
        name: What the reward is called.
        reward: From prompt and answer, as questions have them, to its reward.
        is_exact: Whether it is known, 0 or 1, so that the higher one is better for certain; else
            :func:`preference` says how probable that is.
    """

    name: str
    reward: Callable[[str, str], float]
    is_exact: bool = True
    remedy = "set evaluate.judge to none"

    def judge(self, questions: Sequence[Question]) -> Iterator[tuple[int, Judgment]]:
        """Judge questions.

        Raises:
            DataError: The reward is not known of a prompt.
        """
        return one_by_one(self._prefer, questions)

    def _prefer(self, prompt: str, a: str, b: str) -> float:
        first, second = self.reward(prompt, a), self.reward(prompt, b)
        if self.is_exact:
            return 0.5 if first == second else float(first > second)
        return preference(first, second)


def preference(first: float, second: float) -> float:
    """Bradley-Terry's probability that the answer with the first reward is better: sigma(first - second)."""
    return 1 / (1 + math.exp(second - first)) if second <= first else 1 - 1 / (1 + math.exp(first - second))


def known_reward(evaluate: EvaluateParams) -> RewardJudge | None:
    """The judge that section evaluate asks for, where it is one that knows the reward: ``world`` or ``rule``."""
    if evaluate.judge == "world":
        return RewardJudge("the embedded world's known reward", world_reward)
    if evaluate.judge == "rule":
        assert evaluate.rule is not None  # section evaluate is refused without it
        rule = RULES[evaluate.rule]
        return RewardJudge(f"the rule {evaluate.rule}: {rule.meaning}", rule.reward)
    return None


def world_reward(prompt: str, answer: str) -> float:
    """The embedded world's reward of an answer.

    Raises:
        DataError: The prompt is not of the embedded world.
    """
    return world_task(prompt).reward(answer)


def world_task(prompt: str) -> Task:
    """The task behind a prompt of the embedded world.

    Raises:
        DataError: There is none.
    """
    task = task_of(prompt)
    if task is None:
        raise DataError(
            f"evaluate.judge is world, but the held-out prompt {prompt[:60]!r} is not of the embedded world;"
            " set evaluate.judge to none"
        )
    return task


# --- rules ------------------------------------------------------------------------------------

MAX_SENTENCE_CHARACTERS = 160
"""What a short sentence may have."""

_PREAMBLE = re.compile(
    r"(sure|certainly|of course|absolutely|definitely|okay|ok|great|good question|hello|hi|thank you|thanks"
    r"|here (is|are)|here['’]s|as an ai|i['’]d be happy|i would be happy|i['’]m glad|i am glad|let me|let['’]s)\b",
    re.IGNORECASE,
)
_ABBREVIATIONS = re.compile(r"\b(?:(?:[A-Z]\.)*[A-Z]|Mr|Mrs|Ms|Dr|Prof|St|vs|etc|e\.g|i\.e|a\.m|p\.m)\.(?=\s)")
_END = re.compile(r"[.!?…][\"')\]”’]*\s|[。！？][”』」）]?(?=.)")
_LAST = re.compile(r"[.!?。！？][\"')\]”’』」）]*\Z")
_LIST = re.compile(r"[-*•#]\s|\d+[.)]\s")


@dataclass(frozen=True)
class Rule:
    """What an answer is to be like: it is or it is not, so its reward is 1 or 0, whatever the prompt.

    Attributes:
        meaning: In a sentence, as the report and the docs say it.
        holds: Whether a text is like that.
    """

    meaning: str
    holds: Callable[[str], bool]

    def reward(self, prompt: str, answer: str) -> float:
        """1 where the answer is like that, else 0."""
        return float(self.holds(answer))


def is_one_sentence(answer: str) -> bool:
    """Whether a text is one short sentence that answers at once.

    It is a single line of at most :data:`MAX_SENTENCE_CHARACTERS` characters that ends with a full stop, an exclamation
    mark or a question mark, has no other sentence end within, and begins neither with a list's mark nor with a preamble
    such as *Sure* or *Here is*. The dots of initials and usual abbreviations end no sentence.
    """
    text = answer.strip()
    if not text or len(text) > MAX_SENTENCE_CHARACTERS or "\n" in text:
        return False
    if _PREAMBLE.match(text) or _LIST.match(text):
        return False
    plain = _ABBREVIATIONS.sub("", text)
    return _LAST.search(plain) is not None and _END.search(plain) is None


def is_json_object(answer: str) -> bool:
    """Whether a text is one JSON object (RFC 8259) with at least one member, and nothing around it."""
    try:
        value = json.loads(answer, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and bool(value)


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


RULES: Mapping[RuleName, Rule] = {
    "one_sentence": Rule("one short sentence without a preamble", is_one_sentence),
    "json_object": Rule("a JSON object and nothing else", is_json_object),
}
