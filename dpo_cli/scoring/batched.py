"""Attention of pieces of like length in one call, where no variable-length kernel serves a device.

Legend: T tokens of the row, B pieces of a batch, Q their queries and K their keys, padded, H heads, D head size.

Pieces are padded at their beginning, so that the last query stands at the last key in all of them. What stands for
nothing among the keys is masked; what stands for nothing among the queries sees all keys, and its output is not read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from dpo_cli.scoring.blocks import Piece

_PAIRS_A_BATCH = 1 << 16
"""A piece joins a batch where that adds no more (query, key) pairs than these to what is needed.

To start the kernels of one batch more takes a GPU as long as some hundred thousand pairs do, and the host several times
as long; but what is computed for nothing is kept for the backward pass, too.
"""
_KEYS_ALIKE = 8
"""Keys are padded to a multiple of it: kernels read masks by so many numbers, and copy any other in every layer."""


@dataclass(frozen=True)
class PieceBatch:
    """Pieces that go through attention together.

    Attributes:
        queries_BQ: int64 [B * Q], places in the row; 0 for padding.
        keys_BK: int64 [B * K], likewise.
        mask_B1QK: Is added to scores: 0 where seen and minus infinity where not.
    """

    queries_BQ: torch.Tensor
    keys_BK: torch.Tensor
    mask_B1QK: torch.Tensor


@dataclass(frozen=True)
class PieceBatches:
    """All pieces of a row.

    Attributes:
        batches: Each piece is in one of them.
        places_T: int64 [T], where each position's output is in those of all batches, one after another.
    """

    batches: Sequence[PieceBatch]
    places_T: torch.Tensor


def batches_of(pieces: Sequence[Piece], window: int | None, dtype: torch.dtype, device: torch.device) -> PieceBatches:
    """Put pieces of like length together; masks are made on the device, places are copied to it without waiting."""
    places = [0] * sum(piece.num_queries for piece in pieces)
    batches = []
    begin = 0
    for members in _alike(pieces):
        num_queries = max(piece.num_queries for piece in members)
        num_keys = -(-max(piece.num_keys for piece in members) // _KEYS_ALIKE) * _KEYS_ALIKE
        queries: list[int] = []
        keys: list[int] = []
        for piece in members:
            queries += [0] * (num_queries - piece.num_queries)
            keys += [0] * (num_keys - piece.num_keys)
            for place in range(piece.queries.start, piece.queries.stop):
                places[place] = begin + len(queries)
                queries.append(place)
            for part in piece.keys:
                keys += range(part.start, part.stop)
        begin += len(queries)
        lengths = [[piece.num_queries, piece.num_keys] for piece in members]
        mask = _mask(torch.tensor(lengths).to(device, non_blocking=True), num_queries, num_keys, window, dtype)
        batches.append(
            PieceBatch(
                torch.tensor(queries).to(device, non_blocking=True),
                torch.tensor(keys).to(device, non_blocking=True),
                mask,
            )
        )
    return PieceBatches(batches, torch.tensor(places).to(device, non_blocking=True))


def _alike(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """Pieces in batches, those of like length together."""
    found: list[list[Piece]] = []
    most_queries = most_keys = 0
    for piece in sorted(pieces, key=lambda piece: (piece.num_queries, piece.num_keys, piece.queries.start)):
        wide, long = max(most_queries, piece.num_queries), max(most_keys, piece.num_keys)
        before = len(found[-1]) if found else 0
        added = (before + 1) * wide * long - before * most_queries * most_keys - piece.num_queries * piece.num_keys
        if not found or added > _PAIRS_A_BATCH:
            found.append([])
            wide, long = piece.num_queries, piece.num_keys
        found[-1].append(piece)
        most_queries, most_keys = wide, long
    return found


def _mask(
    lengths_B2: torch.Tensor, num_queries: int, num_keys: int, window: int | None, dtype: torch.dtype
) -> torch.Tensor:
    """[B, 1, Q, K] of queries and keys of so many each."""
    device = lengths_B2.device
    key_K = torch.arange(num_keys, device=device)
    query_Q1 = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]  # the key it stands at
    seen_QK = key_K <= query_Q1
    if window is not None:
        seen_QK &= key_K > query_Q1 - window
    filled_BK = key_K >= num_keys - lengths_B2[:, 1:]
    padding_BQ = query_Q1[:, 0] < num_keys - lengths_B2[:, :1]
    seen_BQK = (seen_QK & filled_BK[:, None]) | padding_BQ[:, :, None]
    mask = torch.zeros(seen_BQK.shape, dtype=dtype, device=device)
    return mask.masked_fill_(~seen_BQK, -torch.inf)[:, None]


Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Query [B, H, Q, D], key and value [B, H, K, D] and the mask [B, 1, Q, K] to [B, H, Q, D]."""


def attend_batches(
    batches: PieceBatches, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attend: Attend
) -> torch.Tensor:
    """Query, key and value [1, H, T, D] to [1, T, H, D]."""
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # [T, H, D]
    outputs = []
    for batch in batches.batches:
        size = batch.mask_B1QK.shape[0]

        def taken(tensor: torch.Tensor, places: torch.Tensor, size: int = size) -> torch.Tensor:
            return tensor.index_select(0, places).view(size, -1, *tensor.shape[1:]).transpose(1, 2)

        out = attend(
            taken(query, batch.queries_BQ), taken(key, batch.keys_BK), taken(value, batch.keys_BK), batch.mask_B1QK
        )
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).index_select(0, batches.places_T)[None]
