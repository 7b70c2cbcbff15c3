"""Which tokens go through the model, which are scored, and how groups share micro-batches."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from dpo_cli.data.tokenise import TokenGroup
from dpo_cli.scoring.layout import pad_groups, split_by_tokens

TWO = TokenGroup("a", "a", (11, 12, 13), ((21, 22), (31,)))
MORE = TokenGroup("b", "b", (14,), ((41, 42, 43, 44, 45), (51, 52)))


def test_rows_are_right_padded_with_a_copy_of_the_prompt_each() -> None:
    layout = pad_groups([TWO, MORE])
    assert layout.tokens_RT.tolist() == [
        [11, 12, 13, 21, 22, 0],
        [11, 12, 13, 31, 0, 0],
        [14, 41, 42, 43, 44, 45],
        [14, 51, 52, 0, 0, 0],
    ]
    assert (layout.num_groups, layout.num_completions) == (2, 2)


def test_every_completion_token_is_scored_once_by_the_position_before_it() -> None:
    layout = pad_groups([TWO, MORE])
    flat = layout.tokens_RT.flatten()
    assert layout.targets_N.tolist() == [21, 22, 31, 41, 42, 43, 44, 45, 51, 52]
    assert flat[layout.predictors_N + 1].tolist() == layout.targets_N.tolist()
    assert flat[layout.predictors_N].tolist() == [13, 21, 13, 14, 41, 42, 43, 44, 14, 51]
    assert layout.rows_N.tolist() == [0, 0, 1, 2, 2, 2, 2, 2, 3, 3]


def test_groups_with_different_numbers_of_completions_do_not_mix() -> None:
    with pytest.raises(ValueError, match="same number of completions"):
        pad_groups([TWO, TokenGroup("c", "c", (1,), ((2,),))])


def test_a_layout_moves_to_a_device_whole() -> None:
    moved = pad_groups([TWO]).to(torch.device("meta"))
    tensors = (moved.tokens_RT, moved.predictors_N, moved.targets_N, moved.rows_N)
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert (moved.num_groups, moved.num_completions) == (1, 2)


@pytest.mark.parametrize("budget", [1, 30, 64, 300, 10_000])
@pytest.mark.parametrize("completions", [1, 2, 4])
def test_micro_batches_keep_every_group_once_and_the_budget(
    make_groups: Callable[..., list[TokenGroup]], budget: int, completions: int
) -> None:
    groups = make_groups(40, completions=completions)
    batches = split_by_tokens(groups, budget)
    assert sorted(index for batch in batches for index in batch) == list(range(40))
    for batch in batches:
        tokens = pad_groups([groups[index] for index in batch]).tokens_RT.numel()
        assert tokens <= budget or len(batch) == 1


def test_a_budget_for_all_makes_one_micro_batch(make_groups: Callable[..., list[TokenGroup]]) -> None:
    assert len(split_by_tokens(make_groups(40), 10_000)) == 1


def test_groups_of_like_length_go_together(make_groups: Callable[..., list[TokenGroup]]) -> None:
    groups = make_groups(40)
    lengths = [[groups[index].longest for index in batch] for batch in split_by_tokens(groups, 64)]
    assert all(max(batch) <= min(following) for batch, following in zip(lengths, lengths[1:], strict=False))


def test_who_shares_a_micro_batch_does_not_depend_on_the_order(make_groups: Callable[..., list[TokenGroup]]) -> None:
    groups = make_groups(40)
    backwards = groups[::-1]

    def ids(rows: list[TokenGroup]) -> list[list[str]]:
        return [[rows[index].id for index in batch] for batch in split_by_tokens(rows, 64)]

    assert ids(groups) == ids(backwards)


def test_no_groups_make_no_micro_batches() -> None:
    assert split_by_tokens([], 64) == []
