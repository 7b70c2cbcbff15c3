"""The split is the prompt's own business."""

from __future__ import annotations

import hashlib

import pytest

from dpo_cli.data.schema import Messages, assistant, user
from dpo_cli.data.splits import is_held_out, split_position

PROMPTS: list[Messages] = [[user(f"question {number}")] for number in range(4000)]


def test_positions_lie_between_0_and_1_and_are_uniform() -> None:
    positions = sorted(map(split_position, PROMPTS))
    assert 0 <= positions[0]
    assert positions[-1] < 1
    # Kolmogorov-Smirnov: 1.95 / sqrt(4000) is passed by chance once in a thousand times
    assert max(abs(position - index / 4000) for index, position in enumerate(positions)) < 0.031


def test_a_position_never_changes() -> None:
    """Every split that was ever made with this package stands on it."""
    text = b'[[["user","question 0"]]]'
    digest = hashlib.blake2b(len(text).to_bytes(8, "little") + text, digest_size=16).digest()
    assert split_position([user("question 0")]) == int.from_bytes(digest[:8], "big") / 2**64


@pytest.mark.parametrize("fraction", [0.05, 0.3, 0.9])
def test_about_the_asked_share_is_held_out(fraction: float) -> None:
    share = sum(is_held_out(prompt, fraction) for prompt in PROMPTS) / len(PROMPTS)
    assert share == pytest.approx(fraction, abs=0.03)


def test_a_larger_share_keeps_what_was_held_out() -> None:
    small = {index for index, prompt in enumerate(PROMPTS) if is_held_out(prompt, 0.1)}
    assert small < {index for index, prompt in enumerate(PROMPTS) if is_held_out(prompt, 0.2)}


def test_role_and_turns_are_part_of_the_prompt() -> None:
    prompts = [
        [user("a")],
        [assistant("a")],
        [user(""), user("a")],
        [user("a\n")],
        [{"role": "system", "content": "a"}],
    ]
    assert len({split_position(prompt) for prompt in prompts}) == len(prompts)


def test_a_conversation_falls_where_its_opening_falls() -> None:
    for number in range(200):
        opening = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": f"question {number}"}]
        longer = [*opening, {"role": "assistant", "content": "yes"}, {"role": "user", "content": "and then?"}]
        assert split_position(longer) == split_position(opening)
