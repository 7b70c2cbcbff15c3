"""``dpo-cli score``: the implicit reward r = beta log(pi / pi_ref) of any pairs and rankings."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dpo_cli.cli.command import command_app, examples
from dpo_cli.cli.console import ConsoleReporter
from dpo_cli.cli.exits import errors_as_exit_codes
from dpo_cli.core import paths
from dpo_cli.core.errors import ParamsError
from dpo_cli.core.progress import Reporter

if TYPE_CHECKING:
    from dpo_cli.core.data_params import Source
    from dpo_cli.core.params import Params

OUTPUTS = (".parquet", ".jsonl")
_MAX_BETA = 1e6
_SECTIONS = ("data", "model", "sft", "reference", "train", "evaluate", "runtime")
_READ = (
    *(
        f"runtime.{name}"
        for name in (
            "device", "workers", "threads", "max_tokens_per_microbatch", "layout", "head_mib", "checkpoint_minutes",
            "model_path",
        )
    ),
    "reference.max_length",
    *(f"evaluate.{name}" for name in ("bootstrap_draws", "confidence", "seed")),
)  # fmt: skip

app = command_app()


@app.command(
    "score",
    rich_help_panel="Measurements",
    epilog=examples(
        "dpo-cli score new_pairs.jsonl",
        "dpo-cli score new_pairs.jsonl --html tokens.html --out rewards.parquet",
        "dpo-cli score answers.csv --set columns='{prompt: question, chosen: good, rejected: bad}' --max-rows 1000",
        "dpo-cli score data/preference/eval.parquet --beta 0.5 --json",
    ),
)
def score_command(
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="FILE", help="Pairs or rankings in any format, or tables such as data/preference/eval.parquet."
        ),
    ],
    model: Annotated[
        Path, typer.Option("--model", metavar="DIR", help="Folder of an adapter that `dpo-cli train` made.")
    ] = paths.DPO_MODEL,
    beta: Annotated[
        float | None,
        typer.Option("--beta", metavar="X", help="Beta of the reward; left out: what the adapter was trained with."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="Write the rows, token by token, as .parquet or .jsonl."),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option("--html", metavar="FILE", help="Write a page with the tokens colored by log(pi / pi_ref)."),
    ] = None,
    max_rows: Annotated[
        int | None, typer.Option("--max-rows", metavar="N", min=1, help="Read so many rows of each file, at most.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="How the files are read, as under data.preferences: `format=hh`, `columns='{prompt: q}'`;"
            " `reference.max_length=N`; or a setting of runtime, such as `runtime.device=cpu`. May be repeated.",
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the figures as one JSON object, and no tables.")
    ] = False,
) -> None:
    """Score pairs or rankings with the implicit reward r = beta log(pi / pi_ref) of the tuned model.

    Prints by source how often the reward orders the answers as the data does, and the margin. Files are read
    as the conversion reads them; rows left out are counted and named. What was scored before is not scored again.
    """
    with errors_as_exit_codes(as_json=as_json):
        # here, so that --help does not wait for them
        from dpo_cli.cli.sources import sources_of
        from dpo_cli.core.load_params import load_params
        from dpo_cli.evaluation.score_rows import refuse_idle_settings

        overrides, of_files = split_settings(settings or [])
        params = load_params(paths.PARAMS, overrides)
        refuse_idle_settings(of_files)
        options = ScoreOptions(model, beta, max_rows, out, html)
        sources = sources_of(files, "preferences", of_files)
        refuse_options(options, sources)
        figures = score_files(sources, options, params, ConsoleReporter(show_tables=not as_json))
    if as_json:
        typer.echo(json.dumps(figures, ensure_ascii=False))


@dataclass(frozen=True)
class ScoreOptions:
    """What is asked for.

    Attributes:
        model: Folder of the adapter.
        beta: Of the reward; None: what the adapter was trained with.
        max_rows: Rows to read of each file; None: all.
        out: Where the rows go, as .parquet or .jsonl.
        html: Where the page with the tokens goes.
    """

    model: Path = paths.DPO_MODEL
    beta: float | None = None
    max_rows: int | None = None
    out: Path | None = None
    html: Path | None = None


def score_files(sources: Sequence[Source], options: ScoreOptions, params: Params, reporter: Reporter) -> dict[str, Any]:
    """Score the rows of some files, write what is asked for, and print what their implicit reward says.

    Returns:
        The figures.

    Raises:
        DataError: A file cannot be read, or no row of it can be scored.
        StaleArtifactError: The model or its reference is missing, damaged, or of another graph.
        Interrupted: The user asked to stop; what was scored is kept.
    """
    from dpo_cli.cli.score_page import print_figures, write_page
    from dpo_cli.evaluation.score import score_sources, write_rows

    found, warnings = score_sources(sources, options.model, options.beta, options.max_rows, params, reporter)
    if options.out is not None:
        write_rows(options.out, found.rows)
    if options.html is not None:
        write_page(options.html, found)
    print_figures(found, options.out, options.html, reporter)
    for warning in warnings:
        reporter.warn(f"score: {warning}")
    return found.figures()


def split_settings(settings: Sequence[str]) -> tuple[list[str], list[str]]:
    """``--set`` as overrides of params.yaml and as settings of the files.

    Raises:
        ParamsError: A setting of params.yaml has no effect here.
    """
    overrides, of_files, problems = [], [], []
    for setting in settings:
        key = setting.partition("=")[0].strip()
        section = key.partition(".")[0]
        if section not in _SECTIONS or "." not in key or key.startswith("data.preferences."):
            of_files.append(setting)
        elif key in _READ:
            overrides.append(setting)
        else:
            problems.append(f"--set {setting} has no effect on score, which reads {', '.join(_READ)}")
    if problems:
        raise ParamsError(problems)
    return overrides, of_files


def refuse_options(options: ScoreOptions, sources: Sequence[Source]) -> None:
    """Refuse what cannot be meant: unknown suffixes, and outputs that would overwrite something read.

    Raises:
        ParamsError: With every problem.
    """
    from dpo_cli.data.plan import find_files

    problems = []
    if options.beta is not None and not 0 < options.beta <= _MAX_BETA:
        problems.append(f"--beta must be > 0 and at most {_MAX_BETA:g}, got {options.beta:g}")
    if options.out is not None and options.out.suffix not in OUTPUTS:
        problems.append(f"--out must end with {' or '.join(OUTPUTS)}, got {options.out}")
    if options.html is not None and options.html.suffix not in (".html", ".htm"):
        problems.append(f"--html must end with .html, got {options.html}")
    inputs = [path for source in sources for path in find_files(source)]
    for path in filter(None, (options.out, options.html)):
        if any(path.exists() and path.samefile(given) for given in inputs if given.exists()):
            problems.append(f"{path} is a file that is read; name another one to write")
    if problems:
        raise ParamsError(problems)
