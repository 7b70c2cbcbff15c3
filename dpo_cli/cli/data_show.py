"""``dpo-cli data show``: one row as the conversion reads it and as the tokens that the model sees."""

from __future__ import annotations

from typing import Annotated

import typer

from dpo_cli.cli.command import command_app, examples
from dpo_cli.cli.data import (
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
    "show",
    epilog=examples(
        "dpo-cli data show pairs.jsonl --row 17",
        "dpo-cli data show pairs.jsonl --row 17 --model ~/models/Qwen2.5-0.5B",
        "dpo-cli data show instructions.json --as sft --model embedded",
    ),
)
def data_show_command(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A data file.")],
    row: Annotated[int, typer.Option("--row", metavar="N", min=0, help="Which row, counted from 0.")] = 0,
    kind: KindOption = None,
    settings: SettingOption = None,
    model: ModelOption = None,
    template: TemplateOption = None,
    max_length: MaxLengthOption = None,
    whole: Annotated[bool, typer.Option("--whole", help="Leave nothing out of the middle of a long prompt.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print all of it as one JSON object.")] = False,
) -> None:
    """Show one row as the conversion reads it and, with --model, as the tokens that the model sees. Writes nothing.

    Exit code 0: the row is taken; 4: it, or a part of it, is left out. Rows that repeat others are
    found by `dpo-cli data check`.
    """
    with errors_as_exit_codes(as_json=as_json):
        refuse_without_model(model, {"--template": template, "--max-length": max_length})
        # here, so that --help does not wait for them
        from dpo_cli.cli.row_page import print_row
        from dpo_cli.cli.sources import project_data, sources_of
        from dpo_cli.cli.token_view import token_view
        from dpo_cli.data.inspect import describe_row, json_of

        [source] = sources_of([file], kind, settings or [])
        view = token_view(model, template, max_length, source) if model else None
        found = describe_row(source, row, view, project_data())
        if as_json:
            typer.echo(json_of(found))
        else:
            print_row(found, whole=whole)
    if found["left_out"]:
        raise typer.Exit(DataError.exit_code)
