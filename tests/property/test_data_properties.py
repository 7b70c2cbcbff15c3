"""Data, whatever is thrown at it: what goes in comes out, and damage is named, never guessed at."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import combinations
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dpo_cli.data.formats import PREFERENCE_FORMATS, SFT_FORMATS
from dpo_cli.data.formats.base import Format, Reading
from dpo_cli.data.formats.detect import RowReader, UnknownFormatError
from dpo_cli.data.formats.pairs import IMPLICIT
from dpo_cli.data.formats.rankings import KWISE
from dpo_cli.data.formats.texts import shared_tokens
from dpo_cli.data.problem import RowProblem
from dpo_cli.data.schema import (
    Messages,
    PreferenceExample,
    RankingExample,
    SftExample,
    assistant,
    content_id,
    split_position,
    text_of,
    user,
)

TEXT = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=40)
VISIBLE = TEXT.filter(lambda text: bool(text.strip()))


@st.composite
def conversations(draw: st.DrawFn) -> Messages:
    """A prompt: perhaps a system turn, turns in alternation, the user's last."""
    system = [{"role": "system", "content": draw(VISIBLE)}] if draw(st.booleans()) else []
    turns = draw(st.lists(st.tuples(VISIBLE, VISIBLE), max_size=3))
    before = [message for question, answer in turns for message in (user(question), assistant(answer))]
    return [*system, *before, user(draw(VISIBLE))]


# --- formats: a canonical example in any format reads back as it was ----------------------------------------------

ROLE_NAMES = {"system": "system", "user": "human", "assistant": "gpt"}


def read_auto(formats: Any, row: dict[str, Any]) -> Any:
    """What ``format: auto`` makes of a file with this row."""
    row = json.loads(json.dumps(row))
    reader = RowReader(formats, "auto", {}, Reading())
    reader.detect("rows.json", [row])
    return reader.read(row)[1]


def fields_of(prompt: Messages) -> dict[str, Any]:
    """A prompt but for its last question, in fields of its own."""
    system = prompt[0]["content"] if prompt[0]["role"] == "system" else ""
    turns = [message["content"] for message in prompt if message["role"] != "system"]
    return {"system": system, "history": [list(pair) for pair in zip(turns[:-1:2], turns[1::2], strict=True)]}


def from_value(messages: Messages) -> list[dict[str, str]]:
    return [{"from": ROLE_NAMES[message["role"]], "value": message["content"]} for message in messages]


def typed(messages: Messages) -> list[dict[str, Any]]:
    """Messages whose content is in two typed parts."""
    return [{"role": message["role"], "content": parts_of(message["content"])} for message in messages]


def parts_of(text: str) -> list[dict[str, str]]:
    middle = len(text) // 2
    return [{"type": "text", "text": text[:middle]}, {"type": "text", "value": text[middle:]}]


INSTRUCTIONS: dict[str, Callable[[Messages, str], dict[str, Any]]] = {
    "alpaca": lambda prompt, answer: {
        **fields_of(prompt),
        "instruction": prompt[-1]["content"],
        "input": "",
        "output": answer,
    },
    "prompt and completion": lambda prompt, answer: {"prompt": prompt, "completion": [assistant(answer)]},
    "question and answer": lambda prompt, answer: {
        **fields_of(prompt),
        "question": prompt[-1]["content"],
        "answer": answer,
    },
    "messages": lambda prompt, answer: {"messages": [*prompt, assistant(answer)]},
    "conversations": lambda prompt, answer: {"conversations": from_value([*prompt, assistant(answer)])},
    "typed messages": lambda prompt, answer: {"messages": typed([*prompt, assistant(answer)])},
    "messages in a cell": lambda prompt, answer: {"messages": json.dumps([*prompt, assistant(answer)])},
}


@pytest.mark.parametrize("form", INSTRUCTIONS)
@given(prompt=conversations(), answer=VISIBLE)
def test_instructions_read_back(form: str, prompt: Messages, answer: str) -> None:
    assert read_auto(SFT_FORMATS, INSTRUCTIONS[form](prompt, answer)) == SftExample(prompt, [assistant(answer)])


def whole(prompt: Messages, chosen: str, rejected: str) -> dict[str, Any]:
    """Both sides as conversations that begin with the prompt."""
    return {"chosen": [*prompt, assistant(chosen)], "rejected": [*prompt, assistant(rejected)]}


def bare(prompt: Messages, chosen: str, rejected: str) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": [assistant(chosen)], "rejected": [assistant(rejected)]}


