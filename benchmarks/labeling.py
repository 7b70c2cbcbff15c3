"""How long ``dpo-cli label`` takes to ask: 100,000 items, 10 raters who vote in turn.

    python benchmarks/labeling.py

Prints the median and the slowest question (asked, answered, progress told; the vote is on the disk), and peak memory.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import tempfile
import time
from pathlib import Path

from dpo_cli.labeling.engine import Engine
from dpo_cli.labeling.items import Account, ItemStore, read_items
from dpo_cli.labeling.settings import Settings

WORDS = 120
"""Of an answer."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--raters", type=int, default=10)
    parser.add_argument("--votes", type=int, default=2000, help="in all")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "items.jsonl"
        draw = random.Random(0)
        with path.open("w", encoding="utf-8") as file:
            for number in range(given.items):
                answers = [" ".join(draw.choices(("some", "words", "of", "an", "answer"), k=WORDS)) for _ in range(2)]
                row = {"prompt": f"prompt {number}", "completions": answers, "scores": [draw.random(), draw.random()]}
                file.write(json.dumps(row) + "\n")
        begin = time.perf_counter()
        items = ItemStore(read_items(path, "pair", 1, 0, Account()), Path(folder) / "votes")
        raters = [f"human:rater{number}" for number in range(given.raters)]
        with Engine(items, Settings(overlap=2), Path(folder) / "votes") as engine:
            for rater in raters:
                engine.join(rater)
            print(f"{len(items)} items read in {time.perf_counter() - begin:.1f} s")
            times = []
            for number in range(given.votes):
                rater = raters[number % len(raters)]
                begin = time.perf_counter()
                asked = engine.ask(rater)
                assert asked is not None
                engine.vote(rater, asked.number, str(number), draw.choice("AB"), seconds=1.0)
                engine.progress(rater)
                times.append(1000 * (time.perf_counter() - begin))
    times.sort()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"median {times[len(times) // 2]:.2f} ms, slowest {times[-1]:.1f} ms of {len(times)}; peak {peak:.0f} MiB")


if __name__ == "__main__":
    main()
