"""Agreement: the paper's Table 2 from votes, and coefficients against published examples."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from dpo_cli.judging.votes import COLUMNS, read_votes
from dpo_cli.statistics.agreement import (
    LOSS,
    TIE,
    WIN,
    MethodAgreement,
    Vote,
    coefficient,
    summarize_votes,
)
from dpo_cli.statistics.intervals import Sampling

# Items by their votes: judge S, judge C, the people; 1 is a win of the method. They add up to the paper's Table 2.
TABLE_2 = {
    "DPO": {
        "0 0 00": 23, "0 0 10": 12, "0 0 11": 2, "0 1 00": 6, "0 1 10": 18, "0 1 11": 11,
        "1 0 00": 3, "1 0 10": 11, "1 0 11": 12, "1 1 00": 1, "1 1 10": 7, "1 1 11": 30,
    },
    "SFT": {"0 0 0": 59, "0 0 1": 7, "0 1 0": 6, "0 1 1": 17, "1 0 0": 4, "1 0 1": 13, "1 1 1": 16},
    "PPO-1": {
        "0 0 0": 1, "0 0 00": 68, "0 0 10": 9, "0 1 00": 4, "0 1 10": 2, "0 1 11": 3,
        "1 0 00": 4, "1 0 10": 2, "1 0 11": 4, "1 1 11": 3,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def table_2_votes(tmp_path_factory: pytest.TempPathFactory) -> list[Vote]:
    """The votes of a file in which every other answer of the method was shown as B."""
    lines = [",".join(COLUMNS)]
    for method, items in TABLE_2.items():
        names = [votes_on for votes_on, count in items.items() for _ in range(count)]
        for number, votes_on in enumerate(names):
            judge_s, judge_c, people = votes_on.split()
            raters = {"S": judge_s, "C": judge_c, **{f"human:{i}": vote for i, vote in enumerate(people)}}
            for rater, vote in raters.items():
                shown_as_a = len(lines) % 2 == 0
                letter = "A" if (vote == "1") == shown_as_a else "B"
                first = method if shown_as_a else "PPO-0"
                lines.append(f"{number},p{number},{method},PPO-0,{rater},{letter},{first}")
    file = tmp_path_factory.mktemp("votes") / "votes.csv"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return read_votes(file)


def summarize(votes: list[Vote], draws: int = 400) -> list[MethodAgreement]:
    return summarize_votes(votes, Sampling(draws, confidence=0.95, seed=0))


def vote(item: int, rater: str, result: int, prompt: str = "") -> Vote:
    return Vote(f"{item}", prompt or f"p{item}", "dpo", "sft", rater, result)


@pytest.mark.parametrize(
    ("method", "num_votes", "wins", "agreement"),
    [
        ("DPO", 272, (47, 54, 58), (70, 67, 65)),
        ("SFT", 122, (27, 32, 43), (77, 79, None)),
        ("PPO-1", 199, (13, 12, 17), (86, 85, 87)),
    ],
)
def test_the_papers_table_2(
    method: str,
    num_votes: int,
    wins: tuple[int, ...],
    agreement: tuple[int | None, ...],
    table_2_votes: list[Vote],
) -> None:
    [found] = [each for each in summarize(table_2_votes) if each.method == method]
    assert found.win_rates["human"].num_votes == num_votes
    rates = [found.win_rates[kind].estimate for kind in ("S", "C", "human")]
    assert tuple(round(100 * rate.value) for rate in rates) == wins
    pairs = [found.pair(*names) for names in (("S", "human"), ("C", "human"), ("human", "human"))]
    assert tuple(None if each is None else round(100 * each.agreement.value) for each in pairs) == agreement
    for estimate in (*rates, *(each.agreement for each in pairs if each)):
        assert estimate.low < estimate.value < estimate.high
    assert found.overall is not None


def test_fleiss_for_a_constant_number_of_raters_alone(table_2_votes: list[Vote]) -> None:
    """All DPO items have two people; one PPO-1 item has a single one, so 199 is odd."""
    found = {each.method: each for each in summarize(table_2_votes)}
    of_people = {name: each.pair("human", "human") for name, each in found.items()}
    assert of_people["SFT"] is None
    assert of_people["DPO"] is not None
    assert of_people["DPO"].coefficient.name == "fleiss_kappa"
    assert of_people["PPO-1"] is not None
    assert of_people["PPO-1"].coefficient.name == "krippendorff_alpha"
    assert (of_people["PPO-1"].num_items, of_people["PPO-1"].num_pairs) == (99, 99)
    overall = [each.overall.name for each in found.values() if each.overall]
    assert overall == ["fleiss_kappa", "fleiss_kappa", "krippendorff_alpha"]


def test_ties_agree_by_half() -> None:
    results = [(WIN, WIN), (WIN, TIE), (TIE, TIE), (LOSS, TIE), (WIN, LOSS)]
    votes = [vote(i, rater, result) for i, pair in enumerate(results) for rater, result in zip("ab", pair, strict=True)]
    [found] = summarize(votes)
    pair = found.pair("a", "b")
    assert pair is not None
    assert pair.agreement.value == pytest.approx((1 + 0.5 + 1 + 0.5 + 0) / 5)
    assert found.win_rates["a"].estimate.value == pytest.approx((1 + 1 + 0.5 + 0 + 1) / 5)
    assert (found.win_rates["b"].num_ties, found.win_rates["b"].num_votes) == (3, 5)
    # a: W W T L W, b: W T T T L; same in 2 of 5, by chance (3 * 1 + 1 * 3 + 1 * 1) / 25
    assert pair.coefficient.estimate.value == pytest.approx((2 / 5 - 7 / 25) / (1 - 7 / 25))


def test_the_order_of_votes_changes_nothing(table_2_votes: list[Vote]) -> None:
    votes = list(table_2_votes)
    before = {each.method: each for each in summarize(votes)}
    random.Random(0).shuffle(votes)
    for each in summarize(votes):
        mine = before[each.method]
        assert {kind: each.win_rates[kind] for kind in mine.win_rates} == mine.win_rates
        assert each.pair("human", "human") == mine.pair("human", "human")
        assert each.overall == mine.overall


def test_one_prompt_is_one_cluster() -> None:
    votes = [vote(i, rater, result, "same") for i in range(6) for rater, result in (("a", WIN), ("b", i % 3))]
    [found] = summarize(votes)
    pair = found.pair("a", "b")
    assert pair is not None
    assert (pair.agreement.low, pair.agreement.high) == (0, 1)  # one trial, half won, says nothing
    assert (found.num_items, found.num_prompts) == (6, 1)


def test_where_all_votes_are_the_same_kappa_is_undefined() -> None:
    [found] = summarize([vote(i, rater, WIN) for i in range(5) for rater in ("a", "b")])
    pair = found.pair("a", "b")
    assert pair is not None
    assert pair.agreement.value == 1
    assert math.isnan(pair.coefficient.estimate.value)
    assert math.isnan(pair.coefficient.estimate.low)


# --- published examples -----------------------------------------------------------------------


def test_cohens_kappa_of_200_cases() -> None:
    """p_o = .70, p_e = .6 * .5 + .3 * .3 + .1 * .2 = .41 (Cohen 1960)."""
    table = np.array([[88, 14, 18], [10, 40, 10], [2, 6, 12]])
    assert coefficient("cohen_kappa", np.eye(9).repeat(table.ravel(), axis=0)) == pytest.approx(0.29 / 0.59)


FLEISS = np.array(
    [
        [0, 0, 0, 0, 14],
        [0, 2, 6, 4, 2],
        [0, 0, 3, 5, 6],
        [0, 3, 9, 2, 0],
        [2, 2, 8, 1, 1],
        [7, 7, 0, 0, 0],
        [3, 2, 6, 3, 0],
        [2, 5, 3, 2, 2],
        [6, 5, 2, 1, 0],
        [0, 2, 2, 3, 7],
    ]
)


def test_fleiss_kappa_of_fourteen_raters() -> None:
    """The table of Wikipedia's article on Fleiss' kappa; the formula is Fleiss' of 1971."""
    assert round(coefficient("fleiss_kappa", FLEISS), 3) == 0.210


