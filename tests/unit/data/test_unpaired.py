"""Single answers as token groups: pairs where a prompt has good and bad ones, and each beside another prompt's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from dpo_cli.data.tokenize import TokenTable
from dpo_cli.data.tokens import TokenGroup, completion_key
from dpo_cli.data.unpaired import beside_others, pairs_of

PATH = Path("data/preference/train.parquet")


def table_of(*rows: tuple[str, str, int]) -> TokenTable:
    """Rows as (prompt, side, number of tokens); a prompt is one token, an answer is its row's number repeated."""
    groups, sides = [], []
    for number, (prompt, side, length) in enumerate(rows):
        completions = tuple((number + 10 * place,) * length for place in range(1 + (side == "both")))
        groups.append(TokenGroup(f"row{number}", prompt, (ord(prompt),), completions))
        sides.append((2 * number, side))  # every second row of the file was left out
    return TokenTable(groups, [], path=PATH, sides=[] if all(side == "both" for _, side in sides) else sides)


def test_a_table_of_pairs_stays_as_it_is() -> None:
    table = table_of(("a", "both", 2), ("b", "both", 3))
    assert pairs_of(table) is table
    nothing, good = beside_others(table, 100)
    assert (nothing.groups, nothing.rejects, good) == ([], [], {})


def test_a_good_and_a_bad_answer_to_one_prompt_make_a_pair() -> None:
    """Prompt a has one good and two bad answers: two pairs with the ids of the bad ones. c and d have no other side."""
    table = table_of(
        ("a", "rejected", 2), ("b", "both", 1), ("a", "chosen", 3), ("c", "chosen", 1), ("a", "rejected", 4),
        ("d", "rejected", 5),
    )  # fmt: skip
    found = pairs_of(table)
    assert [(group.id, group.group, group.completions) for group in found.groups] == [
        ("row1", "b", ((1,), (11,))),
        ("row0", "a", ((2, 2, 2), (0, 0))),
        ("row4", "a", ((2, 2, 2), (4, 4, 4, 4))),
    ]
    assert found.of_rows == {"row0": ("row2", "row0"), "row4": ("row2", "row4")}
    assert [(reject["file"], reject["row"], reject["reason"]) for reject in found.rejects] == [
        (PATH.as_posix(), 6, "unpaired"),
        (PATH.as_posix(), 10, "unpaired"),
    ]
    pair = found.groups[1]
    assert pair.sizes == (1, 3, 2)
    assert pair.keys == [completion_key(pair.prompt, completion) for completion in pair.completions]


def test_an_answer_stands_beside_the_next_one_to_another_prompt() -> None:
    table = table_of(("a", "chosen", 1), ("a", "rejected", 2), ("b", "both", 3), ("c", "chosen", 4))
    found, good = beside_others(table, 100)
    assert [(group.id, group.prompt, group.completions) for group in found.groups] == [
        ("row0", (97,), ((0,), (2, 2, 2))),
        ("row1", (97,), ((1, 1), (2, 2, 2))),
        ("row2", (98,), ((2, 2, 2), (3, 3, 3, 3))),
        ("row2-", (98,), ((12, 12, 12), (3, 3, 3, 3))),
        ("row3", (99,), ((3, 3, 3, 3), (0,))),
    ]
    assert good == {"row0": True, "row1": False, "row2": True, "row2-": False, "row3": True}


@pytest.mark.parametrize(("max_length", "beside"), [(5, [1, 2, 0]), (4, [2, 2, 0])])
def test_what_is_too_long_behind_the_prompt_is_passed_over(max_length: int, beside: list[int]) -> None:
    found, _ = beside_others(table_of(("a", "chosen", 1), ("b", "chosen", 4), ("c", "rejected", 1)), max_length)
    assert [group.completions[1][0] for group in found.groups] == beside


def test_a_row_that_is_there_twice_has_the_same_one_beside_it() -> None:
    """What is known of a group goes by its id."""
    table = table_of(("a", "chosen", 1), ("b", "chosen", 2), ("a", "chosen", 1), ("c", "chosen", 3))
    table = replace(table, groups=[*table.groups[:2], table.groups[0], table.groups[3]])
    found, _ = beside_others(table, 100)
    assert [group.completions[1][0] for group in found.groups] == [1, 0, 1, 0]


def test_without_another_prompt_nothing_is_left() -> None:
    found, _ = beside_others(table_of(("a", "chosen", 1), ("a", "rejected", 2)), 100)
    assert found.groups == []
    assert [(reject["row"], reject["reason"]) for reject in found.rejects] == [
        (0, "no_other_prompt"),
        (2, "no_other_prompt"),
    ]
