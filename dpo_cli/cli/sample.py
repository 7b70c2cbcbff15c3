"""``dpo-cli sample``: answers to the prompts of some files, or the stage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from dpo_cli.cli.command import JsonOption, SetOption, command_app, examples, refuse_unread
from dpo_cli.cli.console import ConsoleReporter
from dpo_cli.cli.exits import errors_as_exit_codes
from dpo_cli.cli.stage import PANEL, run_stage
from dpo_cli.core import paths
from dpo_cli.core.errors import ParamsError
from dpo_cli.core.pipeline import STAGES

_STAGE = next(stage for stage in STAGES if stage.name == "sample")
_READ = ("model", "reference", "evaluate", "runtime")

app = command_app()


@app.command(
    "sample",
    rich_help_panel=PANEL,
    epilog=examples(
        "dpo-cli sample prompts.jsonl",
        "dpo-cli sample prompts.jsonl --answers 8 --set evaluate.max_new_tokens=64",
        "dpo-cli sample prompts.jsonl --out data/raw --set evaluate.judge=rule --set evaluate.rule=json_object",
        "dpo-cli sample unseen.jsonl --model models/dpo",
    ),
)
def sample_command(
    files: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[PROMPTS]...",
            help="Files with prompts, in any format of the data, or a folder of votes; none: those of sample.prompts.",
        ),
    ] = None,
    answers: Annotated[
        int | None, typer.Option("--answers", metavar="K", min=1, help="Answers to each prompt; 4 if left out.")
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            "--top-p",
            metavar="P",
            help="Draw each token from the likeliest ones that together have probability P; 1 if left out: from all.",
        ),
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(
            "--model",
            metavar="DIR",
            help="An adapter for the SFT model, such as models/dpo, or a whole model; left out: the SFT model itself.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="DIR",
            help="Folder of the tables, one for each file, as parquet; data/samples if left out.",
        ),
    ] = None,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Sample answers of the SFT model to prompts of your own, and score them where the reward is known.

    Answers are sampled as evaluate says (temperature, max_new_tokens, seed), and scored where evaluate.judge is rule,
    or world and it knows the prompt. In data/raw such a table is preference data of format kwise: pairs are made of
    answers with different scores. Answers that did not end are left out and counted, and those with the same text are
    merged. What was sampled before is not sampled again. Without PROMPTS it is the stage, which samples as section
    sample says, and nothing by default.
    """
    if not files and answers is top_p is model is out is None:
        run_stage(_STAGE, overrides or [], as_json=as_json)
        return
    with errors_as_exit_codes(as_json=as_json):
        if not files:
            raise ParamsError(
                "--answers, --top-p, --model and --out have no effect without PROMPTS; see section sample"
            )
        if top_p is not None and not 0 < top_p <= 1:
            raise ParamsError(f"--top-p must be above 0 and at most 1, got {top_p:g}")
        from dpo_cli.core.load_params import load_params  # here, so that --help does not wait for them

        params = load_params(paths.PARAMS, overrides or [])
        refuse_unread("sample", _READ, overrides or [])
        from dpo_cli.evaluation.sampling import sample_files

        reporter = ConsoleReporter(show_tables=not as_json)
        figures = sample_files(files, answers or 4, model, out or paths.SAMPLED, params, reporter, top_p or 1.0)
    if as_json:
        typer.echo(json.dumps(figures, ensure_ascii=False))
