"""Win rates by temperature, in and out of distribution, with their intervals, as CSV files.

The judge is the known reward: of two answers the one with reward 1 wins over one with reward 0, and equal rewards tie,
which counts one half. So against the ground truth, whose reward is 1, a win rate is half the rate of good answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from dpo_cli.statistics.intervals import Estimate, Sampling, exact_interval
from experiments.answers.measure import HELD_OUT
from experiments.answers.shifts import SHIFTS

SAMPLING = Sampling(draws=2000, confidence=0.95, seed=0)
SFT, DPO, TRUTH = "sft", "dpo", "ground truth"
ALL_SHIFTS = "all shifts"


@dataclass(frozen=True)
class Measured:
    """The rewards of all answers.

    Attributes:
        rewards: Of each seed float64 [prompts], by prompts, method and temperature; prompts in the order of their ids.
    """

    rewards: Mapping[tuple[str, str, float], Sequence[np.ndarray]]

    @classmethod
    def read(cls, tables: Sequence[Path]) -> Measured:
        """Read what was measured, a table a seed."""
        found: dict[tuple[str, str, float], list[np.ndarray]] = {}
        for table in tables:
            for (prompts, method, temperature), rows in pl.read_parquet(table).group_by(
                "prompts", "method", "temperature", maintain_order=True
            ):
                rewards = rows.sort("prompt_id")["reward"].to_numpy()
                found.setdefault((str(prompts), str(method), float(temperature)), []).append(rewards)  # type: ignore[arg-type]
        return cls(found)

    @property
    def methods(self) -> list[str]:
        """All of them, as they were measured."""
        return list(dict.fromkeys(method for _, method, _ in self.rewards))

    def temperatures(self, prompts: str, method: str) -> list[float]:
        """Those at which a method answered some prompts."""
        return sorted(temperature for *place, temperature in self.rewards if place == [prompts, method])

    def wins(self, prompts: Sequence[str], method: str, temperature: float, against: str) -> list[np.ndarray]:
        """How probably a method's answer wins over the ground truth or another method's: of each seed [prompts]."""
        return [
            np.concatenate([(1 + one - other) / 2 for one, other in zip(ours, theirs, strict=True)])
            for ours, theirs in zip(
                self._by_seed(prompts, method, temperature), self._by_seed(prompts, against, temperature), strict=True
            )
        ]

    def win_rate(self, prompts: Sequence[str], method: str, temperature: float, against: str = TRUTH) -> Estimate:
        """Win rate with its interval, seeds drawn, then prompts.

        Where all answers or none tie with the ground truth the bootstrap knows nothing, and the interval is the exact
        one, each prompt counting once.
        """
        wins = self.wins(prompts, method, temperature, against)
        found = SAMPLING.of_runs(wins, same_prompts=True)
        if against == TRUTH and found.low == found.high:
            low, high = exact_interval(2 * found.value * len(wins[0]), len(wins[0]), SAMPLING.confidence)
            return Estimate(found.value, low / 2, high / 2)
        return found

    def lead(self, prompts: Sequence[str], one: str, other: str, temperature: float) -> Estimate:
        """Win rate of a method against the ground truth less another's, paired by seed and prompt.

        Where no prompt tells them apart the interval is the exact one of none among as many.
        """
        both = (self.wins(prompts, method, temperature, TRUTH) for method in (one, other))
        found = SAMPLING.of_runs([ours - theirs for ours, theirs in zip(*both, strict=True)], same_prompts=True)
        if found.low == found.high == 0:
            size = len(self.wins(prompts, one, temperature, TRUTH)[0])
            end = exact_interval(0, size, SAMPLING.confidence)[1] / 2
            return Estimate(0.0, -end, end)
        return found

    def _by_seed(self, prompts: Sequence[str], method: str, temperature: float) -> list[tuple[np.ndarray, ...]]:
        if method == TRUTH:
            return [tuple(map(np.ones_like, seed)) for seed in self._by_seed(prompts, SFT, temperature)]
        return [*zip(*(self.rewards[name, method, temperature] for name in prompts), strict=True)]


def groups_of(measured: Measured) -> dict[str, list[str]]:
    """What a row of the second table is about: the held-out prompts, each shift, and all shifts together."""
    return {HELD_OUT: [HELD_OUT], **{shift: [shift] for shift in SHIFTS}, ALL_SHIFTS: [*SHIFTS]}


def rate_rows(measured: Measured) -> list[dict[str, Any]]:
    """Win rates of each method on held-out prompts at each temperature (the paper's figures 2, right, and 3)."""
    return [
        {"method": method, "temperature": f"{temperature:g}"}
        | _columns("truth", measured.win_rate([HELD_OUT], method, temperature))
        | _columns("sft", measured.win_rate([HELD_OUT], method, temperature, SFT))
        for method in measured.methods
        for temperature in measured.temperatures(HELD_OUT, method)
    ]


def shift_rows(measured: Measured) -> list[dict[str, Any]]:
    """Win rates against the ground truth in and out of distribution, and what DPO leads by (the paper's table 1)."""
    shift = next(iter(SHIFTS))
    trained = [method for method in measured.methods if measured.temperatures(shift, method)]
    rows = []
    for name, prompts in groups_of(measured).items():
        for temperature in measured.temperatures(shift, DPO):
            row = {"prompts": name, "temperature": f"{temperature:g}"}
            found = {method: measured.win_rate(prompts, method, temperature) for method in trained}
            found |= {
                f"{DPO} - {method}": measured.lead(prompts, DPO, method, temperature)
                for method in trained
                if method != DPO
            }
            size = len(measured.wins(prompts, DPO, temperature, TRUTH)[0])
            rows += [
                row | {"num_prompts": size, "method": method} | _columns("win_rate", each)
                for method, each in found.items()
            ]
    return rows


def training_rows(tables: Mapping[str, Sequence[Path]]) -> list[dict[str, Any]]:
    """Where each training ended: steps, good answers and KL from the reference at temperature 1, by method.

    Args:
        tables: By method, what its cell of each seed measured last, named by the step.
    """
    rows = []
    for method, runs in tables.items():
        last = [pl.read_parquet(run).sort("prompt_id") for run in runs]
        rewards, kls = ([table[name].to_numpy() for table in last] for name in ("reward", "kl"))
        row = {"method": method, "steps": " ".join(str(int(run.stem)) for run in runs)}
        row |= _columns("good", SAMPLING.of_runs(rewards, same_prompts=True))
        rows.append(row | _columns("kl", SAMPLING.of_runs(kls, same_prompts=True)))
    return rows


def _columns(name: str, estimate: Estimate) -> dict[str, str]:
    return {
        name: f"{estimate.value:.4f}",
        f"{name}_low": f"{estimate.low:.4f}",
        f"{name}_high": f"{estimate.high:.4f}",
    }
