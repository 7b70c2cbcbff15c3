"""``python -m experiments NAME``: run what is left of an experiment, and write its results."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Annotated

import typer

from dpo_cli.cli.console import ConsoleReporter
from dpo_cli.cli.exits import errors_as_exit_codes
from dpo_cli.core.errors import MachineError, ParamsError

NAMES = ("sentiment", "answers", "reviews")


def main(
    name: Annotated[str, typer.Argument(help=f"One of {', '.join(NAMES)}.")],
    grid: Annotated[str, typer.Option(help="File of the grid in its folder: grid.yaml, or fast.yaml.")] = "grid.yaml",
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes that train at once; by default one a core, or one on a GPU.")
    ] = None,
) -> None:
    """Run what is left of an experiment, and write its results.

    A run that was stopped or killed continues where it ended.
    """
    with errors_as_exit_codes(as_json=False):
        if name not in NAMES:
            raise ParamsError(f"there is no experiment {name}; there are {', '.join(NAMES)}")
        from dpo_cli.models.load import quiet_libraries  # here, so that --help does not wait for it
        from experiments.grid import default_workers

        quiet_libraries()
        try:
            experiment = importlib.import_module(f"experiments.{name}").EXPERIMENT
        except ModuleNotFoundError as error:
            raise MachineError(
                f"{name} needs {error.name}; run: pip install --constraint constraints.txt --editable '.[real]'"
            ) from None
        work = experiment.folder / "work" / Path(grid).stem
        typer.echo(experiment.run(grid, work, workers or default_workers(), ConsoleReporter(show_tables=False)))


if __name__ == "__main__":
    typer.run(main)
