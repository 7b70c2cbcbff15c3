"""``dpo-cli label``: people vote on answers in a browser or the terminal, or a judge does."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dpo_cli.cli.command import JsonOption, account_name, command_app, examples
from dpo_cli.cli.console import ConsoleReporter
from dpo_cli.cli.exits import errors_as_exit_codes
from dpo_cli.core import paths
from dpo_cli.core.errors import DataError, ParamsError, first_line
from dpo_cli.core.interrupts import heard

if TYPE_CHECKING:
    from dpo_cli.core.progress import Reporter
    from dpo_cli.labeling.engine import Engine
    from dpo_cli.labeling.items import Account, ItemStore
    from dpo_cli.labeling.settings import Settings

_PORT = 8384

app = command_app()


@app.command(
    "label",
    rich_help_panel="Data",
    epilog=examples(
        "dpo-cli label data/samples/prompts.parquet --rater anna",
        "dpo-cli label data/samples/prompts.parquet --rater anna --rater ben --overlap 2 --guideline guideline.md",
        "dpo-cli label reports/evaluate/samples.json --rater anna --out data/raw/votes",
        "dpo-cli label data/samples/prompts.parquet --terminal",
        "dpo-cli label data/samples/prompts.parquet --rater chloe --adjudicate",
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
    raters: Annotated[
        list[str] | None,
        typer.Option(
            "--rater",
            metavar="NAME",
            help="Who votes, each at an address of his own; you if left out. May be repeated.",
        ),
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(
            "--judge",
            metavar="KIND",
            help="In place of people: world, reward-model, hf, openai, or rule:FILE.py with a function reward(prompt,"
            " answer).",
        ),
    ] = None,
    mode: Annotated[
        str | None, typer.Option("--mode", metavar="MODE", help="pair (the default), ranking or thumbs.")
    ] = None,
    pairs: Annotated[
        int | None, typer.Option("--pairs", metavar="N", help="Most pairs of one prompt; 1 if left out.")
    ] = None,
    overlap: Annotated[
        int | None,
        typer.Option(
            "--overlap", metavar="N", help="People who vote on an item, one more if they disagree; 1 if left out."
        ),
    ] = None,
    repeats: Annotated[
        float | None,
        typer.Option("--repeats", metavar="X", help="Share of pairs that come again, flipped; 0.07 if left out."),
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", metavar="N", help="Of the order of items and answers; 0 if left out.")
    ] = None,
    terminal: Annotated[bool, typer.Option("--terminal", help="Vote here, in the terminal, not on a page.")] = False,
    adjudicate: Annotated[
        bool,
        typer.Option("--adjudicate", help="Vote on what people disagree on, and nothing else: this vote then stands."),
    ] = False,
    guideline: Annotated[
        Path | None,
        typer.Option("--guideline", metavar="FILE", help="What people go by, as Markdown: part of the help."),
    ] = None,
    port: Annotated[
        int | None,
        typer.Option("--port", metavar="N", min=0, max=65535, help="Of the page; 8384 if left out, 0: any."),
    ] = None,
    most: Annotated[
        int | None, typer.Option("--max", metavar="N", min=1, help="A judge votes on at most so many items more.")
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

    People vote on a page that this machine alone can open, or in the terminal, by keys (? lists them), without learning
    who wrote what.
    Every vote is on the disk at once, and Ctrl-C, a crash or another day lose none. Each rater has a file, NAME.jsonl;
    some pairs come again, flipped. A judge votes in the same way into judge-NAME.jsonl, on what it has not voted on.
    Mode, pairs, overlap, repeats and seed stay as they were when a folder's votes were begun. `dpo-cli agreement` says
    how far raters agree with each other and with themselves.
    """
    with errors_as_exit_codes(as_json=as_json):
        of_people = {"--guideline": guideline, "--port": port, "--terminal": terminal, "--adjudicate": adjudicate}
        _refuse_options(raters, judge, {"--max": most, "--set": overrides}, of_people)
        from dpo_cli.labeling.engine import Engine  # here, so that --help does not wait for them

        reporter = ConsoleReporter(show_tables=not as_json)
        open_judge = None
        if judge is not None:
            from dpo_cli.labeling.judges import prepare

            open_judge = prepare(judge, overrides or [], reporter)
        text = "" if guideline is None else _read(guideline)
        folder = out or paths.VOTES / items.name.split(".")[0]
        if adjudicate and not folder.is_dir():
            raise DataError(f"{folder} is missing: there are no votes to adjudicate; --out names the folder of votes")
        given = {"mode": mode, "pairs": pairs, "overlap": overlap, "repeats": repeats, "seed": seed}
        settings, store, account = open_items(items, folder, given)
        with Engine(store, settings, folder, text, adjudicates=adjudicate) as engine:
            if open_judge is None:
                where = None if terminal else _PORT if port is None else port
                figures = _ask_people(engine, raters or [account_name()], where, items, account, reporter)
            else:
                from dpo_cli.labeling.judges import judge_items

                path, num_votes, num_without = judge_items(engine, open_judge, most, reporter)
                figures = {"num_votes": num_votes, "num_without": num_without, "file": path.as_posix()}
                print_account(items, account, reporter, [("votes", f"{num_votes} in {path.as_posix()}")])
                if num_without:
                    reporter.warn(f"label: the judge had no verdict on {num_without} items; run it again to ask again")
        if as_json:
            typer.echo(json.dumps(account_of(account) | figures, ensure_ascii=False))


