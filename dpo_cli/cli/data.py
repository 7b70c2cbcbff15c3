"""``dpo-cli data``: look at data before it is used. Nothing here writes to the project."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from dpo_cli.cli.command import in_file, lazy_group
from dpo_cli.core.errors import ParamsError

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

app = typer.Typer(
    name="data",
    cls=lazy_group({"check": in_file("data_check"), "show": in_file("data_show"), "stats": in_file("data_stats")}),
    help="Look at data before it is used: what is wrong with it, how it is read, and what the model will see.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
)


@app.callback(rich_help_panel="Data")
def _group() -> None:
    pass


def refuse_without_model(model: str | None, options: dict[str, Any]) -> None:
    """Refuse options that say how a model sees text where none is named.

    Raises:
        ParamsError: With each of them.
    """
    idle = [name for name, value in options.items() if value is not None]
    if model is None and idle:
        raise ParamsError([f"{name} has no effect without --model" for name in idle])
