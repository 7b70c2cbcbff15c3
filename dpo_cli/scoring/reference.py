"""The reference pass and its cache: every completion of the data scored once, its log-probabilities kept by content.

Prompts are scored with all their completions at a time. ``data/reference/part-*.parquet`` holds one row a completion:

==============  ============  ============================================================
key             string        128-bit hash of the token ids of prompt and completion
logp            float64       sum of token_logps, nats
num_tokens      int32         tokens of the completion, end of turn included
token_logps     list[float32] log pi_ref of each token, nats
==============  ============  ============================================================

and ``manifest.json``, written last, the identity of the graph that made them. A row is found
by its key, never by its position. Template, truncation and tokenizer need no special care:
they are in the token ids. Beta, loss and learning rate are not in the identity, so changing
them recomputes nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import polars as pl
import torch

from dpo_cli.core import paths
from dpo_cli.core.environment import is_gpu
from dpo_cli.core.errors import StaleArtifactError
from dpo_cli.core.manifest import REFERENCE, Manifest
from dpo_cli.data.tokens import TokenGroup, completion_key, joined_group
from dpo_cli.scoring.budget import TokenBudget, in_micro_batches
from dpo_cli.scoring.scorer import Scorer

SCHEMA = {"key": pl.String, "logp": pl.Float64, "num_tokens": pl.Int32, "token_logps": pl.List(pl.Float32)}
_ROWS_A_PART = 100_000
_NO_GRADIENT_FACTOR = 4

Cached = TypeVar("Cached")

# --- the pass -------------------------------------------------------------------------------


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


# --- the cache ------------------------------------------------------------------------------


def write_cache(folder: Path, rows: pl.DataFrame, identity: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Write a cache into an empty folder: parts in the order of their keys, then the manifest."""
    rows = rows.select(list(SCHEMA)).sort("key")
    parts = []
    for number, begin in enumerate(range(0, max(rows.height, 1), _ROWS_A_PART)):
        name = f"part-{number:05d}.parquet"
        rows.slice(begin, _ROWS_A_PART).write_parquet(folder / name)
        parts.append(name)
    REFERENCE.write(
        folder, Manifest({"graph": dict(identity)}, settings=dict(settings), facts={"num_rows": rows.height}), parts
    )


def read_cache(folder: Path, identity: Mapping[str, Any]) -> dict[str, float]:
    """The summed log-probabilities by key, nats, of a cache that was made for this graph.

    Raises:
        StaleArtifactError: See :func:`read_cache_tokens`.
    """
    table = _read(folder, identity, "logp")
    return dict(zip(table["key"].to_list(), table["logp"].to_list(), strict=True))


def read_cache_tokens(folder: Path, identity: Mapping[str, Any]) -> dict[str, list[float]]:
    """The log-probabilities of every token by key, nats, of a cache that was made for this graph.

    Raises:
        StaleArtifactError: It is missing, damaged, or of another graph; the message names the
            field that differs.
    """
    table = _read(folder, identity, "token_logps")
    return dict(zip(table["key"].to_list(), table["token_logps"].to_list(), strict=True))


def read_cache_rows(folder: Path, identity: Mapping[str, Any], wanted: Collection[str]) -> pl.DataFrame:
    """The rows (:data:`SCHEMA`) of some keys, as far as they are there, of a cache that was made for this graph.

    Raises:
        StaleArtifactError: See :func:`read_cache_tokens`.
    """
    return _read(folder, identity, *list(SCHEMA)[1:]).filter(pl.col("key").is_in(sorted(wanted)))


def _read(folder: Path, identity: Mapping[str, Any], *columns: str) -> pl.DataFrame:
    parts = REFERENCE.check({"graph": identity}, folder).files
    return pl.concat([pl.read_parquet(folder / name, columns=["key", *columns], glob=False) for name in parts])


def reference_logps(cache: Mapping[str, Cached], groups: Sequence[TokenGroup]) -> dict[str, list[Cached]]:
    """What the cache holds of each group's completions, by row id.

    Raises:
        StaleArtifactError: A completion is not in the cache.
    """
    found = {}
    for group in groups:
        keys = group.keys
        if any(key not in cache for key in keys):
            raise StaleArtifactError(
                f"data/reference has no row for {group.id} of data/preference: the data"
                f" or the chat template has changed; {REFERENCE.remedy(paths.REFERENCE)}"
            )
        found[group.id] = [cache[key] for key in keys]
    return found
