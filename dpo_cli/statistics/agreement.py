"""Agreement of judges and people: the paper's Table 2, corrected for chance.

Win rates count a tie as one half. Two votes on an item agree by 1 where they are the same, by 1/2
where one of them alone is a tie, else by 0; every pair of votes counts the same. So a rater who
always says tie agrees by one half with one who never does. The coefficients that correct for
chance are nominal: a tie is a category of its own, beside win and loss of the method. One more, of
all raters, is ordinal: a tie lies between the two. Raw
agreement grows with skewed wins (two raters who both say win nine times in ten agree in 82% by
chance), the coefficients do not.

Raters of a kind (`human:anna`, `human:bo`) are exchangeable: between two kinds stands Cohen's
kappa of all pairs of votes; within a kind Fleiss' kappa where each item has the same number of
votes, else Krippendorff's alpha. Intervals are by prompt.

Source: Rafailov et al. 2023, section 6.4 and Table 2.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from dpo_cli.statistics.intervals import Estimate, Sampling

WIN, TIE, LOSS = 0, 1, 2
"""Results of a vote for the method."""

NUM_RESULTS = 3
"""Win, tie and loss."""

CoefficientName = Literal["cohen_kappa", "fleiss_kappa", "krippendorff_alpha", "krippendorff_alpha_ordinal"]


@dataclass(frozen=True)
class Vote:
    """One rater's vote on one pair of answers.

    Attributes:
        item: The pair of answers: all votes on it share this id.
        prompt: The id of their prompt.
        method: What wrote one of them.
        baseline: What wrote the other.
        rater: Who voted: `kind` or `kind:name`.
        result: WIN, TIE or LOSS of the method.
        is_adjudication: Whether it was asked for because others disagree on the item.
    """

    item: str
    prompt: str
    method: str
    baseline: str
    rater: str
    result: int
    is_adjudication: bool = False

    @property
    def kind(self) -> str:
        """The rater's kind: what stands before the colon. Raters of a kind are exchangeable."""
        return self.rater.partition(":")[0]


class Coefficient(NamedTuple):
    """Agreement beyond chance: 1 where all agree, 0 as by chance, NaN where it is undefined: all votes are the same."""

    name: CoefficientName
    estimate: Estimate


class WinRate(NamedTuple):
    """How often raters of a kind prefer the method: the mean over their votes, ties one half."""

    estimate: Estimate
    num_votes: int
    num_ties: int


class PairAgreement(NamedTuple):
    """How two kinds of raters agree, or the raters of one kind.

    Attributes:
        agreement: Mean over pairs of votes on the same item.
        coefficient: The same, corrected for chance.
        num_items: Items with such a pair.
        num_pairs: Pairs of votes.
    """

    first: str
    second: str
    agreement: Estimate
    coefficient: Coefficient
    num_items: int
    num_pairs: int


class MethodAgreement(NamedTuple):
    """Figures of a method against its baseline.

    Attributes:
        win_rates: By kind of rater, in the order of their first votes.
        pairs: Two kinds, or a kind with itself, that voted on the same items.
        overall: All raters together; None where no item has two votes.
        ordinal: The same with a tie between win and loss: Krippendorff's ordinal alpha.
        num_items: Pairs of answers.
        adjudicated: The win rate of adjudications, which no other figure counts: they were asked for because others had
            disagreed, so they are no independent votes. None without.
    """

    method: str
    baseline: str
    win_rates: dict[str, WinRate]
    pairs: list[PairAgreement]
    overall: Coefficient | None
    ordinal: Coefficient | None
    num_items: int
    num_prompts: int
    adjudicated: WinRate | None = None

    def pair(self, first: str, second: str) -> PairAgreement | None:
        """The agreement of two kinds; None where no item has both."""
        return next((each for each in self.pairs if (each.first, each.second) == (first, second)), None)


def summarize_votes(votes: Sequence[Vote], sampling: Sampling) -> list[MethodAgreement]:
    """Figures for each method and baseline, in the order of their first votes, one a rater and item."""
    kinds = list(dict.fromkeys(vote.kind for vote in votes if not vote.is_adjudication))
    groups: dict[tuple[str, str], list[Vote]] = {}
    for vote in votes:
        groups.setdefault((vote.method, vote.baseline), []).append(vote)
    return [_summarize(mine, kinds, sampling) for mine in groups.values()]


def _summarize(votes: Sequence[Vote], kinds: Sequence[str], sampling: Sampling) -> MethodAgreement:
    items: dict[str, list[Vote]] = {}
    by_kind: dict[str | None, list[Vote]] = {}  # None: adjudications
    for vote in votes:
        by_kind.setdefault(None if vote.is_adjudication else vote.kind, []).append(vote)
        if not vote.is_adjudication:
            items.setdefault(vote.item, []).append(vote)
    win_rates = {kind: _win_rate(by_kind[kind], sampling) for kind in kinds if kind in by_kind}
    across = [_between(items, first, second, sampling) for first, second in itertools.combinations(kinds, 2)]
    within = [_within(items, kind, sampling) for kind in kinds]
    everybody = list(items.values())
    return MethodAgreement(
        method=votes[0].method,
        baseline=votes[0].baseline,
        win_rates=win_rates,
        pairs=[each for each in (*across, *within) if each is not None],
        overall=_of_many(everybody, sampling),
        ordinal=_of_many(everybody, sampling, "krippendorff_alpha_ordinal"),
        num_items=len(items),
        num_prompts=len({vote.prompt for vote in votes}),
        adjudicated=_win_rate(by_kind[None], sampling) if None in by_kind else None,
    )


