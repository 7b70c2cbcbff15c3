"""Variable-length FlashAttention on CUDA: one call for all pieces of a row.

Legend: T tokens of the row, H query heads, G key heads, D head size, K keys of all pieces together.

Every kernel that is there is held against the definition before it is used: its causal mask must
align the last query with the last key, which is undefined until it has been seen.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any

import torch

from dpo_cli.scoring.kernels import reason_against_kernel
from dpo_cli.scoring.layout import Block, Run
from dpo_cli.scoring.pieces import AttentionSettings, Piece, aligned_mask, attend_pieces, pieces_of, plain_attention

_TEST_CAP = 2.0
"""Low enough to bend scores of unit size, so that a kernel without a soft cap shows."""
_TEST_WINDOW = 8
"""Shorter than the check's longest text, so that a kernel without a window shows."""
_TOLERANCES = {
    "output": 0.02,
    "gradient of queries": 0.06,
    "gradient of keys": 0.06,
    "gradient of values": 0.06,
}
"""Largest difference of a bfloat16 kernel's output of unit scale from the exact one, and of its three gradients."""


@dataclass(frozen=True)
class Sequences:
    """Pieces as sequences: the queries of a run, and the keys of the text up to its end.

    Attributes:
        key_index: int64 [sum of key lengths], positions in the row; None where they are 0, 1, 2, ...
        query_starts: int32 [S + 1], where each sequence's queries begin.
        key_starts: int32 [S + 1], the same of the keys.
        max_queries: Longest run of queries.
        max_keys: Longest text.
    """

    key_index: torch.Tensor | None
    query_starts: torch.Tensor
    key_starts: torch.Tensor
    max_queries: int
    max_keys: int


def sequences_of(pieces: list[Piece], device: torch.device) -> Sequences:
    """The pieces of a row as sequences."""
    query_lengths = [piece.num_queries for piece in pieces]
    key_lengths = [piece.num_keys for piece in pieces]
    key_index = [place for piece in pieces for part in piece.keys for place in range(part.start, part.stop)]
    whole = key_index == list(range(len(key_index)))
    return Sequences(
        key_index=None if whole else torch.tensor(key_index).to(device, non_blocking=True),
        query_starts=torch.tensor([0, *accumulate(query_lengths)], dtype=torch.int32).to(device, non_blocking=True),
        key_starts=torch.tensor([0, *accumulate(key_lengths)], dtype=torch.int32).to(device, non_blocking=True),
        max_queries=max(query_lengths),
        max_keys=max(key_lengths),
    )


VarlenKernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Sequences, AttentionSettings], torch.Tensor]
"""Causal attention of sequences, the last query aligned with the last key: query [T, H, D], key and value [K, G, D] to
[T, H, D]; what it cannot do raises.
"""


def attend_varlen(
    kernel: VarlenKernel,
    sequences: Sequences,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    settings: AttentionSettings,
) -> torch.Tensor:
    """[T, H, D]."""
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    if sequences.key_index is not None:
        key, value = key.index_select(0, sequences.key_index), value.index_select(0, sequences.key_index)
    return kernel(query.contiguous(), key.contiguous(), value.contiguous(), sequences, settings)


def _flash_attn_kernel() -> VarlenKernel | None:
    """The flash-attn package's kernel, where it is installed; version 2.1 and later align at the end."""
    try:
        from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found]
    except ImportError:
        return None

    def kernel(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sequences: Sequences, settings: AttentionSettings
    ) -> torch.Tensor:
        return flash_attn_varlen_func(
            query,
            key,
            value,
            *_lengths(sequences),
            softmax_scale=settings.scale,
            causal=True,
            window_size=(-1, -1) if settings.window is None else (settings.window - 1, 0),
            softcap=settings.softcap or 0.0,
        )

    return kernel


