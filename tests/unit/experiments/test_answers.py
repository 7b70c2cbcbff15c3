"""Experiment answers: its prompts out of distribution, and what its tables say of known rewards."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from dpo_cli.data.world import draw_tasks, task_of
from experiments.answers.measure import HELD_OUT
from experiments.answers.shifts import SHIFTS, is_new, shifted_tasks
from experiments.answers.tables import SFT, Measured


@pytest.mark.parametrize("shift", SHIFTS)
def test_prompts_of_a_shift_are_new_and_those_of_the_world_are_not(shift: str) -> None:
    tasks = shifted_tasks(shift, 200)
    assert len({task.prompt for task in tasks}) == 200
    assert {task.kind.rpartition(".")[2] for task in tasks} == {"en", "zh"}
    assert all(is_new(task) for task in tasks)
    assert all((task_of(task.prompt) is None) == (shift != "numbers") for task in tasks)
    assert all(task.reward(task.good) == 1 and task.good not in task.bad for task in tasks)
    assert not any(is_new(task) for task in islice(draw_tasks(3), 1000))


def test_good_answers_follow_by_the_rules_of_the_world() -> None:
    good = {task.prompt: task.good for shift in SHIFTS for task in shifted_tasks(shift, 200)}
    assert good["Add 1 to every number in the sentence.\nHenry has 60 keys and 62 boats."] == (
        "Henry has 61 keys and 63 boats."
    )
    assert good["Answer the message.\nMaria: I found my phone in the station."] == (
        "I am glad you have your phone back, Maria!"
    )
    assert good["回复这条消息。\n小丽：今天我找到了手表。"] == "小丽，你的手表回来了，真为你高兴！"


def test_win_rates_of_known_rewards(tmp_path: Path) -> None:
    """Good answers tie with the ground truth and win over bad ones; a method against itself is even."""
    rewards = {"sft": ([1, 0, 0, 0], [0, 0, 0, 1]), "dpo": ([1, 1, 0, 0], [1, 1, 0, 1])}
    tables = []
    for seed in (0, 1):
        rows = [
            {"prompts": HELD_OUT, "method": method, "temperature": 0.0, "prompt_id": str(place), "reward": float(good)}
            for method, runs in rewards.items()
            for place, good in reversed([*enumerate(runs[seed])])
        ]
        tables.append(tmp_path / f"{seed}.parquet")
        pl.DataFrame(rows).write_parquet(tables[-1])
    measured = Measured.read(tables)
    assert measured.win_rate([HELD_OUT], "dpo", 0.0).value == 5 / 8 / 2
    assert measured.win_rate([HELD_OUT], "dpo", 0.0, SFT).value == 0.5 + 3 / 8 / 2
    assert vars(measured.win_rate([HELD_OUT], SFT, 0.0, SFT)) == {"value": 0.5, "low": 0.5, "high": 0.5}
    np.testing.assert_array_equal(measured.wins([HELD_OUT], "dpo", 0.0, SFT), [[0.5, 1, 0.5, 0.5], [1, 1, 0.5, 0.5]])
    assert measured.lead([HELD_OUT], "dpo", SFT, 0.0).value == 3 / 8 / 2
