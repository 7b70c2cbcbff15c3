"""Who wins: both orders asked, a tie is one half."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_cli.core.errors import DataError
from dpo_cli.data.world import task_of
from dpo_cli.judging.judge import INVALID, Judge, Judgment, Question, one_by_one
from dpo_cli.judging.known_reward import RewardJudge, world_reward, world_task
from dpo_cli.judging.win_rate import Comparison, Pair, compare_all, num_questions, summarize

PROMPT = "Answer the message.\nTom: My watch broke today."
GOOD = "That is a pity, Tom. I hope your watch can be fixed!"
BAD = "Nobody cares about your watch, Tom."


class BiasedJudge:
    """Prefers longer answers on a logistic scale, and whatever stands first."""

    remedy = "take another judge"

    def __init__(self, bias: float) -> None:
        self.bias = bias

    def judge(self, questions: Sequence[Question]) -> Iterator[tuple[int, Judgment]]:
        return one_by_one(lambda _, a, b: 1 / (1 + math.exp(-(len(a) - len(b)) - self.bias)), questions)


class SayingJudge:
    """Says what it is told to, question after question, in reverse order."""

    remedy = "take another judge"

    def __init__(self, *says: Judgment) -> None:
        self.says = says
        self.questions: list[Question] = []

    def judge(self, questions: Sequence[Question]) -> Iterator[tuple[int, Judgment]]:
        self.questions += questions
        yield from reversed(list(enumerate(self.says[: len(questions)])))


def compare(judge: Judge, prompt: str, ours: str, theirs: str) -> float | None:
    """Probability that ours is better."""
    return compare_all(judge, [Pair(prompt, ours, theirs)])[0].win


A, B, TIE = Judgment.of(0.9), Judgment.of(0.2), Judgment.of(0.5)


@pytest.mark.parametrize(
    ("ours", "theirs", "win"),
    [(GOOD, BAD, 1.0), (BAD, GOOD, 0.0), (GOOD, GOOD, 0.5), (BAD, "word salad", 0.5), ("", GOOD, 0.0)],
)
def test_the_higher_reward_wins(ours: str, theirs: str, win: float) -> None:
    assert compare(RewardJudge("world", world_reward), PROMPT, ours, theirs) == win


@pytest.mark.parametrize("bias", [-1.0, 0.0, 1.0, 5.0])
def test_a_preference_for_a_position_does_not_decide(bias: float) -> None:
    judge = BiasedJudge(bias)
    assert compare(judge, "", "aa", "bb") == pytest.approx(0.5)
    win, loss = compare(judge, "", "aaa", "b"), compare(judge, "", "b", "aaa")
    assert win is not None
    assert loss is not None
    assert win + loss == pytest.approx(1)
    assert win > 0.5


def test_equal_answers_are_ties_that_nobody_is_asked_about(reporter: Any) -> None:
    judge = SayingJudge(A, B)
    pairs = [Pair("1", "same", "same"), Pair("2", "x", "y"), Pair("3", "", "")]
    with reporter.meter("judging", num_questions(pairs), "questions") as meter:
        comparisons = compare_all(judge, pairs, meter)
    assert (meter.done, meter.total) == (2, 2)
    assert judge.questions == [Question("2", "x", "y"), Question("2", "y", "x")]
    assert [each.win for each in comparisons] == [0.5, pytest.approx(0.85), 0.5]
    assert compare(SayingJudge(), "", "same", "same") == 0.5
    summary = summarize([comparisons[0], comparisons[2]], judge.remedy)
    assert (summary.win_rate, summary.num_identical, summary.num_ties) == (0.5, 2, 2)
    assert (summary.invalid_rate, summary.consistency, summary.first_position_rate) == (0.0, None, None)


def random_comparisons(count: int) -> list[Comparison]:
    rng = random.Random(7)
    return [Comparison(Judgment.of(rng.random()), Judgment.of(rng.random() ** 5)) for _ in range(count)]


def swapped(comparison: Comparison) -> Comparison:
    return Comparison(comparison.theirs_first, comparison.ours_first)


@pytest.mark.parametrize("count", [1, 7, 1000])
def test_changing_policy_and_opponent_gives_exactly_one_minus_p(count: int) -> None:
    comparisons = random_comparisons(count)
    for comparison in comparisons:
        assert comparison.win is not None
        assert swapped(comparison).win == 1 - comparison.win
        assert comparison.win == pytest.approx((comparison.ours_first.p_a + 1 - comparison.theirs_first.p_a) / 2)  # type: ignore[union-attr]
    summary = summarize(comparisons, "")
    other = summarize([*map(swapped, comparisons)], "")
    assert other.win_rate == 1 - summary.win_rate
    assert (other.consistency, other.first_position_rate) == (summary.consistency, summary.first_position_rate)


def test_a_planted_position_bias_hardly_moves_the_win_rate() -> None:
    """Strengths s ~ N(m, 2^2), with m such that E sigma(s) = 0.55; the judge reads sigma(s + bias) for what is first.

    In a fixed order a bias of 1 logit would read 0.69; both orders give the mean of sigma(s + 1) and sigma(s - 1),
    which are convex below 0 and concave above, so that the errors nearly cancel.
    """
    rng = np.random.default_rng(0)
    strengths = rng.normal(0.3185, 2.0, 20_000)

    def sigma(x: Any) -> Any:
        return 1 / (1 + np.exp(-x))

    truth = sigma(strengths).mean()
    assert truth == pytest.approx(0.55, abs=0.005)
    by_prompt = {str(index): strength for index, strength in enumerate(strengths)}

    class Planted:
        remedy = ""

        def judge(self, questions: Sequence[Question]) -> Iterator[tuple[int, Judgment]]:
            return one_by_one(
                lambda prompt, a, _: float(sigma(by_prompt[prompt] * (1 if a == "ours" else -1) + 1.0)), questions
            )

    comparisons = compare_all(Planted(), [Pair(prompt, "ours", "theirs") for prompt in by_prompt])
    summary = summarize(comparisons, "")
    fixed = np.mean([each.ours_first.p_a for each in comparisons if each.ours_first])
    assert fixed - truth > 0.1
    assert abs(summary.win_rate - truth) < 0.01
    assert summary.first_position_rate == pytest.approx(0.69, abs=0.02)
    assert summary.consistency == pytest.approx(0.62, abs=0.02)


def test_consistency_and_position_are_read_off_the_verdicts() -> None:
    consistent = [Comparison(A, B), Comparison(B, A), Comparison(TIE, TIE)]
    not_so = [Comparison(A, A), Comparison(A, TIE)]
    assert [each.is_consistent for each in [*consistent, *not_so]] == [True, True, True, False, False]
    summary = summarize([*consistent, *not_so, Comparison()], "")
    assert summary.consistency == 3 / 5
    assert summary.first_position_rate == 5 / 7  # A: 1 + 1 + 2 + 1, B: 1 + 1
    assert (summary.num_comparisons, summary.num_identical) == (6, 1)
    assert (
        summary.num_ties == 3
    )  # the identical one, the one that both orders call a tie, and the answer that won wherever it stood first


def test_what_has_no_verdict_counts_nowhere_but_as_invalid() -> None:
    comparisons = [Comparison(A, INVALID), *[Comparison(A, B)] * 19]
    assert comparisons[0].win is None
    summary = summarize(comparisons, "")
    assert (summary.num_invalid, summary.invalid_rate) == (1, 0.05)
    assert summary.win_rate == pytest.approx(0.85)
    assert summary.consistency == 1


@pytest.mark.parametrize("identical", [0, 1000])
def test_too_many_without_a_verdict_make_no_win_rate(identical: int) -> None:
    comparisons = [Comparison(INVALID, B), *[Comparison(A, B)] * 18, *[Comparison()] * identical]
    message = r"no verdict in 1 of 19 comparisons \(5.3%\); more than 5% make no win rate; take another judge"
    with pytest.raises(DataError, match=message):
        summarize(comparisons, "take another judge")


# --- soft verdicts ------------------------------------------------------------------------


def test_a_soft_verdict_is_the_share_among_the_options() -> None:
    found = Judgment.of_options([math.log(0.06), math.log(0.02)])
    assert (found.p_a, found.verdict) == (pytest.approx(0.75), "A")
    found = Judgment.of_options([math.log(0.1), math.log(0.2), math.log(0.7)])
    assert (found.p_a, found.verdict) == (pytest.approx(0.1 + 0.35), "tie")
    found = Judgment.of_options([math.log(0.2), math.log(0.5), math.log(0.3)])
    assert (found.p_a, found.verdict) == (pytest.approx(0.35), "B")
    assert Judgment.of_options([-1e4, -1e4]) == TIE
    assert Judgment.of_options([-math.inf, -2.0]) == Judgment(0.0, "B")


@given(st.lists(st.floats(-50, 0), min_size=3, max_size=3))
def test_a_soft_verdict_is_symmetric(logps: list[float]) -> None:
    a, b, tie = logps
    for first, second in ([a, b], [b, a]), ([a, b, tie], [b, a, tie]):
        assert Judgment.of_options(first).p_a + Judgment.of_options(second).p_a == 1
    assert 0 <= Judgment.of_options(logps).p_a <= 1


def test_a_prompt_from_elsewhere_cannot_be_judged() -> None:
    with pytest.raises(
        DataError, match=r"'What is the capital.*' is not of the embedded world; .*evaluate.judge to none"
    ):
        compare(RewardJudge("world", world_reward), "What is the capital of France?", "a", "b")
    assert world_task(PROMPT) == task_of(PROMPT)