def test_fleiss_kappa_refuses_different_numbers_of_raters() -> None:
    with pytest.raises(ValueError, match="same number of votes"):
        coefficient("fleiss_kappa", np.array([[2, 0], [1, 0]]))


KRIPPENDORFF = [
    "1 2 3 3 2 1 4 1 2 . . .",
    "1 2 3 3 2 2 4 1 2 5 . 3",
    ". 3 3 3 2 3 4 2 2 5 1 .",
    "1 2 3 3 2 4 4 1 2 5 1 .",
]


def krippendorff_counts() -> np.ndarray:
    units = zip(*(row.split() for row in KRIPPENDORFF), strict=True)
    return np.array([[unit.count(str(value)) for value in range(1, 6)] for unit in units])


def test_krippendorffs_alpha_of_four_observers() -> None:
    """Krippendorff 2011, example C: nominal, four observers, twelve units, values missing."""
    assert round(coefficient("krippendorff_alpha", krippendorff_counts()), 3) == 0.743
    assert round(coefficient("krippendorff_alpha_ordinal", krippendorff_counts()), 3) == 0.815  # section E


def test_raters_who_vote_at_random_agree_as_by_chance() -> None:
    rng = np.random.default_rng(0)
    votes = [vote(i, rater, int(rng.choice(3, p=[0.8, 0.05, 0.15]))) for i in range(4000) for rater in ("a", "b")]
    [found] = summarize(votes, draws=100)
    pair = found.pair("a", "b")
    assert pair is not None
    assert pair.agreement.value > 0.65
    assert abs(pair.coefficient.estimate.value) < 0.04
