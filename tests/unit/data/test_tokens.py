"""Token groups, in hand and in arrays on disk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_cli.core.artifacts import digest_bytes
from dpo_cli.data.tokens import TokenGroup, TokenWriter, completion_key, joined_group, stored_groups

IDS = st.lists(st.integers(0, 2**31 - 1), max_size=6).map(tuple)


def stored(folder: Path, groups: list[TokenGroup]) -> list[TokenGroup]:
    writer = TokenWriter(folder)
    for group in groups:
        writer.add(group)
    writer.close()
    return stored_groups(folder)


@given(st.lists(st.tuples(IDS, st.lists(IDS, min_size=1, max_size=4)), max_size=6))
def test_a_store_gives_back_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[tuple[int, ...], list[tuple[int, ...]]]]
) -> None:
    groups = [TokenGroup(f"row {n}", f"p{n % 2}", prompt, tuple(texts)) for n, (prompt, texts) in enumerate(rows)]
    found = stored(tmp_path_factory.mktemp("store"), groups)
    assert len(found) == len(groups)
    assert list(found) == groups
    assert found[1:] == groups[1:]
    for ours, group in zip(found, groups, strict=True):
        assert (ours.sizes, ours.keys, ours.longest) == (group.sizes, group.keys, group.longest)
        assert hash(ours) == hash(group)
        assert all(type(token) is int for token in ours.prompt)


def test_the_longest_side_counts() -> None:
    assert TokenGroup("a", "a", (1, 2), ((1,), (1, 2, 3))).longest == 5


def test_the_key_is_a_hash_of_the_ids_as_int32() -> None:
    """Written out once more: a cache of another day must be found by it."""
    prompt, completion = (np.array(ids, "<i4").tobytes() for ids in ((1, 70_000), (5,)))
    assert completion_key((1, 70_000), (5,)) == digest_bytes(prompt, completion)
    assert completion_key((1, 70_000), (5,)) == "fcba5d3b9198fb62ee0c2d13a6c2ea70"


def test_tokens_are_mapped_and_not_held(tmp_path: Path) -> None:
    store = stored(tmp_path, [TokenGroup("a", "b", (1, 2), ((3,), (4, 5)))])
    tokens = np.memmap(tmp_path / "tokens.i32", np.int32, "r+")
    assert tokens.tolist() == [1, 2, 3, 4, 5]
    tokens[4] = 7
    tokens.flush()
    assert store[0].completions == ((3,), (4, 7))


def test_joined_groups_are_those_completions(make_groups: Callable[..., list[TokenGroup]]) -> None:
    one, other = make_groups(2, completions=3)
    other = replace(other, prompt=one.prompt)
    found = joined_group([(one, 2), (other, 0)])
    plain = TokenGroup(found.id, found.id, one.prompt, (one.completions[2], other.completions[0]))
    assert found == plain
    assert (found.sizes, found.keys) == (plain.sizes, plain.keys)
