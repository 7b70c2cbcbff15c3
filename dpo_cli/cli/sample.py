"""``dpo-cli sample``: several answers of a model of this project to each prompt of some files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from dpo_cli.cli.command import JsonOption, SetOption, command_app, examples, refuse_unread
from dpo_cli.cli.console import ConsoleReporter
from dpo_cli.cli.exits import errors_as_exit_codes
from dpo_cli.core import paths

app = command_app()


@app.command(
    "sample",
    rich_help_panel="Data",
    epilog=examples(
        "dpo-cli sample prompts.jsonl",
        "dpo-cli sample prompts.jsonl --answers 8 --set evaluate.max_new_tokens=64",
        "dpo-cli sample prompts.jsonl --out data/raw --set evaluate.judge=rule --set evaluate.rule=json_object",
        "dpo-cli sample unseen.jsonl --model models/dpo",
    ),
)
def sample_command(
    files: Annotated[
        list[Path],
        typer.Argument(metavar="PROMPTS...", help="Rows with a prompt: text, or messages; in any kind of file."),
    ],
    answers: Annotated[int, typer.Option("--answers", metavar="K", min=1, help="Answers to each prompt.")] = 4,
    model: Annotated[
        Path | None,
        typer.Option(
            "--model",
            metavar="DIR",
            help="An adapter for the SFT model, such as models/dpo, or a whole model; left out: the SFT model itself.",
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Folder of the tables, one for each file, as parquet.")
    ] = paths.SAMPLED,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Sample answers of the SFT model to prompts of your own, and score them where the reward is known.

    Answers are sampled as evaluate says (temperature, max_new_tokens, seed), and scored where evaluate.judge is world
    or rule. In data/raw such a table is preference data of format kwise: pairs are made of answers with different
    scores. Answers that did not end are left out and counted, and those with the same text are merged. What was sampled
    before is not sampled again.
    """
    with errors_as_exit_codes(as_json=as_json):
        from dpo_cli.core.load_params import load_params  # here, so that --help does not wait for them

        params = load_params(paths.PARAMS, overrides or [])
        refuse_unread("sample", ("model", "reference", "evaluate", "runtime"), overrides or [])
        from dpo_cli.evaluation.sampling import sample_files

        figures = sample_files(files, answers, model, out, params, ConsoleReporter(show_tables=not as_json))
    if as_json:
        typer.echo(json.dumps(figures, ensure_ascii=False))
