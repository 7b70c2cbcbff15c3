"""The experiment: one project, trainings of several methods and seeds in it, and what these answer."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import chdir
from pathlib import Path
from typing import Any

import polars as pl

from dpo_cli.core.artifacts import write_text
from dpo_cli.core.progress import Reporter, SilentReporter
from dpo_cli.judging.known_reward import world_reward
from dpo_cli.report.figures import standalone
from experiments.answers.figures import shift_chart, temperature_chart
from experiments.answers.measure import PARAMS, measure, prepare
from experiments.answers.tables import SFT, TRUTH, Measured, rate_rows, shift_rows, training_rows
from experiments.cells import Cell, measured_tables, read_cells, run_cell
from experiments.grid import begin_worker, read_grid, refuse_other, wait_for


class Answers:
    """Win rates by temperature, and out of distribution."""

    folder = Path(__file__).parent

    def run(self, grid_file: str, work: Path, workers: int, reporter: Reporter) -> Path:
        """Do what is left of a grid, and write its results.

        Args:
            grid_file: ``grid.yaml``, or a smaller one.
            work: Where it works, and goes on.
            workers: Processes that train or answer at once.
            reporter: Shows progress.

        Returns:
            The folder of the results: that of the experiment for its whole grid, else one beside the work.

        Raises:
            ParamsError: There is no such grid.
            StaleArtifactError: What was begun in the folder was begun with other settings.
            Interrupted: The user asked to stop; what was done is kept.
        """
        grid = read_grid(self.folder, grid_file)
        os.environ.pop("DPO_MODEL_PATH", None)  # of another experiment; the model of this one is embedded
        work.mkdir(parents=True, exist_ok=True)
        work = work.resolve()
        params = PARAMS.read_text(encoding="utf-8")
        refuse_other(work, {"params": params} | {name: grid.get(name, {}) for name in ("set", "rows")})
        with chdir(work):
            prepare(grid, reporter)
        first, *_ = seeds = grid["seeds"]
        cells = [cell for seed in seeds for cell in read_cells(grid, seed)]
        cells += read_cells({**grid, "cells": grid.get("also", [])}, first)
        phases: list[tuple[Callable[..., str], Sequence[Any]]] = [(_train, cells), (_measure, seeds)]
        with (
            ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), begin_worker) as pool,
            reporter.meter("answers: trainings, and what they answer", len(cells) + len(seeds), "parts") as meter,
        ):
            for function, parts in phases:
                wait_for([pool.submit(function, part, grid, work) for part in parts], pool, meter)
        results = (self.folder if grid_file == "grid.yaml" else work) / "results"
        write_results(grid, cells, work, results)
        return results


EXPERIMENT = Answers()


def write_results(grid: Mapping[str, Any], cells: list[Cell], work: Path, results: Path) -> None:
    """Write the tables and figures of what was trained and measured."""
    measured = Measured.read([_rewards(work, seed) for seed in grid["seeds"]])
    last: dict[str, list[Path]] = {}
    for cell in cells:
        name = cell.method if cell.value is None else f"{cell.method} {cell.value:g}"
        last.setdefault(name, []).append([*measured_tables(work / "cells" / cell.name).values()][-1])
    results.mkdir(parents=True, exist_ok=True)
    tables = {
        "win_rates": rate_rows(measured),
        "out_of_distribution": shift_rows(measured),
        "training": training_rows(last),
    }
    for name, rows in tables.items():
        pl.DataFrame(rows).write_csv(results / f"{name}.csv")
    charts = [temperature_chart(measured, against) for against in (TRUTH, SFT)]
    for chart in (*charts, shift_chart(measured, float(min(grid["shift_temperatures"])))):
        write_text(results / f"{chart.slug}.svg", standalone(chart))


def _train(cell: Cell, grid: Mapping[str, Any], work: Path) -> str:
    with chdir(work):
        run_cell(cell, world_reward, work / "cells", SilentReporter(), keeps_adapter=True)
    return cell.name


def _measure(seed: int, grid: Mapping[str, Any], work: Path) -> str:
    adapters = {cell.method: work / "cells" / cell.name / "adapter" for cell in read_cells(grid, seed)}
    with chdir(work):
        measure(seed, grid, adapters, _rewards(work, seed), SilentReporter())
    return f"answers of seed {seed}"


def _rewards(work: Path, seed: int) -> Path:
    return work / f"rewards-{seed}.parquet"
