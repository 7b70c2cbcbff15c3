"""``dpo-cli label``: judges vote on answers."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dpo_cli.cli.command import JsonOption, command_app, examples
from dpo_cli.cli.console import ConsoleReporter
from dpo_cli.cli.exits import errors_as_exit_codes
from dpo_cli.core import paths
from dpo_cli.core.errors import DataError

if TYPE_CHECKING:
    from dpo_cli.core.progress import Reporter
    from dpo_cli.labeling.items import Account, ItemStore
    from dpo_cli.labeling.settings import Settings

app = command_app()


@app.command(
    "label",
    rich_help_panel="Data",
    epilog=examples(
        "dpo-cli label data/samples/prompts.parquet --judge world",
        "dpo-cli label data/samples/prompts.parquet --judge rule:shorter.py --mode ranking",
        "dpo-cli label reports/evaluate/samples.json --judge hf --set evaluate.hf.template=summary",
    ),
)
def label_command(
    items: Annotated[
        Path,
        typer.Argument(
            metavar="ITEMS",
            help="Answers of `dpo-cli sample`, the samples.json of evaluate, or any rows with prompt and completions.",
        ),
    ],
    judge: Annotated[
        str,
        typer.Option(
            "--judge",
            metavar="KIND",
            help="world, reward-model, hf, openai, or rule:FILE.py with a function reward(prompt, answer).",
        ),
    ],
    mode: Annotated[
        str | None, typer.Option("--mode", metavar="MODE", help="pair (the default), ranking or thumbs.")
    ] = None,
    pairs: Annotated[
        int | None, typer.Option("--pairs", metavar="N", help="Most pairs of one prompt; 1 if left out.")
    ] = None,
    repeats: Annotated[
        float | None,
        typer.Option("--repeats", metavar="X", help="Share of pairs that come again, flipped; 0.07 if left out."),
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", metavar="N", help="Of the order of items and answers; 0 if left out.")
    ] = None,
    most: Annotated[
        int | None, typer.Option("--max", metavar="N", min=1, help="Vote on at most so many items more.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Folder of the votes; left out: data/votes, named after ITEMS."),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="evaluate.KEY=VALUE", help="A setting of the judge; may be repeated."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Vote on answers: which of two is better, in which order several are, or whether one is good.

    A judge votes as people do: it sees the answers of an item in an order that is drawn. Its votes go into a file of
    its own, judge-NAME.jsonl, a line each; what it has voted on is not asked again. `dpo-cli agreement` says how far
    raters agree with each other and with themselves.
    """
    with errors_as_exit_codes(as_json=as_json):
        from dpo_cli.labeling.engine import Engine  # here, so that --help does not wait for them
        from dpo_cli.labeling.judges import judge_items, prepare

        reporter = ConsoleReporter(show_tables=not as_json)
        open_judge = prepare(judge, overrides or [], reporter)
        folder = out or paths.VOTES / items.name.split(".")[0]
        settings, store, account = _open_items(
            items, folder, {"mode": mode, "pairs": pairs, "repeats": repeats, "seed": seed}
        )
        with Engine(store, settings, folder) as engine:
            path, num_votes, num_without = judge_items(engine, open_judge, most, reporter)
        figures = _account(account) | {"num_votes": num_votes, "num_without": num_without, "file": path.as_posix()}
        _print(items, account, reporter, [("votes", f"{num_votes} in {path.as_posix()}")])
        if num_without:
            reporter.warn(f"label: the judge had no verdict on {num_without} items; run it again to ask again")
        if as_json:
            typer.echo(json.dumps(figures, ensure_ascii=False))


def _open_items(path: Path, folder: Path, given: dict[str, Any]) -> tuple[Settings, ItemStore, Account]:
    """The settings of a labeling and its items, as they are found in a file."""
    from dpo_cli.labeling.items import Account, ItemStore, read_items
    from dpo_cli.labeling.settings import settle

    if not path.exists():
        raise DataError(f"{path} is missing; dpo-cli sample makes answers to prompts")
    settings = settle(folder, given)
    account = Account()
    items = ItemStore(read_items(path, settings.mode, settings.pairs, settings.seed, account), folder)
    if not len(items):
        raise DataError(f"{path}: there is nothing to vote on: {_left_out(account) or 'it has no rows'}")
    return settings, items, account


def _account(account: Account) -> dict[str, Any]:
    return {**asdict(account), "left_out": dict(account.left_out)}


def _left_out(account: Account) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in account.left_out.items())


def _print(path: Path, account: Account, reporter: Reporter, more: list[tuple[str, str]]) -> None:
    rows = [
        ("rows", str(account.num_rows)),
        ("items", str(account.num_items)),
        ("the same as another", f"{account.num_merged}, merged and counted" if account.num_merged else ""),
        ("left out", _left_out(account)),
        *more,
    ]
    reporter.table(f"label: {path}", [(name, value) for name, value in rows if value])
