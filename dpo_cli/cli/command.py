"""What the files of commands share: how one is loaded when asked for, and options that several have."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar

import typer
from typer.core import TyperGroup

from dpo_cli.core.errors import ParamsError

SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a setting of params.yaml; may be repeated."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the figures as one JSON object, and no tables.")]

Load = Callable[[], typer.Typer]


def examples(*lines: str) -> str:
    """Commands as the end of a help text."""
    return "**Examples**\n\n" + "\n".join(f"- `{line}`" for line in lines)


def command_app() -> typer.Typer:
    """Holds the one command of a file."""
    return typer.Typer(add_completion=False, rich_markup_mode="markdown", pretty_exceptions_enable=False)


def in_file(name: str) -> Load:
    """Loads the file of a command or of a group of them, ``dpo_cli/cli/<name>.py``, and gives its ``app``."""
    return lambda: importlib.import_module(f"dpo_cli.cli.{name}").app


class LazyGroup(TyperGroup):
    """A group whose commands are loaded when one is named, and all of them for its help."""

    loaders: ClassVar[Mapping[str, Load]] = {}

    def list_commands(self, ctx: Any) -> list[str]:
        """Names, in the order of the help."""
        return list(self.loaders)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of this name; for none, all are loaded, so that one like it can be named."""
        for name in [cmd_name] if cmd_name in self.loaders else self.loaders:
            if name not in self.commands:
                self.commands[name] = typer.main.get_command(self.loaders[name]())
        return self.commands.get(cmd_name)


def lazy_group(loaders: Mapping[str, Load], base: type[LazyGroup] = LazyGroup) -> type[LazyGroup]:
    """A kind of group with these commands."""
    return type("Group", (base,), {"loaders": loaders})


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
