"""Losses and layouts hold for all numbers, not for examples alone."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dpo_cli.core.params import TrainParams
from dpo_cli.data.tokens import completion_key
from dpo_cli.losses.catalogue import LOSSES
from dpo_cli.losses.pairwise import Pairs

LOGP = st.floats(-500, 0)
PAIR = st.tuples(LOGP, LOGP)
TOKENS = st.lists(st.integers(0, 9), min_size=1, max_size=12).map(tuple)


def loss_of(name: str, policy: tuple[float, float], reference: tuple[float, float], beta: float = 0.1) -> float:
    def tensor(values: tuple[float, float]) -> torch.Tensor:
        return torch.tensor([values], dtype=torch.float64)

    smoothing = 0.1 if name == "cdpo" else 0.0
    pairs = Pairs(tensor(policy), tensor(reference), torch.ones(1, 2))
    return LOSSES[name].of(pairs, TrainParams(beta=beta, label_smoothing=smoothing)).item()


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


@given(TOKENS, TOKENS, TOKENS, TOKENS)
def test_a_cache_key_is_of_prompt_and_completion_apart(
    prompt: tuple[int, ...], completion: tuple[int, ...], other_prompt: tuple[int, ...], other: tuple[int, ...]
) -> None:
    same = (prompt, completion) == (other_prompt, other)
    assert (completion_key(prompt, completion) == completion_key(other_prompt, other)) == same
