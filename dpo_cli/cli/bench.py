"""``dpo-cli bench``: how fast the passes are on this machine, or would be on another."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Annotated

import typer

from dpo_cli.cli.command import JsonOption, SetOption, command_app, examples, refuse_unread
from dpo_cli.cli.console import ConsoleReporter
from dpo_cli.cli.exits import errors_as_exit_codes
from dpo_cli.core import paths
from dpo_cli.core.errors import ParamsError

app = command_app()

_OF_A_CARD = ("compute_dtype", "max_gpu_gib", "max_tokens_per_microbatch", "layout", "recompute")
_OF_THIS_MACHINE = ("device", "threads", "head_mib")


@app.command(
    "bench",
    rich_help_panel="Measurements",
    epilog=examples(
        "dpo-cli bench",
        "dpo-cli bench --regime harmless --set runtime.max_tokens_per_microbatch=8192",
        "dpo-cli bench --shape llama-3.1-8b --pass train",
        "dpo-cli bench --set runtime.layout=padded --json",
        "dpo-cli bench --card rtx-4090 --shape llama-3.1-8b",
    ),
)
def bench_command(
    which: Annotated[
        str | None,
        typer.Option("--pass", metavar="precompute-ref|train", help="Which pass to measure; left out: both."),
    ] = None,
    regime: Annotated[
        str | None,
        typer.Option(
            "--regime",
            metavar="NAME",
            help="Random pairs with lengths like `harmless`, `0.42`, `2.15`, `3.91` (prompt to answer), or `equal`;"
            " left out: the project's own pairs.",
        ),
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option(
            "--shape",
            metavar="NAME",
            help="Random weights in the shape of `tiny`, `qwen2.5-0.5b`, `qwen2.5-1.5b`, `llama-3.2-3b` or"
            " `llama-3.1-8b`; left out: the project's own model.",
        ),
    ] = None,
    card: Annotated[
        str | None,
        typer.Option(
            "--card",
            metavar="NAME",
            help="Measure nothing, but predict for a GPU like `rtx-3060`, `rtx-4070`, `rtx-4090` or `h100-sxm`: the"
            " kernels, bytes and operations of a --shape are counted without a GPU and compared with its data sheet."
            " Needs a C++ compiler where PyTorch comes without CUDA.",
        ),
    ] = None,
    num_pairs: Annotated[int, typer.Option("--pairs", metavar="N", min=1, help="Pairs per repetition.")] = 64,
    num_turns: Annotated[
        int | None, typer.Option("--turns", metavar="N", min=1, help="Timed repetitions; default: 3.")
    ] = None,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure the reference pass and training on this machine: speed, memory, and how far from their limits.

    Reads the project's model and pairs, or makes random ones; writes nothing but the probe's verdict under
    .scratch. MFU holds the operations that
    the pass needs at the least against the speed of a matrix product in the same run.
    """
    with errors_as_exit_codes(as_json=as_json):
        if card is not None:
            from dpo_cli.dry_run.stub import load_stub
            from dpo_cli.models.device import GPUS

            refuse_unknown({"--card": (card, GPUS)})
            if shape is None:
                raise ParamsError("--card predicts for a model without numbers: name its --shape")
            if num_turns is not None:
                raise ParamsError("--turns has no effect with --card, which measures nothing")
            load_stub()  # before torch

        # here, so that --help does not wait for them
        from dpo_cli.core.load_params import load_params, parse_overrides
        from dpo_cli.core.params import Params
        from dpo_cli.models.shapes import REGIMES, SHAPES
        from dpo_cli.training.bench import PASSES, BenchOptions, measure

        refuse_unknown({"--regime": (regime, REGIMES), "--shape": (shape, SHAPES), "--pass": (which, PASSES)})
        in_project = paths.PARAMS.is_file() or shape is None
        params: Params = load_params(paths.PARAMS, overrides or []) if in_project else parse_overrides(overrides or [])
        refuse_unread("this measurement", _settings_read(which, shape, card), overrides or [])
        reporter, passes = ConsoleReporter(show_tables=not as_json), (which,) if which else PASSES
        if card is not None and shape is not None:
            from dpo_cli.dry_run.prediction import PredictionOptions, predict_speed

            figures = predict_speed(
                PredictionOptions(passes, card, shape, regime or "harmless", num_pairs), params, reporter
            )
        else:
            figures = measure(BenchOptions(passes, regime, shape, num_pairs, num_turns or 3), params, reporter)  # type: ignore[arg-type]
    if as_json:
        typer.echo(json.dumps(figures, ensure_ascii=False))


def refuse_unknown(options: Mapping[str, tuple[str | None, Collection[str]]]) -> None:
    """Refuse values that there are not: by option what was given, None where nothing was, and what there is.

    Raises:
        ParamsError: With those that there are.
    """
    problems = [
        f"{option} must be one of {', '.join(known)}, got {given}"
        for option, (given, known) in options.items()
        if given is not None and given not in known
    ]
    if problems:
        raise ParamsError(problems)


def _settings_read(which: str | None, shape: str | None, card: str | None) -> list[str]:
    """What a measurement, or a prediction for a card, reads of params.yaml."""
    read = ["reference.quantization", "train.lora"]
    read += ["train.batch_size"] if which != "precompute-ref" else []
    read += ["train.seed"] if card is None else []
    runtime = _OF_A_CARD if card is not None else (*_OF_A_CARD, *_OF_THIS_MACHINE)
    read += [f"runtime.{name}" for name in runtime if which != "precompute-ref" or name != "recompute"]
    return read + (["model", "reference", "runtime.model_path"] if shape is None else [])
