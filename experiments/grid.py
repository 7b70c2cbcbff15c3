"""A whole grid: the project of each seed, all its cells, and many answers of the reference, by several processes.

All that was done is in ``work/``: a grid that was killed continues, and of a finished one only the results are written.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from dpo_cli.core import paths
from dpo_cli.core.artifacts import digest_files, read_json, write_json
from dpo_cli.core.environment import usable_cores
from dpo_cli.core.errors import DataError, MachineError, ParamsError, StaleArtifactError
from dpo_cli.core.load_params import read_yaml
from dpo_cli.core.progress import Meter, Reporter, SilentReporter
from experiments.cells import Cell, Reward, read_cells, reference_samples, run_cell
from experiments.page import write_results
from experiments.projects import prepare_project


@dataclass(frozen=True)
class Experiment:
    """A controlled experiment: prompts, a reward that is known, and a model.

    Attributes:
        name: Of its package under experiments.
        title: What its page says.
        known: The reward.
        prompts: Of a seed, so many.
        model: Makes or finds the model in a folder for it, as the grid says; returns its directory.
        is_gated: Whether it is an error if something does not hold that theory asks for.
    """

    name: str
    title: str
    known: Reward
    prompts: Callable[[int, int], list[str]]
    model: Callable[[Path, dict[str, Any]], Path]
    is_gated: bool = True

    @property
    def folder(self) -> Path:
        """Where its settings lie and its results go."""
        return Path(__file__).parent / self.name

    def run(self, grid_file: str, work: Path, workers: int, reporter: Reporter) -> Path:
        """Do what is left of a grid, as :func:`run_experiment` does."""
        return run_experiment(self, grid_file, work, workers, reporter)


def run_experiment(experiment: Experiment, grid_file: str, work: Path, workers: int, reporter: Reporter) -> Path:
    """Do what is left of a grid, and write its results.

    Args:
        experiment: What is run.
        grid_file: In its folder: ``grid.yaml``, or a smaller one.
        work: Where it works, and goes on.
        workers: Processes that train at once.
        reporter: Shows progress.

    Returns:
        The folder of the results: that of the experiment for its whole grid, else one beside the work.

    Raises:
        ParamsError: There is no such grid.
        MachineError: DPO_MODEL_PATH is set to what is no folder.
        StaleArtifactError: What was begun in the folder was begun with other settings or code.
        DataError: Something does not hold that must; the results are written.
    """
    grid = read_grid(experiment.folder, grid_file)
    if given := os.environ.get("DPO_MODEL_PATH"):
        if not Path(given).is_dir():
            raise MachineError(f"DPO_MODEL_PATH: there is no folder {given}")
        os.environ["DPO_MODEL_PATH"] = str(Path(given).resolve())  # it is read in the folders of the projects
    work.mkdir(parents=True, exist_ok=True)
    refuse_other(work, _made_of(experiment, grid))
    model = experiment.model(work, grid).resolve()
    cells: list[Task] = [cell for seed in grid["seeds"] for cell in read_cells(grid, seed)]
    rounds: list[tuple[str, list[Task]]] = [
        ("projects", [("project", seed) for seed in grid["seeds"]]),
        ("cells", [*cells, *(("reference", seed) for seed in grid["seeds"])]),
    ]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _begin, (experiment.name, str(model), str(work), grid)) as pool:
        for what, tasks in rounds:
            with reporter.meter(f"{experiment.name}: {what}", len(tasks), what) as meter:
                wait_for([pool.submit(_run, task) for task in tasks], pool, meter)
    results = (experiment.folder if grid_file == "grid.yaml" else work) / "results"
    failed = [
        check.statement for check in write_results(experiment.title, work, grid, results) if check.verdict == "fails"
    ]
    if failed and experiment.is_gated:
        raise DataError([f"{results / 'checks.csv'}: does not hold: {statement}" for statement in failed])
    return results


def wait_for(running: Sequence[Future[str]], pool: ProcessPoolExecutor, meter: Meter) -> None:
    """Wait until all is done; after an error what is not begun is not begun any more."""
    try:
        for done in as_completed(running):
            meter.note(done.result())
            meter.advance(1)
    except BaseException:
        pool.shutdown(wait=True, cancel_futures=True)
        raise


_OF_EVERY_GRID = ("seeds", "cells", "eval_steps")


def read_grid(folder: Path, grid_file: str) -> dict[str, Any]:
    """The grid of an experiment's folder.

    Raises:
        ParamsError: There is no such file, or it is no grid.
    """
    path = folder / grid_file
    others = "there are grid.yaml and fast.yaml"
    if not path.is_file():
        raise ParamsError(f"{path} is missing; {others}")
    grid = read_yaml(path.read_text(encoding="utf-8"), str(path))
    lacking = [name for name in _OF_EVERY_GRID if not isinstance(grid, dict) or name not in grid]
    if lacking:
        raise ParamsError(f"{path} is no grid, it lacks {', '.join(lacking)}; {others}")
    return grid


def refuse_other(work: Path, made_of: Mapping[str, Any]) -> None:
    """Refuse to go on in a folder whose projects were made of something else; cells look after themselves.

    Raises:
        StaleArtifactError: They were.
    """
    path = work / "made_of.json"
    if path.is_file() and read_json(path, "delete its folder") != made_of:
        raise StaleArtifactError(f"{work} was begun with other settings or code of the experiment; delete it")
    write_json(path, made_of)


def _made_of(experiment: Experiment, grid: dict[str, Any]) -> dict[str, Any]:
    """What the projects of an experiment are made of."""
    of_cells = ("cells", "seeds", "eval_steps", "reference_samples")
    return {
        "grid": {name: value for name, value in grid.items() if name not in of_cells},
        "code": digest_files(experiment.folder, [path.name for path in experiment.folder.glob("*.py")]),
        "params": (experiment.folder / paths.PARAMS).read_text(encoding="utf-8"),
    }


_WORKER_BYTES = 3 * 2**30
"""What a process takes that trains SmolLM2-135M, and more than one that trains a tiny model."""


def default_workers() -> int:
    """Processes at once: one for each core that has memory, or one on a GPU."""
    import psutil
    import torch

    if torch.cuda.is_available():
        return 1
    return max(1, min(usable_cores(), psutil.virtual_memory().available // _WORKER_BYTES))


Task = Cell | tuple[str, int]
"""A cell, or what is made for a seed."""
_worker: dict[str, Any] = {}


def begin_worker() -> None:
    """A worker computes on one core, and ends with the process that began it."""
    import torch

    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    signal.signal(signal.SIGINT, lambda *_: None)  # Ctrl-C is for what computes, which answers it itself
    torch.set_num_threads(1)


def _begin(name: str, model: str, work: str, grid: dict[str, Any]) -> None:
    """What a worker knows."""
    begin_worker()
    os.environ["DPO_MODEL_PATH"] = model
    _worker.update(
        experiment=importlib.import_module(f"experiments.{name}").EXPERIMENT, work=Path(work).resolve(), grid=grid
    )


def _run(task: Task) -> str:
    """A cell, or what a seed needs: its project, many answers of its reference."""
    experiment, work, grid = _worker["experiment"], _worker["work"], _worker["grid"]
    what, seed = ("cell", task.seed) if isinstance(task, Cell) else task
    folder = work / f"seed-{seed}"
    folder.mkdir(exist_ok=True)
    with contextlib.chdir(folder):
        if isinstance(task, Cell):
            run_cell(task, experiment.known, work / "cells", SilentReporter())
            return task.name
        if what == "reference":
            reference_samples(grid["reference_samples"], seed, experiment.known, work / f"reference-{seed}.npz")
            return f"{what} {seed}"
        tree = YAML(typ="safe").load((experiment.folder / paths.PARAMS).read_text(encoding="utf-8"))
        for setting, value in grid.get("set", {}).items():
            section, _, name = setting.partition(".")
            tree[section][name] = value
        prompts = experiment.prompts(seed, grid["num_prompts"])
        prepare_project(tree, seed, prompts, grid["answers"], experiment.known)
        return f"{what} {seed}"
