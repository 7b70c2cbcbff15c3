"""Judgments are kept by content: a second run asks nothing, and a judge that fails midway loses none."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from dpo_cli.core.errors import MachineError
from dpo_cli.judging.cache import CachedJudge
from dpo_cli.judging.judge import INVALID, Judgment, Question

QUESTIONS = [Question(f"prompt {number}", "one", "other") for number in range(10)]


class CountingJudge:
    """Prefers by the length of the prompt; fails after so many questions; has no verdict on some prompts."""

    remedy = "take another judge"

    def __init__(self, identity: str = "one", fails_after: int | None = None, invalid: Sequence[str] = ()) -> None:
        self.identity = {"model": identity}
        self.fails_after = fails_after
        self.invalid = invalid
        self.asked: list[Question] = []

    def judge(self, questions: Sequence[Question]) -> Iterator[tuple[int, Judgment]]:
        for number, (index, question) in enumerate(reversed(list(enumerate(questions)))):
            if number == self.fails_after:
                raise MachineError("gone")
            self.asked.append(question)
            invalid = question.prompt in self.invalid
            yield index, INVALID if invalid else Judgment.of(len(question.a + question.prompt) / 100)


def ask(judge: CountingJudge, folder: Path, questions: Sequence[Question] = QUESTIONS) -> dict[int, Judgment]:
    return dict(CachedJudge(judge, folder, 5).judge(questions))


def test_a_second_run_asks_nothing_and_gives_the_same(tmp_path: Path) -> None:
    first, second = CountingJudge(), CountingJudge()
    answers = ask(first, tmp_path)
    assert len(first.asked) == len(QUESTIONS)
    assert ask(second, tmp_path) == answers == dict(CountingJudge().judge(QUESTIONS))
    assert second.asked == []
    assert CachedJudge(second, tmp_path, 5).remedy == second.remedy


def test_equal_questions_are_asked_once_and_each_answered(tmp_path: Path) -> None:
    judge = CountingJudge()
    answers = ask(judge, tmp_path, [*QUESTIONS, *QUESTIONS])
    assert len(judge.asked) == len(QUESTIONS)
    assert sorted(answers) == list(range(20))
    assert answers[3] == answers[13]


@pytest.mark.parametrize(
    "changed",
    [Question("prompt 0", "other", "one"), Question("prompt 00", "one", "other"), Question("prompt 0o", "ne", "other")],
)
def test_another_order_prompt_or_answer_is_another_question(tmp_path: Path, changed: Question) -> None:
    ask(CountingJudge(), tmp_path)
    judge = CountingJudge()
    ask(judge, tmp_path, [QUESTIONS[0], changed])
    assert judge.asked == [changed]


def test_another_judge_is_asked_anew(tmp_path: Path) -> None:
    ask(CountingJudge(), tmp_path)
    other = CountingJudge("two")
    ask(other, tmp_path)
    assert len(other.asked) == len(QUESTIONS)


@pytest.mark.parametrize("fails_after", [0, 4, 9])
def test_what_was_judged_before_a_failure_is_kept(tmp_path: Path, fails_after: int) -> None:
    with pytest.raises(MachineError, match="gone"):
        ask(CountingJudge(fails_after=fails_after), tmp_path)
    judge = CountingJudge()
    assert ask(judge, tmp_path) == dict(CountingJudge().judge(QUESTIONS))
    assert len(judge.asked) == len(QUESTIONS) - fails_after


def test_what_was_judged_before_an_interruption_is_kept(tmp_path: Path) -> None:
    answers = CachedJudge(CountingJudge(), tmp_path, 5).judge(QUESTIONS)
    next(answers), next(answers), next(answers)
    answers.close()  # type: ignore[attr-defined]
    judge = CountingJudge()
    ask(judge, tmp_path)
    assert len(judge.asked) == len(QUESTIONS) - 3


def test_where_there_was_no_verdict_it_is_asked_again(tmp_path: Path) -> None:
    answers = ask(CountingJudge(invalid=["prompt 4"]), tmp_path)
    assert answers[4] == INVALID
    judge = CountingJudge()
    assert ask(judge, tmp_path)[4].verdict == "B"
    assert judge.asked == [QUESTIONS[4]]
