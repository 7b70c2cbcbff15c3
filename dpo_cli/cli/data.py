"""``dpo-cli data``: look at data before it is used. Nothing here writes to the project."""

from __future__ import annotations

import json
from functools import partial
from typing import Annotated, Any

import typer

from dpo_cli.cli.command import command_group, examples
from dpo_cli.cli.console import ConsoleReporter
from dpo_cli.cli.exits import errors_as_exit_codes
from dpo_cli.core.errors import DataError, ParamsError

FilesArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="[FILE]...", help="Data files; none: the sources in params.yaml."),
]
KindOption = Annotated[
    str | None,
    typer.Option("--as", metavar="sft|preferences", help="What the file is read as; left out: found by its rows."),
]
SettingOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="A setting of the source, as under data.sft or data.preferences: `format=hh`, `columns='{prompt: q}'`.",
    ),
]
ModelOption = Annotated[
    str | None,
    typer.Option("--model", metavar="DIR", help="Count and show tokens of this model; `embedded`: the embedded one's."),
]
TemplateOption = Annotated[
    str | None,
    typer.Option("--template", metavar="NAME", help="Chat template: auto, plain, chatml or alpaca."),
]
MaxLengthOption = Annotated[
    int | None,
    typer.Option("--max-length", metavar="N", min=2, help="Tokens a row may have; left out: the project's limit."),
]

app = command_group(
    "data",
    "Look at data before it is used: what is wrong with it, how it is read, and what the model will see.",
    "Data",
)


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
        from dpo_cli.cli.sources import project_params, sources_of, token_view
        from dpo_cli.data.check_files import check_sources, refuse_unknown_check

        _refuse_without_model(model, {"--template": template, "--max-length": max_length})
        params = project_params()
        refuse_unknown_check(listed, model, params.data)
        view_of = None if model is None else partial(token_view, model, template, max_length)
        sources = sources_of(files or [], kind, settings or [])
        figures, accepted = check_sources(sources, params, ConsoleReporter(show_tables=not as_json), listed, view_of)
    if as_json:
        typer.echo(json.dumps(figures, ensure_ascii=False))
    if not accepted:
        raise typer.Exit(DataError.exit_code)


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
        _refuse_without_model(model, {"--template": template, "--max-length": max_length})
        # here, so that --help does not wait for them
        from dpo_cli.cli.data_pages import print_row
        from dpo_cli.cli.sources import project_params, sources_of, token_view
        from dpo_cli.data.inspect import describe_row, json_of

        [source] = sources_of([file], kind, settings or [])
        view = token_view(model, template, max_length, source) if model else None
        found = describe_row(source, row, view, project_params().data)
        if as_json:
            typer.echo(json_of(found))
        else:
            print_row(found, whole=whole)
    if found["left_out"]:
        raise typer.Exit(DataError.exit_code)


@app.command(
    "stats",
    epilog=examples(
        "dpo-cli data stats pairs.jsonl instructions.json",
        "dpo-cli data stats pairs.jsonl --model ~/models/Qwen2.5-0.5B",
    ),
)
def data_stats_command(
    files: FilesArgument = None,
    kind: KindOption = None,
    settings: SettingOption = None,
    model: ModelOption = None,
    template: TemplateOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as one JSON object.")] = False,
) -> None:
    """Say what data is like: lengths, turns, which answers are longer, languages. Writes nothing.

    Lengths are characters, or tokens with --model. Rows that the conversion would refuse are not
    counted; those that repeat others are.
    """
    with errors_as_exit_codes(as_json=as_json):
        _refuse_without_model(model, {"--template": template})
        # here, so that --help does not wait for them
        from dpo_cli.cli.data_pages import print_profile
        from dpo_cli.cli.sources import encoder_of, project_params, sources_of
        from dpo_cli.data.statistics import profile_sources

        reporter = ConsoleReporter(show_tables=not as_json)
        sources, params = sources_of(files or [], kind, settings or []), project_params()
        encoder = None if model is None else encoder_of(model, template)
        figures = {}
        for name, found in profile_sources(sources, params, encoder, reporter):
            figures[name] = found
            print_profile(name, found, reporter)
    if as_json:
        typer.echo(json.dumps(figures, ensure_ascii=False))


def _refuse_without_model(model: str | None, options: dict[str, Any]) -> None:
    """Refuse options that say how a model sees text where none is named.

    Raises:
        ParamsError: With each of them.
    """
    idle = [name for name, value in options.items() if value is not None]
    if model is None and idle:
        raise ParamsError([f"{name} has no effect without --model" for name in idle])
