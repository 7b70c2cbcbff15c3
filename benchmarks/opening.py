"""How long it takes to open many tokenized pairs for training, and how much memory, with synthetic token ids.

    python benchmarks/opening.py [--pairs 1000000] [--folder DIR]

The pairs lie in a token store as stages leave it in .scratch/tokens, and in a reference cache with a log-probability
for each token. The prompt has 200 tokens and each answer has, so that a pair is two texts of 400 tokens. A process of
its own then does what stage train does before its first step: it opens the store, checks and reads the cache, joins the
two, and looks for the longest pairs; then it lays out the first batch, and, for the speed of random reads, a thousand
more. Memory is the peak of all that is resident in that process, libraries and mapped pages included. What is written
takes about 4 GB a million pairs, and is deleted at the end.
"""

from __future__ import annotations

import argparse
import heapq
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

TOKENS = 200
VOCABULARY = 32_000
BATCH = 16
NUM_BATCHES = 1000
IDENTITY = {"graph": "synthetic"}


def write(folder: Path, num_pairs: int) -> None:
    """A store and a cache of so many pairs."""
    import polars as pl

    from dpo_cli.data.tokens import TokenGroup, TokenWriter
    from dpo_cli.scoring.reference import SCHEMA, write_cache

    rng = np.random.default_rng(0)
    (folder / "tokens").mkdir(parents=True)
    (folder / "reference").mkdir()
    writer = TokenWriter(folder / "tokens")
    keys: list[str] = []
    for start in range(0, num_pairs, 1000):
        tokens = rng.integers(3, VOCABULARY, (min(1000, num_pairs - start), 3, TOKENS)).tolist()
        for number, (prompt, chosen, rejected) in enumerate(tokens, start):
            group = TokenGroup(f"{number:032x}", f"{number:032x}", tuple(prompt), (tuple(chosen), tuple(rejected)))
            writer.add(group)
            keys += group.keys
    writer.close()
    logps = rng.normal(-2, 1, len(keys) * TOKENS).astype(np.float32)
    token_logps = pl.Series(logps).reshape((len(keys), TOKENS)).cast(pl.List(pl.Float32))
    sums = logps.reshape(-1, TOKENS).sum(1, dtype=np.float64)
    columns = {"key": keys, "logp": sums, "num_tokens": [TOKENS] * len(keys), "token_logps": token_logps}
    write_cache(folder / "reference", pl.DataFrame(columns, schema_overrides=SCHEMA), IDENTITY, {})


def measure(folder: Path) -> dict[str, Any]:
    """Open both for training; seconds and MiB."""
    from dpo_cli.data.tokens import stored_groups
    from dpo_cli.scoring.layout import lay_out
    from dpo_cli.scoring.reference import read_cache, reference_logps

    idle = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    begun = time.perf_counter()
    groups = stored_groups(folder / "tokens")
    reference = reference_logps(read_cache(folder / "reference", IDENTITY), groups)
    heapq.nlargest(BATCH, groups, key=lambda group: sum(group.sizes))
    lay_out(random.Random(0).sample(groups, BATCH), "shared")
    opened = time.perf_counter() - begun
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    rng, begun = random.Random(1), time.perf_counter()
    for _ in range(NUM_BATCHES):
        lay_out(rng.sample(groups, BATCH), "shared")
    batch = (time.perf_counter() - begun) / NUM_BATCHES
    assert len(reference) == len(groups)
    return {"num_pairs": len(groups), "seconds": opened, "idle_mib": idle, "peak_mib": peak, "batch_ms": 1000 * batch}


def main() -> None:
    """Write, measure, print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, help="where the data is written, and kept for the next run")
    parser.add_argument("--step", choices=["write", "measure"])
    options = parser.parse_args()
    if options.step == "write":
        write(options.folder, options.pairs)
    elif options.step == "measure":
        print(json.dumps(measure(options.folder)))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            folder = options.folder or Path(temporary)
            for step in ("write", "measure") if not (folder / "reference").exists() else ("measure",):
                command = [sys.executable, __file__, "--step", step, "--folder", str(folder)]
                subprocess.run([*command, "--pairs", str(options.pairs)], check=True)


if __name__ == "__main__":
    main()
