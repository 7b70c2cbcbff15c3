"""``dpo-cli data check``: every row that the conversion would leave out. Nothing here writes to the project."""

from __future__ import annotations

import json
from functools import partial
from typing import Annotated

import typer

from dpo_cli.cli.command import command_app, examples
from dpo_cli.cli.console import ConsoleReporter
from dpo_cli.cli.data import (
    FilesArgument,
    KindOption,
    MaxLengthOption,
    ModelOption,
    SettingOption,
    TemplateOption,
    refuse_without_model,
)
from dpo_cli.cli.exits import errors_as_exit_codes
from dpo_cli.core.errors import DataError

app = command_app()


@app.command(
    "check",
    epilog=examples(
        "dpo-cli data check pairs.jsonl instructions.json",
        "dpo-cli data check answers.json --set columns='{prompt: question, first: a1, second: a2, label: best}'",
        "dpo-cli data check pairs.jsonl --list longer_chosen",
        "dpo-cli data check pairs.jsonl --model ~/models/Qwen2.5-0.5B --max-length 1024",
    ),
)
def data_check_command(
    files: FilesArgument = None,
    kind: KindOption = None,
    settings: SettingOption = None,
    listed: Annotated[
        str | None, typer.Option("--list", metavar="CHECK", help="Name all rows that this check finds.")
    ] = None,
    model: ModelOption = None,
    template: TemplateOption = None,
    max_length: MaxLengthOption = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the figures as one JSON object, and no tables.")
    ] = False,
) -> None:
    """Read files as the conversion would, and report every row that it would leave out. Writes nothing.

    Exit code 0: every row is taken; 4: some row, or a whole file, is refused.
    """
    with errors_as_exit_codes(as_json=as_json):
        # here, so that --help does not wait for them
        from dpo_cli.cli.sources import project_data, project_params, sources_of
        from dpo_cli.data.check_files import CheckOptions, check_sources, refuse_unknown_check

        refuse_without_model(model, {"--template": template, "--max-length": max_length})
        refuse_unknown_check(listed, model, project_data())
        reporter = ConsoleReporter(show_tables=not as_json)
        params, view_of = project_params(), None
        if model is not None:
            from dpo_cli.cli.token_view import token_view

            view_of = partial(token_view, model, template, max_length)
        options = CheckOptions(listed, view_of, params.runtime.workers if params else None)
        sources = sources_of(files or [], kind, settings or [])
        figures, accepted = check_sources(sources, project_data(), options, reporter)
    if as_json:
        typer.echo(json.dumps(figures, ensure_ascii=False))
    if not accepted:
        raise typer.Exit(DataError.exit_code)