PREFERENCES: dict[str, Callable[[Messages, str, str], dict[str, Any]]] = {
    "sharegpt": lambda prompt, chosen, rejected: {
        "conversations": from_value(prompt),
        "chosen": {"from": "gpt", "value": chosen},
        "rejected": {"from": "gpt", "value": rejected},
    },
    "a chosen conversation": lambda prompt, chosen, rejected: {
        "messages": [*prompt, assistant(chosen)],
        "rejected_response": rejected,
    },
    "pairs": bare,
    "texts": lambda prompt, chosen, rejected: {
        **fields_of(prompt),
        "instruction": prompt[-1]["content"],
        "chosen": chosen,
        "rejected": rejected,
    },
    "pairs in cells": lambda *row: {name: json.dumps(value) for name, value in bare(*row).items()},
    "whole conversations": lambda prompt, *sides: {"prompt": prompt, **whole(prompt, *sides)},
    "conversations with a text": lambda prompt, *sides: {"prompt": prompt[-1]["content"], **whole(prompt, *sides)},
    "implicit": whole,
    "chosen messages": lambda *row: {f"{side}_messages": typed(turns) for side, turns in whole(*row).items()},
    "a label": lambda prompt, chosen, rejected: {
        "prompt": prompt,
        "output_1": rejected,
        "output_2": chosen,
        "label": "b",
    },
    "arena": lambda *row: {
        "conversation_a": whole(*row)["chosen"],
        "conversation_b": whole(*row)["rejected"],
        "winner": "model_a",
    },
    "votes": lambda prompt, chosen, rejected: {
        **fields_of(prompt),
        "instruction": prompt[-1]["content"],
        "response1": rejected,
        "response2": chosen,
        "annotator1": 2,
        "annotator2": None,
        "annotator3": 2,
        "annotator4": 1,
    },
}
SCORES_OF = {"votes": (2.0, 1.0)}
"""Forms that say by how much: the numbers of votes."""


@pytest.mark.parametrize("form", PREFERENCES)
@given(prompt=conversations(), chosen=VISIBLE, rejected=VISIBLE)
def test_preferences_read_back(form: str, prompt: Messages, chosen: str, rejected: str) -> None:
    expected = PreferenceExample(prompt, [assistant(chosen)], [assistant(rejected)], *SCORES_OF.get(form, ()))
    assert read_auto(PREFERENCE_FORMATS, PREFERENCES[form](prompt, chosen, rejected)) == expected


SCORES = st.floats(-1e6, 1e6)


@given(conversations(), VISIBLE, VISIBLE, SCORES, SCORES, st.booleans())
def test_scored_preferences_read_back(
    prompt: Messages, one: str, other: str, score: float, other_score: float, by_score: bool
) -> None:
    row: dict[str, Any] = {"prompt": prompt, "response_a": one, "response_b": other}
    if by_score:
        assume(score != other_score)
        row |= {"score_a": score, "score_b": other_score}
    else:
        row = {"prompt": prompt, "chosen": one, "rejected": other, "score_chosen": score, "score_rejected": other_score}
    expected = PreferenceExample(prompt, [assistant(one)], [assistant(other)], score, other_score)
    if by_score and score < other_score:
        expected = PreferenceExample(prompt, [assistant(other)], [assistant(one)], other_score, score)
    assert read_auto(PREFERENCE_FORMATS, row) == expected


PLAIN = st.text(st.sampled_from("abc 你好.?\n"), min_size=1, max_size=12).filter(lambda text: text == text.strip())


@given(st.lists(st.tuples(PLAIN, PLAIN), max_size=3), PLAIN, PLAIN, PLAIN, st.booleans())
def test_a_transcript_reads_back(
    turns: list[tuple[str, str]], question: str, chosen: str, rejected: str, with_prompt: bool
) -> None:
    shared = "".join(f"\n\nHuman: {asked}\n\nAssistant: {answered}" for asked, answered in turns)
    shared += f"\n\nHuman: {question}\n\nAssistant:"
    if with_prompt:
        row = {"prompt": shared, "chosen": f" {chosen}", "rejected": f" {rejected}"}
    else:
        row = {"chosen": f"{shared} {chosen}", "rejected": f"{shared} {rejected}"}
    prompt = [message for asked, answered in turns for message in (user(asked), assistant(answered))]
    expected = PreferenceExample([*prompt, user(question)], [assistant(chosen)], [assistant(rejected)])
    assert read_auto(PREFERENCE_FORMATS, row) == expected


