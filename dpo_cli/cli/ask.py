"""``dpo-cli init --ask``: its data and model by questions, one after the other."""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace
from pathlib import Path

import typer

from dpo_cli.cli.new_project import ProjectFiles
from dpo_cli.core.data_params import PreferenceSource, SftSource
from dpo_cli.core.errors import DpoCliError, ParamsError
from dpo_cli.core.progress import Reporter
from dpo_cli.data.plan import Treatment, plan_of
from dpo_cli.data.reading.base import missing
from dpo_cli.models.folder import check_model_folder

_QUESTIONS = {
    "sft": "Instructions teach the model to answer at all: a file whose rows have a prompt and an answer.",
    "preferences": "Preferences teach it which answers are better: a file whose rows have a prompt, a better answer and"
    " a worse one. If you have none, you can make some by voting on the model's own answers.",
    "model": "The model that is tuned: a folder in Hugging Face layout.",
}
_ELSE = {
    "sft": "the better answers of your preferences, or the embedded world's",
    "preferences": "the embedded world's",
    "model": "the embedded tiny model",
}


def ask_for_files(files: ProjectFiles, reporter: Reporter) -> ProjectFiles:
    """Ask for each file that is not given, until the answer can be read.

    Raises:
        ParamsError: Nobody is there to answer: standard input is no terminal.
    """
    if not is_terminal():
        raise ParamsError("--ask needs a terminal to ask at; give --sft, --preferences and --model instead")
    for name, sentence in _QUESTIONS.items():
        while getattr(files, name) is None:
            typer.echo(f"\n{sentence}", err=True)
            given = typer.prompt(f"--{name} (Enter: {_ELSE[name]})", default="", show_default=False, err=True).strip()
            if not given:
                break
            path = Path(given).expanduser()
            try:
                reporter.say(f"{path}: {_found(name, path)}")
                files = replace(files, **{name: path})
            except DpoCliError as error:
                reporter.warn(str(error))
    return files


def next_steps(folder: Path, files: ProjectFiles, reporter: Reporter) -> None:
    """Say how to do the same without questions, and what comes next."""
    given = {name: path for name in _QUESTIONS if (path := getattr(files, name)) is not None}
    options = [word for name, path in given.items() for word in (f"--{name}", str(path))]
    reporter.say(f"The same without questions: {shlex.join(['dpo-cli', 'init', str(folder), *options])}")
    if files.preferences is None:
        at = shlex.join(["dpo-cli", "-C", str(folder)])
        reporter.say(
            f"To vote on the model's own answers: {at} repro sft, then {at} sample PROMPTS, then {at} label ITEMS"
        )


def is_terminal() -> bool:
    """Whether somebody can answer."""
    return sys.stdin.isatty()


def _found(name: str, path: Path) -> str:
    """What a file or folder is read as.

    Raises:
        DpoCliError: It cannot be read.
    """
    if name == "model":
        check_model_folder(path)
        return "a model in Hugging Face layout"
    if not path.is_file():
        raise missing(path)
    source = SftSource(path=str(path)) if name == "sft" else PreferenceSource(path=str(path))
    return plan_of(source, path, Treatment({}, 0.5))[1]
