"""A row as pieces, queries with the keys of their text, and attention of them where no variable-length kernel serves.

Legend: T tokens of the row, Q queries, K keys, H heads, D head size, B pieces of a batch.

By definition, each piece by itself; in batches of pieces of like length; and by PyTorch's flash kernel for the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from dpo_cli.scoring.layout import Block


@dataclass(frozen=True)
class AttentionSettings:
    """What a layer asks of its attention.

    Attributes:
        scale: Factor on the scores.
        window: How many tokens a token sees, itself included; None for all.
        softcap: ``softcap * tanh(scores / softcap)`` where set (Gemma 2).
        sinks: [H], a score a head of nothing, which takes a part of the softmax (gpt-oss).
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None

    @property
    def is_plain(self) -> bool:
        """Whether kernels of scaled_dot_product_attention can do it."""
        return self.softcap is None and self.sinks is None


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


def aligned_mask(
    num_queries: int, num_keys: int, window: int | None, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """What is added to a piece's scores, [Q, K]: 0 where seen, else minus infinity; made on the device."""
    return _additive(_seen(num_queries, num_keys, window, device), dtype)


def _seen(num_queries: int, num_keys: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Which keys queries see; bool [Q, K], the last query aligned with the last key."""
    query_Q1 = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]
    key_K = torch.arange(num_keys, device=device)
    seen = key_K <= query_Q1
    return seen if window is None else seen & (key_K > query_Q1 - window)


def _additive(seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf)


def plain_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    additive_mask: torch.Tensor,
    settings: AttentionSettings,
) -> torch.Tensor:
    """Attention by its definition, the softmax in float32; [B, H, Q, D]."""
    scores = (query @ key.transpose(2, 3)).float() * settings.scale
    if settings.softcap is not None:
        scores = settings.softcap * torch.tanh(scores / settings.softcap)
    scores = scores + additive_mask
    if settings.sinks is None:
        weights = scores.softmax(-1)
    else:
        nothing = settings.sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        weights = torch.cat([scores, nothing], -1).softmax(-1)[..., :-1]
    return weights.to(value.dtype) @ value


# --- each piece by itself -----------------------------------------------------------------


AttendPiece = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Piece], torch.Tensor]
"""Query [1, H, Q, D], key and value [1, H, K, D] of a piece to [1, H, Q, D]."""


def attend_pieces(
    blocks: Sequence[Block], query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attend: AttendPiece
) -> torch.Tensor:
    """Query, key and value [1, H, T, D] to [1, T, H, D]."""
    outputs = []
    lengths = [block.length for block in blocks]
    parts = (tensor.split(lengths, 2) for tensor in (query, key, value))
    for block, q, k, v in zip(blocks, *parts, strict=True):
        for piece in pieces_of(Block(0, block.runs)):
            outputs.append(attend(q[:, :, piece.queries], _gather(k, piece.keys), _gather(v, piece.keys), piece))
    return torch.cat(outputs, 2).transpose(1, 2)


def _gather(tensor: torch.Tensor, parts: tuple[slice, ...]) -> torch.Tensor:
    """[1, H, K, D] of [1, H, T, D]."""
    if len(parts) == 1:
        return tensor[:, :, parts[0]]
    return torch.cat([tensor[:, :, part] for part in parts], 2)


# --- pieces of like length together ---------------------------------------------------------

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

    They are padded at their beginning, so that the last query stands at the last key in all of them. What stands for
    nothing among the keys is masked; what does among the queries sees all keys, and its output is not read.

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

    def on_device(numbers: list[Any]) -> torch.Tensor:
        return torch.tensor(numbers).to(device, non_blocking=True)

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
        lengths_B2 = on_device([[piece.num_queries, piece.num_keys] for piece in members])
        seen_QK = _seen(num_queries, num_keys, window, device)
        filled_BK = torch.arange(num_keys, device=device) >= num_keys - lengths_B2[:, 1:]
        padding_BQ = torch.arange(num_queries, device=device) < num_queries - lengths_B2[:, :1]
        seen_BQK = (seen_QK & filled_BK[:, None]) | padding_BQ[:, :, None]
        batches.append(PieceBatch(on_device(queries), on_device(keys), _additive(seen_BQK, dtype)[:, None]))
    return PieceBatches(batches, on_device(places))


def _alike(pieces: Iterable[Piece]) -> list[list[Piece]]:
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


AttendBatch = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Query [B, H, Q, D], key and value [B, H, K, D] and the mask [B, 1, Q, K] to [B, H, Q, D]."""


def attend_batches(
    batches: PieceBatches, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attend: AttendBatch
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


# --- PyTorch's flash kernel for the CPU -----------------------------------------------------


def has_cpu_kernel(query: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether the kernel can be called by itself, as scaled_dot_product_attention does."""
    return (
        query.device.type == "cpu"
        and query.shape[-1] == value.shape[-1]
        and query.dtype == value.dtype
        and hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward")
    )


class CpuAttention(torch.autograd.Function):
    """Query, key and value [1, H, T, D] to [1, T, H, D]; a piece without a mask is causal.

    Called piece by piece from autograd the kernel would cost a slice, a concatenation and their gradients for each;
    here it reads and writes the row itself.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        pieces: list[Piece],
        mask_of: Callable[[Piece], torch.Tensor | None],
        scale: float,
    ) -> torch.Tensor:
        """Read the row, write the row."""
        out = query.new_empty(1, query.shape[2], query.shape[1], query.shape[3])
        kept: list[torch.Tensor] = []
        for piece in pieces:
            mask = mask_of(piece)
            part, normalizer = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                query[:, :, piece.queries],
                _gather(key, piece.keys),
                _gather(value, piece.keys),
                is_causal=mask is None,
                attn_mask=mask,
                scale=scale,
            )
            out[:, piece.queries] = part.transpose(1, 2)
            kept.append(normalizer)
        ctx.save_for_backward(query, key, value, out, *kept)
        ctx.pieces, ctx.mask_of, ctx.scale = pieces, mask_of, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of query, key and value."""
        query, key, value, out, *kept = ctx.saved_tensors
        grad, out = grads[0].transpose(1, 2), out.transpose(1, 2)
        query_grad = torch.empty_like(query)
        key_grad, value_grad = torch.zeros_like(key), torch.zeros_like(value)
        for piece, normalizer in zip(ctx.pieces, kept, strict=True):
            mask = ctx.mask_of(piece)
            parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad[:, :, piece.queries],
                query[:, :, piece.queries],
                _gather(key, piece.keys),
                _gather(value, piece.keys),
                out[:, :, piece.queries],
                normalizer,
                0.0,
                mask is None,
                attn_mask=mask,
                scale=ctx.scale,
            )
            query_grad[:, :, piece.queries] = parts[0]
            _add_to(key_grad, piece.keys, parts[1])
            _add_to(value_grad, piece.keys, parts[2])
        return query_grad, key_grad, value_grad, None, None, None


def _add_to(target: torch.Tensor, parts: tuple[slice, ...], source: torch.Tensor) -> None:
    begin = 0
    for part in parts:
        end = begin + part.stop - part.start
        target[:, :, part] += source[:, :, begin:end]
        begin = end
