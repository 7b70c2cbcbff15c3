"""How far learning rates move a real model: the trials behind the defaults of sections sft and train.

    python benchmarks/learning_rates.py PAIRS --model DIR --folder NEW [--part confirm --rates 1e-4]

Pairs are divided by a hash of their prompt: some train, some choose between settings, and others, by which nothing
was chosen, confirm. All rates share one SFT model and one reference cache. Prints a row a trial, as it ends. Whatever
PAIRS is, dpo-cli reads it; a real model takes minutes a trial on a CPU.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import polars as pl

PARTS = {"confirm": (0.0, 0.2), "choose": (0.2, 0.4), "train": (0.4, 1.0)}
"""Where in [0, 1) the hash of a prompt lies."""
SFT_COLUMNS = ("sft rate", "steps", "held-out loss")
DPO_COLUMNS = (
    "train rate", "batch", "steps", "held-out loss", "accuracy", "KL", "chosen reward", "end", "repeated", "perplexity"
)  # fmt: skip


def dpo_cli(project: Path, stage: str, *settings: str) -> dict[str, Any]:
    """Run a stage in a project; its metrics."""
    overrides = [f"--set={setting}" for setting in settings]
    command = [sys.executable, "-m", "dpo_cli", "-C", str(project), stage, *overrides, "--json"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return next(iter(json.loads(done.stdout.splitlines()[-1]).values()))


def init(project: Path, pairs: Path, model: Path) -> None:
    """Make a project, as a user does."""
    command = [sys.executable, "-m", "dpo_cli", "init", str(project), "--preferences", str(pairs)]
    subprocess.run([*command, "--model", str(model)], check=True, stdout=subprocess.DEVNULL)


def divide(pairs: Path, model: Path, whole: Path, most: dict[str, int]) -> dict[str, list[dict[str, Any]]]:
    """The rows of each part, at most so many, in an order of their own."""
    if not (whole / "params.yaml").is_file():
        init(whole, pairs, model)
    dpo_cli(whole, "convert-preferences")
    tables = [pl.read_parquet(whole / "data/preference" / f"{split}.parquet") for split in ("train", "eval")]
    placed = sorted((_position(row["group"]), row["id"], row) for row in pl.concat(tables).to_dicts())
    return {
        part: [row for place, _, row in placed if low <= place < high][: most[part]]
        for part, (low, high) in PARTS.items()
    }


def _position(prompt: str) -> float:
    return int(hashlib.sha256(prompt.encode()).hexdigest()[:12], 16) / 16**12


def prepare(project: Path, model: Path, train: list[dict[str, Any]], held_out: list[dict[str, Any]]) -> None:
    """A project that trains on some rows and holds out others."""
    if not (project / "params.yaml").is_file():
        raw = project / "data/raw"
        raw.mkdir(parents=True)
        for name, rows in (("train", train), ("eval", held_out)):
            texts = [json.dumps({side: row[side] for side in ("prompt", "chosen", "rejected")}) for row in rows]
            (raw / f"{name}.jsonl").write_text("\n".join(texts) + "\n", encoding="utf-8")
        init(project, raw / "train.jsonl", model)
    dpo_cli(project, "base")
    for stage in ("convert-sft", "convert-preferences"):  # instructions are the preferred answers
        also = "[{path: data/raw/eval.jsonl, split: eval}]"
        dpo_cli(project, stage, "data.preferences.split=train", f"data.preferences.also={also}")


def try_sft(project: Path, rate: str) -> list[str]:
    """Fine-tune with a rate; the row of the table."""
    found = dpo_cli(project, "sft", f"sft.learning_rate={rate}", "sft.eval_steps=5")
    return [rate, str(found["num_steps"]), f"{found['eval_loss_start']:.4f} -> {found['eval_loss']:.4f}"]


def try_dpo(project: Path, rate: str, batch_size: str, num_prompts: int) -> list[str]:
    """Train with a rate and evaluate; the row of the table."""
    dpo_cli(project, "train", f"train.learning_rate={rate}", f"train.batch_size={batch_size}", "train.eval_steps=5")
    found = dpo_cli(project, "evaluate", f"evaluate.num_prompts={num_prompts}", "evaluate.max_new_tokens=64")
    low, high = found["reward_accuracy_ci"]
    return [
        rate,
        batch_size,
        str(found["training"]["num_steps"]),
        f"{found['loss_at_reference']:.4f} -> {found['loss']:.4f}",
        f"{found['reward_accuracy']:.3f} [{low:.3f}, {high:.3f}]",
        f"{found['kl']:.3f}",
        f"{found['chosen_reward']:+.3f}",
        *(
            f"{found[f'{name}_sft']:.{digits}f} -> {found[f'{name}_dpo']:.{digits}f}"
            for name, digits in (("finished", 2), ("repetition", 2), ("perplexity", 3))
        ),
    ]


def print_row(cells: list[str] | tuple[str, ...]) -> None:
    """A row of a Markdown table, at once."""
    print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Run the trials and print their tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=Path)
    parser.add_argument("--model", type=Path, required=True, help="model directory")
    parser.add_argument("--folder", type=Path, required=True, help="where the projects of the trials go")
    parser.add_argument("--part", choices=["choose", "confirm"], default="choose")
    parser.add_argument("--sft-rates", nargs="+", default=["1e-4", "5e-4", "2e-4"], help="the last one is kept")
    parser.add_argument("--rates", nargs="+", default=["5e-5", "1e-4", "2e-4", "5e-4"])
    parser.add_argument("--batch-sizes", nargs="+", default=["16"])
    parser.add_argument("--num-train", type=int, default=160)
    parser.add_argument("--num-held-out", type=int, default=64)
    parser.add_argument("--num-prompts", type=int, default=12, help="prompts to answer")
    options = parser.parse_args()
    most = {"train": options.num_train, "choose": options.num_held_out, "confirm": options.num_held_out}
    parts = divide(options.pairs, options.model, options.folder / "whole", most)
    project = options.folder / options.part
    prepare(project, options.model, parts["train"], parts[options.part])
    print_row(SFT_COLUMNS)
    print_row(["---"] * len(SFT_COLUMNS))
    for rate in options.sft_rates:
        print_row(try_sft(project, rate))
    dpo_cli(project, "precompute-ref")
    print()
    print_row(DPO_COLUMNS)
    print_row(["---"] * len(DPO_COLUMNS))
    for batch_size in options.batch_sizes:
        for rate in options.rates:
            print_row(try_dpo(project, rate, batch_size, options.num_prompts))


if __name__ == "__main__":
    main()
