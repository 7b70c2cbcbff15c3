"""Rows as public data sets have them: read by auto, by a column map, or refused with what to say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from dpo_cli.data.formats import PREFERENCE_FORMATS, SFT_FORMATS
from dpo_cli.data.formats.base import Reading
from dpo_cli.data.formats.detect import RowReader, UnknownFormatError
from dpo_cli.data.problem import RowProblem
from dpo_cli.data.schema import PreferenceExample, RankingExample, SftExample, assistant, user

Q, A, B = user("q"), assistant("a"), assistant("b")
CHOSEN = PreferenceExample([Q], [A], [B])
FLIPPED = PreferenceExample([Q], [B], [A])
SYSTEM = {"role": "system", "content": "s"}


def scored(chosen: float, rejected: float) -> PreferenceExample:
    return PreferenceExample([Q], [A], [B], chosen, rejected)


# fmt: off
PREFERENCES = {
    "UltraFeedback binarized": ({"prompt": "q", "prompt_id": "x", "chosen": [Q, A], "rejected": [Q, B], "messages": [Q,
     A], "score_chosen": 8.5, "score_rejected": 7.0},
     scored(8.5, 7)),
    "UltraFeedback cleaned": ({"source": "s", "prompt": "q", "chosen": [Q, A], "chosen-rating": 5.0,
     "chosen-model": "m", "rejected": [Q, B], "rejected-rating": 3.0, "rejected-model": "n"},
     scored(5, 3)),
    "SHP, A": ({"post_id": "x", "history": "q", "human_ref_A": "a", "human_ref_B": "b", "labels": 1, "score_A": 52,
     "score_B": 13, "score_ratio": 4.0},
     scored(52, 13)),
    "SHP, B": ({"history": "q", "human_ref_A": "b", "human_ref_B": "a", "labels": 0, "score_A": 5, "score_B": 13},
     scored(13, 5)),
    "Chatbot Arena": ({"question_id": "x", "model_a": "m", "model_b": "n", "winner": "model_b", "judge": "j",
     "turn": 1, "conversation_a": [Q, A], "conversation_b": [Q, B]},
     FLIPPED),
    "PKU-SafeRLHF": ({"prompt": "q", "response_0": "a", "response_1": "b", "is_response_0_safe": True,
     "is_response_1_safe": False, "better_response_id": 1, "safer_response_id": 0},
     FLIPPED),
    "HelpSteer2 preferences": ({"split": "train", "prompt": "q", "response_1": "a", "response_2": "b",
     "preference_strength": -2},
     CHOSEN),
    "HelpSteer3": ({"domain": "code", "context": [Q], "response1": "a", "response2": "b", "overall_preference": 1,
     "individual_preference": [{"score": 1, "reasoning": "..."}]},
     FLIPPED),
    "Orca DPO pairs": ({"system": "s", "question": "q", "chosen": "a", "rejected": "b"},
     PreferenceExample([SYSTEM, Q], [A], [B])),
    "Orca DPO pairs, without a system prompt": ({"system": "", "question": "q", "chosen": "a", "rejected": "b"},
     CHOSEN),
    "Argilla's Orca DPO pairs": ({"system": "s", "input": "q", "chosen": "a", "rejected": "b", "generations": ["a",
     "b"], "order": ["m", "n"], "rating": [9.0, 8.0], "status": "unchanged"},
     PreferenceExample([SYSTEM, Q], [A], [B])),
    "Capybara": ({"source": "x", "conversation": [{"input": "q", "output": "x"}], "prompt": "q", "chosen": [Q, A],
     "rejected": [Q, B], "rating_chosen": 5, "rating_rejected": 4},
     scored(5, 4)),
    "a DPO mix": ({"dataset": "x", "system": None, "chosen": [Q, A], "rejected": [Q, B], "chosen_rating": 5.0,
     "rejected_rating": 3},
     scored(5, 3)),
    "HH, the prompt cut off": ({"prompt": "\n\nHuman: q\n\nAssistant:", "response": " a", "chosen": " a",
     "rejected": " b"},
     CHOSEN),
    "OpenAI preferences": ({"input": {"messages": [Q], "tools": [], "parallel_tool_calls": True},
     "preferred_output": [A], "non_preferred_output": [B]},
     CHOSEN),
    "ms-swift": ({"messages": [Q, A], "rejected_response": "b"}, CHOSEN),
    "Chatbot Arena, Kaggle": ({"id": 1, "model_a": "m", "model_b": "n", "prompt": '["q"]', "response_a": '["b"]',
     "response_b": '["a"]', "winner_model_a": 0, "winner_model_b": 1, "winner_tie": 0},
     CHOSEN),
    "Chatbot Arena, lists as JSON": ({"prompt": '["q"]', "response_a": '["a"]', "response_b": '["b"]',
     "winner": "model_a"},
     CHOSEN),
    "pairs of turns": ({"conversations": [{"human": "u", "assistant": "v"}, {"human": "q", "assistant": None}],
     "chosen": "a", "rejected": "b"},
     PreferenceExample([user("u"), assistant("v"), Q], [A], [B])),
    "LLMBar": ({"input": "q", "output_1": "b", "output_2": "a", "label": 2}, CHOSEN),
    "AlpacaFarm": ({"instruction": "q", "input": "", "output_1": "b", "output_2": "a", "preference": 2}, CHOSEN),
    "StackExchange paired": ({"qid": 1, "question": "q", "response_j": "a", "response_k": "b"}, CHOSEN),
    "RewardBench": ({"prompt": "q", "chosen": "a", "chosen_model": "m", "rejected": "b", "subset": "s"}, CHOSEN),
    "UltraFeedback": ({"source": "x", "instruction": "q", "models": ["m", "n"], "correct_answers": ["None"],
     "completions": [{"model": "m", "response": "a", "overall_score": 6.5, "fine-grained_score": 4.0,
     "annotations": {}}, {"model": "n", "response": "b", "overall_score": 8.0, "fine-grained_score": 3.0,
     "annotations": {}}]},
     RankingExample([Q], [[B], [A]], [1, 2], [8.0, 6.5])),
    "Nectar": ({"prompt": "\n\nHuman: q\n\nAssistant: ", "answers": [{"answer": "a", "model": "m", "rank": 2.0},
     {"answer": "b", "model": "n", "rank": 1.0}], "turns": 1},
     RankingExample([Q], [[B], [A]], [1, 2])),
    "StackExchange preferences": ({"qid": 1, "question": "q", "answers": [{"text": "a", "pm_score": 1}, {"text": "b",
     "pm_score": 4}]},
     RankingExample([Q], [[B], [A]], [1, 2], [4.0, 1.0])),
    "RewardBench 2": ({"id": "x", "prompt": "q", "chosen": ["a"], "rejected": ["b", "c"], "num_correct": 1,
     "subset": "Math"},
     RankingExample([Q], [[A], [B], [assistant("c")]], [1, 2, 2])),
    "RRHF": ({"query": "q", "responses": ["a", "b"], "scores": [1, 2]},
     RankingExample([Q], [[B], [A]], [1, 2], [2, 1])),
}
"""Rows that auto reads, and what they become."""

MAPPED = {
    "WebGPT comparisons": ({"question": {"id": "x", "full_text": "q"}, "answer_0": "a", "score_0": -0.5,
     "answer_1": "b", "score_1": 0.5},
     {"prompt": "question.full_text"}, {}, PreferenceExample([Q], [B], [A], 0.5, -0.5)),
    "OpenAI summarization comparisons": ({"info": {"post": "q", "title": "t"}, "summaries": [{"text": "a"},
     {"text": "b"}], "choice": 1, "worker": "w"},
     {"prompt": "info.post", "first": "summaries.0.text", "second": "summaries.1.text", "label": "choice"},
      {"0": "first", "1": "second"}, FLIPPED),
    "JudgeLM": ({"question_body": "q", "answer1_body": "a", "answer2_body": "b", "score": [8, 5]},
     {"prompt": "question_body", "first": "answer1_body", "second": "answer2_body", "first_score": "score.0",
      "second_score": "score.1"}, {}, scored(8, 5)),
    "Feedback collection": ({"instruction": "q", "orig_response_A": "a", "orig_response_B": "b",
     "orig_preference": "B"},
     {"first": "orig_response_A", "second": "orig_response_B", "label": "orig_preference"}, {}, FLIPPED),
    "Arena, one column a verdict": ({"prompt": "q", "response_a": "a", "response_b": "b", "winner_model_a": 0,
     "winner_model_b": 1},
     {"first_score": "winner_model_a", "second_score": "winner_model_b"}, {}, PreferenceExample([Q], [B], [A], 1.0,
      0.0)),
}
"""Rows with the columns and the labels that the user says."""

INSTRUCTIONS = {
    "Dolly": ({"instruction": "q", "context": "", "response": "a", "category": "qa"}, [Q]),
    "GSM8K": ({"question": "q", "answer": "a"}, [Q]),
    "OpenOrca": ({"id": "x", "system_prompt": "s", "question": "q", "response": "a"}, [SYSTEM, Q]),
    "SlimOrca": ({"conversations": [{"from": "system", "value": "s", "weight": None}, {"from": "human", "value": "q",
     "weight": 0.0}, {"from": "gpt", "value": "a", "weight": 1.0}]},
     [SYSTEM, Q]),
    "MetaMath": ({"query": "q", "response": "a", "type": "t", "original_question": "o"}, [Q]),
    "Firefly": ({"kind": "x", "input": "q", "target": "a"}, [Q]),
    "No Robots": ({"prompt": "q", "prompt_id": "x", "messages": [SYSTEM, Q, A], "category": "c"}, [SYSTEM, Q]),
    "Numina": ({"source": "x", "problem": "q", "solution": "long", "messages": [Q, A]}, [Q]),
    "ms-swift, instructions": ({"system": "s", "query": "q", "response": "a"}, [SYSTEM, Q]),
    "MOSS": ({"conversation_id": 1, "conversation": [{"human": "q", "assistant": "a"}]}, [Q]),
    "MOSS, as JSON": ({"conversation": '[{"human": "q", "assistant": "a"}]'}, [Q]),
    "pairs of turns with a system prompt": ({"messages": [{"system": "s", "user": "q", "assistant": "a"}]},
     [SYSTEM, Q]),
    "OpenHermes": ({"system_prompt": None, "conversations": [{"from": "human", "value": "q"}, A]}, [Q]),
}
"""Rows with their prompts; the answer is A."""

# fmt: on


@pytest.mark.parametrize(("row", "expected"), PREFERENCES.values(), ids=PREFERENCES)
def test_public_preferences_are_read_by_auto(row: dict[str, Any], expected: Any, auto: Callable[..., Any]) -> None:
    assert auto(row).only == expected
    preferred = expected.chosen if isinstance(expected, PreferenceExample) else expected.completions[0]
    assert auto(row, kind="sft").only == SftExample(expected.prompt, preferred)


@pytest.mark.parametrize(("row", "columns", "labels", "expected"), MAPPED.values(), ids=MAPPED)
def test_public_rows_are_read_by_a_column_map(
    row: dict[str, Any], columns: Any, labels: Any, expected: Any, auto: Callable[..., Any]
) -> None:
    assert auto(row, columns=columns, labels=labels).only == expected


@pytest.mark.parametrize(("row", "prompt"), INSTRUCTIONS.values(), ids=INSTRUCTIONS)
def test_public_instructions_are_read_by_auto(row: dict[str, Any], prompt: Any, auto: Callable[..., Any]) -> None:
    assert auto(row, kind="sft").only == SftExample(prompt, [A])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "q", "response": "a", "helpfulness": 3}, "pairs comes next to it, which needs rejected, too"),
        (
            {"instruction": "q", "output_1": "a", "output_2": "b", "preference": 1.7},
            "'preference' is a number on a scale, such as 1.7: a probability or a strength, no verdict;"
            ' say where to cut it, such as labels: {"<1.5": first, ">1.5": second, "1.5": tie}',
        ),
        (
            {"instruction": "q", "input": "", "candidates": [{"text": "a", "scores": {"bleu": 1}}, {"text": "b"}]},
            "read as kwise: has no 'ranks', 'scores' or 'preference'",
        ),
    ],
    ids=["HelpSteer", "AlpacaEval", "PairRM"],
)
def test_public_files_that_say_too_little_are_refused(
    row: dict[str, Any], message: str, auto: Callable[..., Any]
) -> None:
    with pytest.raises(UnknownFormatError) as caught:
        auto(row)
    assert message in str(caught.value)


ARENA = {"prompt": "q", "response_a": "a", "response_b": "b"}
PART = (
    "the two sides part before the last answer: 3 and 3 turns follow what they share, and DPO compares two answers to"
    " one prompt; say compare: first to compare the first answers in which they differ"
)
# fmt: off
REFUSED_ROWS = {
    "Chatbot Arena, Kaggle, no winner": (
        {**ARENA, "winner_model_a": 1, "winner_model_b": 1, "winner_tie": 0}, "no_label",
        "says in 2 of the columns of 'winner_model_a + winner_model_b + winner_tie' which side won; one must"),
    "Chatbot Arena, Kaggle, a tie": (
        {**ARENA, "winner_model_a": 0, "winner_model_b": 0, "winner_tie": 1}, "tie", "is a tie: neither side won"),
    "Chatbot Arena, Kaggle, two turns": (
        {"prompt": '["q", "r"]', "response_a": '["a", "c"]', "response_b": '["b", "d"]', "winner_model_a": 1,
         "winner_model_b": 0, "winner_tie": 0}, "diverges_early", PART),
    "WebGPT comparisons": (
        {"question": {"id": "x", "full_text": "q"}, "answer_0": "a", "score_0": 0, "answer_1": "b", "score_1": 1},
        "bad_message",
        "'question' is an object with id, full_text; say in columns which of them is meant, with a dot between"),
    "Chatbot Arena, a tie": (
        {"conversation_a": [Q, A], "conversation_b": [Q, B], "winner": "tie (bothbad)"}, "tie",
        "is a tie: neither side won"),
    "Chatbot Arena, two turns": (
        {"conversation_a": [Q, A, Q, A], "conversation_b": [Q, B, Q, B], "winner": "model_a"}, "diverges_early", PART),
}
# fmt: on


@pytest.mark.parametrize(("row", "reason", "detail"), REFUSED_ROWS.values(), ids=REFUSED_ROWS)
def test_public_rows_that_cannot_be_read_say_why(
    row: dict[str, Any], reason: str, detail: str, auto: Callable[..., Any]
) -> None:
    problem = auto(row).found[0]
    assert isinstance(problem, RowProblem)
    assert (problem.reason, problem.detail) == (reason, detail)


# --- columns that nobody reads ------------------------------------------------------------


def outcome(reader: RowReader, row: dict[str, Any]) -> Any:
    try:
        return reader.read(row)[1]
    except RowProblem as problem:
        return problem.detail


SHAPES = [("preference", row, {}, {}) for row, _ in PREFERENCES.values()]
SHAPES += [("preference", row, columns, labels) for row, columns, labels, _ in MAPPED.values()]
SHAPES += [("sft", row, {}, {}) for row, _ in INSTRUCTIONS.values()]


@pytest.mark.parametrize(("kind", "row", "columns", "labels"), SHAPES, ids=[*PREFERENCES, *MAPPED, *INSTRUCTIONS])
def test_a_column_is_unread_if_and_only_if_its_content_makes_no_difference(
    kind: str, row: dict[str, Any], columns: Any, labels: Any
) -> None:
    formats = SFT_FORMATS if kind == "sft" else PREFERENCE_FORMATS
    reader = RowReader(formats, "auto", columns, Reading(labels=labels))
    reader.detect("f", [row])
    before = outcome(reader, row)
    unread = set(reader.take_unread())
    for key, value in row.items():
        if value in (None, "", [], {}):
            assert key not in unread
        else:
            assert (outcome(reader, {**row, key: "something else"}) == before) == (key in unread), key


@pytest.mark.parametrize(
    ("row", "unread"),
    [
        ({"prompt": "q", "instruction": "q", "chosen": "a", "rejected": "b"}, ["instruction"]),
        (
            {"prompt": "q", "chosen": "a", "rejected": "b", "score_chosen": 1, "score_rejected": 0, "margin": 1},
            ["margin"],
        ),
        (
            {"prompt": "q", "chosen": "a", "rejected": "b", "zero": 0, "false": False, "empty": [], "null": None},
            ["zero", "false"],
        ),
        ({"prompt": "q", "response_1": "a", "response_2": "b", "label": "a", "vote_1": 2}, ["vote_1"]),
        (
            {"prompt": "q", "completions": ["a", "b"], "ranks": [1, 2], "scores": [9, 1], "output": "a"},
            ["output", "scores"],
        ),
    ],
)
def test_a_field_that_another_one_says_already_is_unread(
    row: dict[str, Any], unread: list[str], auto: Callable[..., Any]
) -> None:
    assert auto(row).unread == dict.fromkeys(unread, 1)


def test_what_turns_hold_beside_role_and_text_is_unread_where_nobody_reads_it(auto: Callable[..., Any]) -> None:
    said = {"role": "assistant", "content": "a", "weight": 1, "lang": "en", "note": ""}
    asked = {"from": "human", "value": "q", "name": "n", "id": 5}
    read = auto({"conversations": [asked], "chosen": said, "rejected": "b", "history": [{**Q, "at": 1}, A]})
    assert read.unread == dict.fromkeys(
        ("conversations.name", "conversations.id", "history.at", "chosen.weight", "chosen.lang"), 1
    )
    assert auto({"dialog": [asked, said]}, kind="sft", columns={"messages": "dialog"}).unread == {
        "dialog.name": 1,
        "dialog.id": 1,
        "dialog.lang": 1,
    }


def test_what_lies_beside_a_mapped_part_is_unread_and_so_is_the_field_it_stands_for(auto: Callable[..., Any]) -> None:
    row = {
        "meta": {"ask": "q", "lang": "en", "note": ""},
        "prompt": "other",
        "answers": ["a", "b", "c"],
        "rejected": "b",
    }
    read = auto(row, columns={"prompt": "meta.ask", "chosen": "answers.0"})
    assert read.only == CHOSEN
    assert read.unread == {"prompt": 1, "meta.lang": 1, "answers.1": 1, "answers.2": 1}


@pytest.mark.parametrize(
    ("turn", "unread"),
    [
        ({"role": "assistant", "content": "a", "text": "b", "value": "c"}, ["text", "value"]),
        ({"role": "assistant", "content": "a", "reasoning": "r", "reasoning_content": "s"}, ["reasoning"]),
        ({"role": "assistant", "content": "a", "tool_calls": [{"name": "f"}], "function_call": {"name": "g"}},
         ["function_call"]),
        ({"from": "function_call", "value": {"name": "f"}, "reasoning": "r", "tool_calls": [1]}, ["tool_calls"]),
        ({"role": "assistant", "from": "gpt", "content": "a", "name": "n"}, ["from", "name"]),
    ],
)  # fmt: skip
def test_what_a_turn_says_twice_or_in_vain_is_named(turn: Any, unread: list[str], auto: Callable[..., Any]) -> None:
    asked = {"role": "user", "content": "q", "thinking": "t"}
    for row, kind, names in (
        ({"messages": [asked, turn]}, "sft", ("messages", "messages")),
        ({"prompt": [asked], "chosen": [turn], "rejected": "b"}, "preference", ("prompt", "chosen")),
        ({"prompt": [asked], "chosen": [[turn], [turn]], "rejected": "b"}, "preference", ("prompt", "chosen")),
    ):
        read = auto(row, kind=kind)
        assert read.unread == dict.fromkeys((f"{names[0]}.thinking", *(f"{names[1]}.{name}" for name in unread)), 1)


def test_a_call_keeps_the_reasoning_before_it(auto: Callable[..., Any]) -> None:
    call = {"from": "tool_call", "value": {"name": "f"}, "reasoning": "r"}
    found = auto({"conversations": [Q, call]}, kind="sft").only
    assert found.completion[0].keys() == {"role", "content", "reasoning_content", "tool_calls"}
    assert found.completion[0]["reasoning_content"] == "r"


def test_what_a_prompt_object_holds_beside_messages_is_named(auto: Callable[..., Any]) -> None:
    asked = {"messages": [{**Q, "at": 1}], "system": "be kind", "tools": [], "parallel_tool_calls": True}
    row = {"input": asked, "preferred_output": [A], "non_preferred_output": [B]}
    names = {"input.system": 1, "input.parallel_tool_calls": 1, "input.messages.at": 1}
    assert auto(row).unread == names
    tools = [{"name": "f"}]
    assert auto({**row, "input": {**asked, "tools": tools}}).unread == names
    assert auto({**row, "input": {**asked, "tools": tools}, "tools": tools}).unread == {**names, "input.tools": 1}


def test_a_column_of_reasoning_beside_an_answer_with_its_own_is_named(auto: Callable[..., Any]) -> None:
    row = {"prompt": "q", "completion": [{**A, "reasoning_content": "s"}], "reasoning": "r"}
    assert auto(row, kind="sft").unread == {"reasoning": 1}


def test_what_lies_beside_a_path_is_named_however_deep_it_is(auto: Callable[..., Any]) -> None:
    row = {
        "meta": {"a": {"b": "q", "c": 1, "d": None}, "e": 0},
        "summaries": [{"text": "a", "policy": "p"}, {"text": "b"}, {"text": "c"}],
    }
    columns = {"prompt": "meta.a.b", "chosen": "summaries.0.text", "rejected": "summaries.1.text"}
    assert auto(row, columns=columns).unread == dict.fromkeys(
        ("meta.a.c", "meta.e", "summaries.0.policy", "summaries.2"), 1
    )
