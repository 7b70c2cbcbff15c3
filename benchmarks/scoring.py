"""What the scoring engine saves over the plain computation, layout by layout, as ratios within one run.

    python benchmarks/scoring.py

All sides score the same random pairs with the same random llama and adapter on one CPU thread, take turns, and must
agree in their log-probabilities, or no ratio is printed. ``plain`` scores every position of a right-padded batch in
the order of the file, four pairs at a time, through the model's own forward and autograd; the layouts keep a token
budget and send only the positions that predict an answer's token through the head.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers

from dpo_cli.core.params import LoraParams
from dpo_cli.data.tokens import TokenGroup
from dpo_cli.models.adapters import add_adapter
from dpo_cli.models.device import Machine
from dpo_cli.models.shapes import REGIMES, SHAPES, random_model, random_pairs
from dpo_cli.scoring.layout import LAYOUTS, LayoutName
from dpo_cli.scoring.scorer import MAX_READ_SHARE, Scorer

TURNS = 3
NUM_PAIRS = 24
PAIRS_A_BATCH = 4
BUDGET = 1024
TOLERANCE = 1e-3

LAYOUT_OF: dict[str, LayoutName] = {"plain": "padded", **{name: name for name in LAYOUTS}}

Score = Callable[[list[TokenGroup]], torch.Tensor]


def plain(model: Any, groups: Sequence[TokenGroup]) -> torch.Tensor:
    """Log-probabilities float32 [B, 2] of some pairs: logits of every position, then a mask."""
    rows = [(group.prompt, completion) for group in groups for completion in group.completions]
    length = max(len(prompt) + len(completion) for prompt, completion in rows)
    tokens = torch.zeros(len(rows), length, dtype=torch.long)
    scored = torch.zeros(len(rows), length - 1)
    for row, (prompt, completion) in enumerate(rows):
        end = len(prompt) + len(completion)
        tokens[row, :end] = torch.tensor(prompt + completion)
        scored[row, len(prompt) - 1 : end - 1] = 1
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
    logps = logits.float().log_softmax(-1).gather(2, tokens[:, 1:, None]).squeeze(2)
    return (logps * scored).sum(1).view(-1, 2)


def compare(regime: str, vocabulary: int, *, train: bool) -> str:
    """One line of the table: the plain speed, and what each layout makes of it."""
    SHAPES["benchmark"] = SHAPES["tiny"] | {"vocab_size": vocabulary}
    machine = Machine(torch.device("cpu"), torch.float32)
    model = add_adapter(random_model("benchmark", machine, "none"), LoraParams(), 0)
    groups = random_pairs(regime, NUM_PAIRS, vocabulary)
    weights = torch.tensor([[1.0, -1.0]])
    own: Any = model.get_base_model()
    own_attention = own.config._attn_implementation

    def run(batches: list[list[int]], score: Score) -> torch.Tensor:
        found = torch.zeros(len(groups), 2, dtype=torch.float64)
        with torch.set_grad_enabled(train):
            for batch in batches:
                logps = score([groups[index] for index in batch])
                if train:
                    (logps * weights).sum().backward()
                found[batch] = logps.detach().double()
        model.zero_grad()
        return found

    in_order = [list(range(begin, begin + PAIRS_A_BATCH)) for begin in range(0, len(groups), PAIRS_A_BATCH)]
    times: dict[str, list[float]] = {name: [] for name in LAYOUT_OF}
    results = {}
    for turn in range(TURNS + 1):
        for name in times:
            with Scorer(model, torch.float32, LAYOUT_OF[name]) as scorer:
                scorer.max_read_share = MAX_READ_SHARE  # as the probe finds for a llama
                begun = time.perf_counter()
                if name == "plain":
                    results[name] = run(in_order, lambda batch: plain(model, batch))
                else:
                    results[name] = run(scorer.split(groups, BUDGET), lambda batch: scorer.score(batch).logps_BK)
                if turn:  # the first turn warms up
                    times[name].append(time.perf_counter() - begun)
    assert own.config._attn_implementation == own_attention
    cells = []
    for name in LAYOUTS:
        difference = (results["plain"] - results[name]).abs().max().item()
        if not difference <= TOLERANCE:
            raise SystemExit(f"{name} and plain differ by {difference:.2g} nats: no ratio")
        ratios = [slow / fast for slow, fast in zip(times["plain"], times[name], strict=True)]
        cells.append(f"{statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]")
    what = "training pass" if train else "reference pass"
    speed = NUM_PAIRS / statistics.median(times["plain"])
    return f"| {what} | {regime} | {vocabulary} | {speed:.1f} | " + " | ".join(cells) + " |"


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {platform.machine()}, one CPU thread")
    print("python benchmarks/scoring.py: speed over plain, median [min, max] of the turns\n")
    print("| what | regime | vocabulary | plain, pairs/s | " + " | ".join(LAYOUTS) + " |")
    print("|---|---|---|---|" + "---|" * len(LAYOUTS))
    for vocabulary in (1024, 32768):
        for regime in REGIMES:
            for train in (False, True):
                print(compare(regime, vocabulary, train=train), flush=True)


if __name__ == "__main__":
    main()
