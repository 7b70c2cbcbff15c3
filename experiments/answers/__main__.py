"""``python -m experiments.answers``: run what is left of the experiment, and write its results."""

from __future__ import annotations

from contextlib import chdir
from pathlib import Path
from typing import Annotated, Any

import typer
from ruamel.yaml import YAML

from dpo_cli.cli.console import ConsoleReporter
from dpo_cli.cli.exits import errors_as_exit_codes
from dpo_cli.core.artifacts import write_text
from dpo_cli.core.environment import prepare_environment
from dpo_cli.core.progress import Reporter
from dpo_cli.judging.known_reward import world_reward
from dpo_cli.models.load import quiet_libraries
from dpo_cli.report.figures import standalone
from experiments.answers.figures import shift_chart, temperature_chart
from experiments.answers.measure import measure, prepare
from experiments.answers.tables import SFT, TRUTH, Measured, rate_rows, shift_rows, training_rows, write_csv
from experiments.cells import read_cells, run_cell

_HERE = Path(__file__).resolve().parent


def run_answers(grid: dict[str, Any], work: Path, results: Path, reporter: Reporter) -> Measured:
    """Do what is left of a grid, and write its results.

    Args:
        grid: What is trained and asked, as grid.yaml has it.
        work: The project and what is kept of the trainings.
        results: Where tables and figures go.
        reporter: Shows progress.

    Raises:
        Interrupted: The user asked to stop; what was done is kept.
    """
    work, results = work.resolve(), results.resolve()
    cells, rewards = work / "cells", [work / f"rewards-{seed}.parquet" for seed in grid["seeds"]]
    last: dict[str, list[Path]] = {}
    work.mkdir(parents=True, exist_ok=True)
    with chdir(work):
        prepare(grid, reporter)
        for seed, table in zip(grid["seeds"], rewards, strict=True):
            mine = read_cells(grid, seed)
            more = read_cells({**grid, "cells": grid.get("also", [])}, seed) if seed == grid["seeds"][0] else []
            for cell in [*mine, *more]:
                run_cell(cell, world_reward, cells, reporter, keeps_adapter=True)
                name = cell.method if cell.value is None else f"{cell.method} {cell.value:g}"
                last.setdefault(name, []).append(max((cells / cell.name).glob("*.parquet")))
            measure(seed, grid, {cell.method: cells / cell.name / "adapter" for cell in mine}, table, reporter)
    measured = Measured.read(rewards)
    results.mkdir(parents=True, exist_ok=True)
    write_csv(results / "win_rates.csv", rate_rows(measured))
    write_csv(results / "out_of_distribution.csv", shift_rows(measured))
    write_csv(results / "training.csv", training_rows(last))
    charts = [temperature_chart(measured, against) for against in (TRUTH, SFT)]
    charts += [shift_chart(measured, float(min(grid["shift_temperatures"])))]
    for chart in charts:
        write_text(results / f"{chart.slug}.svg", standalone(chart))
    return measured


def main(
    grid: Annotated[str, typer.Option(help="File of the grid beside this one: grid.yaml, or fast.yaml.")] = "grid.yaml",
) -> None:
    """Run what is left of the experiment, and write its results.

    Killed or stopped it goes on where it was.
    """
    with errors_as_exit_codes(as_json=False):
        name = Path(grid).stem
        work = _HERE / "work" / name
        results = _HERE / "results" if name == "grid" else work / "results"
        told = YAML(typ="safe").load((_HERE / grid).read_text(encoding="utf-8"))
        run_answers(told, work, results, ConsoleReporter(show_tables=False))
        typer.echo(f"{results}")


if __name__ == "__main__":
    prepare_environment()
    quiet_libraries()
    typer.run(main)