def _win_rate(votes: Sequence[Vote], sampling: Sampling) -> WinRate:
    estimate = sampling.rate([1 - vote.result / 2 for vote in votes], [vote.prompt for vote in votes])
    return WinRate(estimate, len(votes), sum(vote.result == TIE for vote in votes))


def _between(items: dict[str, list[Vote]], first: str, second: str, sampling: Sampling) -> PairAgreement | None:
    pairs = [
        (one, other)
        for votes in items.values()
        for one in votes
        if one.kind == first
        for other in votes
        if other.kind == second
    ]
    if not pairs:
        return None
    cells = [NUM_RESULTS * one.result + other.result for one, other in pairs]
    prompts = [one.prompt for one, _ in pairs]
    estimate = sampling.of_sums(_cohen_of_sums, np.eye(NUM_RESULTS**2)[cells], prompts)
    return _pair_agreement(first, second, pairs, Coefficient("cohen_kappa", estimate), sampling)


def _within(items: dict[str, list[Vote]], kind: str, sampling: Sampling) -> PairAgreement | None:
    mine = [[vote for vote in votes if vote.kind == kind] for votes in items.values()]
    pairs = [pair for votes in mine for pair in itertools.combinations(votes, 2)]
    coefficient = _of_many([votes for votes in mine if votes], sampling)
    return _pair_agreement(kind, kind, pairs, coefficient, sampling) if coefficient else None


def _pair_agreement(
    first: str, second: str, pairs: Sequence[tuple[Vote, Vote]], coefficient: Coefficient, sampling: Sampling
) -> PairAgreement:
    agreement = [1 - abs(one.result - other.result) / 2 for one, other in pairs]
    estimate = sampling.rate(agreement, [one.prompt for one, _ in pairs])
    return PairAgreement(first, second, estimate, coefficient, len({one.item for one, _ in pairs}), len(pairs))


def _of_many(
    items: Sequence[Sequence[Vote]], sampling: Sampling, name: CoefficientName | None = None
) -> Coefficient | None:
    """Fleiss' kappa where each item has the same number of votes, else Krippendorff's alpha; None without a pair."""
    counts = np.array([np.bincount([vote.result for vote in votes], minlength=NUM_RESULTS) for votes in items])
    prompts = [votes[0].prompt for votes in items]
    num_votes = counts.sum(-1) if len(counts) else np.zeros(0)
    if not (num_votes > 1).any():
        return None
    if name is None:
        name = "fleiss_kappa" if (num_votes == num_votes[0]).all() else "krippendorff_alpha"
    return Coefficient(name, sampling.of_sums(_OF_SUMS[name], _COLUMNS[name](counts), prompts))


# --- coefficients ---------------------------------------------------------------------------


def coefficient(name: CoefficientName, counts: np.ndarray) -> float:
    """A coefficient of items.

    Args:
        name: Which one.
        counts: [items, C] votes by category; for Cohen's, one-hot [items, C * C] by both raters' categories.

    Returns:
        NaN where all votes are the same; Krippendorff's also where no item has two.

    Raises:
        ValueError: Fleiss' of items that have different numbers of votes, or fewer than two.
    """
    columns = _COLUMNS[name](np.asarray(counts))
    return float(_OF_SUMS[name](columns.sum(0, keepdims=True), np.array([float(len(columns))]))[0])


