"""Win rates by judges and people, and how far they agree, as in the paper's Table 2."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_cli.core import paths
from dpo_cli.core.artifacts import write_csv_table, write_json
from dpo_cli.core.errors import DataError, ParamsError
from dpo_cli.judging.votes import read_shown, read_votes
from dpo_cli.statistics.agreement import MethodAgreement, WinRate, summarize_votes
from dpo_cli.statistics.intervals import Estimate, Sampling
from dpo_cli.statistics.raters import RaterQuality, rater_quality


@dataclass(frozen=True)
class AgreementTable:
    """What votes say of each method and baseline, and of their raters, with intervals of so many bootstrap draws."""

    methods: list[MethodAgreement]
    raters: list[RaterQuality]
    draws: int
    confidence: float
    seed: int

    @property
    def kinds(self) -> list[str]:
        """Kinds of raters of all methods."""
        return list(dict.fromkeys(kind for each in self.methods for kind in each.win_rates))

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Kinds that share items in some method: two kinds first, then those with themselves."""
        found = dict.fromkeys((pair.first, pair.second) for each in self.methods for pair in each.pairs)
        return sorted(found, key=lambda pair: pair[0] == pair[1])


def agreement_of_files(files: Sequence[Path], *, draws: int, confidence: float, seed: int) -> AgreementTable:
    """Read votes files and compute all figures over all of them.

    Raises:
        DataError: One is no votes file, a rater voted on an item twice, or there is nothing to say: no item has votes
            of two raters, and none was shown by ``dpo-cli label``.
    """
    sampling = Sampling(draws, confidence, seed)
    methods = summarize_votes(read_votes(*files), sampling)
    raters = rater_quality(read_shown(*files), sampling)
    if not raters and not any(each.pairs for each in methods):
        raise DataError(
            f"{', '.join(map(str, files))}: no item has votes of two raters, so there is no agreement; give all votes"
            " on the same two answers the same item_id"
        )
    return AgreementTable(methods, raters, draws, confidence, seed)


def refuse_outside_a_project() -> None:
    """Refuse to save where there is no project whose report could show it.

    Raises:
        ParamsError: There is no params.yaml.
    """
    if not paths.PARAMS.is_file():
        raise ParamsError(
            f"--save writes into a project, and there is no {paths.PARAMS} here; go into its folder, name it with -C,"
            " or leave --save out"
        )


def as_json(found: AgreementTable) -> dict[str, Any]:
    """The figures as one JSON value; null where one is undefined."""
    return {
        "draws": found.draws,
        "confidence": found.confidence,
        "seed": found.seed,
        "methods": [
            {
                "method": each.method,
                "baseline": each.baseline,
                "num_prompts": each.num_prompts,
                "num_items": each.num_items,
                "win_rates": {kind: _win_rate(rate) for kind, rate in each.win_rates.items()},
                "adjudicated": _win_rate(each.adjudicated) if each.adjudicated else None,
                "pairs": [
                    {
                        "first": pair.first,
                        "second": pair.second,
                        "num_items": pair.num_items,
                        "num_pairs": pair.num_pairs,
                        "agreement": _estimate(pair.agreement),
                        pair.coefficient.name: _estimate(pair.coefficient.estimate),
                    }
                    for pair in each.pairs
                ],
                "overall": {each.overall.name: _estimate(each.overall.estimate)} if each.overall else None,
                "ordinal": {each.ordinal.name: _estimate(each.ordinal.estimate)} if each.ordinal else None,
            }
            for each in found.methods
        ],
        "raters": [
            {name: _estimate(value) if isinstance(value, Estimate) else value for name, value in each._asdict().items()}
            for each in found.raters
        ],
    }


def save(found: AgreementTable) -> None:
    """Write the figures to reports/agreement/metrics.json, where the report finds them."""
    write_json(paths.metrics_file("agreement"), {"agreement": as_json(found)})


def write_csv(found: AgreementTable, path: Path) -> None:
    """Write the figures as CSV, one a line: num counts votes, or pairs of them; an undefined figure is empty."""
    rows: list[tuple[Any, ...]] = []
    for each in found.methods:
        rates = each.win_rates | ({"adjudication": each.adjudicated} if each.adjudicated else {})
        figures = [("win_rate", kind, "", rate.num_votes, rate.estimate) for kind, rate in rates.items()]
        for pair in each.pairs:
            for name, estimate in (("agreement", pair.agreement), (pair.coefficient.name, pair.coefficient.estimate)):
                figures.append((name, pair.first, pair.second, pair.num_pairs, estimate))
        count = sum(rate.num_votes for rate in each.win_rates.values())
        for overall in filter(None, (each.overall, each.ordinal)):
            figures.append((overall.name, "", "", count, overall.estimate))
        rows += [(each.method, each.baseline, *who, *_estimate(estimate).values()) for *who, estimate in figures]
    for rater in found.raters:
        for name in ("position_bias", "consistency", "noise"):
            if (estimate := getattr(rater, name)) is not None:
                num = rater.num_votes if name == "position_bias" else rater.num_repeats
                rows.append(("", "", name, rater.rater, "", num, *_estimate(estimate).values()))
    write_csv_table(path, ("method", "baseline", "figure", "first", "second", "num", "value", "low", "high"), rows)


def _win_rate(rate: WinRate) -> dict[str, Any]:
    return {"num_votes": rate.num_votes, "num_ties": rate.num_ties, **_estimate(rate.estimate)}


def _estimate(estimate: Estimate) -> dict[str, float | None]:
    figures = {"value": estimate.value, "low": estimate.low, "high": estimate.high}
    return {name: None if math.isnan(figure) else figure for name, figure in figures.items()}
