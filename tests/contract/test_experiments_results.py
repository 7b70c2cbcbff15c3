"""The committed results are those of the whole grids, and what must hold of them holds."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from markupsafe import escape
from ruamel.yaml import YAML

from experiments.cells import read_cells
from experiments.frontier import LABELS

FOLDER = Path(__file__).parents[2] / "experiments"
NAMES = pytest.mark.parametrize(("name", "num_seeds"), [("sentiment", 3), ("reviews", 2)])


def rows(table: str, name: str = "sentiment") -> list[dict[str, str]]:
    with (FOLDER / name / "results" / f"{table}.csv").open(encoding="utf-8") as file:
        return [*csv.DictReader(file)]


@NAMES
def test_every_cell_of_the_grid_has_a_point_of_all_seeds(name: str, num_seeds: int) -> None:
    grid = YAML(typ="safe").load((FOLDER / name / "grid.yaml").read_text(encoding="utf-8"))
    assert len(grid["seeds"]) == num_seeds
    expected = {(cell.method, "" if cell.value is None else f"{cell.value:g}") for cell in read_cells(grid, 1)}
    points = rows("points", name)
    trained = [row for row in points if row["steps"] and row["method"] != "sft"]
    assert {(row["method"], row["value"]) for row in trained} == expected
    assert {len(row["steps"].split()) for row in trained} == {num_seeds}
    assert {row["method"] for row in points} >= {"sft", "dpo", "ppo", "preferred-ft", "best-of-n", "best-of-n-gt"}
    for row in points:
        assert float(row["reward_low"]) <= float(row["reward"]) <= float(row["reward_high"])
        assert row["text"], "an answer to the same prompt at each point"


def test_what_theory_asks_holds_and_the_figures_say_so() -> None:
    verdicts = {row["statement"]: row["verdict"] for row in rows("checks")}
    assert "fails" not in verdicts.values()
    assert [verdict for statement, verdict in verdicts.items() if "KL of Preferred-FT" in statement].count("holds") == 3
    assert [statement for statement in verdicts if statement.endswith("earn more")], (
        "far from the reference DPO is better"
    )
    points = {(row["method"], row["value"]): row for row in rows("points")}
    sft, preferred = points["sft", ""], points["preferred-ft", ""]
    dpo = sorted((row for row in rows("points") if row["method"] == "dpo"), key=lambda row: float(row["value"]))
    assert max(float(row["reward_low"]) for row in dpo) > float(sft["reward_high"])
    assert max(float(row["reward_low"]) for row in dpo) > float(preferred["reward_high"])
    found = [row for row in rows("curves") if row["method"] == "dpo" and row["step"] == "300"]
    last = [[float(each["kl"]) for each in found if float(each["value"]) == float(row["value"])] for row in dpo]
    means = [sum(kls) / len(kls) for kls in last]
    assert means == sorted(means, reverse=True), "the KL falls as beta grows"


@NAMES
def test_the_page_loads_nothing_and_has_every_policy(name: str, num_seeds: int) -> None:
    page = (FOLDER / name / "results" / "index.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert page.count("<svg") == 2
    for row in rows("points", name):
        policy, text = f"{LABELS[row['method']]} {row['value']}".strip(), escape(row["text"])
        assert f'<tr><th scope="row">{policy}</th><td class="text">{text}</td></tr>' in page


@NAMES
def test_figures_are_files_of_their_own(name: str, num_seeds: int) -> None:
    for figure in ("frontier", "curves"):
        assert (FOLDER / name / "results" / f"{figure}.svg").read_text(encoding="utf-8").startswith("<svg xmlns=")


def test_every_training_of_answers_has_a_row_and_those_by_reward_beat_sft() -> None:
    grid = YAML(typ="safe").load((FOLDER / "answers" / "grid.yaml").read_text(encoding="utf-8"))
    trained = {row["method"]: len(row["steps"].split()) for row in rows("training", "answers")}
    assert trained == {
        **{cell.method: len(grid["seeds"]) for cell in read_cells(grid, 1)},
        **{f"{cell.method} {cell.value:g}": 1 for cell in read_cells({**grid, "cells": grid["also"]}, 1)},
    }
    rates = {(row["method"], row["temperature"]): row for row in rows("win_rates", "answers")}
    for method in ("dpo", "ppo", "rloo"):
        assert all(float(rates[method, temperature]["sft_low"]) > 0.5 for temperature in ("0", "1"))
