"""What rewards say of pairs and rankings, by hand: held-out figures, a reward model's, and agreement with ranks."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import pytest

from dpo_cli.evaluation.metrics import held_out_metrics
from dpo_cli.evaluation.rewards import (
    ScoredGroup,
    agreements,
    pair_losses,
    reward_metrics,
    summarize_agreements,
)
from dpo_cli.statistics.intervals import Sampling

SAMPLING = Sampling(draws=300, confidence=0.95, seed=0)


def sigma(margin: float) -> float:
    return 1 / (1 + math.exp(-margin))


# --- the implicit reward of held-out pairs --------------------------------------------------


def held_out(
    number: int, policy: tuple[float, float], reference: tuple[float, float], tokens: tuple[int, int] = (3, 3)
) -> ScoredGroup:
    return ScoredGroup.implicit((f"row-{number:03d}", f"prompt-{number}"), policy, reference, tokens, 0.5)


def figures_of(pairs: list[ScoredGroup]) -> dict[str, Any]:
    return held_out_metrics(pairs, pair_losses(pairs, 0.5), SAMPLING)


def test_held_out_figures_are_means_over_pairs() -> None:
    pairs = [
        held_out(0, (-8.0, -12.0), (-10.0, -10.0), (5, 3)),  # delta 4: right, reference undecided, chosen longer
        held_out(1, (-12.0, -9.0), (-10.0, -9.0), (3, 5)),  # delta -2: wrong, reference wrong, chosen shorter
        held_out(2, (-5.0, -7.0), (-6.0, -8.0), (4, 4)),  # delta 0: a tie, reference right, equally long
        held_out(3, (-5.0, -7.0), (-5.0, -6.0), (4, 2)),  # delta 1: right, reference right, chosen longer
    ]
    margins = [pair.margin for pair in pairs]
    assert margins == pytest.approx([2.0, -1.0, 0.0, 0.5])
    losses = [math.log1p(math.exp(-margin)) for margin in margins]
    assert pair_losses(pairs, 0.5) == pytest.approx(losses, rel=1e-12)
    found = figures_of(pairs)
    assert {name: found[name] for name in ("num_ties", "num_pairs", "num_prompts")} == {
        "num_ties": 1, "num_pairs": 4, "num_prompts": 4
    }  # fmt: skip
    expected = {
        "margin": 1.5 / 4,
        "reward_accuracy": (1 + 0 + 0.5 + 1) / 4,
        "reference_accuracy": (0.5 + 0 + 1 + 1) / 4,
        "longer_accuracy": (1 + 0 + 0.5 + 1) / 4,
        "chosen_reward": 0.5 * (2 - 2 + 1 + 0) / 4,
        "rejected_reward": 0.5 * (-2 + 0 + 1 - 1) / 4,
        "loss": sum(losses) / 4,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("policy", "note"),
    [
        ((-4.0, -8.0), "no pair is in the wrong order"),
        ((-5.0, -7.0), "all margins are 0"),
        ((-6.0, -6.0), "the margins point the wrong way"),
    ],
)
def test_pairs_that_no_temperature_fits_say_why(policy: tuple[float, float], note: str) -> None:
    found = figures_of([held_out(number, policy, (-5.0, -7.0)) for number in range(3)])
    assert found["calibration_temperature"] is None
    assert found["calibration_note"].startswith(note)


# --- a reward model -------------------------------------------------------------------------


def rewarded(number: int, chosen: float, rejected: float, lengths: tuple[int, int] = (5, 5)) -> ScoredGroup:
    return ScoredGroup(f"row-{number:05d}", f"prompt-{number // 2}", (chosen, rejected), lengths)


def test_a_reward_models_figures_of_four_pairs() -> None:
    pairs = [rewarded(0, 2, 0, (6, 5)), rewarded(1, 0, 1, (4, 5)), rewarded(2, 3, 3), rewarded(3, 1, -1, (9, 2))]
    found = reward_metrics(pairs, SAMPLING)
    # the bins of a tie, of 1 and of 2: |accuracy - probability| by their shares
    gaps = [abs(0.5 - 0.5), abs(0 - sigma(1)), abs(1 - sigma(2))]
    expected = {
        "accuracy": (1 + 0 + 0.5 + 1) / 4,
        "log_loss": sum(math.log1p(math.exp(-margin)) for margin in (2, -1, 0, 2)) / 4,
        "margin": 3 / 4,
        "longer_accuracy": (1 + 0 + 0.5 + 1) / 4,
        "num_chosen_longer": 2,
        "num_chosen_as_long": 1,
        "num_chosen_shorter": 1,
        "accuracy_chosen_longer": 1.0,
        "accuracy_chosen_as_long": 0.5,
        "accuracy_chosen_shorter": 0.0,
        "num_ties": 1,
        "num_eval_pairs": 4,
        "num_eval_prompts": 2,
        "ece": (gaps[0] + gaps[1] + 2 * gaps[2]) / 4,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    cells = found["reliability"]
    assert [(cell["num_pairs"], round(cell["accuracy"], 6)) for cell in cells] == [(1, 0.5), (1, 0), (2, 1)]
    assert [cell["probability"] for cell in cells] == pytest.approx([0.5, sigma(1), sigma(2)])
    assert all(cell["probability_from"] <= cell["probability"] <= cell["probability_to"] for cell in cells)
    assert "accuracy_chosen_longer" not in reward_metrics([rewarded(0, 1, 0)], SAMPLING), "there is no such pair"


def test_only_differences_count_and_no_order_of_rows() -> None:
    rng = random.Random(0)
    rewards = [(rng.gauss(1, 2), rng.gauss(0, 2)) for _ in range(60)]
    first = reward_metrics([rewarded(at, *pair) for at, pair in enumerate(rewards)], SAMPLING)
    moved = [rewarded(at, chosen + 512.0, rejected + 512.0) for at, (chosen, rejected) in enumerate(rewards)]
    second = reward_metrics(moved[::-1], SAMPLING)
    for name in ("accuracy", "accuracy_ci", "log_loss", "ece"):
        assert second[name] == pytest.approx(first[name])


def test_a_true_model_is_calibrated_and_one_that_is_too_sure_is_not() -> None:
    """Labels drawn from Bradley-Terry of the rewards themselves, then of a third of them."""
    rng = random.Random(1)
    pairs = []
    for _ in range(6000):
        first, second = rng.gauss(0, 1.5), rng.gauss(0, 1.5)
        pairs.append((first, second) if rng.random() <= sigma(first - second) else (second, first))
    true, boastful = (
        reward_metrics(
            [rewarded(at, scale * chosen, scale * rejected) for at, (chosen, rejected) in enumerate(pairs)], SAMPLING
        )
        for scale in (1, 3)
    )
    assert true["ece"] < 0.02
    assert boastful["ece"] > 0.1
    assert boastful["accuracy_ci"] == true["accuracy_ci"]
    assert boastful["log_loss_ci"][0] > true["log_loss_ci"][1]


def test_rewards_of_any_size_overflow_nothing() -> None:
    found = reward_metrics([rewarded(0, 1e6, 0), rewarded(1, 0, 1e6)], SAMPLING)
    assert (found["log_loss"], found["accuracy"]) == (pytest.approx(5e5), 0.5)


# --- any rows -------------------------------------------------------------------------------


def ranked(ranks: tuple[int, ...], rewards: tuple[float, ...], group: str = "g") -> ScoredGroup:
    reference = tuple(-value for value in rewards)
    return ScoredGroup("r", group, rewards, tuple(range(1, len(ranks) + 1)), ranks, reference=reference)


def test_a_pair_is_right_wrong_or_a_tie() -> None:
    found = agreements([ranked((1, 2), rewards) for rewards in ((2.0, 1.0), (1.0, 2.5), (1.0, 1.0))])
    assert [one.outcome for one in found] == ["right", "wrong", "tie"]
    assert [one.reference_accuracy for one in found] == [0, 1, 0.5]
    assert [one.longer_accuracy for one in found] == [0, 0, 0], "the second answer is the longer one"


def test_rankings_of_any_size_agree_with_counting() -> None:
    rng = random.Random(0)
    rows = []
    for number in range(60):
        size = rng.randint(2, 6)
        ranks = (*sorted(rng.randint(1, 3) for _ in range(size - 1)), 4)
        rows.append(ranked(ranks, tuple(float(rng.randint(0, 3)) for _ in range(size)), f"g{number % 7}"))
    for row, found in zip(rows, agreements(rows), strict=True):
        pairs = [
            (better, worse)
            for (a, better), (b, worse) in itertools.product(zip(row.ranks, row.rewards, strict=True), repeat=2)
            if a < b
        ]
        scores = [1.0 if better > worse else 0.5 if better == worse else 0.0 for better, worse in pairs]
        assert found.num_compared == len(pairs)
        assert found.num_ties == scores.count(0.5)
        assert found.accuracy == pytest.approx(sum(scores) / len(scores))
        assert found.margin == pytest.approx(sum(better - worse for better, worse in pairs) / len(pairs))
        assert found.outcome == ("wrong" if 0.0 in scores else "tie" if 0.5 in scores else "right")


def test_every_row_counts_once_and_intervals_are_clustered_by_prompt() -> None:
    rows = [ranked((1, 2), (1.0, 0.0), "a"), ranked((1, 2), (0.0, 1.0), "b"), ranked((1, 2, 3), (3.0, 2.0, 1.0), "b")]
    summary = summarize_agreements(rows, agreements(rows), SAMPLING)
    assert summary.accuracy.value == pytest.approx(2 / 3)
    assert (summary.num_rows, summary.num_prompts, summary.num_compared, summary.num_ties) == (3, 2, 5, 0)
    assert summary.accuracy.low <= summary.accuracy.value <= summary.accuracy.high
