"""Rules that are checked exactly: what holds, and what does not for one reason alone."""

from __future__ import annotations

from typing import get_args

import pytest

from dpo_cli.core.judges import RuleName
from dpo_cli.judging.known_reward import MAX_SENTENCE_CHARACTERS, RULES


def test_every_name_in_the_settings_is_a_rule() -> None:
    assert list(RULES) == list(get_args(RuleName))


@pytest.mark.parametrize(
    "answer",
    [
        "Bees eat nectar and pollen.",
        "  Bees eat nectar!\n",
        "Dr. Smith lives in the U.S. with J. Doe.",
        "Pi is about 3.14, e.g. in a circle.",
        'She said "no."',
        "Greater Britain is a place (an island).",
        "Heresy is a belief.",
        "蜜蜂吃花蜜。",
        "x" * (MAX_SENTENCE_CHARACTERS - 1) + ".",
    ],
)
def test_one_sentence(answer: str) -> None:
    assert RULES["one_sentence"].reward("anything", answer) == 1.0


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "   ",
        "Bees eat nectar. They live in hives.",
        'Bees eat "nectar." They live in hives.',
        "Why bees? They are busy.",
        "Bees eat nectar and",
        "Bees eat\nnectar.",
        "Sure, bees eat nectar.",
        "Here's the answer: nectar.",
        "here is what bees eat: nectar.",
        "- Bees eat nectar.",
        "1. Bees eat nectar.",
        "蜜蜂吃花蜜。它们很忙。",
        "Bees eat nectar.x",
        "x" * MAX_SENTENCE_CHARACTERS + ".",
    ],
)
def test_not_one_sentence(answer: str) -> None:
    assert RULES["one_sentence"].reward("anything", answer) == 0.0


@pytest.mark.parametrize(
    ("answer", "reward"),
    [
        ('{"name": "Tom", "age": 12}', 1),
        (' {"a": {"b": [1, null]}}\n', 1),
        ("{}", 0),
        ('[{"a": 1}]', 0),
        ('```json\n{"a": 1}\n```', 0),
        ('Here it is: {"a": 1}', 0),
        ('{"a": 1} I hope that helps.', 0),
        ("{'a': 1}", 0),
        ('{"a": NaN}', 0),
        ('{"a": ' + "[" * 100_000, 0),
        ("", 0),
    ],
)
def test_a_json_object(answer: str, reward: float) -> None:
    assert RULES["json_object"].reward("anything", answer) == reward
