"""What came of a grid: reward against KL with intervals, Best-of-N, the ideal frontier, and what holds between them.

A cell's checkpoint is chosen on one half of the held-out prompts, by its reward; its figures are those on the other
half. Intervals are drawn seed by seed, then prompt by prompt.
"""

from __future__ import annotations

import csv
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from dpo_cli.core.artifacts import write_text
from dpo_cli.statistics.best_of_n import best_of_n, best_of_n_kl_bound, ideal_frontier
from dpo_cli.statistics.intervals import Estimate, Sampling
from experiments.cells import Cell, read_cells

SAMPLING = Sampling(draws=2000, confidence=0.95, seed=0)
IDEAL_BETAS = tuple(float(beta) for beta in np.geomspace(3.0, 0.03, 25))
NUMBERS = (1, 2, 4, 8, 16, 32, 64, 128)
NOISE = 0.02
"""How far a point may lie above the ideal frontier by the noise of both."""


@dataclass(frozen=True)
class Point:
    """A cell, or a policy that is not trained, over all seeds.

    Attributes:
        method: ``dpo``, ``best-of-n``, ...
        value: Its setting; None where it has none.
        rewards: Of each seed float64 [prompts].
        kls: The same, nats; of Best-of-N its bound.
        steps: The checkpoint of each seed.
        text: An answer to the first prompt of the first seed.
    """

    method: str
    value: float | None
    rewards: Sequence[np.ndarray]
    kls: Sequence[np.ndarray]
    steps: Sequence[int] = ()
    text: str = ""

    @property
    def name(self) -> str:
        """As tables and figures have it."""
        return self.method if self.value is None else f"{self.method} {self.value:g}"

    @property
    def reward(self) -> Estimate:
        """Mean reward."""
        return SAMPLING.of_runs(self.rewards, same_prompts=False)

    @property
    def kl(self) -> Estimate:
        """Mean KL from the reference, nats an answer."""
        return SAMPLING.of_runs(self.kls, same_prompts=False)


@dataclass(frozen=True)
class Results:
    """All points of a grid.

    Attributes:
        points: Trained policies, at the checkpoints that were chosen; the reference first.
        best_of_n: By the learned reward and by the known one.
        ideal: Mean (KL, reward) where enough of the reference's answers count.
        curves: Mean reward and KL of each measured step.
        prompt: Whose answers the points show.
    """

    points: Sequence[Point]
    best_of_n: Mapping[str, Sequence[Point]]
    ideal: Sequence[tuple[float, float]]
    curves: Sequence[dict[str, Any]]
    prompt: str

    def of(self, method: str) -> list[Point]:
        """The points of a method, by their KL."""
        return sorted((point for point in self.points if point.method == method), key=lambda point: point.kl.value)

    def ideal_reward(self, kl: float) -> float:
        """The ideal reward at a KL; NaN beyond what the reference's answers tell."""
        kls, rewards = zip(*self.ideal, strict=True)
        return float(np.interp(kl, kls, rewards, right=math.nan))


def read_results(work: Path, grid: Mapping[str, Any]) -> Results:
    """Read what the cells of a grid measured.

    Raises:
        FileNotFoundError: A cell has not been run.
    """
    by_name: dict[str, list[tuple[Cell, int, pl.DataFrame]]] = {}
    curves = []
    start: list[pl.DataFrame] = []
    for seed in grid["seeds"]:
        for cell in read_cells(grid, seed):
            tables = {
                int(path.stem): pl.read_parquet(path) for path in sorted((work / "cells" / cell.name).glob("*.parquet"))
            }
            for step, table in tables.items():
                curves.append(
                    {"method": cell.method, "value": cell.value, "seed": seed, "step": step}
                    | {name: table[name].mean() for name in ("reward", "kl", "k1", "num_tokens", "finished")}
                )
            chosen = max(
                (step for step in tables if step), key=lambda step: _half(tables[step], 0)["reward"].to_numpy().mean()
            )
            by_name.setdefault(cell.name.rpartition("-")[0], []).append((cell, chosen, _half(tables[chosen], 1)))
            if len(start) < len(grid["seeds"]) and cell == read_cells(grid, seed)[0]:
                start.append(_half(tables[0], 1))
    points = [_point("sft", None, [0] * len(start), start)]
    for runs in by_name.values():
        cell = runs[0][0]
        points.append(_point(cell.method, cell.value, [step for _, step, _ in runs], [table for *_, table in runs]))
    samples = [np.load(work / f"reference-{seed}.npz") for seed in grid["seeds"]]
    numbers = [number for number in NUMBERS if number <= samples[0]["known"].shape[1]]
    bounds = best_of_n_kl_bound(numbers)
    bests: dict[str, list[Point]] = {}
    for name, by in (("best-of-n", "learned"), ("best-of-n-gt", "known")):
        found = [best_of_n(each[by], each["known"], numbers) for each in samples]
        bests[name] = [
            Point(name, float(number), [one[:, place] for one in found],
                  [np.full(len(one), bounds[place]) for one in found])
            for place, number in enumerate(numbers)
        ]  # fmt: skip
    frontiers = [ideal_frontier(each["known"], IDEAL_BETAS) for each in samples]
    valid = np.all([each.valid_B for each in frontiers], axis=0)
    kls = np.mean([each.kls_PB.mean(0) for each in frontiers], axis=0)
    rewards = np.mean([each.rewards_PB.mean(0) for each in frontiers], axis=0)
    ideal = [(0.0, points[0].reward.value), *zip(kls[valid].tolist(), rewards[valid].tolist(), strict=True)]
    return Results(points, bests, sorted(ideal), curves, start[0]["prompt"][0])


