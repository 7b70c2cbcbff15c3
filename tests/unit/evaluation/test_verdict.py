"""What the metrics mean: each finding's color, flags, and the sentence on top."""

from __future__ import annotations

import re
from typing import Any

import pytest

from dpo_cli.core.params import TrainParams
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
from dpo_cli.evaluation.metrics import form_metrics
from dpo_cli.evaluation.verdict import HARDLY_MOVED, HIGH_KL, USUAL_RATE, WELL_FORMED, headline, verdict

METRICS: dict[str, Any] = {
    "win_rate": 0.75,
    "win_rate_ci": [0.7, 0.8],
    "tie_rate": 0.1,
    "win_rate_ceiling": 0.875,
    "reward_sft": 0.25,
    "reward_dpo": 0.75,
    "reward_accuracy": 0.97,
    "reward_accuracy_ci": [0.95, 0.99],
    "reference_accuracy": 0.6,
    "longer_accuracy": 0.55,
    "num_pairs": 500,
    "num_prompts": 128,
    "num_generated_prompts": 128,
    "num_judged": 126,
    "num_decided": 110,
    "temperature": 1.0,
    "loss": 0.3,
    "learns_log_ratio": True,
    "loss_ci": [0.28, 0.33],
    "loss_at_reference": 0.6931,
    "margin": 2.0,
    "margin_ci": [1.8, 2.2],
    "kl": 1.2,
    "kl_ci": [1.0, 1.4],
    "kl_k1": 1.3,
    "kl_estimates_disagree": False,
    "well_formed_sft": 0.97,
    "well_formed_dpo": 0.99,
    "num_form_decided": 4,
    "form_win_rate": 0.75,
    "form_win_rate_ci": [0.19, 0.99],
    "finished_sft": 0.98,
    "finished_dpo": 0.99,
    "answer_tokens_sft": 10.0,
    "answer_tokens_dpo": 11.0,
    "chosen_reward": 0.5,
    "rejected_reward": -1.5,
    "num_ties": 0,
    "judge": "world",
    "judge_name": "the known reward",
    "detectable_win_rate": 0.63,
    "win_rate_lc": 0.7,
    "win_rate_lc_ci": [0.65, 0.75],
    "length_note": "",
    "calibration_error": 0.03,
    "calibration_temperature": 1.2,
    "calibration_note": "",
    "entropy_sft": 0.4,
    "entropy_dpo": 0.35,
    "repetition_sft": 0.0,
    "repetition_dpo": 0.01,
    "distinct_sft": 0.2,
    "distinct_dpo": 0.2,
    "length_ratio": 1.1,
    "reward_length_correlation": 0.1,
    "perplexity_base": 1.4,
    "perplexity_sft": 1.2,
    "perplexity_dpo": 1.3,
}
BROKEN = {"well_formed_dpo": 0.5, "num_form_decided": 12, "form_win_rate": 0.0, "form_win_rate_ci": [0.0, 0.26]}
JUDGED = ("win_rate", "win_rate_ci", "tie_rate", "well_formed_sft", "well_formed_dpo", "reward_sft", "reward_dpo")


def without_judge(**changes: Any) -> dict[str, Any]:
    return {name: value for name, value in (METRICS | changes).items() if name not in JUDGED}


def finding(name: str, **changes: Any) -> Finding:
    (found,) = [finding for finding in verdict(METRICS | changes) if finding.name == name]
    return found


@pytest.mark.parametrize(
    ("name", "changes", "status"),
    [
        ("win rate over SFT", {"win_rate_ci": [0.51, 0.8]}, "good"),
        ("win rate over SFT", {"win_rate_ci": [0.49, 0.8]}, "warn"),
        ("win rate over SFT", {"win_rate_ci": [0.5, 0.8]}, "warn"),
        ("win rate over SFT", {"win_rate": 0.4, "win_rate_ci": [0.3, 0.49]}, "bad"),
        ("held-out reward accuracy", {"reward_accuracy_ci": [0.51, 0.6]}, "good"),
        ("held-out reward accuracy", {"reward_accuracy_ci": [0.49, 0.6]}, "warn"),
        ("held-out reward accuracy", {"reward_accuracy_ci": [0.3, 0.49]}, "bad"),
        ("held-out loss", {}, "good"),
        ("held-out loss", {"loss": 0.7, "loss_ci": [0.65, 0.75]}, "warn"),
        ("held-out loss", {"loss": 0.9, "loss_ci": [0.7, 1.1]}, "bad"),
        ("held-out loss", {"loss": 0.9, "loss_ci": [0.9, 0.9], "num_prompts": 1}, "warn"),
        ("KL from the reference", {}, "good"),
        ("KL from the reference", {"kl": HIGH_KL + 1}, "warn"),
        ("KL from the reference", {"kl_estimates_disagree": True}, "bad"),
        ("well-formed answers", {}, "good"),
        ("well-formed answers", {"well_formed_sft": 0.6, "well_formed_dpo": WELL_FORMED - 0.1}, "warn"),
        ("well-formed answers", {"well_formed_sft": 0.9, "well_formed_dpo": WELL_FORMED - 0.1}, "warn"),
        ("well-formed answers", BROKEN, "bad"),
        ("KL from the reference", {"kl": HARDLY_MOVED / 2}, "warn"),
        ("win rate at equal length", {}, "good"),
        ("win rate at equal length", {"win_rate_lc_ci": [0.49, 0.75]}, "warn"),
        ("win rate at equal length", {"win_rate_lc": None, "win_rate_lc_ci": None, "length_note": "why"}, "plain"),
        ("win rate at equal length", {"win_rate_lc_ci": None}, "plain"),
        ("calibration", {}, "plain"),
        ("calibration", {"calibration_error": 0.2}, "warn"),
        ("calibration", {"calibration_error": 0.2, "learns_log_ratio": False}, "plain"),
        ("perplexity of SFT text", {}, "plain"),
        ("perplexity of SFT text", {"perplexity_dpo": 1.6}, "warn"),
        ("reward of chosen answers", {}, "plain"),
        ("reward of chosen answers", {"chosen_reward": -0.1}, "warn"),
    ],
)
def test_a_finding_has_the_color_of_its_figure(name: str, changes: dict[str, Any], status: str) -> None:
    assert finding(name, **changes).status == status


