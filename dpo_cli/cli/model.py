"""`dpo-cli model`: bring a model into the layout that the stages read, and say what a model folder holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dpo_cli.cli.command import JsonOption, command_group, examples
from dpo_cli.cli.console import ConsoleReporter
from dpo_cli.cli.exits import errors_as_exit_codes

if TYPE_CHECKING:
    from dpo_cli.models.describe import ModelDescription

app = command_group(
    "model", "Bring a model of another form into an ordinary folder, and look at what a model folder holds.", "Projects"
)


@app.command(
    "import",
    epilog=examples(
        "dpo-cli model import SmolLM2-135M-Instruct.Q4_1.gguf --out models/smollm2",
        "dpo-cli model import model.gguf.part00 model.gguf.part01 --out mine",
        "dpo-cli model import ~/.cache/huggingface/hub/models--Qwen--Qwen2.5-0.5B --out qwen",
        "dpo-cli model import ~/downloads/gemma-3-4b-it --out gemma-text",
    ),
)
def import_command(
    sources: Annotated[
        list[Path],
        typer.Argument(
            metavar="SOURCE...",
            help="A GGUF file, or its pieces in their order; a folder with pickled or safetensors weights, of text or"
            " of text and images; a model of the Hub's cache (models--ORG--NAME, or one of its snapshots).",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The folder to make.")],
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            metavar="NAME",
            help="Of weights dequantized from GGUF: float32 if not given, which is exact; bfloat16 or float16, half of"
            " the size.",
        ),
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option("--tokenizer", metavar="DIR", help="The tokenizer of a GGUF model, in place of the file's own."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Make an ordinary model folder of another source: safetensors weights, tokenizer, template and license.

    GGUF files are dequantized (`pip install 'dpo-cli[gguf]'`), pickled weights read without running them, the
    language model taken out of a multimodal one and held against the whole. The result is loaded, looked
    through for NaN and asked a question, then put in its place: whole or not at all. Nothing is downloaded.
    """
    with errors_as_exit_codes(as_json=as_json):
        # here, so that --help does not wait for them
        from dpo_cli.models.importing import GgufOptions, import_model
        from dpo_cli.models.load import quiet_libraries

        quiet_libraries()
        reporter = ConsoleReporter(show_tables=not as_json)
        source, found = import_model(sources, out, GgufOptions(dtype, tokenizer), reporter)
        origin = {"source": str(source.name), "kind": source.kind, "revision": source.revision, "out": str(out)}
        rows = [("from", f"{source.name}: {source.kind}"), ("to", str(out))]
        rows += [("revision", source.revision)] if source.revision else []
        _print(found, origin, rows, reporter, as_json=as_json)
    if not as_json:
        reporter.say(f"use it: dpo-cli init PROJECT --model {out}")


@app.command(
    "info", epilog=examples("dpo-cli model info models/smollm2", "dpo-cli model info ~/models/Qwen2.5-0.5B --json")
)
def info_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A model folder.")], as_json: JsonOption = False
) -> None:
    """Say what a model folder holds: checked file by file, loaded, and asked a question. Writes nothing.

    It is the table that `dpo-cli model import` ends with: sizes, vocabulary, special and end tokens, chat
    template, license, an answer and the digest of every file.
    """
    with errors_as_exit_codes(as_json=as_json):
        # here, so that --help does not wait for them
        from dpo_cli.models.describe import describe_model
        from dpo_cli.models.load import quiet_libraries

        quiet_libraries()
        reporter = ConsoleReporter(show_tables=not as_json)
        found = describe_model(folder, reporter, "info")
        _print(found, {"folder": str(folder)}, [("folder", str(folder))], reporter, as_json=as_json)


def _print(
    found: ModelDescription,
    origin: dict[str, str | None],
    rows: list[tuple[str, str]],
    reporter: ConsoleReporter,
    *,
    as_json: bool,
) -> None:
    for note in found.notes:
        reporter.warn(note)
    reporter.table("model", rows + found.table)
    if as_json:
        typer.echo(json.dumps({"model": {**origin, **found.figures, "notes": list(found.notes)}}, ensure_ascii=False))
