"""Losses and layouts hold for all numbers, not for examples alone."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dpo_cli.data.tokenise import TokenGroup
from dpo_cli.objectives.pairwise import pairwise_loss
from dpo_cli.reference.cache import completion_key
from dpo_cli.scoring.layout import pad_groups, split_by_tokens

LOGP = st.floats(-500, 0)
PAIR = st.tuples(LOGP, LOGP)
TOKENS = st.lists(st.integers(0, 9), min_size=1, max_size=12).map(tuple)
GROUPS = st.lists(
    st.builds(
        lambda prompt, chosen, rejected: (prompt, (chosen, rejected)),
        TOKENS,
        TOKENS,
        TOKENS,
    ),
    min_size=1,
    max_size=12,
).map(lambda rows: [TokenGroup(f"row-{n}", f"row-{n}", prompt, sides) for n, (prompt, sides) in enumerate(rows)])


def loss_of(name: str, policy: tuple[float, float], reference: tuple[float, float], beta: float = 0.1) -> float:
    def tensor(values: tuple[float, float]) -> torch.Tensor:
        return torch.tensor([values], dtype=torch.float64)

    smoothing = 0.1 if name == "cdpo" else 0.0
    return pairwise_loss(name, beta, smoothing)(tensor(policy), tensor(reference), torch.ones(1, 2)).item()


@given(PAIR, st.floats(0.01, 5))
def test_a_policy_that_is_its_reference_has_loss_ln_2(logps: tuple[float, float], beta: float) -> None:
    assert loss_of("sigmoid", logps, logps, beta) == pytest.approx(math.log(2), abs=1e-12)
    assert loss_of("cdpo", logps, logps, beta) == pytest.approx(math.log(2), abs=1e-12)


@given(PAIR, PAIR, st.floats(-100, 100))
@pytest.mark.parametrize("name", ["sigmoid", "cdpo", "ipo", "hinge"])
def test_a_shift_of_both_answers_changes_nothing(
    name: str, policy: tuple[float, float], reference: tuple[float, float], shift: float
) -> None:
    """Lemma 1 of the paper: only the difference of two rewards counts, so f(x) added to both is not seen."""
    moved = (policy[0] + shift, policy[1] + shift)
    assert loss_of(name, moved, reference) == pytest.approx(loss_of(name, policy, reference), rel=1e-9, abs=1e-9)


@given(PAIR, PAIR)
def test_the_two_orders_of_a_pair_are_probabilities_that_add_to_one(
    policy: tuple[float, float], reference: tuple[float, float]
) -> None:
    """Bradley-Terry: exp(-loss) is the probability of the preference, and one of the two orders must hold."""
    forward = loss_of("sigmoid", policy, reference)
    backward = loss_of("sigmoid", policy[::-1], reference[::-1])
    assert math.exp(-forward) + math.exp(-backward) == pytest.approx(1, abs=1e-12)


@given(PAIR, PAIR, st.floats(0.001, 50))
@pytest.mark.parametrize("name", ["sigmoid", "hinge"])
def test_a_likelier_chosen_answer_never_costs_more(
    name: str, policy: tuple[float, float], reference: tuple[float, float], gain: float
) -> None:
    assert loss_of(name, (policy[0] + gain, policy[1]), reference) <= loss_of(name, policy, reference)


@given(GROUPS, st.integers(1, 200))
def test_micro_batches_hold_every_group_once_and_the_budget(groups: list[TokenGroup], budget: int) -> None:
    batches = split_by_tokens(groups, budget)
    assert sorted(index for batch in batches for index in batch) == list(range(len(groups)))
    for batch in batches:
        padded = pad_groups([groups[index] for index in batch]).tokens_RT.numel()
        assert padded <= budget or len(batch) == 1


@given(GROUPS)
def test_a_layout_scores_every_completion_token_once(groups: list[TokenGroup]) -> None:
    layout = pad_groups(groups)
    completions = [completion for group in groups for completion in group.completions]
    assert layout.targets_N.tolist() == [token for completion in completions for token in completion]
    flat = layout.tokens_RT.flatten()
    length = layout.tokens_RT.shape[1]
    assert flat[layout.predictors_N + 1].tolist() == layout.targets_N.tolist()
    assert (layout.predictors_N // length).tolist() == layout.rows_N.tolist()


@given(TOKENS, TOKENS, TOKENS, TOKENS)
def test_a_cache_key_is_of_prompt_and_completion_apart(
    prompt: tuple[int, ...], completion: tuple[int, ...], other_prompt: tuple[int, ...], other: tuple[int, ...]
) -> None:
    same = (prompt, completion) == (other_prompt, other)
    assert (completion_key(prompt, completion) == completion_key(other_prompt, other)) == same
