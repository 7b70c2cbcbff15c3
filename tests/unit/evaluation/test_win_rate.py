"""Who wins: both orders asked, a tie is one half."""

from __future__ import annotations

import math

import pytest

from dpo_cli.core.errors import DataError
from dpo_cli.data.world import task_of
from dpo_cli.evaluation.judges.exact import WorldJudge, world_task
from dpo_cli.evaluation.win_rate import compare

PROMPT = "Answer the message.\nTom: My watch broke today."
GOOD = "That is a pity, Tom. I hope your watch can be fixed!"
BAD = "Nobody cares about your watch, Tom."


class BiasedJudge:
    """Prefers longer answers on a logistic scale, and whatever stands first."""

    def __init__(self, bias: float) -> None:
        self.bias = bias

    def prefer(self, prompt: str, first: str, second: str) -> float:
        return 1 / (1 + math.exp(-(len(first) - len(second)) - self.bias))


@pytest.mark.parametrize(
    ("ours", "theirs", "win"),
    [(GOOD, BAD, 1.0), (BAD, GOOD, 0.0), (GOOD, GOOD, 0.5), (BAD, "word salad", 0.5), ("", GOOD, 0.0)],
)
def test_the_higher_reward_wins(ours: str, theirs: str, win: float) -> None:
    assert compare(WorldJudge(), PROMPT, ours, theirs) == win


@pytest.mark.parametrize("bias", [-1.0, 0.0, 1.0, 5.0])
def test_a_preference_for_a_position_does_not_decide(bias: float) -> None:
    judge = BiasedJudge(bias)
    assert compare(judge, "", "aa", "bb") == pytest.approx(0.5)
    assert compare(judge, "", "aaa", "b") + compare(judge, "", "b", "aaa") == pytest.approx(1)
    assert compare(judge, "", "aaa", "b") > 0.5


def test_equal_answers_are_not_even_asked_for() -> None:
    class Refusing:
        def prefer(self, prompt: str, first: str, second: str) -> float:
            raise AssertionError

    assert compare(Refusing(), "", "same", "same") == 0.5


def test_a_prompt_from_elsewhere_cannot_be_judged() -> None:
    with pytest.raises(
        DataError, match=r"'What is the capital.*' is not of the embedded world; .*evaluate.judge to none"
    ):
        WorldJudge().prefer("What is the capital of France?", "a", "b")


def test_the_judge_knows_the_prompts_task() -> None:
    assert world_task(PROMPT) == task_of(PROMPT)
    assert world_task(PROMPT).good == GOOD
