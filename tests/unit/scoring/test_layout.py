"""Which tokens go through the model, which are scored by whom, and how groups share micro-batches."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence

import pytest
import torch

from dpo_cli.data.tokens import TokenGroup
from dpo_cli.scoring.layout import (
    LAYOUTS,
    MIN_SHARED_TOKENS,
    Block,
    Layout,
    LayoutName,
    Run,
    lay_out,
    num_row_tokens,
    split_by_tokens,
)

Make = Callable[..., list[TokenGroup]]

TWO = TokenGroup("a", "a", (11, 12, 13), ((21, 22), (31,)))
MORE = TokenGroup("b", "b", (14,), ((41, 42, 43, 44, 45), (51, 52)))
BRANCH = tuple(range(60, 60 + MIN_SHARED_TOKENS))


def shared(*completions: Sequence[int], prompt: Sequence[int] = (11, 12, 13)) -> Layout:
    """One group of these completions in the shared layout."""
    return lay_out([TokenGroup("g", "g", tuple(prompt), tuple(map(tuple, completions)))], "shared")


def scores_by_completion(layout: Layout) -> list[list[tuple[int, int]]]:
    """For each completion its (predictor, target) pairs, in their order."""
    found: list[list[tuple[int, int]]] = [[] for _ in range(layout.num_groups * layout.num_completions)]
    for owner, index in zip(layout.owners_M.tolist(), layout.scored_M.tolist(), strict=True):
        found[owner].append((int(layout.predictors_N[index]), int(layout.targets_N[index])))
    return found


def runs_of(layout: Layout) -> list[tuple[int, int]]:
    (block,) = layout.blocks
    return [tuple(run) for run in block.runs]


# --- worked out by hand -------------------------------------------------------------------


def test_a_shared_row_is_each_prompt_once_and_then_its_completions_without_their_last_tokens() -> None:
    """Rows of the layout, by index.

    ==========  == == == == == == == == == ==
    index        0  1  2  3  4  5  6  7  8  9
    token       11 12 13 21 14 41 42 43 44 51
    position     0  1  2  3  0  1  2  3  4  1
    ==========  == == == == == == == == == ==

    22, 31, 45 and 52 are predicted by 21, 13, 44 and 51, and predict nothing.
    """
    layout = lay_out([TWO, MORE], "shared")
    assert layout.tokens_RT.tolist() == [[11, 12, 13, 21, 14, 41, 42, 43, 44, 51]]
    assert layout.positions_RT is not None
    assert layout.positions_RT.tolist() == [[0, 1, 2, 3, 0, 1, 2, 3, 4, 1]]
    assert layout.predictors_N.tolist() == [2, 3, 2, 4, 5, 6, 7, 8, 4, 9]
    assert layout.targets_N.tolist() == [21, 22, 31, 41, 42, 43, 44, 45, 51, 52]
    assert layout.scored_M.tolist() == list(range(10))
    assert layout.owners_M.tolist() == [0, 0, 1, 2, 2, 2, 2, 2, 3, 3]
    assert layout.blocks == (Block(0, (Run(3, -1), Run(1, 0))), Block(4, (Run(1, -1), Run(4, 0), Run(1, 0))))
    assert (layout.num_groups, layout.num_completions, layout.num_padding, layout.num_tokens) == (2, 2, 0, 10)


def test_padded_rows_are_a_text_each_with_padding_to_the_right() -> None:
    layout = lay_out([TWO, MORE], "padded")
    assert layout.tokens_RT.tolist() == [
        [11, 12, 13, 21, 0],
        [11, 12, 13, 0, 0],
        [14, 41, 42, 43, 44],
        [14, 51, 0, 0, 0],
    ]
    assert layout.positions_RT is None
    assert layout.blocks == ()
    assert layout.predictors_N.tolist() == [2, 3, 7, 10, 11, 12, 13, 14, 15, 16]
    assert layout.targets_N.tolist() == [21, 22, 31, 41, 42, 43, 44, 45, 51, 52]
    assert layout.scored_M.tolist() == list(range(10))
    assert layout.owners_M.tolist() == [0, 0, 1, 2, 2, 2, 2, 2, 3, 3]
    assert (layout.num_groups, layout.num_completions, layout.num_padding, layout.num_tokens) == (2, 2, 6, 20)


def test_completions_that_begin_alike_have_the_beginning_once() -> None:
    layout = shared((21, 22, 23, 24), (21, 22, 33))
    assert layout.tokens_RT.tolist() == [[11, 12, 13, 21, 22, 23]]
    assert runs_of(layout) == [(5, -1), (1, 0)]
    assert layout.targets_N.tolist() == [21, 22, 23, 24, 33]
    assert scores_by_completion(layout) == [[(2, 21), (3, 22), (4, 23), (5, 24)], [(2, 21), (3, 22), (4, 33)]]


def test_a_completion_that_another_one_goes_on_from_has_no_token_of_its_own() -> None:
    """22 ends the first completion but goes through the model: the second one's 23 is predicted by it."""
    layout = shared((21, 22), (21, 22, 23))
    assert layout.tokens_RT.tolist() == [[11, 12, 13, 21, 22]]
    assert runs_of(layout) == [(5, -1)]
    assert layout.targets_N.tolist() == [21, 22, 23]
    assert layout.scored_M.tolist() == [0, 1, 0, 1, 2]
    assert layout.owners_M.tolist() == [0, 0, 1, 1, 1]
    assert layout.predictors_N.tolist() == [2, 3, 4]


