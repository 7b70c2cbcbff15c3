"""How fast preference data converts, how much memory it takes, and how that compares with ``datasets``, in one run.

    python benchmarks/conversion.py [--rows 1000000]

Both sides read the same JSON lines (about a kilobyte a pair) and make the same table: id, prompt, chosen and rejected
as messages, scores, source and group, where id and group are content hashes, on both sides by the same function. Ours
also checks every row, finds duplicates and contradictions, splits by prompt, and writes parquet; ``datasets`` loads,
maps, and leaves Arrow files in its cache. The ids must be equal, or no ratio is printed. Each side runs in a process of
its own, with as many workers as there are cores; ``datasets`` also as its documentation has it, in one process. Peak
memory is the resident memory of all processes of a side, less that of an interpreter that has imported what it imports.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

MIB = 2**20


def write_pairs(path: Path, num_rows: int, seed: int = 0) -> None:
    """Synthetic pairs of sentences of random words, about 1 GB a million."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(5000)]
    sentences = [" ".join(rng.choices(words, k=12)) + "." for _ in range(20_000)]

    def text(num_sentences: int) -> str:
        return " ".join(rng.choices(sentences, k=num_sentences))

    with path.open("w", encoding="utf-8") as file:
        for row in range(num_rows):
            pair = {"prompt": f"Question {row}: {text(3)}", "chosen": text(4), "rejected": text(5)}
            file.write(json.dumps(pair) + "\n")


# --- the sides, each in a process of its own -------------------------------------------------------


def run_ours(source: Path, folder: Path, workers: int) -> tuple[float, float]:
    """Convert with dpo-cli; seconds, and MiB of an idle interpreter."""
    from dpo_cli.core.data_params import DataChecks, PreferenceSource
    from dpo_cli.data.convert import convert
    from dpo_cli.data.plan import Treatment

    idle = psutil.Process().memory_info().rss / MIB
    (folder / "out").mkdir()
    (folder / "work").mkdir()
    begun = time.perf_counter()
    convert(
        [PreferenceSource(path=str(source))],
        Treatment(DataChecks().model_dump(), 0.1),
        folder / "work",
        folder / "out",
        folder / "rejects.jsonl",
        workers=workers,
    )
    return time.perf_counter() - begun, idle


def to_schema(row: dict[str, Any]) -> dict[str, Any]:
    """The canonical row, as a user of ``datasets`` would write it."""
    from dpo_cli.data.schema import content_id

    prompt = [{"role": "user", "content": row["prompt"]}]
    chosen = [{"role": "assistant", "content": row["chosen"]}]
    rejected = [{"role": "assistant", "content": row["rejected"]}]
    return {
        "id": content_id(prompt, chosen, rejected),
        "prompt": prompt,
        "chosen": chosen,
        "rejected": rejected,
        "chosen_score": None,
        "rejected_score": None,
        "source": "pairs.jsonl",
        "group": content_id(prompt),
    }


def run_datasets(source: Path, folder: Path, workers: int) -> tuple[float, float]:
    """Load and map with ``datasets``; seconds, and MiB of an idle interpreter."""
    import datasets

    datasets.disable_progress_bars()
    idle = psutil.Process().memory_info().rss / MIB
    begun = time.perf_counter()
    table = datasets.load_dataset("json", data_files=str(source), cache_dir=str(folder / "cache"), split="train")
    table = table.map(to_schema, num_proc=workers if workers > 1 else None)
    seconds = time.perf_counter() - begun
    table.select_columns(["id"]).to_parquet(folder / "ids.parquet")
    return seconds, idle


def measure(side: str, source: Path, folder: Path, workers: int) -> tuple[float, float]:
    """Run a side in a process of its own; seconds, and peak MiB beyond its idle interpreters."""
    folder.mkdir()
    command = [sys.executable, __file__, "--side", side, "--source", str(source), "--folder", str(folder)]
    process = subprocess.Popen([*command, "--workers", str(workers)], stdout=subprocess.PIPE, text=True)
    peak = 0.0
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        watched = psutil.Process(process.pid)
        while not done.wait(0.05):
            try:
                family = [watched, *watched.children(recursive=True)]
                peak = max(peak, sum(member.memory_info().rss for member in family) / MIB)
            except psutil.Error:
                continue

    thread = threading.Thread(target=watch)
    thread.start()
    output, _ = process.communicate()
    done.set()
    thread.join()
    if process.returncode:
        raise SystemExit(f"{side} failed")
    seconds, idle = json.loads(output.strip().splitlines()[-1])
    return seconds, peak - idle


def same_ids(ours: Path, theirs: Path) -> bool:
    """Whether both sides found the same rows."""
    import polars as pl

    mine = pl.concat([pl.read_parquet(ours / f"{split}.parquet", columns=["id"]) for split in ("train", "eval")])
    return mine.sort("id").equals(pl.read_parquet(theirs, columns=["id"]).sort("id"))


def main() -> None:
    """Measure both sides and print rate, memory and ratio."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--side", choices=["ours", "datasets"])
    parser.add_argument("--source", type=Path)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--workers", type=int, default=1)
    arguments = parser.parse_args()
    if arguments.side:
        run = run_ours if arguments.side == "ours" else run_datasets
        print(json.dumps(run(arguments.source, arguments.folder, arguments.workers)))
        return
    cores = os.cpu_count() or 1
    with tempfile.TemporaryDirectory(prefix="dpo-cli-bench-") as name:
        folder = Path(name)
        source = folder / "pairs.jsonl"
        write_pairs(source, arguments.rows)
        size = source.stat().st_size / 1e9
        print(f"{arguments.rows} pairs, {size:.2f} GB of JSON lines, {cores} cores, {platform.processor() or 'CPU'}")
        figures = {}
        for side, workers in (("ours", cores), ("datasets", 1), ("datasets", cores)):
            place = folder / f"{side}-{workers}"
            seconds, mib = figures[side, workers] = measure(side, source, place, workers)
            rate = arguments.rows / seconds
            print(
                f"{side:>9}, {workers} workers: {seconds:6.1f} s  {rate:8.0f} rows/s  peak {mib:6.0f} MiB", flush=True
            )
        if not same_ids(folder / f"ours-{cores}" / "out", folder / "datasets-1" / "ids.parquet"):
            raise SystemExit("the ids differ: no ratio")
        mine = figures["ours", cores][0]
        for (side, workers), (seconds, _) in figures.items():
            if side == "datasets":
                print(f"datasets with {workers} workers / ours: {seconds / mine:.2f}")


if __name__ == "__main__":
    main()
