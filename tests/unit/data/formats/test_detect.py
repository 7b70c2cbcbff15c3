"""Which format a row has and where its fields lie: found, explained, and refused where it would be a guess."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from ruamel.yaml import YAML

from dpo_cli.core.errors import ParamsError
from dpo_cli.data.formats import PREFERENCE_FORMATS
from dpo_cli.data.formats.base import Format, Reading
from dpo_cli.data.formats.columns import MISSING, look_up, plan_of
from dpo_cli.data.formats.detect import RowReader, UnknownFormatError
from dpo_cli.data.formats.instructions import ALPACA
from dpo_cli.data.formats.pairs import PAIRS
from dpo_cli.data.formats.rankings import KWISE
from dpo_cli.data.formats.two_outputs import TWO_OUTPUTS
from dpo_cli.data.problem import RowProblem
from dpo_cli.data.schema import assistant, user

# --- columns -----------------------------------------------------------------------------------


def plan(fmt: Format[Any], row: dict[str, Any], **named: Any) -> Any:
    return plan_of(fmt, tuple(row), named, Reading())


ROW = {"a": {"b": {"c": 1}, "l": [{"x": 2}, [3]]}, "a.b": 4, "empty": None}


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("a.b.c", 1),
        ("a.b", 4),  # a key with a dot comes before a path
        ("a.l.0.x", 2),
        ("a.l.1.0", 3),
        ("empty", None),
        ("b", MISSING),
        ("a.c", MISSING),
        ("a.l.2", MISSING),
        ("a.l.-1", MISSING),
        ("a.l.x", MISSING),
        ("a.b.c.d", MISSING),
        ("empty.x", MISSING),
        ("", MISSING),
    ],
)
def test_a_path_goes_through_objects_and_lists(path: str, value: Any) -> None:
    assert look_up(ROW, path) == value


def test_a_fields_own_name_comes_before_others() -> None:
    row = {"prompt": "q", "question": "other", "chosen": "a", "better": "other", "rejected": "b"}
    assert plan(PAIRS, row).columns == {}


def test_a_key_is_one_field_only() -> None:
    row = {"input": "q", "context": "c", "chosen": "a", "rejected": "b"}
    renamed = plan(PAIRS, row).rename(row)
    assert (renamed["prompt"], renamed["input"]) == ("q", "c")
    row = {"input": "q", "chosen": "a", "rejected": "b"}
    assert "input" not in plan(PAIRS, row).rename(row)
    row = {"instruction": "i", "input": "c", "chosen": "a", "rejected": "b"}
    assert plan(PAIRS, row).columns == {}
    row = {"history": "h", "human_ref_A": "a", "human_ref_B": "b", "labels": 1}
    renamed = plan(TWO_OUTPUTS, row).rename(row)
    assert renamed["prompt"] == "h"
    assert "history" not in renamed


def test_a_named_field_that_is_not_there_is_missed_only_where_it_is_needed() -> None:
    row = {"q": "q", "chosen": "a", "rejected": "b", "system": "s"}
    found = plan(PAIRS, row, prompt="q", system="meta.system")
    assert "system" not in found.rename(row)
    with pytest.raises(RowProblem, match="has no 'q', which stands for prompt"):
        found.rename({"chosen": "a", "rejected": "b"})


def test_a_list_of_paths_makes_a_list() -> None:
    row = {"prompt": "q", "a": {"t": "x"}, "b": {"t": "y"}}
    found = plan(KWISE, row, completions=["a.t", "b.t"], scores=["a.s", "b.s"])
    assert found.rename(row)["completions"] == ["x", "y"]
    assert found.rename({"prompt": "q", "b": {"t": "y"}})["completions"] == [None, "y"]
    with pytest.raises(RowProblem, match=r"has no 'a\.t \+ b\.t', which stands for completions"):
        found.rename({"prompt": "q"})


def test_keys_that_may_all_be_a_field_are_rivals() -> None:
    assert plan(ALPACA, {"instruction": "i", "output": "o", "response": "r"}).fits
    row = {"question": "q", "query": "r", "chosen": "a", "rejected": "b"}
    assert plan(PAIRS, row).rivals == {"prompt": ("question", "query")}
    assert plan(PAIRS, row, prompt="query").fits
    row = {"question": "q", "instruction": "i", "chosen": "a", "rejected": "b"}
    assert plan(PAIRS, row).rivals == {"prompt": ("question", "instruction")}
    assert plan(PAIRS, {"prompt": "p", "instruction": "i", "chosen": "a", "rejected": "b"}).fits


@pytest.mark.parametrize(
    ("fmt", "row", "named", "reason", "detail"),
    [
        (PAIRS, {"question": None, "chosen": "a", "rejected": "b"}, {}, "missing_field", "has no 'question'"),
        (PAIRS, {"question": "q", "response_j": 5, "response_k": "b"}, {}, "not_text", "'response_j' must be text"),
        (PAIRS, {"question": [5], "chosen": "a", "rejected": "b"}, {}, "bad_message", "question[0] must be a message"),
        (PAIRS, {"prompt": "q", "chosen": "a", "rejected": None}, {}, "missing_field", "has no 'rejected', nor worse"),
        (
            KWISE,
            {"prompt": "q", "one": "a", "two": 5},
            {"completions": ["one", "two"], "output": ""},
            "not_text",
            "'two' must be text",
        ),
        (
            PAIRS,
            {"p": {"id": 5}, "chosen": "a", "rejected": "b"},
            {"prompt": "p"},
            "bad_message",
            "'p' is an object with id; say in columns",
        ),
    ],
)
def test_problems_are_told_in_the_words_of_the_file(
    fmt: Format[Any], row: dict[str, Any], named: dict[str, Any], reason: str, detail: str
) -> None:
    found = plan(fmt, row, **named)
    with pytest.raises(RowProblem) as caught:
        fmt.read(found.rename(row), found.reading)
    problem = found.named(caught.value)
    assert problem.reason == reason
    assert problem.detail.startswith(detail)


# --- detect ------------------------------------------------------------------------------------


Q, A, B = user("q"), assistant("a"), assistant("b")


PAIR = {"prompt": "q", "chosen": "a", "rejected": "b"}


def reader(name: str = "auto", columns: dict[str, Any] | None = None, **reading: Any) -> RowReader:
    return RowReader(PREFERENCE_FORMATS, name, columns or {}, Reading(**reading))


def test_each_row_has_its_own_format(auto: Callable[..., Any]) -> None:
    rows = [PAIR, {"conversations": [Q], "chosen": A, "rejected": B}, {"question": "q", "better": "a", "worse": "b"}]
    read = auto(*rows)
    assert read.formats == ["pairs", "sharegpt", "pairs"]
    assert read.why == (
        "pairs: 2 of the first 3 rows have prompt (or instruction), chosen and rejected"
        " (prompt <- question, chosen <- better, rejected <- worse);"
        " sharegpt: 1 of the first 3 rows have conversations (or messages) and two answers, chosen and rejected"
    )


def test_rows_that_fit_no_format_are_read_as_the_most_frequent_one(auto: Callable[..., Any]) -> None:
    rows = [{"question": "q", "response_j": "a", "response_k": "b"}] * 3
    odd = [
        {"question": "q", "response_j": "a"},
        {"x": 1},
        5,
        {"question": "q", "query": "r", "better": "a", "worse": "b"},
    ]
    read = auto(*rows, *odd)
    assert read.why.endswith("4 of them fit no format and are read as pairs")
    assert [(problem.reason, problem.detail) for problem in read.found[3:]] == [
        (
            "missing_field",
            "has no 'rejected', nor worse, dispreferred, response_k, rejected_response, non_preferred_output",
        ),
        ("missing_field", "has no 'prompt', nor question, query, input"),
        ("not_an_object", "must be a JSON object, got a number"),
        ("two_fields", "question and query may both be prompt; say which in columns"),
    ]


def test_a_named_format_reads_every_row_as_it_is() -> None:
    named = reader("implicit")
    fmt, found = named.read({"source": "some words", "chosen": "The a", "rejected": "The b"})
    assert (fmt.name, found.prompt) == ("implicit", [user("The")])
    with pytest.raises(RowProblem, match="has no 'rejected'"):
        named.read({"prompt": "q", "chosen": "a"})
    with pytest.raises(RowProblem, match="has no 'conversations', nor messages"):
        reader("sharegpt").read(PAIR)


def test_a_reader_that_is_told_the_fallback_reads_as_the_one_that_found_it() -> None:
    first = reader()
    first.detect("f", [PAIR])
    second = reader()
    second.use_fallback(first.fallback)
    for row in (PAIR, {"chosen": "The a", "rejected": "The b"}, {"prompt": "q"}, 5, {}):
        results = []
        for one in (first, second):
            try:
                results.append(one.read(row))  # type: ignore[arg-type]
            except RowProblem as problem:
                results.append((problem.reason, problem.detail))
        assert results[0] == results[1]


def test_columns_say_where_fields_lie(auto: Callable[..., Any]) -> None:
    row = {"meta": {"ask": "q"}, "answers": [{"t": "a"}, {"t": "b"}], "s": "be kind"}
    columns = {"prompt": "meta.ask", "chosen": "answers.0.t", "rejected": "answers.1.t", "system": "s"}
    read = auto(row, columns=columns)
    assert read.only.prompt == [{"role": "system", "content": "be kind"}, Q]
    for move in ("prompt <- meta.ask", "chosen <- answers.0.t", "rejected <- answers.1.t", "system <- s"):
        assert move in read.why
    found = auto(row, {"answers": []}, columns=columns).found[1]
    assert (found.reason, found.detail) == ("missing_field", "has no 'meta.ask', which stands for prompt")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"promt": "q"}, r"columns\.promt is not a field; did you mean prompt\?"),
        ({"zzz": "q"}, r"columns\.zzz is not a field; there are chosen, "),
    ],
)
def test_a_field_that_no_format_has_is_refused(columns: dict[str, str], message: str) -> None:
    with pytest.raises(ParamsError, match=message):
        reader(columns=columns)
    with pytest.raises(ParamsError, match="not a field of the format pairs; "):
        reader("pairs", {"first": "output_1"})


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"prompt": "qestion"},
            "columns.prompt names 'qestion', which none of the first 1 rows has; did you mean question?",
        ),
        ({"system": "meta.sytem"}, "did you mean meta.system?"),
        ({"history": "zzz"}, "columns.history names 'zzz', which none of the first 1 rows has"),
    ],
)
def test_a_path_that_no_row_has_is_refused(columns: dict[str, str], message: str, auto: Callable[..., Any]) -> None:
    row = {"question": "q", "chosen": "a", "rejected": "b", "meta": {"system": "s"}}
    with pytest.raises(UnknownFormatError) as caught:
        auto(row, columns=columns)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "f: it has no rows"),
        ([5, "a"], "f: its rows must be JSON objects, got a number"),
        ([["q", "a", "b"]], "f: its rows must be JSON objects, got a list of 3"),
        (['{"prompt": "q"}'], "got text; they are such objects as text, so decode them once more (json.loads)"),
        (
            [{"prompt": ["q", "r"], "chosen": ["a", "b"], "rejected": ["c", "d"]}],
            "it is one object with a list for each",
        ),
        ([{"prompt": {"0": "q"}, "chosen": {"0": "a"}}], "it is one object with an object for each column; write one"),
        (
            [{"columns": ["prompt"], "index": [0], "data": [["q"]]}],
            "it is one object with a table in it, columns and data",
        ),
        (
            [{"id1": {"prompt": "q", "chosen": "a"}, "id2": {"prompt": "r", "chosen": "b"}}],
            "a row under each name; write",
        ),
        ([{}], "its first row has no fields"),
        ([{"prompt": "q", "chosen": "a"}], "pairs comes next to it, which needs rejected, too"),
        (
            [{"prompt": "q", "response_1": "a", "response_2": "b"}],
            "two_outputs comes next to it, which needs label, too",
        ),
        ([{"question": "q", "query": "r", "chosen": "a", "rejected": "b"}], "as pairs, question and query may both be"),
        (
            [{"conversations": ["q"], "chosen": "a", "rejected": "b"}],
            "read as sharegpt: conversations[0] must be a message",
        ),
        ([{"data": [PAIR]}], "if the rows are nested, set records: data"),
        ([{"prompt": "q", "completion": "a", "label": True}], "label calls good or bad (unpaired, as KTO takes them)"),
        ([{"messages": [Q, A], "label": False}], "the other losses need two answers to the same prompt"),
        ([{"prompt": "q", "response": "a", "thumbs": "up"}], "say format: unpaired and columns: {label: thumbs}; the"),
    ],
)
def test_a_file_of_no_known_format_is_refused_with_what_to_do(rows: list[Any], message: str) -> None:
    with pytest.raises(UnknownFormatError) as caught:
        reader().detect("f", rows)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "row", "columns", "advice"),
    [
        (
            "sft",
            {"en_instruction": "q", "en_input": "i", "en_output": "a"},
            {},
            "instruction: en_instruction, input: en_input, output: en_output",
        ),
        ("sft", {"Frage": "q", "model_answer": "a"}, {"prompt": "Frage"}, "prompt: Frage, completion: model_answer"),
        ("sft", {"x": "q", "y": "a"}, {}, "prompt: ..., completion: ..."),
        (
            "preference",
            {"user_prompt": "q", "chosen_text": "a", "rejected_text": "b"},
            {},
            "prompt: user_prompt, chosen: chosen_text, rejected: rejected_text",
        ),
        ("preference", {"x": "q", "y": "a"}, {"chosen": "y"}, "prompt: ..., chosen: y, rejected: ..."),
        ("preference", {"prompt": "q", "response_a": "a", "response_b": "b", "best": "response_b"}, {}, "label: best"),
        ("preference", {"ask_prompt": "q", "answer_a": "a", "answer_b": "b", "verdict": "B"}, {},
         "prompt: ask_prompt, label: verdict"),
        ("preference", {"prompt": "q", "y_w": "some words", "y_l": "others"}, {}, "chosen: ..., rejected: ..."),
        ("preference", {"prompt": "q", "preferred_response": "a", "rejected_response": "b"}, {},
         "chosen: preferred_response"),
        ("preference", {"conversations": [Q], "good": "a", "bad": "b"}, {}, "chosen: good, rejected: bad"),
        ("preference", {"prompt": "q"}, {}, "chosen: ..., rejected: ..."),
        *(
            ("preference", {"question": "q", other: "r", "chosen": "a", "rejected": "b"}, {}, "prompt: question")
            for other in ("query", "instruction")
        ),
        ("preference", {"prompt_en": "q", "answers_en": ["a", "b"], "scores_en": [1, 2]}, {},
         "prompt: prompt_en, completions: answers_en, scores: scores_en"),
        ("preference", {"the prompt": "q", "#1 chosen": "a", "rejected, all": "b"}, {},
         "prompt: the prompt, chosen: '#1 chosen', rejected: 'rejected, all'"),
        *(
            (kind, {"instruction_en": "q", "input_en": "i", "chosen_en": "a", "rejected_en": "b"}, {},
             "instruction: instruction_en, input: input_en, chosen: chosen_en, rejected: rejected_en")
            for kind in ("preference", "sft")
        ),
        ("sft", {"instruction_en": "q", "context_en": "i", "response_en": "a"}, {},
         "instruction: instruction_en, input: context_en, output: response_en"),
        ("sft", {"input_en": "q", "output_en": "a"}, {}, "prompt: input_en, completion: output_en"),
    ],
)  # fmt: skip
def test_an_unknown_file_is_told_columns_that_lose_no_field_of_it(
    kind: str, row: dict[str, Any], columns: dict[str, Any], advice: str, auto: Callable[..., Any]
) -> None:
    """Followed word by word the advice works, where it has no dots, and none of it says what is known already."""
    with pytest.raises(UnknownFormatError) as caught:
        auto(row, kind=kind, columns=columns)
    assert f"such as columns: {{{advice}}}" in str(caught.value)
    said = YAML(typ="safe").load(f"{{{advice}}}")
    assert not any(name == column for name, column in said.items())
    if "..." not in advice:
        read = auto(row, kind=kind, columns=said)
        assert not isinstance(read.found[0], RowProblem)
        assert read.unread.keys() <= {"query", "instruction"}


@pytest.mark.parametrize(
    ("kind", "row", "problem"),
    [
        ("preference", {"prompt": "q", "completions": [{"text": "a", "label": 1}, {"text": "b"}]}, "has no 'ranks', "),
        ("sft", {"conversations": [Q]}, "the conversation must end with an answer, it ends with a turn of the user"),
    ],
)
def test_where_no_column_would_help_none_is_advised(
    kind: str, row: dict[str, Any], problem: str, auto: Callable[..., Any]
) -> None:
    with pytest.raises(UnknownFormatError) as caught:
        auto(row, kind=kind)
    assert problem in str(caught.value)
    assert "say which field is which" not in str(caught.value)


def test_a_doubt_offers_no_column_that_is_a_side_already(auto: Callable[..., Any]) -> None:
    row = {"better text": "some words and more", "worse text": "some words and less", "question text": "which words?"}
    with pytest.raises(UnknownFormatError) as caught:
        auto(row, columns={"chosen": "better text", "rejected": "worse text"})
    assert "there is no field known as the prompt, and question text may be it" in str(caught.value)


def test_rows_whose_keys_are_data_are_read_without_filling_the_memory() -> None:
    found = reader()
    for number in range(2500):
        assert found.read({**PAIR, f"key {number}": 1})[0].name == "pairs"
    assert len(found._plans) == 2000


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {
            "conversations": [{"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "a"},
            "rejected": {"from": "gpt", "value": "b"},
        },
        {"input": "q", "output_1": "a", "output_2": "b", "label": 1},
        {"prompt": "q", "completions": ["a", "b"], "ranks": [1, 2]},
        {"chosen": [Q, A], "rejected": [Q, B]},
    ],
)
def test_system_and_history_in_fields_of_their_own_are_part_of_the_prompt(
    row: dict[str, Any], auto: Callable[..., Any]
) -> None:
    prompt = auto({**row, "system": "s", "history": [["u", "v"]]}).only.prompt
    assert [message["content"] for message in prompt] == ["s", "u", "v", "q"]
