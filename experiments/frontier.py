"""What came of a grid: reward against KL with intervals, Best-of-N, the ideal frontier, and what holds between them.

What is chosen, checkpoints and settings, is chosen on one half of the held-out prompts; figures are those on the other
half. Intervals are drawn seed by seed, then prompt by prompt.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl

from dpo_cli.core.errors import DataError
from dpo_cli.statistics.best_of_n import best_of_n, best_of_n_kl_bound, ideal_frontier
from dpo_cli.statistics.intervals import Estimate, Sampling
from experiments.cells import half, measured_tables, read_cells

SAMPLING = Sampling(draws=2000, confidence=0.95, seed=0)
IDEAL_BETAS = tuple(float(beta) for beta in np.geomspace(3.0, 0.03, 25))
NUMBERS = (1, 2, 4, 8, 16, 32, 64, 128)
LABELS = {
    "sft": "SFT, the reference",
    "dpo": "DPO",
    "ppo": "PPO, learned reward",
    "ppo-gt": "PPO, true reward",
    "unlikelihood": "Unlikelihood",
    "preferred-ft": "Preferred-FT",
    "best-of-n": "Best-of-N, learned reward",
    "best-of-n-gt": "Best-of-N, true reward",
}
"""Methods as readers know them."""


def of_seeds(values: Sequence[np.ndarray]) -> Estimate:
    """The mean over seeds and prompts; each seed has prompts of its own."""
    return SAMPLING.of_runs(values, same_prompts=False)


@dataclass(frozen=True)
class Run:
    """What one seed measured of a policy.

    Attributes:
        step: Of the checkpoint; 0 is the reference.
        choosing: Answers to the prompts that are chosen on: ``prompt_id``, ``reward``, ``kl``.
        reported: Answers to the others.
        last: Answers to the others at the last step.
    """

    step: int
    choosing: pl.DataFrame
    reported: pl.DataFrame
    last: pl.DataFrame


@dataclass(frozen=True)
class Point:
    """A policy over all seeds.

    Attributes:
        method: ``dpo``, ``best-of-n``, ...
        value: Its setting; None where it has none.
        runs: Of each seed; none of Best-of-N.
        rewards: Of each seed float64 [prompts], on the prompts that are reported.
        kls: The same, nats; of Best-of-N its bound.
        text: An answer to the first prompt of the first seed.
    """

    method: str
    value: float | None
    runs: Sequence[Run]
    rewards: Sequence[np.ndarray]
    kls: Sequence[np.ndarray]
    text: str = ""

    @classmethod
    def of(cls, method: str, value: float | None, runs: Sequence[Run]) -> Point:
        """A policy that was trained, or the reference."""
        rewards, kls = ([run.reported[name].to_numpy() for run in runs] for name in ("reward", "kl"))
        return cls(method, value, runs, rewards, kls, runs[0].reported["text"][0])

    @property
    def name(self) -> str:
        """As readers know it."""
        return LABELS[self.method] + ("" if self.value is None else f" {self.value:g}")

    @cached_property
    def reward(self) -> Estimate:
        """Mean reward."""
        return of_seeds(self.rewards)

    @cached_property
    def kl(self) -> Estimate:
        """Mean KL from the reference, nats an answer."""
        return of_seeds(self.kls)

    def chosen_on(self, name: str) -> float:
        """The mean ``reward`` or ``kl`` on the prompts that are chosen on."""
        return float(np.mean([run.choosing[name].to_numpy().mean() for run in self.runs]))


@dataclass(frozen=True)
class Ideal:
    """The optimal policies of reward - beta KL, estimated from the reference's answers to the reported prompts.

    Attributes:
        betas: Descending. Where few answers count, the optimum of reward - beta KL comes out too low.
        rewards: Of each seed float64 [prompts, betas].
        kls: The same, nats.
        num_sure: The first betas, for which enough answers count in every seed.
        fewest: Effective samples of the prompt that has the fewest, at the last of these; nan if there are none.
        start: Mean reward of the reference.
        most: The largest reward that an answer of the reference had.
    """

    betas: Sequence[float]
    rewards: Sequence[np.ndarray]
    kls: Sequence[np.ndarray]
    num_sure: int
    fewest: float
    start: float
    most: float

    @property
    def curve(self) -> list[tuple[float, float]]:
        """Mean (KL, reward), from the reference on, then of each beta."""
        kls, rewards = (np.mean([each.mean(0) for each in values], axis=0) for values in (self.kls, self.rewards))
        return [(0.0, self.start), *zip(kls.tolist(), rewards.tolist(), strict=True)]


@dataclass(frozen=True)
class Results:
    """All points of a grid.

    Attributes:
        points: The reference, then trained policies at the checkpoints that were chosen.
        best_of_n: By the learned reward and by the known one.
        ideal: Of the same prompts.
        curves: Mean reward and KL of each measured step, on all held-out prompts.
        prompt: Whose answers the points show.
    """

    points: Sequence[Point]
    best_of_n: Mapping[str, Sequence[Point]]
    ideal: Ideal
    curves: Sequence[dict[str, Any]]
    prompt: str

    def of(self, method: str) -> list[Point]:
        """The points of a method, by their setting."""
        return sorted((point for point in self.points if point.method == method), key=lambda point: point.value or 0)


def read_results(work: Path, grid: Mapping[str, Any]) -> Results:
    """Read what the cells of a grid measured.

    Raises:
        StaleArtifactError: A cell has not been run to its end.
        DataError: Something was measured on other prompts.
    """
    runs: dict[tuple[str, float | None], list[Run]] = {}
    start: list[Run] = []
    curves = []
    for seed in grid["seeds"]:
        tables: dict[int, pl.DataFrame] = {}
        for cell in read_cells(grid, seed):
            found = measured_tables(work / "cells" / cell.name)
            tables = {step: pl.read_parquet(path) for step, path in found.items()}
            curves += [
                {"method": cell.method, "value": cell.value, "seed": seed, "step": step}
                | {name: table[name].mean() for name in ("reward", "kl", "k1", "num_tokens", "finished")}
                for step, table in tables.items()
            ]
            best = max(
                (step for step in tables if step), key=lambda step: half(tables[step], 0)["reward"].to_numpy().mean()
            )
            runs.setdefault((cell.method, cell.value), []).append(_run(tables, best))
        start.append(_run(tables, 0))  # every cell begins with the reference
    samples = [np.load(work / f"reference-{seed}.npz") for seed in grid["seeds"]]
    for run, sampled in zip(start, samples, strict=True):
        if run.reported["prompt_id"].to_list() != sampled["prompt_ids"].tolist():
            raise DataError(f"{work}: the reference answered other prompts than the cells; delete the folder")
    points = [Point.of("sft", None, start), *(Point.of(*cell, found) for cell, found in runs.items())]
    numbers = [number for number in NUMBERS if number <= samples[0]["known"].shape[1]]
    bounds = best_of_n_kl_bound(numbers)
    bests: dict[str, list[Point]] = {}
    for name, by in (("best-of-n", "learned"), ("best-of-n-gt", "known")):
        found = [best_of_n(each[by], each["known"], numbers) for each in samples]
        bests[name] = [
            Point(
                name,
                float(number),
                (),
                [one[:, place] for one in found],
                [np.full(len(one), bounds[place]) for one in found],
                str(samples[0]["texts"][np.argmax(samples[0][by][0, :number])]),
            )
            for place, number in enumerate(numbers)
        ]
    return Results(points, bests, _ideal(samples), curves, start[0].reported["prompt"][0])


def _run(tables: Mapping[int, pl.DataFrame], step: int) -> Run:
    return Run(step, half(tables[step], 0), half(tables[step], 1), half(tables[max(tables)], 1))


def _ideal(samples: Sequence[Mapping[str, np.ndarray]]) -> Ideal:
    found = [ideal_frontier(each["known"], IDEAL_BETAS) for each in samples]
    num_sure = int(np.cumprod([each.valid_B for each in found], axis=1).all(0).sum())
    return Ideal(
        IDEAL_BETAS,
        rewards=[each.rewards_PB for each in found],
        kls=[each.kls_PB for each in found],
        num_sure=num_sure,
        fewest=float(min(each.effective_samples_PB[:, num_sure - 1].min() for each in found)) if num_sure else math.nan,
        start=float(np.mean([each["known"].mean() for each in samples])),
        most=float(max(each["known"].max() for each in samples)),
    )


# --- what holds -------------------------------------------------------------------------------

Verdict = Literal["holds", "fails", "more", "less", "not told apart", "too far in KL", "not checked"]
MOST_KL_RATIO = 1.5
"""Two policies whose KLs differ by a larger factor are not compared in reward."""


@dataclass(frozen=True)
class Check:
    """A statement about the points.

    Attributes:
        statement: In words.
        verdict: Of what must hold ``holds``, ``fails`` or ``not checked``; of two methods, whether the first one earns
            more, if their KLs are near enough.
        difference: In reward, or what the statement says, paired by prompt.
        kl: Difference in KL, nats; None where it says nothing of it.
    """

    statement: str
    verdict: Verdict
    difference: Estimate
    kl: Estimate | None = None


def checks(results: Results) -> list[Check]:
    """What must hold of the points; then DPO beside each point of the other methods, whoever wins."""
    sft, dpo = results.points[0], results.of("dpo")
    bests = [point for found in results.best_of_n.values() for point in found]
    found = [_above(f"{_best(dpo).name} earns more than SFT", _best(dpo), sft)]
    preferred = sorted(results.of("preferred-ft"), key=lambda point: point.chosen_on("kl"))
    for place, other in enumerate(preferred, start=1):
        found.append(_above(f"{_best(dpo).name} earns more than {other.name}", _best(dpo), other))
        found.append(_at_matched_kl([sft, *dpo], other, earns_more=1 < place == len(preferred)))
    found += [_kl_falls(one, other) for one, other in itertools.pairwise(dpo)]
    found.append(_below_ideal([*results.points[1:], *bests], results.ideal))
    for one in results.of("ppo-gt"):
        found += [_true_beside_learned(one, other) for other in results.of("ppo") if other.value == one.value]
    for method in ("unlikelihood", "ppo", "ppo-gt"):
        for other in results.of(method):
            nearest = min(dpo, key=lambda point: abs(point.chosen_on("kl") - other.chosen_on("kl")))
            kls = sorted((nearest.kl.value, other.kl.value))
            is_near = kls[1] <= MOST_KL_RATIO * kls[0]
            found.append(
                _beside(f"{nearest.name}, the nearest in KL, beside {other.name}", nearest, other, is_near=is_near)
            )
    for points in results.best_of_n.values():
        found.append(_beside(f"{_best(dpo).name} beside {points[-1].name}", _best(dpo), points[-1], is_near=True))
    return found


def _best(points: Sequence[Point]) -> Point:
    """The point with the highest reward on the prompts that are chosen on."""
    return max(points, key=lambda point: point.chosen_on("reward"))


def _difference(one: Sequence[np.ndarray], other: Sequence[np.ndarray]) -> Estimate:
    """Of two policies, paired by prompt."""
    return of_seeds([a - b for a, b in zip(one, other, strict=True)])


def _above(statement: str, one: Point, other: Point) -> Check:
    difference = _difference(one.rewards, other.rewards)
    return Check(statement, "holds" if difference.low > 0 else "fails", difference, _difference(one.kls, other.kls))


def _beside(statement: str, one: Point, other: Point, *, is_near: bool) -> Check:
    difference = _difference(one.rewards, other.rewards)
    verdict: Verdict = "more" if difference.low > 0 else "less" if difference.high < 0 else "not told apart"
    return Check(statement, verdict if is_near else "too far in KL", difference, _difference(one.kls, other.kls))


def _true_beside_learned(one: Point, other: Point) -> Check:
    """Whether the true reward is not shown to be the worse one to train with; at the last step, where KLs are alike."""
    rewards, kls = (
        [[run.last[name].to_numpy() for run in point.runs] for point in (one, other)] for name in ("reward", "kl")
    )
    difference = _difference(*rewards)
    statement = f"{one.name}, is not shown to earn less than {other.name}, at the last step"
    return Check(statement, "holds" if difference.high >= 0 else "fails", difference, _difference(*kls))


def _at_matched_kl(frontier: Sequence[Point], other: Point, *, earns_more: bool) -> Check:
    """Whether a frontier is not shown to lie below a point: its two neighbors in KL are mixed.

    To answer with one policy or with the other, by chance, earns the mean of their rewards, and has at most the mean of
    their KLs, which is that of the point. Near the reference a point can be about ideal; of one that is further away it
    can be asked that the mixture ``earns_more``.
    """
    wanted = max(other.chosen_on("kl"), 0.0)
    for below, above in itertools.pairwise(sorted(frontier, key=lambda point: point.chosen_on("kl"))):
        low, high = max(below.chosen_on("kl"), 0.0), above.chosen_on("kl")
        if low <= wanted <= high:
            share = (wanted - low) / (high - low)
            mixed = [(1 - share) * a + share * b for a, b in zip(below.rewards, above.rewards, strict=True)]
            difference = _difference(mixed, other.rewards)
            least, claim = (
                (difference.low, "earn more") if earns_more else (difference.high, "are not shown to earn less")
            )
            statement = f"{below.name} and {above.name}, mixed to the KL of {other.name}, {claim}"
            return Check(statement, "fails" if least < 0 else "holds", difference)
    return Check(f"no policy of DPO has as much KL as {other.name}", "not checked", Estimate(*[math.nan] * 3))


def _kl_falls(one: Point, other: Point) -> Check:
    """Whether more beta is not shown to have more KL, at the last step of both."""
    kls = [[run.last["kl"].to_numpy() for run in point.runs] for point in (other, one)]
    rise = _difference(*kls)
    statement = f"the KL of {other.name} is not shown to be above that of {one.name}, at the last step (rise, nats)"
    return Check(statement, "fails" if rise.low > 0 else "holds", rise)


def _below_ideal(points: Sequence[Point], ideal: Ideal) -> Check:
    """Whether no policy has more reward - beta KL than the optimum, beta log Z, for any beta.

    Where few answers count the optimum comes out too low, which is a harder test of what was trained. Best-of-N, of
    which the bound of the KL is taken, is made of the same answers: it is tested where enough answers count alone. A
    policy far from the reference could not be above, whatever it earned: how many could is counted.

    Source: Rafailov et al. 2023, appendix A.1: the difference is beta KL(pi || pi*).
    """
    betas = np.array(ideal.betas)
    optima = [rewards - betas * kls for rewards, kls in zip(ideal.rewards, ideal.kls, strict=True)]
    found, able = [], 0
    for one in points:
        tried = betas if one.runs else betas[: ideal.num_sure]
        for place, beta in enumerate(tried):
            each = zip(one.rewards, one.kls, optima, strict=True)
            found.append((of_seeds([reward - beta * kl - best[:, place] for reward, kl, best in each]), one))
        highest = np.mean([best.mean(0) for best in optima], axis=0)[: len(tried)]
        able += bool((ideal.most - tried * one.kl.value > highest).any())
    over, point = max(found, key=lambda each: each[0].low)
    statement = (
        f"none of {len(points)} policies, Best-of-N among them, is above the ideal frontier at any of {len(betas)}"
        f" betas (reward - beta KL less its optimum; the largest: {point.name}); {able} of them would be,"
        f" with a reward of {ideal.most:.2g}"
    )
    return Check(statement, "fails" if over.low > 0 else "holds", over)
