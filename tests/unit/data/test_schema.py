"""Canonical rows and their identity."""

from __future__ import annotations

import polars as pl

from dpo_cli.data.schema import (
    PREFERENCE_SCHEMA,
    SFT_SCHEMA,
    PreferenceExample,
    SftExample,
    assistant,
    content_id,
    text_of,
    user,
)

PAIR = PreferenceExample([user("q")], [assistant("good")], [assistant("bad")])


def test_an_id_is_of_the_content_alone() -> None:
    again = PreferenceExample([user("q")], [assistant("good")], [assistant("bad")], 0.9, 0.1)
    assert PAIR.row("a.json")["id"] == again.row("b.json")["id"]


def test_every_part_of_a_row_moves_its_id() -> None:
    others = [
        PreferenceExample([user("r")], [assistant("good")], [assistant("bad")]),
        PreferenceExample([user("q")], [assistant("better")], [assistant("bad")]),
        PreferenceExample([user("q")], [assistant("good")], [assistant("worse")]),
        PreferenceExample([user("q")], [assistant("bad")], [assistant("good")]),
        PreferenceExample([user("q"), assistant("good")], [], [assistant("bad")]),
    ]
    assert len({PAIR.row("a")["id"], *(other.row("a")["id"] for other in others)}) == 6


def test_the_order_of_a_messages_keys_does_not_count() -> None:
    assert content_id([{"role": "user", "content": "q"}]) == content_id([{"content": "q", "role": "user"}])


def test_the_group_is_the_prompts_id() -> None:
    other = PreferenceExample([user("q")], [assistant("x")], [assistant("y")])
    assert PAIR.row("a")["group"] == other.row("a")["group"] == content_id([user("q")])


def test_rows_have_the_columns_of_their_schema() -> None:
    rows = [(PAIR.row("a"), PREFERENCE_SCHEMA), (SftExample([user("q")], [assistant("a")]).row("a"), SFT_SCHEMA)]
    for row, schema in rows:
        assert list(row) == list(schema)
        assert pl.DataFrame([row], schema=schema).to_dicts() == [row]


def test_the_text_of_messages_is_all_their_contents() -> None:
    assert text_of([user("a"), assistant("b")]) == "a\nb"
    assert text_of([]) == ""
