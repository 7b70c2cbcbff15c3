"""The command line: which commands there are, and in which file each is."""

from __future__ import annotations

import importlib
import os
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from dpo_cli.cli.command import examples
from dpo_cli.cli.exits import errors_as_exit_codes
from dpo_cli.core.environment import claim_gpu, prepare_environment
from dpo_cli.core.errors import MachineError
from dpo_cli.core.interrupts import watched_stop
from dpo_cli.core.pipeline import STAGES, Stage

_EXIT_CODES = (
    "**Exit codes**: 0 done, 1 a bug, 2 usage, 3 settings, 4 data, 5 stale artifact, 6 machine or model,"
    " 130 stopped by you."
)


_NAMES = (
    "evaluate", "report", "bench", "plan", "compare", "agreement", "capability", "rating-sheet", "score", "sample",
    "label", "votes", "chat", "watch", "init", "repro", "doctor", "data", "model", "export",
)  # fmt: skip
COMMANDS: dict[str, Stage | str] = {
    **{stage.command: stage for stage in STAGES},
    **{name: name for name in _NAMES},
    "rating-sheet": "agreement.sheet_app",
}
"""Each command's file, ``dpo_cli/cli/<name>.py``, with what it is called there if it is not the file's ``app``, or the
stage that has none of its own; in the order of the help."""


def _load(where: Stage | str) -> Any:
    if isinstance(where, str):
        name, _, app = where.partition(".")
        return getattr(importlib.import_module(f"dpo_cli.cli.{name}"), app or "app")
    from dpo_cli.cli.stage import stage_app

    return stage_app(where)


class _Commands(TyperGroup):
    """The commands, loaded when one is named, and all of them for the help.

    All take ``--model=~/m`` for ``--model ~/m``: shells leave a tilde behind = alone.
    """

    def list_commands(self, ctx: Any) -> list[str]:
        """Names, in the order of the help."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of this name; for none, all are loaded, so that one like it can be named."""
        for name in [cmd_name] if cmd_name in COMMANDS else COMMANDS:
            if name not in self.commands:
                self.commands[name] = typer.main.get_command(_load(COMMANDS[name]))
        return self.commands.get(cmd_name)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read a command line."""
        return super().parse_args(ctx, [_from_home(argument) for argument in args])


def _from_home(argument: str) -> str:
    option, separator, value = argument.partition("=")
    is_path = option.startswith("-") and (value == "~" or value.startswith("~/"))
    return f"{option}{separator}{Path(value).expanduser()}" if is_path else argument


app = typer.Typer(
    name="dpo-cli",
    cls=_Commands,
    help="Tune a language model on preferences with Direct Preference Optimization: offline, versioned, on one GPU.",
    epilog=examples(
        "dpo-cli init mine --sft instructions.json --preferences pairs.jsonl --model ~/models/Qwen2.5-0.5B",
        "dpo-cli -C mine repro",
        "dpo-cli -C mine precompute-ref && dpo-cli -C mine train --set train.beta=0.5",
    )
    + f"\n\n{_EXIT_CODES}",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


def main() -> None:
    """Entry point of the console script and of ``python -m dpo_cli``."""
    prepare_environment()
    claim_gpu()
    with watched_stop():
        app()


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dpo-cli {version('dpo-cli')}")
        raise typer.Exit


@app.callback()
def _global_options(
    directory: Annotated[
        Path | None, typer.Option("-C", metavar="DIR", help="Run in this project folder, as if started there.")
    ] = None,
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    if directory is None:
        return
    with errors_as_exit_codes(as_json=False):
        try:
            os.chdir(directory)
        except OSError as error:
            raise MachineError(f"-C {directory}: {error.strerror}") from None
