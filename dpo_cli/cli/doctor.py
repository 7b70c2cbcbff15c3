"""``dpo-cli doctor``: whether this machine and this project can do it, and what to do where not."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

import typer

from dpo_cli.cli.command import JsonOption, command_app, examples

if TYPE_CHECKING:
    from dpo_cli.core.checkup import Finding
    from dpo_cli.core.params import Params

app = command_app()

_STYLES = {"good": ("ok", "green"), "warn": ("warning", "yellow"), "bad": ("FAULT", "bold red"), "plain": ("", "dim")}


@app.command(
    "doctor",
    rich_help_panel="Projects",
    epilog=examples("dpo-cli doctor", "dpo-cli -C mine doctor", "dpo-cli doctor --json"),
)
def doctor_command(as_json: JsonOption = False) -> None:
    """Look for what is wrong with this machine and this project: one line a fault, with what to do about it.

    It multiplies in 4 bits, forward and backward, on the GPU if there is one; holds packages, driver and
    PyTorch against each other; looks at memory, disks, git, DVC and the clock; and opens every file that the
    settings name in a process without a network. Takes seconds, writes nothing that stays. Exit code 0 if there
    is no fault (warnings are none); else that of the gravest: 6 machine or model, 5 stale artifact, 4 data, 3 settings.
    """
    # here, so that --help does not wait for them
    from rich.text import Text

    from dpo_cli.cli.console import open_console
    from dpo_cli.core.text import in_one_line
    from dpo_cli.models.doctor import examine

    console, findings = open_console(), []
    for finding in examine(_look_at_data):
        findings.append(finding)
        if not as_json:
            word, style = _STYLES[finding.status]
            line = Text.assemble((f"{word:<8}", style), (f"{finding.name:<10}", "dim"), in_one_line(_in_words(finding)))
            console.print(line, soft_wrap=True)
    faults = [finding for finding in findings if finding.status == "bad"]
    code = max((fault.exit_code for fault in faults), default=0)
    if as_json:
        rows = [{name: value for name, value in asdict(each).items() if name != "exit_code"} for each in findings]
        typer.echo(json.dumps({"doctor": rows, "exit_code": code}, ensure_ascii=False))
    else:
        console.print(Text(_headline(findings), "bold red" if faults else "bold green"))
    if code:
        raise typer.Exit(code)


def _look_at_data(params: Params) -> None:
    from dpo_cli.data.plan import refuse_missing

    refuse_missing(params.data)


def _in_words(finding: Finding) -> str:
    return f"{finding.found}; {finding.remedy}" if finding.remedy else finding.found


def _headline(findings: list[Finding]) -> str:
    numbers = [sum(finding.status == status for finding in findings) for status in ("bad", "warn")]
    words = [
        f"{number} {name}{'s' if number > 1 else ''}"
        for number, name in zip(numbers, ("fault", "warning"), strict=True)
        if number
    ]
    return ", ".join(words) or "all well"
