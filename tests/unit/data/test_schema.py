"""Canonical rows and their identity."""

from __future__ import annotations

import hashlib

import pyarrow as pa
import pytest

from dpo_cli.core.artifacts import digest_json
from dpo_cli.data.schema import (
    MESSAGES,
    PREFERENCE_SCHEMA,
    SFT_SCHEMA,
    PreferenceExample,
    RankingExample,
    SftExample,
    assistant,
    content_id,
    from_table,
    joint_id,
    split_position,
    table_of,
    text_of,
    user,
    with_tools,
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


def test_the_group_is_the_prompts_id() -> None:
    other = PreferenceExample([user("q")], [assistant("x")], [assistant("y")])
    assert PAIR.row("a")["group"] == other.row("a")["group"] == content_id([user("q")])


def test_rows_have_the_columns_of_their_schema() -> None:
    rows = [(PAIR.row("a"), PREFERENCE_SCHEMA), (SftExample([user("q")], [assistant("a")]).row("a"), SFT_SCHEMA)]
    for row, schema in rows:
        assert list(row) == schema.names
        assert table_of([row], schema).to_pylist() == [row]


def test_what_a_message_has_beside_its_text_moves_its_id_and_nulls_do_not() -> None:
    plain, called = assistant("a"), {**assistant("a"), "tool_calls": "[]"}
    told = from_table({"prompt": [user("q")], "completion": [{**called, "reasoning_content": None}], "tools": None})
    assert told == {"prompt": [user("q")], "completion": [called]}
    ids = {content_id([plain]), content_id([called]), content_id([{**plain, "reasoning_content": "[]"}])}
    assert len(ids) == 3
    assert content_id([called]) == digest_json([[["assistant", "a", {"tool_calls": "[]"}]]])


def test_tools_belong_to_the_prompt_and_not_to_its_opening() -> None:
    prompt = with_tools([user("q")], "[5]")
    assert from_table({"prompt": [user("q")], "tools": "[5]"}) == {"prompt": prompt}
    assert content_id(prompt) != content_id([user("q")])
    assert split_position(prompt) == split_position([user("q")])


def test_the_text_of_an_answer_has_its_reasoning_and_its_calls() -> None:
    assert text_of([{**assistant(""), "reasoning_content": "r", "tool_calls": "[1]"}]) == "r\n[1]"


def test_a_table_has_room_for_calls_where_a_row_has_them() -> None:
    """Also in lists of structs, as the rows of score have their answers."""
    called = {**assistant("a"), "tool_calls": "[]"}
    nested = pa.schema([("prompt", MESSAGES), ("answers", pa.list_(pa.struct([("messages", MESSAGES)])))])
    plain, full = ({"prompt": [user("q")], "answers": [{"messages": [turn]}]} for turn in (assistant("a"), called))
    assert table_of([plain], nested).schema == nested
    (row,) = table_of([plain | full | {"prompt": with_tools([user("q")], "[5]")}], nested).to_pylist()
    assert from_table(row) == {"prompt": with_tools([user("q")], "[5]"), "answers": [{"messages": [called]}]}


def test_the_text_of_messages_is_all_their_contents() -> None:
    assert text_of([user("a"), assistant("b")]) == "a\nb"
    assert text_of([]) == ""


def test_a_parts_id_is_the_digest_of_its_json() -> None:
    """The fast way agrees with the plain one, whatever must be escaped."""
    texts = ["", 'a"b\\c/', "line\nend\r\t", "\x00\x1f\x7f", "中文 😀 \u2028", "\b\f"]
    for text in texts:
        assert content_id([user(text), assistant("a")]) == digest_json([[["user", text], ["assistant", "a"]]])


def test_the_id_of_several_parts_is_one_of_theirs_in_order() -> None:
    parts = [[user("q")], [assistant("good")], [assistant("bad")]]
    assert content_id(*parts) == joint_id(*map(content_id, parts)) == PAIR.row("a")["id"]
    assert content_id(*parts) != content_id(*reversed(parts))


def test_half_a_surrogate_pair_has_no_id() -> None:
    with pytest.raises(UnicodeEncodeError):
        content_id([user("\ud800")])


RANKING = RankingExample([user("q")], [[assistant(text)] for text in "abcd"], [1, 2, 2, 3])


@pytest.mark.parametrize(
    ("scheme", "pairs"),
    [
        ("all", [(0, 1), (0, 2), (0, 3), (1, 3), (2, 3)]),
        ("adjacent", [(0, 1), (0, 2), (1, 3), (2, 3)]),
        ("best_vs_worst", [(0, 3)]),
    ],
)
def test_a_ranking_makes_the_pairs_of_a_scheme(scheme: str, pairs: list[tuple[int, int]]) -> None:
    assert RANKING.pairs(scheme) == pairs


def test_verdicts_go_before_ranks_where_all_pairs_are_asked_for() -> None:
    cycle = RankingExample(
        [user("q")], [[assistant(text)] for text in "abc"], [1, 1, 1], None, [(0, 1), (1, 2), (2, 0)]
    )
    assert cycle.pairs("all") == [(0, 1), (1, 2), (2, 0)]
    assert cycle.pairs("adjacent") == cycle.pairs("best_vs_worst") == []


def test_a_pair_that_a_verdict_decides_the_other_way_is_none() -> None:
    """a beats b, c and loses to d; b and c beat d: a is best and d is worst, yet d beat a."""
    answers = [[assistant(text)] for text in "abcd"]
    odd = RankingExample([user("q")], answers, [1, 2, 3, 4], None, [(0, 1), (0, 2), (1, 2), (1, 3), (2, 3), (3, 0)])
    assert odd.pairs("best_vs_worst") == []
    assert odd.pairs("adjacent") == [(0, 1), (1, 2), (2, 3)]


def test_a_pair_of_a_ranking_has_its_scores() -> None:
    scored = RankingExample([user("q")], [[assistant("a")], [assistant("b")]], [1, 2], [0.9, 0.1])
    assert scored.pair(0, 1) == PreferenceExample([user("q")], [assistant("a")], [assistant("b")], 0.9, 0.1)
    assert RANKING.pair(0, 3) == PreferenceExample([user("q")], [assistant("a")], [assistant("d")])


# --- the split ------------------------------------------------------------------------------


def test_positions_lie_between_0_and_1_and_are_uniform() -> None:
    positions = sorted(split_position([user(f"question {number}")]) for number in range(4000))
    assert 0 <= positions[0]
    assert positions[-1] < 1
    # Kolmogorov-Smirnov: 1.95 / sqrt(4000) is passed by chance once in a thousand times
    assert max(abs(position - index / 4000) for index, position in enumerate(positions)) < 0.031


def test_a_position_never_changes() -> None:
    """Every split that was ever made with this package stands on it."""
    text = b'[[["user","question 0"]]]'
    digest = hashlib.blake2b(len(text).to_bytes(8, "little") + text, digest_size=16).digest()
    assert split_position([user("question 0")]) == int.from_bytes(digest[:8], "big") / 2**64
