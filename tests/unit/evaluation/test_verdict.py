"""What the metrics mean: each finding's color, and the sentence on top."""

from __future__ import annotations

from typing import Any

import pytest

from dpo_cli.core.params import TrainParams
from dpo_cli.evaluation.flags import FEWEST, Finding
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


@pytest.mark.parametrize(
    ("changes", "status", "words"),
    [
        ({}, "good", "is better than the SFT model"),
        ({"win_rate_ci": [0.45, 0.6]}, "warn", "open"),
        ({"win_rate_ci": [0.3, 0.45]}, "bad", "harm"),
        ({"kl_estimates_disagree": True}, "bad", "wrong with the computation"),
        (BROKEN, "bad", "Tuning did harm: well-formed answers."),
        (BROKEN | {"loss": 0.9, "loss_ci": [0.8, 1.0]}, "bad", "harm: held-out loss, well-formed answers."),
        ({"chosen_reward": -1.0, "kl": 50.0}, "good", "is better"),
        ({"kl": HARDLY_MOVED / 2}, "warn", "hardly moved"),
        ({"num_decided": FEWEST - 1, "win_rate_ci": [1.0, 1.0]}, "warn", "too few prompts have a winner"),
        ({"num_decided": FEWEST - 1, "win_rate_ci": [0.0, 0.0]}, "warn", "too few prompts have a winner"),
    ],
)
def test_the_headline_with_a_judge(changes: dict[str, Any], status: str, words: str) -> None:
    text, found = headline(METRICS | changes)
    assert found == status
    assert words in text


@pytest.mark.parametrize(
    ("changes", "status", "words"),
    [
        ({}, "good", "no judge compared its answers"),
        ({"reward_accuracy_ci": [0.45, 0.6]}, "warn", "do not show"),
        ({"reward_accuracy_ci": [0.3, 0.45]}, "bad", "harm"),
        ({"reward_accuracy_ci": [0.16, 1.0], "num_prompts": 2}, "warn", "Too few prompts are held out"),
        ({"kl_estimates_disagree": True}, "bad", "wrong with the computation"),
    ],
)
def test_the_headline_without_a_judge(changes: dict[str, Any], status: str, words: str) -> None:
    text, found = headline(without_judge(**changes))
    assert found == status
    assert words in text


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
    assert "which learned of the same preferences" in findings["win rate over SFT"].meaning
    assert "well-formed answers" not in findings
