"""What training takes on GPUs that are not there: a prediction for each card and shape of a model, as one table.

    python benchmarks/cards.py --out benchmarks/results/predicted_cards.md

Each row is what ``dpo-cli bench --card C --shape S --pass train`` predicts. No GPU is used; a C++ compiler is needed.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from dpo_cli.cli.exits import errors_as_exit_codes
from dpo_cli.core.artifacts import write_text
from dpo_cli.core.environment import prepare_environment
from dpo_cli.core.errors import MachineError
from dpo_cli.core.interrupts import watched_stop
from dpo_cli.dry_run.stub import load_stub
from dpo_cli.models.device import GPUS

CARDS = ("rtx-2080-ti", "rtx-3060", "rtx-3070", "rtx-3090", "rtx-4070", "rtx-4090")
SHAPES = ("qwen2.5-0.5b", "qwen2.5-1.5b", "llama-3.2-3b", "llama-3.1-8b")
COLUMNS = ("shape", "card", "dtype", "recompute", "tokens at once", "pairs/s", "s on the GPU", "s on the host")
COLUMNS += ("kernels", "GB", "TFLOP", "peak GiB")


def row(figures: dict[str, Any]) -> str:
    """One line of the table."""
    found = figures["train"]
    cells = [
        figures["model"],
        figures["card"],
        figures["compute_dtype"],
        found["recompute"],
        found["max_tokens_per_microbatch"],
        f"{found['pairs_per_s']:.1f}",
        f"{found['device_seconds']:.2f}",
        f"{found['host_seconds']:.2f}",
        found["kernels"],
        f"{found['bytes'] / 1e9:.0f}",
        f"{found['flops'] / 1e12:.0f}",
        f"{found['peak_bytes'] / 2**30:.1f}" + ("" if found["fits"] else " (does not fit)"),
    ]
    return f"| {' | '.join(map(str, cells))} |"


def main(words: Sequence[str] | None = None) -> None:
    """Predict, and print as it goes; the file has all rows, or is left as it was."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where the table is written, too")
    parser.add_argument("--cards", nargs="+", default=CARDS, choices=GPUS, metavar="CARD")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="SHAPE")
    parser.add_argument(
        "--pairs", type=_positive, default=32, help="pairs as long as those of HH harmless; 16 make a step"
    )
    arguments = parser.parse_args(words)
    prepare_environment()
    try:
        with watched_stop(), errors_as_exit_codes(as_json=False):
            if arguments.out:
                _refuse_place(arguments.out)
            load_stub()  # before torch is imported
            _predict(arguments)
    except typer.Exit as end:
        raise SystemExit(end.exit_code) from None


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a number of at least 1, got {text}")
    return int(text)


def _refuse_place(out: Path) -> None:
    """Refuse a place for the table that cannot be written to, before minutes have gone by."""
    if out.is_dir():
        raise MachineError(f"{out} is a folder; name a file: --out FILE.md")
    try:
        tempfile.TemporaryFile(dir=out.parent).close()
    except OSError as error:
        raise MachineError(f"{out} cannot be written: {error.strerror}; name another file: --out FILE.md") from None


def _predict(arguments: argparse.Namespace) -> None:
    from dpo_cli.cli.bench import refuse_unknown
    from dpo_cli.core.params import Params
    from dpo_cli.core.progress import SilentReporter
    from dpo_cli.dry_run.prediction import PredictionOptions, predict_speed
    from dpo_cli.models.shapes import SHAPES

    for shape in arguments.shapes:
        refuse_unknown({"--shape": (shape, SHAPES)})
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    print("\n".join(lines))
    for shape in arguments.shapes:
        for card in arguments.cards:
            options = PredictionOptions(("train",), card, shape, "harmless", arguments.pairs)
            lines.append(row(predict_speed(options, Params(), SilentReporter())))
            print(lines[-1], flush=True)
    if arguments.out:
        title = f"# Predicted, not measured: nf4, {arguments.pairs} pairs in steps of 16, no GPU was used"
        write_text(arguments.out, "\n".join([title, "", "`python benchmarks/cards.py`", "", *lines, ""]))


if __name__ == "__main__":
    main()
