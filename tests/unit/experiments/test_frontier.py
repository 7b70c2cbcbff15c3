"""What is said of a grid's points: figures of one half of the prompts, and checks that a planted fault makes fail."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from dpo_cli.core.errors import ParamsError, StaleArtifactError
from experiments.cells import read_cells
from experiments.frontier import NUMBERS, Ideal, Point, Results, Run, checks, read_results
from experiments.grid import read_grid

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


def write_cells(work: Path, rewards: Mapping[int, tuple[float, float]]) -> None:
    """Every cell of the grid with a table a step, each with two rewards: of the prompts in even and in odd places."""
    for seed in GRID["seeds"]:
        for cell in read_cells(GRID, seed):
            folder = work / "cells" / cell.name
            folder.mkdir(parents=True)
            for step, (even, odd) in rewards.items():
                rows = [
                    {"prompt_id": f"{place:02}", "prompt": f"p{place}", "text": f"t{place}", "num_tokens": 3}
                    | {"reward": (even, odd)[place % 2], "kl": 1.0, "k1": 1.0, "finished": True}
                    for place in reversed(range(6))
                ]
                pl.DataFrame(rows).write_parquet(folder / f"{step:05}.parquet", metadata={"key": "now"})
            (folder / "cell.json").write_text(json.dumps({"key": "now"}), encoding="utf-8")
        samples = np.random.default_rng(seed).random((3, max(NUMBERS)))
        ids, texts = np.array(["01", "03", "05"]), np.array([f"s{place}" for place in range(max(NUMBERS))])
        np.savez(work / f"reference-{seed}.npz", known=samples, learned=samples, prompt_ids=ids, texts=texts)


def test_checkpoints_are_chosen_on_one_half_and_reported_on_the_other(tmp_path: Path) -> None:
    """Step 10 is better on the prompts that are chosen on and worse on those that are reported: it is taken."""
    write_cells(tmp_path, {0: (0.9, 0.5), 10: (0.8, 0.2), 20: (0.7, 0.6)})
    results = read_results(tmp_path, GRID)
    sft, *trained = results.points
    assert (sft.method, sft.reward.value) == ("sft", pytest.approx(0.5))
    assert [(point.name, [run.step for run in point.runs]) for point in trained] == [
        ("DPO 0.1", [10, 10]),
        ("DPO 5", [10, 10]),
        ("PPO, learned reward 3", [10, 10]),
    ]
    assert trained[0].reward.value == pytest.approx(0.2)
    assert trained[0].text == "t1"
    best = np.load(tmp_path / "reference-1.npz")["learned"][0].argmax()
    assert results.best_of_n["best-of-n"][-1].text == f"s{best}"


def test_what_was_measured_with_other_settings_or_not_to_its_end_is_no_result(tmp_path: Path) -> None:
    write_cells(tmp_path, {0: (0.5, 0.5), 10: (0.8, 0.2)})
    folder = tmp_path / "cells" / "dpo-5-2"
    pl.read_parquet(folder / "00010.parquet").with_columns(reward=pl.lit(0.9)).write_parquet(
        folder / "00007.parquet", metadata={"key": "then"}
    )
    assert read_results(tmp_path, GRID).of("dpo")[1].runs[1].step == 10
    (folder / "cell.json").unlink()
    with pytest.raises(StaleArtifactError, match="cell.json is missing; run the experiment again"):
        read_results(tmp_path, GRID)


def test_the_ideal_begins_with_the_reference_and_rises(tmp_path: Path) -> None:
    write_cells(tmp_path, {0: (0.5, 0.5), 10: (0.8, 0.2)})
    ideal = read_results(tmp_path, GRID).ideal
    kls, rewards = zip(*ideal.curve, strict=True)
    assert [*kls] == sorted(kls)
    assert [*rewards] == sorted(rewards)
    assert rewards[0] == pytest.approx(
        np.mean([np.load(tmp_path / f"reference-{seed}.npz")["known"] for seed in (1, 2)])
    )


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
        tables = [
            pl.DataFrame({"reward": reward + sign * noise, "kl": np.full(40, float(kl)), "text": [""] * 40})
            for sign in (1, -1)
        ]
        points.append(Point.of(method, float(value) if value else None, [Run(10, each, each, each) for each in tables]))
    betas = [0.5, 0.1]
    best = [np.tile([0.65, 0.9], (40, 1))] * 2
    ideal = Ideal(betas, best, [np.tile([0.1, 1.0], (40, 1))] * 2, 2, 40.0, 0.5, 1.5)
    bests = [Point("best-of-n", 4.0, (), [np.full(40, 0.6)] * 2, [np.full(40, 0.5)] * 2)]
    return Results(points, {"best-of-n": bests}, ideal, [], "")


def failed(found: Results) -> list[str]:
    return [check.statement for check in checks(found) if check.verdict == "fails"]


def test_what_theory_allows_passes() -> None:
    assert failed(results()) == []


@pytest.mark.parametrize(
    ("changes", "statement"),
    [
        ({"dpo_0.1": (4, 0.5), "dpo_1": (1, 0.5), "dpo_5": (0.1, 0.5)}, "earns more than SFT"),
        ({"preferred-ft": (0.2, 0.85)}, "DPO 0.1 earns more than Preferred-FT"),
        ({"preferred-ft": (0.2, 0.65)}, "DPO 5 and DPO 1, mixed to the KL of Preferred-FT, are not shown to earn less"),
        ({"preferred-ft_1": (0.5, 0.648)}, "DPO 5 and DPO 1, mixed to the KL of Preferred-FT 1, earn more"),
        ({"preferred-ft": (0.05, 0.59)}, "SFT, the reference and DPO 5, mixed to the KL of Preferred-FT"),
        ({"dpo_5": (2, 0.75)}, "the KL of DPO 5 is not shown to be above that of DPO 1"),
        ({"dpo_1": (1, 0.95)}, "none of 7 policies, Best-of-N among them, is above the ideal frontier"),
        ({"dpo_0.1": (4, 1.3)}, "the largest: DPO 0.1)"),
        (
            {"ppo-gt_6": (4, 0.7)},
            "PPO, true reward 6, is not shown to earn less than PPO, learned reward 6, at the last step",
        ),
    ],
)
def test_a_planted_fault_is_named(changes: dict[str, tuple[float, float]], statement: str) -> None:
    assert [found for found in failed(results(**changes)) if statement in found]


@pytest.mark.parametrize(("reward", "verdict"), [(0.5, "more"), (0.9, "less"), (0.7, "not told apart")])
def test_another_method_may_win(reward: float, verdict: str) -> None:
    (check,) = (each for each in checks(results(unlikelihood=(1, reward))) if "beside Unlikelihood" in each.statement)
    assert (check.verdict, check.statement) == (verdict, "DPO 1, the nearest in KL, beside Unlikelihood")


def test_policies_far_apart_in_kl_are_not_compared() -> None:
    found = {
        check.statement: check.verdict for check in checks(results(unlikelihood=(7, 0.9), **{"preferred-ft": (7, 0.9)}))
    }
    assert found["DPO 0.1, the nearest in KL, beside Unlikelihood"] == "too far in KL"
    assert found["no policy of DPO has as much KL as Preferred-FT"] == "not checked"
    assert found["DPO 0.1 beside Best-of-N, learned reward 4"] == "more"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "grid.yaml is missing; there are grid.yaml and fast.yaml"),
        ("", "is no grid, it lacks seeds, cells, eval_steps"),
        ("seeds: [1]\ncells: []\n", "is no grid, it lacks eval_steps"),
        ("seeds: [1\n", r"grid.yaml, line 2, column 1: not valid YAML"),
    ],
)
def test_what_is_no_grid_is_refused(tmp_path: Path, text: str | None, words: str) -> None:
    if text is not None:
        (tmp_path / "grid.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ParamsError, match=words):
        read_grid(tmp_path, "grid.yaml")
