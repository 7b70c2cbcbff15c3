"""What the scoring engine saves over the plain computation, as ratios within one run.

    python benchmarks/scoring.py

Both sides score the same random pairs with the same random llama on one CPU thread, take turns, and must agree in
their log-probabilities, or no ratio is printed. ``plain`` scores every position of a right-padded batch in the order
of the file, eight pairs at a time; ``ours`` sorts by length, keeps a token budget, and sends only the positions that
predict an answer's token through the head.
"""

from __future__ import annotations

import platform
import random
import statistics
import time
from collections.abc import Callable, Sequence

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from dpo_cli.data.tokenise import TokenGroup
from dpo_cli.scoring.layout import split_by_tokens
from dpo_cli.scoring.scorer import Scorer

TURNS = 3
NUM_PAIRS = 32
PAIRS_A_BATCH = 8
BUDGET = 4096
TOLERANCE = 1e-3


def random_pairs(vocabulary: int, seed: int = 0) -> list[TokenGroup]:
    """Pairs with lengths like those of HH harmless: prompts about 120 tokens, answers about 45, both long-tailed."""
    rng = random.Random(seed)

    def tokens(mean: float) -> tuple[int, ...]:
        length = max(4, min(400, round(rng.lognormvariate(0, 0.7) * mean)))
        return tuple(rng.randrange(vocabulary) for _ in range(length))

    return [TokenGroup(f"{n:04d}", f"{n:04d}", tokens(95), (tokens(38), tokens(38))) for n in range(NUM_PAIRS)]


def make_model(vocabulary: int) -> LlamaForCausalLM:
    """A random llama of four layers of width 256."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    return LlamaForCausalLM(config).eval()


def plain(model: LlamaForCausalLM, groups: Sequence[TokenGroup]) -> torch.Tensor:
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


def compare(vocabulary: int, *, train: bool) -> str:
    """One line of the table: what both took, and their ratio."""
    model, groups = make_model(vocabulary), random_pairs(vocabulary)
    scorer = Scorer(model, torch.float32)
    weights = torch.tensor([[1.0, -1.0]])

    def run(batches: list[list[int]], score: Callable[[list[TokenGroup]], torch.Tensor]) -> torch.Tensor:
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
    budgeted = split_by_tokens(groups, BUDGET)
    sides = {
        "plain": lambda: run(in_order, lambda batch: plain(model, batch)),
        "ours": lambda: run(budgeted, lambda batch: scorer.score(batch).logps_BK),
    }
    times: dict[str, list[float]] = {name: [] for name in sides}
    results = {}
    for turn in range(TURNS + 1):
        for name, side in sides.items():
            begun = time.perf_counter()
            results[name] = side()
            if turn:  # the first turn warms up
                times[name].append(time.perf_counter() - begun)
    difference = (results["plain"] - results["ours"]).abs().max().item()
    if not difference <= TOLERANCE:
        raise SystemExit(f"the two sides differ by {difference:.2g} nats: no ratio")
    ratios = [slow / fast for slow, fast in zip(times["plain"], times["ours"], strict=True)]
    what = "training pass" if train else "reference pass"
    seconds = {name: statistics.median(values) for name, values in times.items()}
    return (
        f"| {what} | {vocabulary} | {NUM_PAIRS / seconds['plain']:.1f} | {NUM_PAIRS / seconds['ours']:.1f} |"
        f" {statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}] | {difference:.1e} |"
    )


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {platform.machine()}, one CPU thread")
    print()
    print("| what | vocabulary | plain, pairs/s | ours, pairs/s | ratio, median [min, max] | difference, nats |")
    print("|---|---|---|---|---|---|")
    for vocabulary in (1024, 32768):
        for train in (False, True):
            print(compare(vocabulary, train=train), flush=True)


if __name__ == "__main__":
    main()
