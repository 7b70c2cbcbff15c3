"""What is said of a grid's points: figures of one half of the prompts, and checks that a planted fault makes fail."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from experiments.cells import read_cells
from experiments.frontier import NUMBERS, Point, Results, checks, read_results

GRID: Mapping[str, Any] = {
    "seeds": [1, 2],
    "eval_steps": 10,
    "cells": [
        {"method": "dpo", "over": "train.beta", "values": [0.1, 5], "set": {"train.loss": "sigmoid"}},
        {"method": "ppo", "over": "ppo.target_kl", "values": [3], "reward": "learned"},
    ],
}


def test_a_cell_sets_the_seed_of_the_sections_that_it_sets() -> None:
    first, second, third = read_cells(GRID, 2)
    assert [cell.name for cell in (first, second, third)] == ["dpo-0.1-2", "dpo-5-2", "ppo-3-2"]
    assert first.settings == ("train.loss=sigmoid", "train.beta=0.1", "train.seed=2")
    assert (third.settings, third.reward) == (("ppo.target_kl=3", "ppo.seed=2"), "learned")


def test_checkpoints_are_chosen_on_one_half_and_reported_on_the_other(tmp_path: Path) -> None:
    """Step 10 is better on the prompts that are chosen on and worse on those that are reported: it is taken."""
    for seed in GRID["seeds"]:
        for cell in read_cells(GRID, seed):
            (tmp_path / "cells" / cell.name).mkdir(parents=True)
            for step, (even, odd) in {0: (0.9, 0.5), 10: (0.8, 0.2), 20: (0.7, 0.6)}.items():
                rows = [
                    {"prompt_id": f"{place:02}", "prompt": f"p{place}", "text": f"t{place}", "num_tokens": 3}
                    | {"reward": (even, odd)[place % 2], "kl": 1.0, "k1": 1.0, "finished": True}
                    for place in reversed(range(6))
                ]
                pl.DataFrame(rows).write_parquet(tmp_path / "cells" / cell.name / f"{step:05}.parquet")
        samples = np.random.default_rng(seed).random((3, max(NUMBERS)))
        np.savez(tmp_path / f"reference-{seed}.npz", known=samples, learned=samples)
    results = read_results(tmp_path, GRID)
    sft, *trained = results.points
    assert (sft.method, sft.reward.value) == ("sft", pytest.approx(0.5))
    assert [(point.name, [*point.steps]) for point in trained] == [
        ("DPO 0.1", [10, 10]),
        ("DPO 5", [10, 10]),
        ("PPO, learned reward 3", [10, 10]),
    ]
    assert trained[0].reward.value == pytest.approx(0.2)
    assert trained[0].text == "t1"


def results(**changes: tuple[float, float]) -> Results:
    """Points at (KL, reward) that theory allows, some of them changed; a name is method_value."""
    places = {
        "sft": (0, 0.5), "dpo_0.1": (4, 0.8), "dpo_1": (1, 0.7), "dpo_5": (0.1, 0.6), "preferred-ft": (0.2, 0.55),
        "ppo_6": (4, 0.8), "ppo-gt_6": (4, 0.82),
    } | changes  # fmt: skip
    noise = np.random.default_rng(0).normal(0, 0.01, 40)
    points = []
    for name, (kl, reward) in places.items():
        method, _, value = name.partition("_")
        runs = [reward + noise, reward - noise]
        points.append(Point(method, float(value) if value else None, runs, [np.full(40, float(kl))] * 2))
    return Results(points, {}, [(0.0, 0.5), (0.1, 0.65), (1.0, 0.9), (5.0, 1.0)], [], "")


def failed(found: Results) -> list[str]:
    return [check.statement for check in checks(found) if check.fails]


def test_what_theory_allows_passes() -> None:
    assert failed(results()) == []


@pytest.mark.parametrize(
    ("changes", "statement"),
    [
        ({"dpo_0.1": (4, 0.5), "dpo_1": (1, 0.5), "dpo_5": (0.1, 0.5)}, "earns more than SFT"),
        ({"preferred-ft": (0.2, 0.65)}, "DPO 5 earns more than Preferred-FT, with no more KL"),
        ({"preferred-ft": (0.05, 0.51)}, "no point of DPO has as little KL as Preferred-FT"),
        ({"dpo_5": (2, 0.75)}, "the KL of DPO falls as beta grows"),
        ({"dpo_1": (1, 0.95)}, "no point is above the ideal frontier (the highest: DPO 1)"),
        ({"ppo-gt_6": (4, 0.7)}, "PPO, true reward 6, is as good as PPO, learned reward 6"),
    ],
)
def test_a_planted_fault_is_named(changes: dict[str, tuple[float, float]], statement: str) -> None:
    assert [found for found in failed(results(**changes)) if statement in found]
