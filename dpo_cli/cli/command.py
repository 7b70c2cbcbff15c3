"""What the files of commands share: how one is loaded when asked for, and options that several have."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar

import typer
from typer.core import TyperGroup

from dpo_cli.core.errors import ParamsError

SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a setting of params.yaml; may be repeated."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the metrics as one JSON object, and no tables.")]

Load = Callable[[], typer.Typer]


def examples(*lines: str) -> str:
    """Commands as the end of a help text."""
    return "**Examples**\n\n" + "\n".join(f"- `{line}`" for line in lines)


def command_app() -> typer.Typer:
    """Holds one command."""
    return typer.Typer(add_completion=False, rich_markup_mode="markdown", pretty_exceptions_enable=False)


def in_file(name: str, app: str = "app") -> Load:
    """Loads the file of a command or of a group of them, ``dpo_cli/cli/<name>.py``, and gives its ``app``."""
    return lambda: getattr(importlib.import_module(f"dpo_cli.cli.{name}"), app)


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


def refuse_unread(command: str, read: tuple[str, ...], overrides: list[str]) -> None:
    """Refuse ``--set`` of sections that a command does not read.

    Raises:
        ParamsError: With those that it reads.
    """
    unread = [override for override in overrides if override.partition(".")[0].strip() not in read]
    if unread:
        raise ParamsError(
            [f"--set {override} has no effect on {command}, which reads {', '.join(read)}" for override in unread]
        )