def test_some_completions_share_their_beginning_where_it_is_long_enough() -> None:
    """The tree of (b1 ... b8, 21, 22), (31, 32) and (b1 ... b8, 41, 42), first children first.

    ======  ======  ========  ===========================
    run     parent  index     what
    ======  ======  ========  ===========================
    0       -1      0 - 2     the prompt
    1       0       3 - 10    b1 ... b8, of two
    2       1       11        21, and 22 is not put in
    3       1       12        41, and 42 is not put in
    4       0       13        31, and 32 is not put in
    ======  ======  ========  ===========================
    """
    layout = shared((*BRANCH, 21, 22), (31, 32), (*BRANCH, 41, 42))
    assert layout.tokens_RT.tolist() == [[11, 12, 13, *BRANCH, 21, 41, 31]]
    assert runs_of(layout) == [(3, -1), (8, 0), (1, 1), (1, 1), (1, 0)]
    assert layout.positions_RT is not None
    assert layout.positions_RT.tolist() == [[*range(11), 11, 11, 3]]
    branch = [(2, 60), *((index, token) for index, token in zip(range(3, 10), BRANCH[1:], strict=True))]
    assert scores_by_completion(layout) == [
        [*branch, (10, 21), (11, 22)],
        [(2, 31), (13, 32)],
        [*branch, (10, 41), (12, 42)],
    ]


@pytest.mark.parametrize(
    ("num_alike", "num_tokens"), [(7, 3 + 8 + 8 + 1), (8, 3 + 8 + 1 + 1 + 1), (9, 3 + 9 + 1 + 1 + 1)]
)
def test_a_beginning_is_shared_by_some_from_eight_tokens_on(num_alike: int, num_tokens: int) -> None:
    assert MIN_SHARED_TOKENS == 8
    alike = tuple(range(60, 60 + num_alike))
    layout = shared((*alike, 21, 22), (*alike, 31, 32), (41, 42))
    assert layout.num_tokens == num_tokens