def _cohen_of_sums(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Agreement of two raters beyond chance: (p_o - p_e) / (1 - p_e).

    p_o is the share on the diagonal, p_e = sum_c p_c. p_.c that of raters who vote by chance, each with shares of
    his own. Of 200 cases, 88 14 18 / 10 40 10 / 2 6 12: p_o = 140/200 = .70; the shares are .6 .3 .1 and .5 .3 .2, so
    p_e = .30 + .09 + .02 = .41, and kappa = .29 / .59 = .492.

    Source: Cohen 1960, A coefficient of agreement for nominal scales.
    """
    size = math.isqrt(sums.shape[1])
    table = sums.reshape(len(sums), size, size)
    observed = np.trace(table, axis1=-2, axis2=-1) * counts
    expected = (table.sum(-1) * table.sum(-2)).sum(-1)
    return _ratio(observed - expected, counts**2 - expected)


def _fleiss_columns(counts: np.ndarray) -> np.ndarray:
    """By item the share of pairs of votes that agree, and the shares of the categories: [items, 1 + C]."""
    num_votes = counts.sum(-1, keepdims=True)
    if (num_votes != num_votes[0]).any() or num_votes[0] < 2:
        raise ValueError("Fleiss' kappa needs the same number of votes an item, two at the least")
    agreeing = (counts * (counts - 1)).sum(-1, keepdims=True) / (num_votes * (num_votes - 1))
    return np.hstack([agreeing, counts / num_votes])


def _fleiss_of_sums(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Agreement beyond chance of a constant number of raters an item: (P - P_e) / (1 - P_e).

    With n_ic votes of n for category c on item i, P is the mean of (sum_c n_ic^2 - n) / (n (n - 1)), the share of
    pairs that agree, and P_e = sum_c p_c^2 with p_c the share of all votes. 14 raters on 10 items, votes by category
    20 28 39 21 32 of 140: P_e = (20^2 + 28^2 + 39^2 + 21^2 + 32^2) / 140^2 = .2128, P = .3780 and
    kappa = .1652 / .7872 = .210 (the test has the table).

    Source: Fleiss 1971, Measuring nominal scale agreement among many raters, equations 1 to 7.
    """
    means = sums / counts[:, None]
    expected = (means[:, 1:] ** 2).sum(-1)
    return _ratio(means[:, 0] - expected, 1 - expected)


def _krippendorff_columns(counts: np.ndarray) -> np.ndarray:
    """By item the coincidences off the diagonal, and the votes that can be paired: [items, 1 + C]."""
    num_votes = counts.sum(-1, keepdims=True)
    paired = np.where(num_votes > 1, counts, 0)
    apart = (paired.sum(-1, keepdims=True) ** 2 - (paired**2).sum(-1, keepdims=True)) / np.maximum(num_votes - 1, 1)
    return np.hstack([apart, paired])


def _krippendorff_of_sums(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Agreement beyond chance of any number of raters an item, votes missing or not: 1 - D_o / D_e, nominal.

    An item with m >= 2 votes gives n_c (n_k - [c = k]) / (m - 1) to the coincidences o_ck; one with fewer gives
    nothing. With n_c = sum_k o_ck and n = sum_c n_c, alpha = 1 - (n - 1) sum_{c!=k} o_ck / sum_{c!=k} n_c n_k.
    Krippendorff's four observers and twelve units: one unit has one value and falls out, n = 40 values 9 13 10 5 3,
    sum_{c!=k} n_c n_k = 1600 - 384 = 1216. Units with votes 3:1, 3:1 and 1:1:1:1 give 2, 2 and 4 off the diagonal, in
    all 8, so alpha = 1 - 39 * 8 / 1216 = .743.

    Source: Krippendorff 2011, Computing Krippendorff's alpha-reliability, section C (the same formula).
    """
    total = sums[:, 1:].sum(-1)
    expected = total**2 - (sums[:, 1:] ** 2).sum(-1)
    return _ratio(expected - (total - 1) * sums[:, 0], expected)


def _coincidences(counts: np.ndarray) -> np.ndarray:
    """By item its coincidences o_ck = n_c (n_k - [c = k]) / (m - 1) of m >= 2 votes: [items, C * C]."""
    num_votes = counts.sum(-1)[:, None, None]
    pairs = counts[:, :, None] * (counts[:, None, :] - np.eye(counts.shape[1]))
    return np.where(num_votes > 1, pairs / np.maximum(num_votes - 1, 1), 0).reshape(len(counts), -1)


def _ordinal_of_sums(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Krippendorff's alpha where the categories are in order: 1 - D_o / D_e with squared distances in ranks.

    With n_c = sum_k o_ck and n = sum_c n_c, the distance of c <= k is the values from one to the other, of both ends
    half: sum_{g=c..k} n_g - (n_c + n_k) / 2. D_o = sum o_ck d_ck^2 and D_e = sum n_c n_k d_ck^2 / (n - 1). The four
    observers' values have n_c = 9 13 10 5 3, so that 1 and 2 are 22 - 11 = 11 apart.

    Source: Krippendorff 2011, Computing Krippendorff's alpha-reliability, section E.
    """
    size = math.isqrt(sums.shape[1])
    table = sums.reshape(len(sums), size, size)
    totals = table.sum(-1)
    middles = totals.cumsum(-1) - totals / 2
    distances = (middles[:, :, None] - middles[:, None, :]) ** 2
    observed = (table * distances).sum((-1, -2)) * (totals.sum(-1) - 1)
    expected = (totals[:, :, None] * totals[:, None, :] * distances).sum((-1, -2))
    return _ratio(expected - observed, expected)


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """The ratio; NaN where nothing, within rounding, is below."""
    defined = below > 1e-9
    return np.where(defined, above / np.where(defined, below, 1), np.nan)


_COLUMNS: dict[CoefficientName, Callable[[np.ndarray], np.ndarray]] = {
    "cohen_kappa": lambda counts: counts,
    "fleiss_kappa": _fleiss_columns,
    "krippendorff_alpha": _krippendorff_columns,
    "krippendorff_alpha_ordinal": _coincidences,
}
_OF_SUMS = {
    "cohen_kappa": _cohen_of_sums,
    "fleiss_kappa": _fleiss_of_sums,
    "krippendorff_alpha": _krippendorff_of_sums,
    "krippendorff_alpha_ordinal": _ordinal_of_sums,
}