def _half(table: pl.DataFrame, half: int) -> pl.DataFrame:
    """Every other prompt, in the order of their ids: half 0 to choose on, half 1 to report."""
    return table.sort("prompt_id")[half::2]


def _point(method: str, value: float | None, steps: Sequence[int], tables: Sequence[pl.DataFrame]) -> Point:
    rewards, kls = ([table[name].to_numpy() for table in tables] for name in ("reward", "kl"))
    return Point(method, value, rewards, kls, steps, tables[0]["text"][0])


# --- what holds -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Check:
    """A statement about the points.

    Attributes:
        statement: In words.
        difference: What it is about, with its interval.
        holds: Whether it does: for a difference, beyond noise.
        is_required: Whether the paper's theory asks for it; the others are told as they are.
    """

    statement: str
    difference: Estimate
    holds: bool
    is_required: bool

    @property
    def fails(self) -> bool:
        """Whether it must hold and does not."""
        return self.is_required and not self.holds


def checks(results: Results) -> list[Check]:
    """What theory asks of the points, and who wins otherwise."""
    sft, dpo = results.points[0], results.of("dpo")
    best = max(dpo, key=lambda point: point.reward.value)
    found = [_above(f"{best.name} earns more than SFT", best, sft, required=True)]
    for other in results.of("preferred-ft"):
        found.append(_at_no_more_kl(dpo, other, required=True))
    kls = [point.kl.value for point in sorted(dpo, key=lambda point: point.value or 0)]
    falls = max((later - earlier for earlier, later in itertools.pairwise(kls)), default=0.0)
    found.append(
        Check("KL of dpo falls as beta grows (largest rise)", Estimate(falls, math.nan, math.nan), falls <= 0, True)
    )
    above = [
        (point.reward.low - results.ideal_reward(point.kl.high), point)
        for point in results.points[1:]
        if not math.isnan(results.ideal_reward(point.kl.high))
    ]
    if above:
        most, point = max(above, key=lambda each: each[0])
        found.append(
            Check(f"no point is above the ideal frontier (the highest: {point.name})",
                  Estimate(most, math.nan, math.nan), most <= NOISE, True)
        )  # fmt: skip
    truth, learned = results.of("ppo-gt"), results.of("ppo")
    for one in truth:
        for other in learned:
            if one.value == other.value:
                found.append(_not_below(f"{one.name} (true reward) is as good as {other.name} (learned)", one, other))
    for method in ("unlikelihood", "ppo", "ppo-gt"):
        found += [_at_no_more_kl(dpo, other, required=False) for other in results.of(method)]
    return found


def _difference(one: Point, other: Point) -> Estimate:
    """Of the rewards, paired by prompt."""
    return SAMPLING.of_runs([a - b for a, b in zip(one.rewards, other.rewards, strict=True)], same_prompts=False)


def _above(statement: str, one: Point, other: Point, *, required: bool) -> Check:
    difference = _difference(one, other)
    return Check(statement, difference, difference.low > 0, required)


def _not_below(statement: str, one: Point, other: Point) -> Check:
    difference = _difference(one, other)
    return Check(statement, difference, difference.high >= 0, True)


def _at_no_more_kl(dpo: Sequence[Point], other: Point, *, required: bool) -> Check:
    """Whether some dpo point with no more KL than another one's earns more than it."""
    nearer = [point for point in dpo if point.kl.value <= other.kl.value]
    if not nearer:
        return Check(
            f"no dpo point has as little KL as {other.name}", Estimate(math.nan, math.nan, math.nan), False, required
        )
    best = max(nearer, key=lambda point: point.reward.value)
    return _above(f"{best.name} earns more than {other.name}, with no more KL", best, other, required=required)


# --- files ------------------------------------------------------------------------------------


def write_results(title: str, work: Path, grid: Mapping[str, Any], folder: Path) -> list[Check]:
    """Write points.csv, ideal.csv, curves.csv, checks.csv, texts.json, the figures and index.html."""
    from experiments.page import write_page

    results = read_results(work, grid)
    folder.mkdir(parents=True, exist_ok=True)
    points = [*results.points, *(point for found in results.best_of_n.values() for point in found)]
    _write_csv(folder / "points.csv", [_row(point) for point in points])
    _write_csv(folder / "ideal.csv", [{"kl": _short(kl), "reward": _short(reward)} for kl, reward in results.ideal])
    _write_csv(folder / "curves.csv", [{name: _short(value) for name, value in row.items()} for row in results.curves])
    held = checks(results)
    _write_csv(
        folder / "checks.csv",
        [
            {"holds": check.holds, "required": check.is_required, "statement": check.statement}
            | dict(zip(("difference", "low", "high"), map(_short, vars(check.difference).values()), strict=True))
            for check in held
        ],
    )
    texts = {"prompt": results.prompt, "answers": {point.name: point.text for point in results.points}}
    write_text(folder / "texts.json", json.dumps(texts, indent=1, ensure_ascii=False) + "\n")
    write_page(title, results, held, grid, folder)
    return held


def _row(point: Point) -> dict[str, Any]:
    reward, kl = point.reward, point.kl
    return {
        "method": point.method,
        "value": "" if point.value is None else f"{point.value:g}",
        **dict(zip(("reward", "reward_low", "reward_high"), map(_short, vars(reward).values()), strict=True)),
        **dict(zip(("kl", "kl_low", "kl_high"), map(_short, vars(kl).values()), strict=True)),
        "steps": " ".join(map(str, point.steps)),
    }


def _short(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return "" if math.isnan(value) else f"{value:.4f}"


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
