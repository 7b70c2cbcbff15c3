"""Where fields lie: under other names, at paths, nowhere; and how problems are told in the file's words."""

from __future__ import annotations

from typing import Any

import pytest

from dpo_cli.data.formats.base import Format, Reading
from dpo_cli.data.formats.columns import MISSING, look_up, plan_of
from dpo_cli.data.formats.instructions import ALPACA
from dpo_cli.data.formats.pairs import PAIRS
from dpo_cli.data.formats.rankings import KWISE
from dpo_cli.data.formats.two_outputs import TWO_OUTPUTS
from dpo_cli.data.problem import RowProblem


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


def test_fields_are_found_by_their_other_names() -> None:
    row = {"question": "q", "response_j": "a", "response_k": "b", "system_prompt": "s", "id": 1}
    found = plan(PAIRS, row)
    assert found.fits
    assert found.columns == {
        "prompt": "question",
        "chosen": "response_j",
        "rejected": "response_k",
        "system": "system_prompt",
    }
    renamed = found.rename(row)
    assert renamed == row | {"prompt": "q", "chosen": "a", "rejected": "b", "system": "s"}


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


def test_what_the_user_names_comes_before_everything() -> None:
    row = {"prompt": "p", "question": "q", "input": "c", "chosen": "a", "rejected": "b"}
    renamed = plan(PAIRS, row, prompt="question", chosen="rejected", rejected="chosen", input="").rename(row)
    assert (renamed["prompt"], renamed["chosen"], renamed["rejected"]) == ("q", "b", "a")
    assert "input" not in renamed


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
    ("row", "missing"),
    [
        ({"prompt": "q", "chosen": "a"}, ("rejected",)),
        ({"question": "q", "response_j": "a"}, ("rejected",)),
        ({"instruction": "q", "rejected": "a"}, ("chosen",)),
        ({"chosen": "a", "rejected": "b"}, ("prompt",)),
        ({}, ("prompt", "chosen", "rejected")),
    ],
)
def test_what_is_missing_is_named(row: dict[str, Any], missing: tuple[str, ...]) -> None:
    assert plan(PAIRS, row).missing == missing


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
