"""The committed results of the sentiment experiment: of the whole grid, and what theory asks of them holds."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from experiments.cells import read_cells

FOLDER = Path(__file__).parents[2] / "experiments" / "sentiment"


def rows(name: str) -> list[dict[str, str]]:
    with (FOLDER / "results" / f"{name}.csv").open(encoding="utf-8") as file:
        return [*csv.DictReader(file)]


def test_every_cell_of_the_grid_has_a_point_of_all_seeds() -> None:
    grid = YAML(typ="safe").load((FOLDER / "grid.yaml").read_text(encoding="utf-8"))
    assert len(grid["seeds"]) >= 3
    expected = {(cell.method, "" if cell.value is None else f"{cell.value:g}") for cell in read_cells(grid, 1)}
    trained = [row for row in rows("points") if row["steps"] and row["method"] != "sft"]
    assert {(row["method"], row["value"]) for row in trained} == expected
    assert {len(row["steps"].split()) for row in trained} == {len(grid["seeds"])}


def test_what_theory_asks_holds_and_the_figures_say_so() -> None:
    assert "fails" not in {row["verdict"] for row in rows("checks")}
    points = {(row["method"], row["value"]): row for row in rows("points")}
    sft, preferred = points["sft", ""], points["preferred-ft", ""]
    dpo = sorted((row for row in rows("points") if row["method"] == "dpo"), key=lambda row: float(row["value"]))
    assert max(float(row["reward_low"]) for row in dpo) > float(sft["reward_high"])
    assert any(
        float(row["kl"]) <= float(preferred["kl_high"]) and float(row["reward"]) > float(preferred["reward"])
        for row in dpo
    )
    last = {
        row["value"]: [float(each["kl"]) for each in rows("curves") if each["value"] == row["value"] and
                       each["method"] == "dpo" and each["step"] == "300"]
        for row in dpo
    }  # fmt: skip
    means = [sum(found) / len(found) for found in last.values()]
    assert means == sorted(means, reverse=True), "the KL falls as beta grows"


def test_the_page_loads_nothing_and_has_every_policy() -> None:
    page = (FOLDER / "results" / "index.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert page.count("<svg") == 2
    for label in (
        "DPO 0.05",
        "PPO, learned reward 12",
        "PPO, true reward 3",
        "Unlikelihood 1",
        "Best-of-N, true reward 128",
    ):
        assert label in page


@pytest.mark.parametrize("name", ["frontier", "curves"])
def test_figures_are_files_of_their_own(name: str) -> None:
    assert (FOLDER / "results" / f"{name}.svg").read_text(encoding="utf-8").startswith("<svg xmlns=")
