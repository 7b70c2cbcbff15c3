"""``dpo-cli init``: a project folder of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dpo_cli.cli.command import command_app, examples
from dpo_cli.cli.console import ConsoleReporter
from dpo_cli.cli.exits import errors_as_exit_codes
from dpo_cli.core.errors import ParamsError

app = command_app()


@app.command(
    "init",
    rich_help_panel="Projects",
    epilog=examples(
        "dpo-cli init demo",
        "dpo-cli init mine --ask",
        "dpo-cli init mine --sft instructions.json --preferences pairs.jsonl --model ~/models/Qwen2.5-0.5B",
        "dpo-cli init round2 --from round1",
        "dpo-cli init mine --preferences pairs.csv --set 'columns={chosen: good, rejected: bad}' --set sft.method=none",
    ),
)
def init_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the new project; created if missing.")],
    sft: Annotated[
        Path | None, typer.Option("--sft", metavar="FILE", help="Instruction data; copied into data/raw.")
    ] = None,
    preferences: Annotated[
        Path | None, typer.Option("--preferences", metavar="FILE", help="Preference data; copied into data/raw.")
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option("--model", metavar="DIR", help="Base model in Hugging Face layout; none: the embedded model."),
    ] = None,
    ask: Annotated[
        bool, typer.Option("--ask", help="Ask for the files and the model that are not given, one by one.")
    ] = False,
    earlier: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="DIR",
            help="Another project: start from the model that it tuned, with its settings and prompts.",
        ),
    ] = None,
    reuse: Annotated[
        bool, typer.Option("--reuse", help="With --from: train on that project's preferences again, too.")
    ] = False,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="[SECTION.]KEY=VALUE",
            help="A setting for params.yaml, such as `sft.method=none`; of the file that is given without its section:"
            " `columns='{chosen: good}'`; may be repeated.",
        ),
    ] = None,
) -> None:
    """Make a project folder: params.yaml, dvc.yaml, and a git repository with DVC, in which the data is committed.

    Without files it holds the embedded small world, without a model the embedded tiny model.
    Existing files in the folder are never overwritten. If the data cannot be read, no project is made.
    With --from it is the next round: the tuned adapter of the other project is its SFT model and reference.
    """
    with errors_as_exit_codes(as_json=False):
        # here, so that --help does not wait for them
        if earlier is not None:
            from dpo_cli.cli.next_round import create_round

            others = {"--sft": sft, "--preferences": preferences, "--model": model, "--ask": ask or None}
            for option, given in others.items():
                if given is not None:
                    raise ParamsError(
                        f"{option} has no place beside --from, which takes the data and model of {earlier}"
                    )
            create_round(folder, earlier, ConsoleReporter(), reuse=reuse, settings=settings or [])
            return
        if reuse:
            raise ParamsError("--reuse has no effect without --from")
        from dpo_cli.cli.new_project import ProjectFiles, create_project

        files = ProjectFiles(sft=sft, preferences=preferences, model=model)
        reporter = ConsoleReporter()
        if ask:
            from dpo_cli.cli.ask import ask_for_files

            files = ask_for_files(files, reporter)
        create_project(folder, files, reporter, settings or [])
        if ask:
            from dpo_cli.cli.ask import next_steps

            next_steps(folder, files, reporter)
