"""What a judge is asked: the paper's templates, and the user's, checked."""

from __future__ import annotations

from pathlib import Path

import pytest

from dpo_cli.core.errors import ParamsError
from dpo_cli.judging.judge import Question
from dpo_cli.judging.templates import TEMPLATES, open_template, transcript

QUESTION = Question("what {a} is", "it has {b} and {{x}}", "and {prompt} {tie}")


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_built_in_template_shows_all_three_texts_as_they_are(name: str) -> None:
    template = open_template(name, "evaluate.template")
    text = template.render(QUESTION)
    positions = [text.index(part) for part in (QUESTION.prompt, QUESTION.a, QUESTION.b)]
    assert positions == sorted(positions)
    assert template.options == ("A", "B")
    assert '"A"' in text
    assert len(text) == len(template.text) - len("{prompt}{a}{b}") + sum(
        map(len, (QUESTION.prompt, QUESTION.a, QUESTION.b))
    )


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_built_in_templates_pass_the_check_of_the_users_own(tmp_path: Path, name: str) -> None:
    path = tmp_path / "own.txt"
    path.write_text("\ufeff" + TEMPLATES[name] + "\n", encoding="utf-8")
    assert open_template(str(path), "evaluate.template").text == TEMPLATES[name]


def test_the_papers_concise_prompt_adds_its_criterion_to_the_simple_one() -> None:
    simple, concise = TEMPLATES["summary"], TEMPLATES["summary-concise"]
    added = ", without including unimportant or irrelevant details? A good summary is both precise and concise."
    assert simple.replace("given forum post?", f"given forum post{added}") == concise
    assert len({open_template(name, "").digest for name in TEMPLATES}) == len(TEMPLATES)


def test_a_template_may_offer_a_tie(tmp_path: Path) -> None:
    path = tmp_path / "tie.txt"
    path.write_text('{prompt}\nA: {a}\nB: {b}\nA, B, or "{tie}" if they are equal:', encoding="utf-8")
    template = open_template(str(path), "evaluate.template")
    assert template.options == ("A", "B", "C")
    assert template.render(Question("p", "x", "y")) == 'p\nA: x\nB: y\nA, B, or "C" if they are equal:'


def test_every_problem_of_a_template_is_named_at_once(tmp_path: Path) -> None:
    path = tmp_path / "own.txt"
    path.write_text("{promt} {a} {a} and {zzz}; Answer A", encoding="utf-8")
    with pytest.raises(ParamsError) as caught:
        open_template(str(path), "evaluate.template")
    assert [problem.removeprefix(f"{path}: ") for problem in caught.value.problems] == [
        "{prompt} must stand in it once, got 0 times",
        "{a} must stand in it once, got 2 times",
        "{b} must stand in it once, got 0 times",
        "{promt} is not a place for anything; did you mean {prompt}?",
        "{zzz} is not a place for anything; there are {prompt}, {a}, {b}, {tie}",
        "it must call the candidates A and B, since the answer is one of these letters; B is not in it",
    ]


def test_a_template_that_is_not_there_or_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ParamsError, match=r"evaluate.template must be one of summary, .* got 'dialog'"):
        open_template("dialog", "evaluate.template")
    (tmp_path / "own.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ParamsError, match="is not UTF-8 text"):
        open_template(str(tmp_path / "own.txt"), "evaluate.template")


def test_a_single_message_is_its_text_and_a_conversation_a_transcript() -> None:
    ask = {"role": "user", "content": "2 and 2?"}
    assert transcript([ask]) == "2 and 2?"
    talk = [{"role": "system", "content": "Be kind."}, ask, {"role": "assistant", "content": "4"}, ask]
    assert transcript(talk) == "System: Be kind.\n\nUser: 2 and 2?\n\nAssistant: 4\n\nUser: 2 and 2?"


def test_a_transcript_has_the_calls_of_a_conversation() -> None:
    called = {"role": "assistant", "content": "", "tool_calls": '[{"function":{"name":"add"}}]'}
    talk = [{"role": "user", "content": "q"}, called, {"role": "tool", "content": "4"}]
    assert transcript(talk) == 'User: q\n\nAssistant: [{"function":{"name":"add"}}]\n\nTool: 4'
