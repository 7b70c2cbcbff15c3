"""``dpo-cli rating-sheet``: answers as a file that people fill in with their votes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dpo_cli.cli.command import command_app, examples
from dpo_cli.cli.exits import errors_as_exit_codes
from dpo_cli.core.text import in_one_line

app = command_app()


@app.command(
    "rating-sheet",
    rich_help_panel="Measurements",
    epilog=examples(
        "dpo-cli rating-sheet data/raw/votes.csv --rater human:anna",
        "dpo-cli rating-sheet votes-ben.csv --rater human:ben --model evaluations/another",
    ),
)
def rating_sheet_command(
    sheet: Annotated[Path, typer.Argument(metavar="SHEET", help="The CSV file to write.")],
    rater: Annotated[
        str, typer.Option("--rater", metavar="KIND:NAME", help="Who fills it in, such as human:anna.")
    ] = "human",
    model: Annotated[
        Path | None,
        typer.Option("--model", metavar="DIR", help="A folder that `evaluate --model` wrote, not reports/evaluate."),
    ] = None,
) -> None:
    """Write the answers of SFT and tuned model as a sheet on which people vote, without naming the models.

    evaluate.num_prompts says how many there are. Fill in the column `vote` (A, B or tie) and hide `a_is`.
    With `evaluate.judge: votes` and `evaluate.votes.file` the votes become the win rate; `dpo-cli agreement`
    compares raters, and judges with them (reports/evaluate/votes.csv).
    """
    with errors_as_exit_codes(as_json=False):
        from dpo_cli.evaluation.tables import write_rating_sheet  # here, so that --help does not wait for it

        num_items, num_identical = write_rating_sheet(model, sheet, rater)
    same = f"; {num_identical} prompts with identical answers are ties and left out" if num_identical else ""
    typer.echo(in_one_line(f"{sheet}: {num_items} pairs of answers to vote on{same}"))
