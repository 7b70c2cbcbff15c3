"""Layouts and micro-batches hold for all trees of completions, not for examples alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from unittest import mock

from hypothesis import example, given, settings
from hypothesis import strategies as st

from dpo_cli.data.tokens import TokenGroup
from dpo_cli.scoring import layout as layout_module
from dpo_cli.scoring.layout import LAYOUTS, Layout, LayoutName, lay_out, num_row_tokens, split_by_tokens

PIECES = ((1,), (2,), (1,) * 7, (2,) * 8, tuple(range(1, 10)), (3, 1) * 6)
"""Completions made of a few of them share beginnings of many lengths, just below and above what is worth it."""

COMPLETION = st.lists(st.sampled_from(PIECES), min_size=1, max_size=4).map(lambda pieces: sum(pieces, ()))
PROMPT = st.lists(st.integers(0, 3), min_size=1, max_size=5).map(tuple)
NAME = st.sampled_from(LAYOUTS)


def name_groups(rows: Sequence[tuple[tuple[int, ...], list[tuple[int, ...]]]]) -> list[TokenGroup]:
    return [TokenGroup(f"row-{n}", f"row-{n}", prompt, tuple(sides)) for n, (prompt, sides) in enumerate(rows)]


def groups_of(completions: int, max_size: int = 4) -> st.SearchStrategy[list[TokenGroup]]:
    sides = st.lists(COMPLETION, min_size=completions, max_size=completions)
    return st.lists(st.tuples(PROMPT, sides), min_size=1, max_size=max_size).map(name_groups)


GROUPS = st.integers(1, 5).flatmap(groups_of)
MIXED = st.lists(st.tuples(PROMPT, st.lists(COMPLETION, min_size=1, max_size=4)), max_size=12).map(name_groups)


def texts_by_index(layout: Layout) -> dict[int, tuple[int, ...]]:
    """What each position of the flattened row stands behind, itself included: its text, read off the blocks."""
    tokens = layout.tokens_RT.flatten().tolist()
    if not layout.blocks:
        length = layout.tokens_RT.shape[1]
        return {i: tuple(tokens[i - i % length : i + 1]) for i in range(len(tokens))}
    texts = {}
    for block in layout.blocks:
        index = block.start
        whole: list[tuple[int, ...]] = []
        for run in block.runs:
            text = whole[run.parent] if run.parent >= 0 else ()
            for _ in range(run.length):
                text = (*text, tokens[index])
                texts[index] = text
                index += 1
            whole.append(text)
    return texts


ONE_TOKEN_FIRST = name_groups([((0,), [(2,), (*range(9), 1, 1), (*range(9), 3, 3)])])
"""A completion that puts no token in, before a branch that others share."""


@settings(max_examples=3 * settings().max_examples)
@example(ONE_TOKEN_FIRST, "shared")
@given(GROUPS, NAME)
def test_every_completion_token_is_scored_once_by_what_stands_before_it(
    groups: list[TokenGroup], name: LayoutName
) -> None:
    layout = lay_out(groups, name)
    texts = texts_by_index(layout)
    owed = [
        (owner, (*group.prompt, *completion[:place]), token)
        for owner, (group, completion) in enumerate((g, c) for g in groups for c in g.completions)
        for place, token in enumerate(completion)
    ]
    predictors, targets = layout.predictors_N.tolist(), layout.targets_N.tolist()
    found = [
        (owner, texts[predictors[index]], targets[index])
        for owner, index in zip(layout.owners_M.tolist(), layout.scored_M.tolist(), strict=True)
    ]
    assert found == owed
    assert set(layout.scored_M.tolist()) == set(range(len(targets)))


@given(GROUPS, NAME)
def test_every_position_of_a_row_is_in_a_block_and_knows_its_place_in_its_text(
    groups: list[TokenGroup], name: LayoutName
) -> None:
    layout = lay_out(groups, name)
    texts = texts_by_index(layout)
    assert sorted(texts) == list(range(layout.num_tokens))
    if layout.positions_RT is None:
        assert (name, layout.blocks) == ("padded", ())
    else:
        assert layout.positions_RT.shape == layout.tokens_RT.shape
        assert layout.positions_RT.flatten().tolist() == [len(texts[index]) - 1 for index in range(len(texts))]
        assert all(run.length > 0 for block in layout.blocks for run in block.runs)


@given(GROUPS)
def test_a_cheaper_layout_is_never_larger_and_sharing_never_computes_what_nobody_asks_for(
    groups: list[TokenGroup],
) -> None:
    shared, padded = (lay_out(groups, name) for name in LAYOUTS)
    assert shared.num_tokens <= padded.num_tokens - padded.num_padding
    assert shared.num_padding == 0
    texts = {(*group.prompt, *completion) for group in groups for completion in group.completions}
    beginnings = {text[:length] for text in texts for length in range(1, len(text))}
    assert set(texts_by_index(shared).values()) == beginnings


@given(GROUPS)
def test_where_every_token_is_worth_sharing_no_beginning_of_a_group_is_computed_twice(groups: list[TokenGroup]) -> None:
    """The tree is then the trie of the group: a token for each different beginning that has a next token."""
    with mock.patch.object(layout_module, "MIN_SHARED_TOKENS", 1):
        for group in groups:
            texts = [(*group.prompt, *completion) for completion in group.completions]
            beginnings = {text[:length] for text in texts for length in range(1, len(text))}
            found = list(texts_by_index(lay_out([group], "shared")).values())
            assert sorted(found) == sorted(beginnings)


@given(MIXED, st.integers(1, 300), NAME, st.randoms(use_true_random=False))
def test_micro_batches_hold_every_group_once_and_the_budget(
    groups: list[TokenGroup], budget: int, name: LayoutName, random: object
) -> None:
    batches = split_by_tokens(groups, budget, name)
    assert sorted(index for batch in batches for index in batch) == list(range(len(groups)))
    for batch in batches:
        layout = lay_out([groups[index] for index in batch], name)
        assert layout.num_tokens <= budget or len(batch) == 1
    shuffled = list(groups)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    other = split_by_tokens(shuffled, budget, name)
    assert [[groups[i].id for i in batch] for batch in batches] == [[shuffled[i].id for i in batch] for batch in other]


@given(st.lists(st.integers(1, 12), min_size=1, max_size=200), st.integers(100, 400))
def test_groups_much_smaller_than_the_budget_leave_hardly_any_room(sizes: list[int], budget: int) -> None:
    groups = name_groups([((1,) * size, [(2,)]) for size in sizes])
    least = math.ceil(sum(num_row_tokens(group, "shared") for group in groups) / budget)
    assert least <= len(split_by_tokens(groups, budget, "shared")) <= least + 1
