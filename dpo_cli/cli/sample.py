"""``dpo-cli sample`` and ``try``: answers to the prompts of some files, or the stage; one prompt on both models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from dpo_cli.cli.command import JsonOption, SetOption, command_app, examples, refuse_unread
from dpo_cli.cli.console import ConsoleReporter, open_console, plain_table
from dpo_cli.cli.exits import errors_as_exit_codes
from dpo_cli.cli.stage import PANEL, run_stage
from dpo_cli.core import paths
from dpo_cli.core.errors import DataError, ParamsError
from dpo_cli.core.pipeline import STAGES

if TYPE_CHECKING:
    from dpo_cli.judging.answers import Answer

_STAGE = next(stage for stage in STAGES if stage.name == "sample")
_NARROW = 60
_READ = ("model", "reference", "evaluate", "runtime")

app, try_app = command_app(), command_app()


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


@try_app.command(
    "try",
    rich_help_panel="Measurements",
    epilog=examples(
        "dpo-cli try 'Explain in one sentence why the sky is blue.'",
        "dpo-cli try 'Tell me a story.' --temperature 0.7 --set evaluate.max_new_tokens=64",
        "dpo-cli try 'Hello!' --system 'You are a pirate.' --model ~/adapters/another",
    ),
)
def try_command(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What the user says.")],
    system: Annotated[
        str | None, typer.Option("--system", metavar="TEXT", help="A system message before the prompt.")
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(
            "--model",
            metavar="DIR",
            help="An adapter for the project's SFT model, or a whole model, in place of models/dpo.",
        ),
    ] = None,
    temperature: Annotated[
        float,
        typer.Option("--temperature", metavar="T", min=0, max=10, help="0 takes the likeliest token each time."),
    ] = 0.0,
    overrides: SetOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the answers as one JSON object.")] = False,
) -> None:
    """Try a prompt on the SFT model and on the tuned one, and see both answers side by side.

    Answers are greedy. With --temperature they are sampled, as evaluate does: the same prompt gives the same answers,
    another evaluate.seed others. They end after evaluate.max_new_tokens. Neither reports nor models are touched.
    """
    with errors_as_exit_codes(as_json=as_json):
        from dpo_cli.core.load_params import load_params  # here, so that --help does not wait for them

        if not prompt.strip():
            raise DataError("the prompt is empty; say something, as in: dpo-cli try 'Hello!'")
        params = load_params(paths.PARAMS, overrides or [])
        refuse_unread("try", _READ, overrides or [])
        if any(override.partition("=")[0].strip() == "evaluate.temperature" for override in overrides or []):
            raise ParamsError("--set evaluate.temperature has no effect on try; say --temperature")
        from dpo_cli.evaluation.sampling import tried_json, try_prompt

        evaluate = params.evaluate.model_copy(update={"temperature": temperature})
        params = params.model_copy(update={"evaluate": evaluate})
        found = try_prompt(prompt, system, model, params, ConsoleReporter(show_tables=not as_json))
        if as_json:
            typer.echo(json.dumps(tried_json(prompt, found, temperature), ensure_ascii=False))
        else:
            print_tried(found, temperature)


def print_tried(found: dict[str, Answer], temperature: float, console: Console | None = None) -> None:
    """Print answers beside each other, or below each other where there is no room."""
    console = console or open_console()
    table = plain_table(expand=True)
    if console.width < _NARROW:
        table.add_column(Text(f"at T = {temperature:g}"), overflow="fold")
        for name, each in found.items():
            table.add_row(Text.assemble((f"{_title(name, each)}\n", "bold"), each.text, "\n"))
    else:
        for name, each in found.items():
            table.add_column(Text(_title(name, each)), overflow="fold", ratio=1)
        table.add_row(*(Text(each.text) for each in found.values()))
    console.print(table)
    if len({each.text for each in found.values()}) == 1:
        console.print(Text("Both answer alike.", "dim"))


def _title(model: str, answer: Answer) -> str:
    return f"{model} ({answer.num_tokens} tokens{'' if answer.finished else ', cut off'})"
