"""Flags: when each is raised, in which color, and what it says to do."""

from __future__ import annotations

from typing import Any

import pytest

from dpo_cli.evaluation.flags import (
    LESS_DISTINCT,
    LESS_ENTROPY,
    LONGER,
    MORE_REPETITION,
    MORE_UNFINISHED,
    Finding,
    flags,
    judge_quality,
)

METRICS: dict[str, Any] = {
    "chosen_reward": 0.5,
    "rejected_reward": -1.5,
    "win_rate_ci": [0.55, 0.65],
    "win_rate_lc_ci": [0.52, 0.62],
    "kl": 2.0,
    "entropy_sft": 1.0,
    "entropy_dpo": 0.8,
    "length_ratio": 1.0,
    "reward_length_correlation": 0.1,
    "num_generated_prompts": 128,
    "finished_sft": 0.99,
    "finished_dpo": 0.98,
    "repetition_sft": 0.01,
    "repetition_dpo": 0.02,
    "distinct_sft": 0.4,
    "distinct_dpo": 0.35,
}
CHEAPER = {
    "num_smaller_steps": 2,
    "cheaper_scale": 0.5,
    "cheaper_kl": 0.6,
    "cheaper_win_rate": 0.61,
    "cheaper_gain": -0.01,
    "cheaper_gain_ci": [-0.04, 0.02],
}
COLLAPSED = {"entropy_dpo": LESS_ENTROPY - 0.01}


def flag(name: str, **changes: Any) -> Finding:
    (found,) = [each for each in flags(METRICS | changes) if each.name == name]
    return found


def test_none_is_raised_without_a_reason() -> None:
    assert {each.status for each in flags(METRICS)} == {"plain"}


@pytest.mark.parametrize(
    ("name", "changes", "status", "words"),
    [
        ("reward of chosen answers", {"chosen_reward": -0.1}, "warn", "no failure by itself"),
        ("reward of chosen answers", {"chosen_reward": -0.1, "win_rate_ci": [0.3, 0.49]}, "bad", "win rate is below"),
        ("reward of chosen answers", {"chosen_reward": -0.1, "win_rate_ci": [0.3, 0.51]}, "warn", "common"),
        ("reward of chosen answers", {"chosen_reward": -0.1, **COLLAPSED}, "bad", "entropy"),
        ("length of answers", {"length_ratio": LONGER + 0.1}, "warn", "talks longer"),
        (
            "length of answers",
            {"length_ratio": 2.0, "reward_length_correlation": 0.9},
            "warn",
            "reward rises with length",
        ),
        ("length of answers", {"length_ratio": 2.0, "win_rate_lc_ci": [0.45, 0.55]}, "warn", "at equal length"),
        ("length of answers", {"length_ratio": 2.0, "win_rate_lc_ci": [0.4, 0.49]}, "bad", "at equal length"),
        ("length of answers", {"length_ratio": 2.0, "win_rate_lc_ci": None}, "warn", "talks longer"),
        ("length of answers", {"reward_length_correlation": None}, "plain", "mean tokens"),
        ("over-optimization", CHEAPER, "warn", "as good as all of it"),
        ("over-optimization", {**CHEAPER, "cheaper_gain_ci": [-0.05, -0.01]}, "bad", "better than all of it"),
        ("over-optimization", {"num_smaller_steps": 1}, "plain", "of 1 smaller step .* none is as good"),
        ("form of answers", {"finished_dpo": 0.98 - MORE_UNFINISHED}, "warn", "fewer answers end"),
        ("form of answers", {"repetition_dpo": 0.02 + MORE_REPETITION}, "warn", "repeat themselves"),
        ("form of answers", {"distinct_dpo": 0.39 * LESS_DISTINCT}, "warn", "more alike"),
        ("form of answers", COLLAPSED, "warn", "entropy"),
        ("form of answers", {"finished_dpo": 0.5, "repetition_dpo": 0.5}, "bad", "fewer answers end.*, answers repeat"),
        ("form of answers", {"distinct_dpo": None}, "plain", "no sign"),
    ],
)
def test_a_flag_is_raised(name: str, changes: dict[str, Any], status: str, words: str) -> None:
    import re

    found = flag(name, **changes)
    assert found.status == status
    assert re.search(words, found.meaning)


def test_without_a_judge_flags_need_none() -> None:
    metrics = {name: value for name, value in METRICS.items() if not name.startswith("win_rate")}
    assert len(flags(metrics)) == 3
    found = flags(metrics | {"chosen_reward": -1.0, "length_ratio": 3.0})
    assert [each.status for each in found] == ["warn", "warn", "plain"]


def test_a_judge_is_doubted_for_a_reason() -> None:
    assert judge_quality(METRICS) is None
    sure = {"judge_name": "judge", "judge_agreement": 0.8, "judge_agreement_ci": [0.7, 0.9], "judge_consistency": 0.9}
    found = judge_quality(sure)
    assert found is not None
    assert (found.status, found.value) == (
        "plain",
        "80.0% [70.0%, 90.0%] agreement with the data, 90.0% consistent",
    )
    for change, words in (
        ({"judge_agreement_ci": [0.45, 0.9]}, "chosen answers"),
        ({"judge_consistency": 0.6}, "order of the answers"),
    ):
        doubted = judge_quality(sure | change)
        assert doubted is not None
        assert doubted.status == "warn"
        assert words in doubted.meaning


def test_answers_that_never_ended_are_not_called_well_formed() -> None:
    never = {"finished_sft": 0.0, "finished_dpo": 0.0, "max_new_tokens": 128}
    found = flag("form of answers", **never)
    assert found.value.startswith("0.0% end")
    assert found.status == "warn"
    assert "most answers are cut off: raise evaluate.max_new_tokens, now 128" in found.meaning
    assert "no sign" not in found.meaning
    repeated = flag("form of answers", repetition_sft=0.7, repetition_dpo=0.75)
    assert (repeated.status, "answers repeat themselves; SFT's are no better" in repeated.meaning) == ("warn", True)
