"""Scores of three models are paired by item, and a difference is told in words where it is beyond doubt."""

from __future__ import annotations

import math

import pytest

from dpo_cli.core.errors import DataError
from dpo_cli.evaluation import BASE, DPO, SFT
from dpo_cli.evaluation.capability import (
    TaskResult,
    in_words,
    metrics_of,
    pair_items,
    rows_of,
    summarize_task,
)
from dpo_cli.statistics.intervals import Sampling

SAMPLING = Sampling(draws=2000, confidence=0.95, seed=0)


def result_of(base: list[float], sft: list[float], dpo: list[float], *, higher_is_better: bool = True) -> TaskResult:
    found = {name: dict(enumerate(values)) for name, values in ((BASE, base), (SFT, sft), (DPO, dpo))}
    return summarize_task(pair_items("sums", "acc", higher_is_better, found), SAMPLING)


def test_items_are_paired_by_their_number_and_not_by_their_order() -> None:
    found = {BASE: {2: 0.0, 0: 1.0, 1: 0.5}, SFT: {0: 1.0, 1: 0.0, 2: 0.0}, DPO: {1: 1.0, 0: 0.0, 2: 0.0}}
    scores = pair_items("sums", "acc", True, found)
    assert scores.items == [0, 1, 2]
    assert scores.scores == {BASE: [1.0, 0.5, 0.0], SFT: [1.0, 0.0, 0.0], DPO: [0.0, 1.0, 0.0]}
    assert rows_of(scores)[1] == {"task": "sums", "item": 1, "metric": "acc", "base": 0.5, "sft": 0.0, "dpo": 1.0}


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ({BASE: {0: 1.0}, SFT: {0: 1.0, 1: 0.0}, DPO: {0: 1.0}}, "base 1, sft 2, dpo 1"),
        ({BASE: {0: 1.0}, SFT: {1: 1.0}, DPO: {0: 1.0}}, "cannot be paired"),
        ({BASE: {}, SFT: {}, DPO: {}}, "no item has the metric acc"),
    ],
)
def test_what_cannot_be_paired_is_refused(found: dict[str, dict[int, float]], words: str) -> None:
    with pytest.raises(DataError, match=words):
        pair_items("sums", "acc", True, found)


def test_the_interval_is_that_of_the_paired_difference() -> None:
    """Items that are easy or hard for both models tell nothing of their difference.

    Of 400 items 40 are lost and 8 won. The difference of an item has the mean -32/400 and the variance
    48/400 - (32/400)^2, so the interval is -.08 +- 1.96 * sqrt(.1136 / 400) = [-.113, -.047]. Unpaired, with half of
    the items right, it would be wider: +- 1.96 * sqrt(2 * .25 / 400) = +- .069.
    """
    sft = [1.0] * 200 + [0.0] * 200
    dpo = [0.0] * 40 + [1.0] * 160 + [1.0] * 8 + [0.0] * 192
    difference = result_of(sft, sft, dpo).differences[DPO, SFT]
    assert difference.estimate.value == pytest.approx(-0.08)
    half = 1.96 * math.sqrt((48 / 400 - 0.08**2) / 400)
    assert difference.estimate.low == pytest.approx(-0.08 - half, abs=0.004)
    assert difference.estimate.high == pytest.approx(-0.08 + half, abs=0.004)
    assert difference.change == "worse"


def test_the_figures() -> None:
    result = result_of([0.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 0.0], [1.0, 1.0, 0.0, 0.0])
    figures = metrics_of([result])["capability"]["tasks"]["sums"]
    assert list(figures) == [
        "metric", "higher_is_better", "change", "num_items", "base", "sft", "dpo",
        "dpo_minus_sft", "dpo_minus_sft_ci", "sft_minus_base", "sft_minus_base_ci",
    ]  # fmt: skip
    assert (figures["num_items"], figures["base"], figures["sft"], figures["dpo"]) == (4, 0.5, 0.75, 0.5)
    assert (figures["dpo_minus_sft"], figures["sft_minus_base"]) == (-0.25, 0.25)


@pytest.mark.parametrize(("num_lost", "change"), [(5, "not told apart"), (6, "worse")])
def test_beyond_doubt_takes_as_many_items_as_a_sign_test(num_lost: int, change: str) -> None:
    """Five losses and no win have the probability 2 * 2^-5 = .0625 under no difference, six have .031."""
    sft = [1.0] * 100
    difference = result_of(sft, sft, [0.0] * num_lost + [1.0] * (100 - num_lost)).differences[DPO, SFT]
    assert difference.estimate.high < 0
    assert difference.change == change


def test_less_may_be_better() -> None:
    low, high = [0.1 * (at % 3) for at in range(60)], [1 + 0.1 * (at % 5) for at in range(60)]
    result = result_of(high, low, high, higher_is_better=False)
    assert result.differences[SFT, BASE].change == "better"
    assert result.differences[DPO, SFT].change == "worse"


def test_words_name_what_got_worse_and_nothing_else() -> None:
    good, bad = [1.0] * 20, [0.0] * 20
    assert in_words([result_of(good, good, bad)]) == [
        "DPO is worse than SFT on sums beyond doubt: acc 1.000 -> 0.000, on 20 items",
        "SFT is worse than base on no task beyond doubt.",
    ]
    assert in_words([result_of(good, bad, bad)])[1].startswith("SFT is worse than base on sums beyond doubt: acc")
    assert in_words([result_of(bad, good, good)]) == [
        "DPO is worse than SFT on no task beyond doubt.",
        "SFT is worse than base on no task beyond doubt.",
    ]
