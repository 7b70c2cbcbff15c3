"""``dpo-cli chat``: a conversation with base, SFT and tuned model at once, or one prompt to all of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from dpo_cli.cli.command import SetOption, account_name, command_app, examples, refuse_unread
from dpo_cli.cli.console import ConsoleReporter, open_console, plain_table
from dpo_cli.cli.exits import errors_as_exit_codes
from dpo_cli.core import paths
from dpo_cli.core.errors import DataError, ParamsError

if TYPE_CHECKING:
    from dpo_cli.core.params import Params
    from dpo_cli.judging.answers import Answer

_NARROW = 30
"""Columns that an answer needs to stand beside others."""
_READ = ("model", "reference", "evaluate", "runtime")

app = command_app()


@app.command(
    "chat",
    rich_help_panel="Measurements",
    epilog=examples(
        "dpo-cli chat",
        "dpo-cli chat --system 'You are a pirate.' --temperature 0.7 --rater anna",
        "dpo-cli chat --once 'Explain in one sentence why the sky is blue.'",
        "dpo-cli chat --once 'Hello!' --model ~/adapters/another --json",
    ),
)
def chat_command(
    once: Annotated[
        str | None, typer.Option("--once", metavar="PROMPT", help="Print the answers to this prompt, and end.")
    ] = None,
    system: Annotated[
        str | None, typer.Option("--system", metavar="TEXT", help="A system message before the conversation.")
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(
            "--model",
            metavar="DIR",
            help="An adapter for the project's SFT model, or a whole model, in place of models/dpo.",
        ),
    ] = None,
    temperature: Annotated[
        float,
        typer.Option("--temperature", metavar="T", min=0, max=10, help="0 takes the likeliest token each time."),
    ] = 0.0,
    rater: Annotated[
        str | None, typer.Option("--rater", metavar="NAME", help="Who votes; left out: the name of your account.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Folder of the votes; data/votes/chat if left out.")
    ] = None,
    overrides: SetOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="With --once: print the answers as one JSON object.")] = False,
) -> None:
    """Talk to the base model, the SFT model and the tuned one at once, and vote on what they say.

    All get the same conversation, which goes on from the answer that you choose, so the answers to every turn can be
    compared. One key says whether the SFT model's answer or the tuned one is better: a vote like those of `dpo-cli
    label`, in a file NAME.jsonl. Answers end after evaluate.max_new_tokens. With --temperature they are sampled, as
    evaluate does: the same prompt gives the same answers, another evaluate.seed others.
    """
    with errors_as_exit_codes(as_json=as_json):
        _refuse_options(once, {"--rater": rater, "--out": out}, as_json=as_json)
        from dpo_cli.core.load_params import load_params  # here, so that --help does not wait for them

        params = load_params(paths.PARAMS, overrides or [])
        refuse_unread("chat", _READ, overrides or [])
        if any(override.partition("=")[0].strip() == "evaluate.temperature" for override in overrides or []):
            raise ParamsError("--set evaluate.temperature has no effect on chat; say --temperature")
        reporter = ConsoleReporter(show_tables=not as_json)
        if once is None:
            _talk(params, model, system, temperature, rater or account_name(), out, reporter)
            return
        found = _ask(params, model, once, system, temperature, reporter)
        if as_json:
            rows = [
                {"model": name, "text": each.text, "num_tokens": each.num_tokens, "finished": each.finished}
                for name, each in found.items()
            ]
            typer.echo(json.dumps({"prompt": once, "temperature": temperature, "answers": rows}, ensure_ascii=False))
        else:
            print_answers(found, temperature)


def _refuse_options(once: str | None, of_talks: dict[str, object], *, as_json: bool) -> None:
    if once is not None:
        if not once.strip():
            raise DataError("the prompt is empty; say something, as in: dpo-cli chat --once 'Hello!'")
        if unread := [name for name, value in of_talks.items() if value is not None]:
            raise ParamsError(f"{' and '.join(unread)} has no effect with --once, which takes no votes; leave it out")
    elif as_json:
        raise ParamsError("--json has no effect without --once")
    elif not all(stream.isatty() for stream in (sys.stdin, sys.stdout, sys.stderr)):
        raise ParamsError("dpo-cli chat needs a terminal; without one, say --once PROMPT")


def _ask(
    params: Params, model: Path | None, prompt: str, system: str | None, temperature: float, reporter: ConsoleReporter
) -> dict[str, Answer]:
    from dpo_cli.data.schema import Message, user
    from dpo_cli.evaluation.chat import Chat

    chat = Chat(params, model, reporter)
    before: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    return {name: chat.answer(name, [*before, user(prompt)], temperature) for name in chat.names}


def _talk(
    params: Params,
    model: Path | None,
    system: str | None,
    temperature: float,
    rater: str,
    out: Path | None,
    reporter: ConsoleReporter,
) -> None:
    from dpo_cli.evaluation.chat import Chat
    from dpo_cli.labeling.chat_terminal import chat_in_terminal
    from dpo_cli.labeling.chat_votes import ChatVotes
    from dpo_cli.labeling.votes import person

    chat = Chat(params, model, reporter)
    with ChatVotes(out or paths.VOTES / "chat", person(rater)) as votes:
        chat.load()
        chat_in_terminal(chat, votes, system, temperature)
        if votes.num_votes:
            reporter.say(f"votes of this conversation: {votes.num_votes}, in {votes.path}")


def print_answers(found: dict[str, Answer], temperature: float, console: Console | None = None) -> None:
    """Print answers beside each other, or below each other where there is no room."""
    console = console or open_console()
    table = plain_table(expand=True)
    if console.width < _NARROW * len(found):
        table.add_column(Text(f"at T = {temperature:g}"), overflow="fold")
        for name, each in found.items():
            table.add_row(Text.assemble((f"{_title(name, each)}\n", "bold"), each.text, "\n"))
    else:
        for name, each in found.items():
            table.add_column(Text(_title(name, each)), overflow="fold", ratio=1)
        table.add_row(*(Text(each.text) for each in found.values()))
    console.print(table)
    if len({each.text for each in found.values()}) == 1:
        console.print(Text("All answer alike.", "dim"))


def _title(model: str, answer: Answer) -> str:
    return f"{model} ({answer.num_tokens} tokens{'' if answer.finished else ', cut off'})"