def test_branches_may_branch_again() -> None:
    inner = tuple(range(80, 90))
    layout = shared((*BRANCH, *inner, 21), (*BRANCH, *inner, 31), (*BRANCH, 41), (51,))
    assert layout.tokens_RT.tolist() == [[11, 12, 13, *BRANCH, *inner]]
    assert runs_of(layout) == [(3, -1), (8, 0), (10, 1)]
    ends = [completion[-1] for completion in scores_by_completion(layout)]
    assert ends == [(20, 21), (20, 31), (10, 41), (2, 51)]


# --- refusals and moves -------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYOUTS)
def test_groups_with_different_numbers_of_completions_do_not_mix(name: LayoutName) -> None:
    with pytest.raises(ValueError, match="same number of completions"):
        lay_out([TWO, TokenGroup("c", "c", (1,), ((2,),))], name)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_moves_to_a_device_whole(name: LayoutName) -> None:
    layout = lay_out([TWO, MORE], name)
    moved = layout.to(torch.device("meta"))
    tensors = {field: value for field, value in vars(moved).items() if isinstance(value, torch.Tensor)}
    assert {tensor.device.type for tensor in tensors.values()} == {"meta"}
    assert set(tensors) == {field for field, value in vars(layout).items() if isinstance(value, torch.Tensor)}
    assert (moved.num_groups, moved.num_completions, moved.blocks) == (2, 2, layout.blocks)
    assert layout.to(torch.device("cpu")) is layout


# --- micro-batches ------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_budget_for_all_makes_one_micro_batch(name: LayoutName, make_groups: Make) -> None:
    groups = make_groups(40)
    num_tokens = lay_out(groups, name).num_tokens
    assert len(split_by_tokens(groups, num_tokens, name)) == 1
    assert len(split_by_tokens(groups, num_tokens - 1, name)) == 2


def test_padded_groups_of_like_length_go_together(make_groups: Make) -> None:
    groups = make_groups(40)
    lengths = [[groups[index].longest for index in batch] for batch in split_by_tokens(groups, 64, "padded")]
    assert len(lengths) > 5
    assert all(max(batch) <= min(following) for batch, following in zip(lengths, lengths[1:], strict=False))


def test_micro_batches_without_padding_are_about_equal(make_groups: Make) -> None:
    groups = make_groups(300, prompt_lengths=(5, 40), completion_lengths=(5, 40))
    sizes = [num_row_tokens(group, "shared") for group in groups]
    loads = [sum(sizes[index] for index in batch) for batch in split_by_tokens(groups, 2000, "shared")]
    assert len(loads) > 5
    assert max(loads) - min(loads) <= max(sizes)


@pytest.mark.parametrize(("sizes", "each"), [((51, 60), 1), ((34, 38), 2), ((26, 28), 3)])
def test_groups_that_fill_a_micro_batch_badly_still_make_as_few_as_they_can(sizes: tuple[int, int], each: int) -> None:
    """Groups of more than 1/2, 1/3 or 1/4 of the budget: one, two or three go together, and no more."""
    rng = random.Random(0)
    groups = [TokenGroup(f"g{number}", f"g{number}", (1,) * rng.randint(*sizes), ((2,),)) for number in range(300)]
    batches = split_by_tokens(groups, 100, "shared")
    assert sorted(index for batch in batches for index in batch) == list(range(300))
    assert 300 // each <= len(batches) <= math.ceil(300 / each * 1.02)


@pytest.mark.parametrize("name", LAYOUTS)
def test_twenty_thousand_groups_are_split_in_seconds(name: LayoutName, make_groups: Make) -> None:
    groups = make_groups(20_000, prompt_lengths=(2, 6), completion_lengths=(1, 4))
    begin = time.process_time()
    batches = split_by_tokens(groups, 4096, name)
    assert time.process_time() - begin < 10
    assert sorted(index for batch in batches for index in batch) == list(range(20_000))
    loads = [sum(num_row_tokens(groups[index], name) for index in batch) for batch in batches]
    assert max(loads) <= 4096
    if name != "padded":
        assert len(batches) <= math.ceil(sum(loads) / 4096 * 1.01)
