"""What can be wrong with an example, and what becomes of it."""

from __future__ import annotations

import pytest

from dpo_cli.core.data_params import DataChecks
from dpo_cli.data.blocks import fit_answers
from dpo_cli.data.checks import (
    CHECKS_OF,
    DESCRIPTIONS,
    check_example,
    has_chat_markers,
    has_placeholders,
    reason_to_drop,
)
from dpo_cli.data.repeats import CHECKS
from dpo_cli.data.schema import PreferenceExample, RankingExample, SftExample, assistant, user

POLICIES = DataChecks().model_dump()


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected", "found"),
    [
        ("q", "a", "b", set()),
        (" \n", "a", "b", {"empty_prompt"}),
        ("q", "", "b", {"empty_chosen"}),
        ("q", "a", "\t", {"empty_rejected"}),
        ("q", "", " ", {"empty_chosen", "empty_rejected", "equal_sides"}),
        ("q", "a", "a", {"equal_sides"}),
        ("q", "a", " a\n", {"equal_sides"}),
        ("q", "a", "A", set()),
        ("q", "q", "b", set()),
        ("q", "ab", "a", {"prefix_sides", "longer_chosen"}),
        ("q", "a", "ab", {"prefix_sides"}),
        ("q", "abc", "xy", {"longer_chosen"}),
        ("q {{name}}", "a", "b", {"placeholders"}),
        ("q", "a", "b</s>", {"chat_markers"}),
        ("q", "a\ufffd", "b ", {"replacement_characters"}),
    ],
)
def test_a_pair(prompt: str, chosen: str, rejected: str, found: set[str]) -> None:
    pair = PreferenceExample([user(prompt)], [assistant(chosen)], [assistant(rejected)])
    assert set(check_example(pair)) == found


@pytest.mark.parametrize(
    ("scores", "is_found"),
    [((1.0, 9.0), True), ((3.0, 3.0), True), ((0, 0.0), True), ((9.0, 1.0), False), ((None, 1.0), False)],
)
def test_scores_that_contradict_the_choice_are_seen(scores: tuple[float | None, float], is_found: bool) -> None:
    pair = PreferenceExample([user("q")], [assistant("a")], [assistant("b")], *scores)
    assert ("score_conflict" in check_example(pair)) == is_found


@pytest.mark.parametrize(
    ("prompt", "completion", "found"),
    [
        ("q", "a", []),
        ("", "a", ["empty_prompt"]),
        ("q", " ", ["empty_completion"]),
        ("q", "q", []),
        ("q", "<|im_end|>", ["chat_markers"]),
        *(
            (f"Name some.\n{word}", "a", ["no_input"])
            for word in ("<noinput>", "Noinput", "No input.", "`<noinput>`", "< no_input >")
        ),
        *((text, "a", []) for text in ("noinput", "What is noinput", "Some.\nno inputs", "Some.\nnoinput here")),
    ],
)
def test_an_instruction(prompt: str, completion: str, found: list[str]) -> None:
    assert check_example(SftExample([user(prompt)], [assistant(completion)])) == found


@pytest.mark.parametrize(
    ("extra", "is_empty"),
    [({"reasoning_content": "sum"}, True), ({"tool_calls": "[{}]"}, False), ({}, True), ({"content": "5"}, False)],
)
def test_reasoning_alone_is_no_answer_and_a_call_is_one(extra: dict[str, str], is_empty: bool) -> None:
    answer, q, a = [{**assistant(" "), **extra}], [user("q")], [assistant("a")]
    assert ("empty_completion" in check_example(SftExample(q, answer))) == is_empty
    assert ("empty_chosen" in check_example(PreferenceExample(q, answer, a))) == is_empty
    assert ("empty_rejected" in check_example(PreferenceExample(q, a, answer))) == is_empty
    places, unfit = fit_answers(RankingExample(q, [a, answer], [1, 2]), POLICIES)
    assert (places, [check for _, check, _ in unfit]) == (([0], ["empty_rejected"]) if is_empty else ([0, 1], []))


MARKED = (
    "<|im_end|>", "a <|endoftext|> b", "</s>", "<s>[INST] x", "[/INST]", "x\n\nHuman: y", "Assistant: y",
    "<end_of_turn>", "### Instruction:\nGo", "###Response",
)  # fmt: skip
PLAIN = ("a < b | c > d", "<b>bold</b>", "# Title", "### Results", "the Human: a study", "x[INST", "a <| b |> c")


def test_marks_of_chat_templates_are_seen_and_what_only_looks_like_one_is_none() -> None:
    assert all(map(has_chat_markers, MARKED))
    assert not any(map(has_chat_markers, PLAIN))


def test_placeholders_are_seen() -> None:
    assert all(map(has_placeholders, ("{{name}}", "{{ a.b }}")))
    assert not any(map(has_placeholders, ("{{}}", "{name}")))


@pytest.mark.parametrize(
    ("roles", "found"),
    [
        ("user", False),
        ("system user", False),
        ("user assistant user", False),
        ("user assistant tool tool", False),
        ("user user", True),
        ("system user assistant assistant user", True),
        ("user system user", True),
        ("system system user", True),
    ],
)
def test_turns_out_of_turn_are_seen(roles: str, found: bool) -> None:
    prompt = [{"role": role, "content": str(at)} for at, role in enumerate(roles.split())]
    assert ("turn_order" in check_example(PreferenceExample(prompt, [assistant("a")], [assistant("b")]))) == found


def test_an_example_that_fails_several_checks_is_left_out_for_the_gravest() -> None:
    assert reason_to_drop(["longer_chosen", "chat_markers", "equal_sides", "empty_chosen"], POLICIES) == "empty_chosen"
    assert reason_to_drop(["longer_chosen", "chat_markers"], POLICIES) is None
    assert reason_to_drop(["longer_chosen", "chat_markers"], POLICIES | {"longer_chosen": "drop"}) == "longer_chosen"
    assert reason_to_drop(["chat_markers"], POLICIES | {"chat_markers": "error"}) == "chat_markers"


def test_every_setting_is_a_check_and_every_check_has_a_setting() -> None:
    settings = set(DataChecks.model_fields)
    assert {name for names in CHECKS_OF.values() for name in names} == settings
    # a check is of a single example, of rows beside each other, or of the format
    assert set(DESCRIPTIONS) | set(CHECKS) | {"malformed", "tie"} == settings
