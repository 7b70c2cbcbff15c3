"""How many tokens go through the model at once, and what becomes of it when memory runs out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from dpo_cli.core.artifacts import write_json
from dpo_cli.core.errors import MachineError, is_out_of_memory
from dpo_cli.core.progress import Reporter

Item = TypeVar("Item")
Result = TypeVar("Result")


class TokenBudget:
    """Tokens of a micro-batch; halved when memory runs out, and remembered for the next run where there is a file."""

    def __init__(self, max_tokens: int, stage: str, reporter: Reporter, memory: Path | None = None) -> None:
        self._stage = stage
        self._reporter = reporter
        self._memory = memory
        remembered = _recall(memory)
        self.max_tokens = max_tokens if remembered is None else min(max_tokens, remembered)

    def halve(self, batches: Sequence[Sequence[Any]]) -> None:
        """Take half of it, after the micro-batches that it gave did not fit.

        Raises:
            MachineError: Every micro-batch was a single group already.
        """
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if all(len(batch) == 1 for batch in batches):
            raise MachineError(
                f"{self._stage}: out of memory with a single prompt and its answers at a time; in training set"
                " runtime.recompute to layers, or lower sft.max_length or reference.max_length"
            )
        self.max_tokens = max(1, self.max_tokens // 2)
        self._reporter.warn(
            f"{self._stage}: out of memory; continuing with {self.max_tokens} tokens at once"
            " (runtime.max_tokens_per_microbatch); without dropout that changes no result beyond rounding"
        )
        if self._memory is not None:
            write_json(self._memory, {"max_tokens_per_microbatch": self.max_tokens})


def in_micro_batches(
    groups: Sequence[Item],
    budget: TokenBudget,
    split: Callable[[Sequence[Item], int], list[list[int]]],
    work: Callable[[list[Item]], Result],
) -> Iterator[tuple[list[Item], Result]]:
    """Do some work on groups in micro-batches; where one does not fit into memory, go on in smaller ones.

    Args:
        groups: What is worked on: token groups, or prompts.
        budget: Halved where it is too much.
        split: Makes micro-batches of so many tokens, as indices.
        work: Is done on each; what it did before it ran out of memory must not count.

    Yields:
        Each micro-batch with what came of it; every group is in one.

    Raises:
        MachineError: A single group does not fit.
    """
    left = list(groups)
    while left:
        done: set[int] = set()
        for indices in split(left, budget.max_tokens):
            batch = [left[index] for index in indices]
            try:
                result = work(batch)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                batch = []
            if not batch:  # out of the except block: the error's traceback holds on to what filled the memory
                budget.halve([indices])
                break
            done.update(indices)
            yield batch, result  # type: ignore[possibly-undefined]
        left = [group for index, group in enumerate(left) if index not in done]


def _recall(memory: Path | None) -> int | None:
    try:
        return int(json.loads(memory.read_text(encoding="utf-8"))["max_tokens_per_microbatch"]) if memory else None
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return None