@given(VISIBLE, TEXT, TEXT)
def test_an_implicit_prompt_and_its_answers_are_the_texts_again(start: str, one: str, other: str) -> None:
    chosen, rejected = start + one, start + other
    try:
        example = IMPLICIT.read({"chosen": chosen, "rejected": rejected}, Reading())
    except RowProblem as problem:
        assert problem.reason == "no_common_prompt"
        return
    assert isinstance(example, PreferenceExample)
    cut = len(text_of(example.prompt))
    assert text_of(example.prompt) + text_of(example.chosen) == chosen
    assert text_of(example.prompt) + text_of(example.rejected) == rejected
    assert shared_tokens(chosen, chosen[:cut]) == shared_tokens(rejected, rejected[:cut]) == cut


# --- formats: rankings ---------------------------------------------------------------------------------------------

ANSWERS = st.lists(st.tuples(VISIBLE, st.integers(0, 3)), min_size=2, max_size=5)
"""Answers with their levels, 0 the best."""


def verdicts(levels: list[int]) -> list[Any]:
    return [0 if one == other else 1 if one < other else 2 for one, other in combinations(levels, 2)]


def matrix(levels: list[int]) -> list[list[float]]:
    return [[0.5 if one == other else 0.9 if one < other else 0.1 for other in levels] for one in levels]


RANKINGS: dict[str, Callable[[list[str], list[int]], dict[str, Any]]] = {
    "ranks": lambda texts, levels: {"completions": texts, "ranks": levels},
    "scores": lambda texts, levels: {"responses": texts, "scores": [-float(level) for level in levels]},
    "answers with ranks": lambda texts, levels: {
        "answers": [{"answer": text, "rank": 2.0 * level + 1} for text, level in zip(texts, levels, strict=True)]
    },
    "answers with scores": lambda texts, levels: {
        "completions": [
            {"response": text, "overall_score": -level, "model": "m"} for text, level in zip(texts, levels, strict=True)
        ]
    },
    "verdicts": lambda texts, levels: {"completions": texts, "preference": verdicts(levels)},
    "a matrix": lambda texts, levels: {"completions": texts, "preference": matrix(levels)},
}


def ranking_of(prompt: Messages, answers: list[tuple[str, int]], form: str) -> RankingExample:
    """The ranking in these answers, worked out level by level."""
    ordered = [answer for level in range(4) for answer in answers if answer[1] == level]
    levels = [level for _, level in ordered]
    pairs = [(i, j) for i, j in combinations(range(len(levels)), 2) if levels[i] < levels[j]]
    return RankingExample(
        prompt,
        [[assistant(text)] for text, _ in ordered],
        [len({other for other in levels if other < level}) + 1 for level in levels],
        [-float(level) for level in levels] if "scores" in form else None,
        pairs if form in ("verdicts", "a matrix") else None,
    )


@pytest.mark.parametrize("form", RANKINGS)
@given(prompt=conversations(), answers=ANSWERS)
def test_rankings_read_back(form: str, prompt: Messages, answers: list[tuple[str, int]]) -> None:
    row = {"prompt": prompt, **RANKINGS[form](*map(list, zip(*answers, strict=True)))}
    expected = ranking_of(prompt, answers, form)
    found = read_auto(PREFERENCE_FORMATS, row)
    assert found == expected
    assert found.pairs("all") == [
        (i, j) for i, j in combinations(range(len(answers)), 2) if found.ranks[i] < found.ranks[j]
    ]


@given(conversations(), st.lists(VISIBLE, min_size=2, max_size=5))
def test_a_list_in_order_reads_back(prompt: Messages, texts: list[str]) -> None:
    row = {**fields_of(prompt), "instruction": prompt[-1]["content"], "input": "", "output": texts}
    expected = RankingExample(prompt, [[assistant(text)] for text in texts], list(range(1, len(texts) + 1)))
    assert KWISE.read(row, Reading(in_order=True)) == expected


@given(conversations(), ANSWERS)
def test_a_tree_reads_back(prompt: Messages, answers: list[tuple[str, int]]) -> None:
    prompt = [message for message in prompt if message["role"] != "system"]
    node: dict[str, Any] = {
        "role": "prompter",
        "text": prompt[-1]["content"],
        "replies": [{"role": "assistant", "text": text, "rank": level, "replies": []} for text, level in answers],
    }
    for message in reversed(prompt[:-1]):
        role = "prompter" if message["role"] == "user" else "assistant"
        node = {"role": role, "text": message["content"], "replies": [node]}
    parts = [example for _, example in read_auto(PREFERENCE_FORMATS, {"prompt": node})]
    assert parts == [ranking_of(prompt, answers, "ranks")]


