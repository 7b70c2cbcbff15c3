"""``dpo-cli export``: the trained model in the forms that others load, each held against what was trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from dpo_cli.cli.command import JsonOption, SetOption, command_app, examples, refuse_unread
from dpo_cli.cli.console import ConsoleReporter
from dpo_cli.cli.exits import errors_as_exit_codes
from dpo_cli.core import paths
from dpo_cli.core.errors import MachineError

_OF_EVALUATE = ("max_new_tokens", "bootstrap_draws", "confidence", "seed")
_READ = ("model", "reference", "runtime", *(f"evaluate.{name}" for name in _OF_EVALUATE))

app = command_app()


@app.command(
    "export",
    rich_help_panel="Projects",
    epilog=examples(
        "dpo-cli export --out exports",
        "dpo-cli export --out exports --to gguf-q8_0 --to gguf-q4_1",
        "dpo-cli export --out exports --to adapter --for vllm",
        "dpo-cli export --out exports --to merged --dtype bfloat16 --min-kept 0.9",
    ),
)
def export_command(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where a folder is made for each form.")],
    to: Annotated[
        list[str] | None,
        typer.Option(
            "--to",
            metavar="FORM",
            help="adapter; merged-nf4 or merged (whole models); gguf-f16, -q8_0, -q4_0, -q4_1, and K-quants such as"
            " gguf-q4_k_m (by llama-quantize); gguf-lora. May be repeated; left out: adapter, and the whole model"
            " merged into the weights that it was trained on.",
        ),
    ] = None,
    model: Annotated[
        Path, typer.Option("--model", metavar="DIR", help="Folder of an adapter that `dpo-cli train` made.")
    ] = paths.DPO_MODEL,
    pairs: Annotated[int, typer.Option("--pairs", metavar="K", min=1, help="Held-out pairs to score.")] = 64,
    max_nats: Annotated[
        float,
        typer.Option(
            "--max-nats", metavar="X", min=0, help="Refuse a form that is further from what was trained, nats a token."
        ),
    ] = 0.25,
    min_kept: Annotated[
        float,
        typer.Option(
            "--min-kept",
            metavar="SHARE",
            min=0.01,
            max=1,
            help="Refuse a form that keeps less of the tuned margin, or has more than one by this share.",
        ),
    ] = 0.8,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            metavar="NAME",
            help="Of merged weights: bfloat16, float16 or float32; left out: the base's if 16 bits, else float16.",
        ),
    ] = None,
    serve_with: Annotated[
        str | None, typer.Option("--for", metavar="SERVER", help="vllm: check that it takes the adapter.")
    ] = None,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Export the trained model, and check that what was exported is what was trained.

    Each form is built aside, loaded again, and held against the trained model on held-out pairs: the same tokens of
    every prompt, nats a token, how much of the tuned margin is kept, pairs that are ranked the same, and greedy
    answers. GGUF files are loaded by llama.cpp (`pip install 'dpo-cli[export]'`). A form that is too far away is
    refused, with what is wrong with it; the others are moved into place with a model card that says what was found.
    """
    with errors_as_exit_codes(as_json=as_json):
        from dpo_cli.core.load_params import load_params  # here, so that --help does not wait for them

        params = load_params(paths.PARAMS, overrides or [])
        refuse_unread("export", _READ, overrides or [])
        from dpo_cli.exporting.export import ExportOptions, export_model

        options = ExportOptions(model, tuple(to or ()), pairs, max_nats, min_kept, dtype, serve_with)
        reporter = ConsoleReporter(show_tables=not as_json)
        exported, recommended = export_model(out, options, params, reporter)
        for each in exported:
            reporter.table(f"export: {each.name}", each.rows())
        if recommended:
            reporter.say(f"export: {recommended}")
    if as_json:
        figures = {each.name: each.figures() for each in exported}
        typer.echo(json.dumps({"targets": figures, "recommended": recommended}, ensure_ascii=False))
    with errors_as_exit_codes(as_json=False):  # the figures name the problems, too
        problems = [f"{each.name} is refused: {problem}" for each in exported for problem in each.found.problems]
        if problems:
            raise MachineError(problems)
