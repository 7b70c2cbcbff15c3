"""``python -m experiments NAME``: run what is left of an experiment, and write its results."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Annotated

import typer

from dpo_cli.cli.console import ConsoleReporter
from dpo_cli.cli.exits import errors_as_exit_codes


def main(
    name: Annotated[str, typer.Argument(help="sentiment, answers or reviews.")],
    grid: Annotated[str, typer.Option(help="File of the grid in its folder: grid.yaml, or fast.yaml.")] = "grid.yaml",
    workers: Annotated[int, typer.Option(min=1, help="Processes that train at once.")] = os.cpu_count() or 1,
) -> None:
    """Run what is left of an experiment, and write its results.

    Killed or stopped it goes on where it was.
    """
    with errors_as_exit_codes(as_json=False):
        experiment = importlib.import_module(f"experiments.{name}").EXPERIMENT
        work = experiment.folder / "work" / Path(grid).stem
        results = experiment.run(grid, work, workers, ConsoleReporter(show_tables=False))
        typer.echo(f"{results}")


if __name__ == "__main__":
    typer.run(main)
