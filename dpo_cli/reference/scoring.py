"""The reference pass: every completion of the data scored once, prompts with all their completions at a time."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch

from dpo_cli.core.environment import is_gpu
from dpo_cli.core.row_store import RowStore
from dpo_cli.data.tokens import TokenGroup, completion_key, joined_group
from dpo_cli.models.workplace import Workplace
from dpo_cli.scoring.budget import TokenBudget, in_micro_batches
from dpo_cli.scoring.scorer import Scorer

_NO_GRADIENT_FACTOR = 4


def tokens_at_once(max_tokens: int, device: torch.device) -> int:
    """Tokens that go through the model at once without gradients, where a training step lets so many through.

    A pass without gradients keeps no activations, so on a GPU it is four times as many. On the CPU that does not pay:
    what goes through at once should fit into the processor's caches.
    """
    return max_tokens * (_NO_GRADIENT_FACTOR if is_gpu(device) else 1)


def missing_groups(groups: Sequence[TokenGroup], known: Collection[str], max_tokens: int) -> list[TokenGroup]:
    """The completions that are not known yet, by prompt, each once.

    A prompt with more completions than ``max_tokens`` has room for makes several groups.

    Args:
        groups: Groups of the data; a completion may be in several.
        known: Keys of the completions that were scored before.
        max_tokens: Tokens that go through the model at once.

    Returns:
        In the order in which the prompts first appear. Deterministic.
    """
    by_prompt: dict[str, dict[str, tuple[TokenGroup, int]]] = {}
    for group in groups:
        missing = [(key, (group, place)) for place, key in enumerate(group.keys) if key not in known]
        if missing:
            prompt = completion_key(group.prompt, ())
            for key, part in missing:
                by_prompt.setdefault(prompt, {}).setdefault(key, part)
    found: list[list[tuple[TokenGroup, int]]] = []
    for parts in by_prompt.values():
        num_tokens = max_tokens + 1
        for group, place in parts.values():
            prompt, *completions = group.sizes
            if num_tokens + completions[place] > max_tokens:
                found.append([])
                num_tokens = prompt
            found[-1].append((group, place))
            num_tokens += completions[place]
    return list(map(joined_group, found))


@torch.no_grad()
def score_groups(scorer: Scorer, groups: Sequence[TokenGroup], budget: TokenBudget) -> Iterator[list[dict[str, Any]]]:
    """Score groups in micro-batches; where one does not fit into memory, go on with smaller ones.

    Yields:
        The cache's rows of each micro-batch, as it is scored.

    Raises:
        MachineError: A single group does not fit into memory.
    """

    def split(left: Sequence[TokenGroup], max_tokens: int) -> list[list[int]]:
        return scorer.split(left, tokens_at_once(max_tokens, scorer.device))

    for batch, scores in in_micro_batches(groups, budget, split, scorer.score):
        completions = [(group.prompt, completion) for group in batch for completion in group.completions]
        pieces = scores.token_logps_M.cpu().split([len(completion) for _, completion in completions])
        yield [
            {
                "key": completion_key(prompt, completion),
                "logp": logps.double().sum().item(),
                "num_tokens": len(completion),
                "token_logps": logps.tolist(),
            }
            for (prompt, completion), logps in zip(completions, pieces, strict=True)
        ]


def score_into_store(
    scorer: Scorer,
    groups: Sequence[TokenGroup],
    store: RowStore,
    budget: TokenBudget,
    work: Workplace,
    what: str,
) -> None:
    """Score groups and store their rows as time passes.

    Args:
        scorer: Scores them.
        groups: Those that are missing.
        store: Where their rows go.
        budget: Tokens that go through the model at once.
        work: Whose command it is, how much work a kill may cost, and who hears of it.
        what: What is done, for the meter.

    Raises:
        Interrupted: The user asked to stop; what was computed is stored, as it is after any error.
        MachineError: A single group does not fit into memory.
    """
    total = sum(len(group.completions) for group in groups)
    with work.keeping(store) as keep, work.reporter.meter(f"{work.command}: {what}", total, "answers") as meter:
        for rows in score_groups(scorer, groups, budget):
            keep(rows)
            meter.advance(len(rows))