# --- formats: anything else ----------------------------------------------------------------------------------------

ODD_TEXT = TEXT | st.sampled_from(
    [
        *("", " ", "[", "[1, 2]", '["a"]', '[{"role": "user", "content": "q"}]', "[{'role': 'user'}]"),
        *("\n\nHuman: q\n\nAssistant:", "\n\nHuman: q\n\nAssistant: a", "2", "nan", "tie", "model_a", "true"),
    ]
)
MESSAGE = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(["user", "assistant", "system", "tool", "robot"]) | st.none(),
        "from": st.sampled_from(["human", "gpt"]),
        "content": st.deferred(lambda: JSON),
        "text": ODD_TEXT,
        "rank": st.integers(-1, 2) | st.none(),
        "score": st.floats(),
        "weight": st.sampled_from([0, 1, None]),
        "tool_calls": st.none() | st.just([{}]),
        "replies": st.lists(st.deferred(lambda: MESSAGE), max_size=3),
    },
)
JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ODD_TEXT | MESSAGE,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
FORMATS = (*SFT_FORMATS, *PREFERENCE_FORMATS)
FIELDS = sorted(
    {name for fmt in FORMATS for field, others in fmt.names.items() for name in (field, *others)}
    | {"output_1", "output_2", "conversation_a", "conversation_b", "winner", "annotator1", "score_1", "score_2"}
    | {"human_ref_A", "human_ref_B", "labels", "response_1", "response_2", "response_3", "tools", "replies"}
)


def check_found(found: Any) -> None:
    """What is read is an example, or parts that are examples or problems."""
    for example in [part for _, part in found] if isinstance(found, Iterator) else [found]:
        if isinstance(example, RowProblem):
            assert example.reason
            assert str(example)
            continue
        messages = [*example.prompt, *(turn for answer in example.answers for turn in answer)]
        assert example.prompt
        assert {message["role"] for message in messages} <= {"system", "user", "assistant", "tool"}
        assert all(isinstance(message["content"], str) for message in messages)
        if isinstance(example, RankingExample):
            assert example.ranks == sorted(example.ranks)
            for scheme in ("all", "adjacent", "best_vs_worst"):
                assert all(better != worse for better, worse in example.pairs(scheme))


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
@given(data=st.data())
def test_any_object_is_read_or_refused_with_a_reason(fmt: Format[Any], data: st.DataObject) -> None:
    needed = data.draw(st.sampled_from(fmt.needs))
    names = st.sampled_from([*fmt.names, *needed, *needed])
    row = data.draw(st.dictionaries(names, JSON, max_size=6))
    for turns in ("last", "all"):
        try:
            check_found(fmt.read(row, Reading(turns=turns)))
        except RowProblem as problem:
            assert problem.reason
            assert str(problem)


@settings(max_examples=3 * settings().max_examples)
@given(st.lists(st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=6) | JSON, min_size=1, max_size=4))
def test_any_rows_are_read_by_auto_or_refused_with_a_reason(rows: list[Any]) -> None:
    for formats in (SFT_FORMATS, PREFERENCE_FORMATS):
        reader = RowReader(formats, "auto", {}, Reading())
        try:
            assert reader.detect("rows.json", rows)
        except UnknownFormatError as error:
            assert str(error).startswith("rows.json: ")
        for row in rows:
            try:
                fmt, found = reader.read(row)
                assert fmt in formats
                check_found(found)
            except RowProblem as problem:
                assert problem.reason
                assert str(problem)


# --- identity and split ---------------------------------------------------------------------------------------------


@given(conversations(), conversations())
def test_equal_content_has_equal_identity_and_other_content_another(first: Messages, second: Messages) -> None:
    copy = [{"content": message["content"], "role": message["role"]} for message in first]
    assert content_id(copy) == content_id(first)
    assert (content_id(first) == content_id(second)) == (first == second)


@given(conversations(), conversations())
def test_a_conversation_falls_where_its_opening_falls(prompt: Messages, other: Messages) -> None:
    opening = prompt[: 1 + [message["role"] for message in prompt].index("user")]
    longer = [*opening, assistant("and?"), *(turn for turn in other if turn["role"] != "system")]
    assert split_position(longer) == split_position(prompt) == split_position(opening)
    assert 0 <= split_position(prompt) < 1
