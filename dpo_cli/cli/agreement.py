"""``dpo-cli rating-sheet`` and ``agreement``: sheets for people to vote on, and how far judges and people agree."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from dpo_cli.cli.command import command_app, examples
from dpo_cli.cli.console import open_console, plain_table
from dpo_cli.cli.exits import errors_as_exit_codes
from dpo_cli.core.errors import ParamsError
from dpo_cli.core.text import in_one_line

if TYPE_CHECKING:
    from rich.table import Table

    from dpo_cli.judging.agreement import AgreementTable
    from dpo_cli.statistics.agreement import Coefficient
    from dpo_cli.statistics.intervals import Estimate

_NAMES = {
    "cohen_kappa": "Cohen's kappa",
    "fleiss_kappa": "Fleiss' kappa",
    "krippendorff_alpha": "Krippendorff's alpha",
    "krippendorff_alpha_ordinal": "ordinal alpha",
}
_NONE = "-"

app, sheet_app = command_app(), command_app()


@sheet_app.command(
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


@app.command(
    "agreement",
    rich_help_panel="Measurements",
    epilog=examples(
        "dpo-cli agreement votes.csv",
        "dpo-cli agreement votes.parquet --draws 10000 --confidence 0.9",
        "dpo-cli agreement votes.csv --csv table.csv --json",
        "dpo-cli agreement anna.csv ben.csv reports/evaluate/votes.csv --save",
    ),
)
def agreement_command(
    votes: Annotated[
        list[Path],
        typer.Argument(
            metavar="VOTES...",
            help="Files of dpo-cli label; or tables, a vote a row: item_id, prompt_id, method, baseline, rater, vote"
            " (A, B or tie), a_is.",
        ),
    ],
    draws: Annotated[
        int, typer.Option("--draws", metavar="N", min=100, help="Draws behind each interval, clustered by prompt.")
    ] = 2000,
    confidence: Annotated[
        float, typer.Option("--confidence", metavar="X", help="Coverage of the intervals, between 0.5 and 1.")
    ] = 0.95,
    seed: Annotated[int, typer.Option("--seed", metavar="N", min=0, help="Seed of the draws.")] = 0,
    csv_file: Annotated[
        Path | None, typer.Option("--csv", metavar="FILE", help="Write the figures to a CSV file, too.")
    ] = None,
    save: Annotated[
        bool, typer.Option("--save", help="Write them to reports/agreement of this project, too, for its report.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as one JSON object, no tables.")] = False,
) -> None:
    """Say how far judges and people agree, as in the paper's Table 2: win rates, agreement, kappa or alpha.

    A rater is `kind` or `kind:name`, such as `gpt-4-s` and `human:anna`; raters of a kind make one row. `a_is` names
    the model whose answer was shown as A. A tie is half a win, and agrees by half with a win or a loss. Of raters whom
    dpo-cli label asked it says, too, whether they prefer a position and how often they agree with themselves. Without
    --csv and --save nothing is written.
    """
    with errors_as_exit_codes(as_json=as_json):
        if not 0.5 < confidence < 1:
            raise ParamsError(f"--confidence must be > 0.5 and < 1, got {confidence:g}")
        from dpo_cli.judging import agreement  # here, so that --help does not wait for it

        if save:
            agreement.refuse_outside_a_project()
        found = agreement.agreement_of_files(votes, draws=draws, confidence=confidence, seed=seed)
        if csv_file is not None:
            agreement.write_csv(found, csv_file)
        if save:
            agreement.save(found)
        if as_json:
            typer.echo(json.dumps(agreement.as_json(found), ensure_ascii=False))
        else:
            print_table(found)


def print_table(found: AgreementTable, console: Console | None = None) -> None:
    """Print a column a method, a row a figure, intervals below the values.

    Args:
        found: What to print.
        console: Where; None: standard output.
    """
    console = console or open_console()
    table = plain_table()
    table.add_column("")
    for each in found.methods:
        table.add_column(Text(f"{each.method}\nvs {each.baseline}"))
    for name, cells in _rows(found):
        table.add_row(Text(name), *(Text(cell) for cell in cells))
    console.print()
    console.print(table)
    console.print()
    console.print(
        Text(
            f"In brackets {100 * found.confidence:g}% intervals by prompt ({found.draws} draws). A tie is half a win,"
            " and agrees by half with a win or a loss; for kappa and alpha it is a category of its own, for the ordinal"
            " alpha it lies between the two."
        )
    )
    if found.raters:
        console.print()
        console.print(_rater_table(found))
        console.print()
        console.print(
            Text(
                "Noise is the share of wrong votes behind what was voted on differently when it came again. The last"
                " column is how much more often the answer shown first was chosen than the second: 0 without bias."
            )
        )


def _rater_table(found: AgreementTable) -> Table:
    """A row a rater whom ``dpo-cli label`` asked."""
    table = plain_table()
    for name in ("rater", "votes", "ties", "shown again", "same again %", "noise %", "first less second"):
        table.add_column(Text(name))
    for each in found.raters:
        bias = each.position_bias
        is_biased = bias is not None and not bias.low <= 0 <= bias.high
        cells = (
            each.rater,
            str(each.num_votes),
            str(each.num_ties),
            str(each.num_repeats),
            _percent(each.consistency) if each.consistency else _NONE,
            _percent(each.noise) if each.noise else _NONE,
            f"{_decimal(bias)}{' biased' if is_biased else ''}" if bias else _NONE,
        )
        table.add_row(*(Text(cell, "bold red" if is_biased and place == 6 else "") for place, cell in enumerate(cells)))
    return table


def _rows(found: AgreementTable) -> list[tuple[str, list[str]]]:
    rates = [each.win_rates for each in found.methods]
    rows = [
        ("prompts", [str(each.num_prompts) for each in found.methods]),
        ("items", [str(each.num_items) for each in found.methods]),
    ]
    for kind in found.kinds:
        rows.append((f"N votes, {kind}", [str(mine[kind].num_votes) if kind in mine else _NONE for mine in rates]))
    for kind in found.kinds:
        rows.append((f"win %, {kind}", [_percent(mine[kind].estimate) if kind in mine else _NONE for mine in rates]))
    if any(adjudicated := [each.adjudicated for each in found.methods]):
        rows.append(("N adjudications", [str(rate.num_votes) if rate else _NONE for rate in adjudicated]))
        rows.append(("win %, adjudications", [_percent(rate.estimate) if rate else _NONE for rate in adjudicated]))
    pairs = {names: [each.pair(*names) for each in found.methods] for names in found.pairs}
    for (first, second), mine in pairs.items():
        rows.append((f"agree %, {first} - {second}", [_percent(each.agreement) if each else _NONE for each in mine]))
    for (first, second), mine in pairs.items():
        rows += _coefficient_rows(f"{first} - {second}", [each.coefficient if each else None for each in mine])
    if len(found.kinds) > 1:
        rows += _coefficient_rows("all raters", [each.overall for each in found.methods])
    rows += _coefficient_rows("all raters", [each.ordinal for each in found.methods])
    return rows


def _coefficient_rows(who: str, cells: Sequence[Coefficient | None]) -> list[tuple[str, list[str]]]:
    """A row for each coefficient that some method has."""
    return [
        (
            f"{_NAMES[name]}, {who}",
            [_decimal(each.estimate) if each is not None and each.name == name else _NONE for each in cells],
        )
        for name in dict.fromkeys(each.name for each in cells if each is not None)
    ]


def _percent(estimate: Estimate) -> str:
    return f"{100 * estimate.value:.0f}\n[{100 * estimate.low:.0f}, {100 * estimate.high:.0f}]"


def _decimal(estimate: Estimate) -> str:
    if math.isnan(estimate.value):
        return "undefined"
    interval = "no interval" if math.isnan(estimate.low) else f"[{estimate.low:.2f}, {estimate.high:.2f}]"
    return f"{estimate.value:.2f}\n{interval}"
