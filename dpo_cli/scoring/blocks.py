"""Who sees whom within a block, and attention by its definition.

Legend: T tokens of the row, L of a block, Q queries, K keys, H heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch

from dpo_cli.scoring.layout import Block, Run


@dataclass(frozen=True)
class Piece:
    """Queries that follow one another, and the keys of the text up to the last of them.

    Attributes:
        queries: Their place in the row.
        keys: The keys' places in the row, in the order of the text; the last one ends with the queries.
    """

    queries: slice
    keys: tuple[slice, ...]

    @property
    def num_queries(self) -> int:
        """Q."""
        return self.queries.stop - self.queries.start

    @property
    def num_keys(self) -> int:
        """K, at least Q."""
        return sum(part.stop - part.start for part in self.keys)


def pieces_of(block: Block) -> list[Piece]:
    """A block as pieces: its first text whole, and of every other one what is new; each query is in one piece.

    To score a block as a whole would score every completion against its siblings, only to mask it.
    """
    found: list[Piece] = []
    starts = list(accumulate((run.length for run in block.runs), initial=block.start))
    paths: list[tuple[slice, ...]] = []
    begin = block.start
    for index, run in enumerate(block.runs):
        before = paths[run.parent] if run.parent >= 0 else ()
        here = slice(starts[index], starts[index + 1])
        if before and before[-1].stop == here.start:
            here, before = slice(before[-1].start, here.stop), before[:-1]
        paths.append((*before, here))
        if index + 1 < len(block.runs) and block.runs[index + 1].parent == index:
            continue  # a first child goes on from it
        found.append(Piece(slice(begin, here.stop), paths[index]))
        begin = here.stop
    return found


def gather(tensor: torch.Tensor, parts: tuple[slice, ...]) -> torch.Tensor:
    """[1, H, K, D] of [1, H, T, D]."""
    if len(parts) == 1:
        return tensor[:, :, parts[0]]
    return torch.cat([tensor[:, :, part] for part in parts], 2)


def aligned_mask(num_queries: int, num_keys: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Which keys a piece's queries see; bool [Q, K], the last query aligned with the last key; made on the device."""
    query_Q1 = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]
    key_K = torch.arange(num_keys, device=device)
    seen = key_K <= query_Q1
    return seen if window is None else seen & (key_K > query_Q1 - window)


def block_mask(runs: tuple[Run, ...], window: int | None) -> torch.Tensor:
    """Which queries (rows) see which keys (columns) of a block of L tokens; bool [L, L]."""
    ancestry = torch.eye(len(runs), dtype=torch.bool)
    begins: list[int] = []
    for index, run in enumerate(runs):
        begins.append(0 if run.parent < 0 else begins[run.parent] + runs[run.parent].length)
        if run.parent >= 0:
            ancestry[index] |= ancestry[run.parent]
    lengths = torch.tensor([run.length for run in runs])
    run_of = torch.repeat_interleave(torch.arange(len(runs)), lengths)
    positions = torch.cat([torch.arange(begin, begin + run.length) for begin, run in zip(begins, runs, strict=True)])
    distance = positions[:, None] - positions[None, :]
    mask = ancestry[run_of][:, run_of] & (distance >= 0)
    return mask if window is None else mask & (distance < window)


def additive(mask: torch.Tensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A mask to add to scores: 0 where seen and minus infinity where not."""
    return torch.zeros(mask.shape, dtype=dtype, device=device).masked_fill_(~mask.to(device), -torch.inf)


def plain_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    additive_mask: torch.Tensor,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attention by its definition, the softmax in float32; [1, H, L, D]."""
    scores = (query @ key.transpose(2, 3)).float() * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores + additive_mask
    if sinks is None:
        weights = scores.softmax(-1)
    else:
        nothing = sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        weights = torch.cat([scores, nothing], -1).softmax(-1)[..., :-1]
    return weights.to(value.dtype) @ value