def _torch_kernel() -> VarlenKernel | None:
    """PyTorch's own kernel; its signature has changed between versions."""
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters

    def kernel(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sequences: Sequences, settings: AttentionSettings
    ) -> torch.Tensor:
        if settings.softcap is not None:
            raise NotImplementedError("torch's varlen_attn has no soft cap")
        extra: dict[str, Any] = {"window_size": (-1 if settings.window is None else settings.window - 1, 0)}
        if "scale" in known:
            extra["scale"] = settings.scale
        elif not math.isclose(settings.scale, query.shape[-1] ** -0.5):
            query = query * (settings.scale * math.sqrt(query.shape[-1]))
        if (repeats := query.shape[1] // key.shape[1]) > 1:
            if "enable_gqa" in known:
                extra["enable_gqa"] = True
            else:
                key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
        return varlen_attn(query, key, value, *_lengths(sequences), **extra)  # type: ignore[return-value]

    return kernel


def _lengths(sequences: Sequences) -> tuple[torch.Tensor, torch.Tensor, int, int]:
    return sequences.query_starts, sequences.key_starts, sequences.max_queries, sequences.max_keys


VARLEN_KERNELS: dict[str, Callable[[], VarlenKernel | None]] = {
    "flash-attn": _flash_attn_kernel,
    "torch": _torch_kernel,
}
"""Kernels by name, the one to be tried first at the front; each gives None where it is not installed."""
VARLEN_DEVICES = ("cuda",)
"""Types of devices that have such kernels."""


@dataclass(frozen=True)
class Choice:
    """The kernel to use, if any.

    Attributes:
        name: Its name; None where there is none.
        kernel: The kernel itself.
        refused: Why those before it in the list, or all of them, will not do, by their names.
    """

    name: str | None
    kernel: VarlenKernel | None
    refused: dict[str, str]


def choose_kernel(query: torch.Tensor, value: torch.Tensor, settings: AttentionSettings) -> Choice:
    """The first kernel that is there, can do what a layer asks for and aligns as it must.

    A kernel without windows serves the layers that slide none.
    """
    reason = None
    if settings.sinks is not None:
        reason = "its layers have sinks"
    elif query.dtype not in (torch.bfloat16, torch.float16):
        reason = f"numbers are {str(query.dtype).removeprefix('torch.')}"
    elif value.shape[-1] != query.shape[-1]:
        reason = "values are of another size than queries"
    if reason is not None:
        return Choice(None, None, dict.fromkeys(VARLEN_KERNELS, reason))
    return _choose(
        query.device, query.dtype, query.shape[-1], settings.window is not None, settings.softcap is not None
    )


@cache
def _choose(device: torch.device, dtype: torch.dtype, head_size: int, windowed: bool, capped: bool) -> Choice:
    settings = AttentionSettings(head_size**-0.5, _TEST_WINDOW if windowed else None, _TEST_CAP if capped else None)
    refused: dict[str, str] = {}
    for name, make in VARLEN_KERNELS.items():
        kernel = make()
        if kernel is None:
            refused[name] = "not installed"
        elif (reason := reason_against(kernel, device, dtype, head_size, settings)) is not None:
            refused[name] = reason
        else:
            return Choice(name, kernel, refused)
    return Choice(None, None, refused)


def reason_against(
    kernel: VarlenKernel,
    device: torch.device,
    dtype: torch.dtype,
    head_size: int,
    settings: AttentionSettings,
    num_heads: tuple[int, int] = (4, 2),
) -> str | None:
    """Why a kernel or its gradients are not what the definition gives, on runs with fewer queries than keys.

    A kernel that aligned the first query with the first key would pass where both are as many. ``num_heads`` are those
    of queries, and of keys and values.

    Returns:
        None where the kernel is right.
    """
    blocks = (Block(0, (Run(37, -1), Run(5, 0), Run(3, 0))), Block(45, (Run(9, -1),)))
    pieces = [piece for block in blocks for piece in pieces_of(block)]
    generator = torch.Generator().manual_seed(0)
    size = sum(block.length for block in blocks)
    queries, keys = num_heads
    inputs = [torch.randn(1, heads, size, head_size, generator=generator) for heads in (queries, keys, keys)]
    weights = torch.randn(1, size, queries, head_size, generator=generator).to(device)

    def by_definition(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        k, v = (tensor.repeat_interleave(queries // keys, 1) for tensor in (k, v))
        return attend_pieces(blocks, q, k, v, one_piece)

    def one_piece(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, piece: Piece) -> torch.Tensor:
        mask = aligned_mask(piece.num_queries, piece.num_keys, settings.window, q.dtype, device)
        return plain_attention(q, k, v, mask, settings)

    def by_kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attend_varlen(kernel, sequences_of(pieces, device), q, k, v, settings)[None]

    asked = "".join([" with a window" if settings.window else "", " with a soft cap" if settings.softcap else ""])
    narrow = [tensor.to(device, dtype) for tensor in inputs]
    return reason_against_kernel(by_kernel, by_definition, narrow, weights, _TOLERANCES, asked)