def _refuse_options(
    raters: list[str] | None, judge: str | None, of_judges: dict[str, Any], of_people: dict[str, Any]
) -> None:
    """Refuse options that have no effect with people, or with a judge."""
    if raters and judge:
        raise ParamsError("--rater and --judge exclude each other; people and judges vote in runs of their own")
    unread = of_judges if judge is None else of_people
    if named := [name for name, value in unread.items() if value]:
        who = "people vote: it is a judge's" if judge is None else "a judge votes: it is people's"
        raise ParamsError(f"{' and '.join(named)} has no effect where {who}; leave it out")
    alone = [name for name in ("--terminal", "--adjudicate") if of_people[name]]
    if alone and len(raters or []) > 1:
        raise ParamsError(f"{' and '.join(alone)} is for one rater, got {len(raters or [])}; name one with --rater")
    if of_people["--terminal"]:
        if of_people["--port"] is not None:
            raise ParamsError("--port has no effect with --terminal, which opens no page; leave one of them out")
        if not (sys.stdin.isatty() and sys.stderr.isatty()):
            raise ParamsError("--terminal needs a terminal; without it, people vote on a page")


def _read(guideline: Path) -> str:
    try:
        return guideline.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--guideline {guideline} cannot be read as UTF-8 text: {first_line(error)}") from None


def _ask_people(
    engine: Engine, names: list[str], port: int | None, path: Path, account: Account, reporter: Reporter
) -> dict[str, Any]:
    """Let people vote, on the page until Ctrl-C, or in the terminal if the port is None."""
    from dpo_cli.labeling.votes import file_of, person

    raters = [person(name) for name in dict.fromkeys(names)]
    for rater in raters:
        if num_torn := engine.join(rater).num_torn:
            reporter.warn(
                f"label: {file_of(engine.folder, rater)}: its last vote was cut off when dpo-cli was killed; those"
                f" {num_torn} bytes were set aside in the file that ends with .torn"
            )
    engine.count_absent()
    if engine.adjudicates:
        _refuse_agreement(engine)
    if engine.num_unknown:
        reporter.warn(f"label: {engine.num_unknown} votes are on items that {path} does not have; they are kept")
    print_account(path, account, reporter, [("votes in", engine.folder.as_posix())])
    if port is None:
        from dpo_cli.labeling.terminal import vote_in_terminal

        vote_in_terminal(engine, raters[0])
    else:
        _serve(engine, raters, port, reporter)
    done = {rater: engine.progress(rater) for rater in raters}
    for rater, progress in done.items():
        reporter.say(f"{rater}: {progress.done} votes in {file_of(engine.folder, rater)}, {progress.left} items left")
    return {"raters": {rater: {"num_votes": each.done, "num_left": each.left} for rater, each in done.items()}}


def _refuse_agreement(engine: Engine) -> None:
    """Refuse to adjudicate where nobody disagrees."""
    num_shared, num_contested = engine.count_shared()
    if num_contested:
        return
    why = f"people agree on all {num_shared} items that two of them voted on"
    if not num_shared:
        why = "no item has votes of two people; --overlap 2 asks two about each, in a folder whose votes begin with it"
    raise DataError(f"{engine.folder}: there is nothing to adjudicate: {why}")


def _serve(engine: Engine, raters: list[str], port: int, reporter: Reporter) -> None:
    from dpo_cli.labeling.desk import Desk

    desk = Desk(engine, raters, port)
    for rater in raters:
        reporter.say(f"{rater.partition(':')[2]} votes at {desk.address(rater)}")
    reporter.say("Ctrl-C ends it; all votes are on the disk")
    try:
        desk.serve()
    except KeyboardInterrupt as stop:  # the usual end
        heard(stop)


def open_items(path: Path, folder: Path, given: dict[str, Any]) -> tuple[Settings, ItemStore, Account]:
    """The settings of a labeling and its items, as they are found in a file."""
    from dpo_cli.labeling.items import Account, ItemStore, read_items
    from dpo_cli.labeling.settings import settle

    if not path.exists():
        raise DataError(f"{path} is missing; dpo-cli sample makes answers to prompts")
    if (file := next((each for each in (folder, *folder.parents) if each.exists()), folder)).is_file():
        raise DataError(f"--out {folder}: {file} is a file; name a folder")
    settings = settle(folder, given)
    account = Account()
    items = ItemStore(read_items(path, settings.mode, settings.pairs, settings.seed, account), folder)
    if not len(items):
        raise DataError(f"{path}: there is nothing to vote on: {_left_out(account) or 'it has no rows'}")
    return settings, items, account


def account_of(account: Account) -> dict[str, Any]:
    """What became of the rows of a file, for ``--json``."""
    return {**asdict(account), "left_out": dict(account.left_out)}


def _left_out(account: Account) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in account.left_out.items())


def print_account(path: Path, account: Account, reporter: Reporter, more: list[tuple[str, str]]) -> None:
    """Show what became of the rows of a file."""
    rows = [
        ("rows", str(account.num_rows)),
        ("items", str(account.num_items)),
        ("the same as another", f"{account.num_merged}, merged and counted" if account.num_merged else ""),
        ("left out", _left_out(account)),
        *more,
    ]
    reporter.table(f"label: {path}", [(name, value) for name, value in rows if value])
