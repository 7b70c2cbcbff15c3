"""How long ``dpo-cli label`` takes to ask: 100,000 items, 10 raters who vote in turn; and votes to be converted.

    python benchmarks/labeling.py                      # the median and the slowest question, and peak memory
    python benchmarks/labeling.py --convert 100000     # so many votes of 10 raters, two on each pair, made into pairs

A question is asked and answered, the progress told, and the vote is on the disk.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import tempfile
import time
from pathlib import Path

from dpo_cli.core.data_params import DataChecks, PreferenceSource
from dpo_cli.data.convert import convert
from dpo_cli.data.plan import Treatment
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
    parser.add_argument("--convert", type=int, metavar="VOTES", help="measure conversion instead")
    given = parser.parse_args()
    if given.convert:
        convert_votes(given.convert, given.raters)
        return
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
    print(
        f"median {times[len(times) // 2]:.2f} ms, slowest {times[-1]:.1f} ms of {len(times)}; peak {peak_mib():.0f} MiB"
    )


def convert_votes(num_votes: int, num_raters: int) -> None:
    """Two raters vote on each pair; the votes are read as preferences, in one process."""
    draw = random.Random(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("votes", "work", "out"):
            (folder / part).mkdir()
        files = [(folder / f"votes/rater{number}.jsonl").open("w", encoding="utf-8") for number in range(num_raters)]
        answers: list[str] = []
        for number in range(num_votes):
            if number % 2 == 0:
                answers = [" ".join(draw.choices(("some", "words", "of", "an", "answer"), k=WORDS)) for _ in range(2)]
            row = {
                "number": number // num_raters,
                "item_id": str(number // 2),
                "mode": "pair",
                "vote": draw.choice("AB"),
            }
            row |= {"rater": f"human:rater{number % num_raters}", "prompt": f"prompt {number // 2}"}
            files[number % num_raters].write(json.dumps(row | {"completions": draw.sample(answers, 2)}) + "\n")
        for file in files:
            file.close()
        begin = time.perf_counter()
        source = PreferenceSource(path=str(folder / "votes"))
        treatment = Treatment(DataChecks().model_dump(), 0.1)
        found = convert([source], treatment, folder / "work", folder / "out", folder / "rejects.jsonl")
        seconds = time.perf_counter() - begin
    print(f"{num_votes} votes, {sum(found.num_written.values())} pairs: {seconds:.1f} s; peak {peak_mib():.0f} MiB")


def peak_mib() -> float:
    """Of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