def test_the_win_rate_comes_first_and_every_finding_says_what_it_means() -> None:
    findings = verdict(METRICS)
    assert findings[0].name == "win rate over SFT"
    assert findings[0].value.startswith("75.0% [70.0%, 80.0%]")
    assert all(found.meaning and found.value for found in findings)
    assert len({found.name for found in findings}) == len(findings) == 11


def test_without_a_judge_there_is_no_win_rate() -> None:
    names = {found.name for found in verdict(without_judge())}
    assert "win rate over SFT" not in names
    assert "well-formed answers" not in names
    assert len(names) == 8


TRAINING = {
    "learning_rate": 5e-6, "beta": 0.1, "epochs": 1.0, "max_steps": None, "num_steps": 62, "kept_step": 62
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "first", "meaning"),
    [
        (
            {},
            "raise train.learning_rate, which was 5e-06",
            "raise train.learning_rate, which was 5e-06, or raise train.epochs, which was 1, so 62 steps,"
            " or lower train.beta, which was 0.1",
        ),
        (
            {"learning_rate": 0.01, "max_steps": 3},
            "raise train.max_steps, which was 3",
            "raise train.max_steps, which was 3, or raise train.learning_rate, which was 0.01",
        ),
        (
            {"kept_step": 0},
            "train.keep best kept its start: lower train.learning_rate, which was 5e-06",
            "lower train.learning_rate, which was 5e-06",
        ),
    ],
)
def test_a_model_that_hardly_moved_is_told_which_setting_to_change(
    changes: dict[str, Any], first: str, meaning: str
) -> None:
    assert TrainParams().learning_rate == USUAL_RATE
    moved = {"kl": HARDLY_MOVED / 2, "training": TRAINING | changes}
    assert headline(METRICS | moved) == (f"The tuned model is all but the SFT model: it hardly moved; {first}.", "warn")
    assert meaning in finding("KL from the reference", **moved).meaning


def test_a_model_that_went_too_far_is_told_which_setting_to_change() -> None:
    """Unless it is better; the line of the KL says it in any case."""
    far = {"kl": HIGH_KL + 1, "training": TRAINING}
    slow, fast = METRICS | far, METRICS | far | {"training": TRAINING | {"learning_rate": 2 * USUAL_RATE}}
    open_, worse = {"win_rate_ci": [0.45, 0.6]}, {"win_rate_ci": [0.3, 0.45]}
    steps = "It went far from the SFT model; lower train.epochs, which was 1, so 62 steps."
    assert headline(slow | open_)[0].endswith(steps)
    assert headline(slow | worse)[0].endswith(steps)
    assert headline(fast | open_)[0].endswith("; lower train.learning_rate, which was 0.0002.")
    assert headline(fast | open_ | {"training": None})[0].endswith("; train less, or with a lower learning rate.")
    assert headline(slow) == headline(METRICS)
    assert "or raise train.beta, which was 0.1" in finding("KL from the reference", **far).meaning
    assert "far" not in finding("KL from the reference", kl=HIGH_KL).meaning


def test_a_red_line_never_stands_under_a_good_headline() -> None:
    broken = [
        {"kl_estimates_disagree": True},
        BROKEN,
        {"loss": 0.9, "loss_ci": [0.8, 1.0]},
        {"reward_accuracy_ci": [0.2, 0.3]},
        {"win_rate_ci": [0.2, 0.3]},
    ]
    for changes in broken:
        metrics = METRICS | changes
        assert "bad" in {found.status for found in verdict(metrics)}
        assert headline(metrics)[1] == "bad"


