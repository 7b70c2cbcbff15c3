"""What the files of commands share: how they hold a command, and options that several have."""

from __future__ import annotations

import getpass
from collections.abc import Sequence
from typing import Annotated

import typer

from dpo_cli.core.errors import ParamsError

SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a setting of params.yaml; may be repeated."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the figures as one JSON object, and no tables.")]


def examples(*lines: str) -> str:
    """Commands as the end of a help text."""
    return "**Examples**\n\n" + "\n".join(f"- `{line}`" for line in lines)


def command_app() -> typer.Typer:
    """Holds the one command of a file."""
    return typer.Typer(add_completion=False, rich_markup_mode="markdown", pretty_exceptions_enable=False)


def command_group(name: str, meaning: str, panel: str) -> typer.Typer:
    """Holds the commands of a file that has several, such as ``dpo-cli data check``."""
    app = typer.Typer(name=name, help=meaning, no_args_is_help=True, add_completion=False, rich_markup_mode="markdown")
    app.callback(rich_help_panel=panel)(lambda: None)
    return app


def refuse_unread(command: str, read: Sequence[str], overrides: Sequence[str]) -> None:
    """Refuse ``--set`` of what a command does not read.

    Raises:
        ParamsError: With the sections and settings that it reads.
    """

    def is_read(override: str) -> bool:
        key = f"{override.partition('=')[0].strip()}."
        return any(key.startswith(f"{name}.") for name in read)

    problems = [
        f"--set {override} has no effect on {command}, which reads {', '.join(read)}"
        for override in overrides
        if not is_read(override)
    ]
    if problems:
        raise ParamsError(problems)


def account_name() -> str:
    """Who votes, where nobody is named."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # as in a container without a list of users
        return "me"