@pytest.mark.parametrize(
    ("num_lost", "num_gained", "status"), [(1, 0, "warn"), (5, 0, "warn"), (6, 0, "bad"), (6, 3, "warn")]
)
def test_form_that_fell_by_chance_is_no_harm(num_lost: int, num_gained: int, status: str) -> None:
    """Of twenty answers; the others of both models are broken. Six of six lost come by chance in 3 of 100 cases."""
    forms = [(True, False)] * num_lost + [(False, True)] * num_gained + [(False, False)] * (20 - num_lost - num_gained)
    shares = {"well_formed_sft": num_lost / 20, "well_formed_dpo": num_gained / 20}
    assert finding("well-formed answers", **shares, **form_metrics(forms, 0.95)).status == status


def test_a_reward_model_as_judge_has_no_ceiling_and_says_where_it_comes_from() -> None:
    """No ceiling and no well-formed answers: only the world's judge knows them."""
    known = ("win_rate_ceiling", "well_formed_sft", "well_formed_dpo")
    metrics = {name: value for name, value in METRICS.items() if name not in known} | {"judge": "reward-model"}
    findings = {each.name: each for each in verdict(metrics)}
    assert "at most" not in findings["win rate over SFT"].meaning
    assert "which learned from the same preferences" in findings["win rate over SFT"].meaning
    assert "well-formed answers" not in findings


# --- flags ----------------------------------------------------------------------------------


CHEAPER = {
    "num_smaller_steps": 2,
    "cheaper_scale": 0.5,
    "cheaper_kl": 0.6,
    "cheaper_win_rate": 0.61,
    "cheaper_gain": -0.01,
    "cheaper_gain_ci": [-0.04, 0.02],
}
COLLAPSED = {"entropy_dpo": 0.4 * LESS_ENTROPY - 0.01}


@pytest.mark.parametrize(
    ("name", "changes", "status", "words"),
    [
        ("reward of chosen answers", {"chosen_reward": -0.1}, "warn", "not a failure in itself"),
        ("reward of chosen answers", {"chosen_reward": -0.1, "win_rate_ci": [0.3, 0.49]}, "bad", "win rate is below"),
        ("reward of chosen answers", {"chosen_reward": -0.1, "win_rate_ci": [0.3, 0.51]}, "warn", "common"),
        ("reward of chosen answers", {"chosen_reward": -0.1, **COLLAPSED}, "bad", "entropy"),
        ("length of answers", {"length_ratio": LONGER + 0.1}, "warn", "answers are longer"),
        (
            "length of answers",
            {"length_ratio": 2.0, "reward_length_correlation": 0.9},
            "warn",
            "reward rises with length",
        ),
        ("length of answers", {"length_ratio": 2.0, "win_rate_lc_ci": [0.45, 0.55]}, "warn", "at equal length"),
        ("length of answers", {"length_ratio": 2.0, "win_rate_lc_ci": [0.4, 0.49]}, "bad", "at equal length"),
        ("length of answers", {"length_ratio": 2.0, "win_rate_lc_ci": None}, "warn", "answers are longer"),
        ("length of answers", {"reward_length_correlation": None}, "plain", "mean tokens"),
        ("over-optimization", CHEAPER, "warn", "as good as all of it"),
        ("over-optimization", {**CHEAPER, "cheaper_gain_ci": [-0.05, -0.01]}, "bad", "better than all of it"),
        ("over-optimization", {"num_smaller_steps": 1}, "plain", "of 1 smaller step .* none is as good"),
        (
            "form of answers",
            {"finished_dpo": 0.97 - MORE_UNFINISHED},
            "warn",
            "fewer answers end",
        ),
        ("form of answers", {"repetition_dpo": 0.01 + MORE_REPETITION}, "warn", "repeat themselves"),
        ("form of answers", {"distinct_dpo": 0.19 * LESS_DISTINCT}, "warn", "more alike"),
        ("form of answers", COLLAPSED, "warn", "entropy"),
        ("form of answers", {"finished_dpo": 0.5, "repetition_dpo": 0.5}, "bad", "fewer answers end.*, answers repeat"),
        ("form of answers", {"distinct_dpo": None}, "plain", "no sign"),
    ],
)
def test_a_flag_is_raised(name: str, changes: dict[str, Any], status: str, words: str) -> None:
    found = finding(name, **changes)
    assert found.status == status
    assert re.search(words, found.meaning)


def test_without_a_judge_flags_need_none() -> None:
    assert {each.status for each in flags(METRICS)} == {"plain"}
    metrics = {name: value for name, value in METRICS.items() if not name.startswith("win_rate")}
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
    found = finding("form of answers", **never)
    assert found.value.startswith("0.0% end")
    assert found.status == "warn"
    assert "most answers are cut off: raise evaluate.max_new_tokens, now 128" in found.meaning
    assert "no sign" not in found.meaning
    repeated = finding("form of answers", repetition_sft=0.7, repetition_dpo=0.75)
    assert (repeated.status, "answers repeat themselves; SFT's are no better" in repeated.meaning) == ("warn", True)
