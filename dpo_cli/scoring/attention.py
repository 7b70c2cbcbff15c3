"""Attention within the blocks of a layout, registered with transformers as ``dpo_blocks``.

Legend: T tokens of the row, H query heads, G key heads (H a multiple of G), D head size.

A token sees the tokens of its own text that come before it: those of its run and of the runs its
run comes from. No mask function is registered under the name, so transformers builds no mask and
hands each layer's own sliding window, soft cap and sinks to :func:`block_attention`.

On CUDA one call of a variable-length FlashAttention serves all blocks (``varlen.py``), on the CPU
PyTorch's flash kernel (``cpu_attention.py``). For what such kernels cannot do, texts' new queries go
through scaled_dot_product_attention, or through plain matrix products where there is a soft cap or a
sink: those of like length in one call (``batched.py``), on the CPU each by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from dpo_cli.scoring.batched import PieceBatches, attend_batches, batches_of
from dpo_cli.scoring.blocks import Piece, additive, aligned_mask, gather, pieces_of, plain_attention
from dpo_cli.scoring.cpu_attention import CpuAttention, has_cpu_kernel
from dpo_cli.scoring.layout import Block, Layout
from dpo_cli.scoring.varlen import (
    VARLEN_DEVICES,
    VARLEN_KERNELS,
    Choice,
    Sequences,
    attend_varlen,
    choose_kernel,
    sequences_of,
)

PIECEWISE_DEVICES = ("cpu",)
"""Types of devices on which a call for each piece is the fastest: there it starts at once and nothing is padded."""
IMPLEMENTATION = "dpo_blocks"
"""The name to switch a model's attention to."""


class UnsupportedAttentionError(Exception):
    """A layer asks for attention that blocks cannot have: not causal, or with a bias of its own."""


# --- which layout is attended -------------------------------------------------------------


class Attending:
    """The layout in work, with what is worked out of it once and serves all layers.

    Attributes:
        layout: The layout.
        windows: The sliding windows that layers asked for; None stands for full attention.
        kernels: What computed the layers' attention.
        refused: Why a kernel was not used for some layer, by its name.
        read_P: The positions that the last layer's MLP is computed on; None for all.
    """

    def __init__(self, layout: Layout, read_P: torch.Tensor | None = None) -> None:
        self.layout = layout
        self.read_P = read_P
        self.windows: set[int | None] = set()
        self.kernels: set[str] = set()
        self.refused: dict[str, str] = {}
        self._pieces: list[Piece] | None = None
        self._sequences: Sequences | None = None
        self._masks: dict[tuple[int, int, int | None, torch.dtype], torch.Tensor] = {}
        self._batches: dict[tuple[int | None, torch.dtype], PieceBatches] = {}

    def pieces(self) -> list[Piece]:
        """All pieces of the row."""
        if self._pieces is None:
            self._pieces = [piece for block in self.layout.blocks for piece in pieces_of(block)]
        return self._pieces

    def sequences(self) -> Sequences:
        """The row as variable-length sequences."""
        if self._sequences is None:
            self._sequences = sequences_of(self.layout.blocks, self.layout.tokens_RT.device)
        return self._sequences

    def mask(self, piece: Piece, window: int | None, dtype: torch.dtype) -> torch.Tensor | None:
        """The mask to add to a piece's scores; None where causality says it all."""
        if piece.num_queries == piece.num_keys and (window is None or window >= piece.num_keys):
            return None
        return self.full_mask(piece, window, dtype)

    def full_mask(self, piece: Piece, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        """The mask to add to a piece's scores, [Q, K]."""
        key = piece.num_queries, piece.num_keys, window, dtype
        if key not in self._masks:
            device = self.layout.tokens_RT.device
            self._masks[key] = additive(aligned_mask(*key[:3], device), dtype, device)
        return self._masks[key]

    def batches(self, window: int | None, dtype: torch.dtype) -> PieceBatches:
        """All pieces of the row, those of like length together."""
        key = window, dtype
        if key not in self._batches:
            self._batches[key] = batches_of(self.pieces(), window, dtype, self.layout.tokens_RT.device)
        return self._batches[key]


_attending: ContextVar[Attending | None] = ContextVar("attending", default=None)


def attending() -> Attending | None:
    """What is attended right now; None outside of :func:`attend`."""
    return _attending.get()


@contextmanager
def attend(state: Attending | None) -> Iterator[None]:
    """Attend within a layout's blocks for as long as the context lasts.

    A forward that is repeated in the backward pass needs it again: see ``recompute.py``.
    """
    token = _attending.set(state)
    try:
        yield
    finally:
        _attending.reset(token)


# --- the registered function --------------------------------------------------------------


def block_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one layer, as transformers calls it.

    Args:
        module: The layer.
        query: [1, H, T, D].
        key: [1, G, T, D].
        value: [1, G, T, D].
        attention_mask: None, or the layer has a mask of its own and is refused.
        scaling: Factor on the scores; 1 / sqrt(D) where None.
        dropout: Refused unless 0: the positions of a shared prompt would be dropped for all alike.
        sliding_window: How many tokens a token sees, itself included; None for all.
        softcap: ``softcap * tanh(scores / softcap)`` where set (Gemma 2).
        s_aux: [H], a score a head of nothing, which takes a part of the softmax (gpt-oss).
        position_bias: Refused.

    Returns:
        [1, T, H, D] and no weights.

    Raises:
        UnsupportedAttentionError: The layer asks for what blocks cannot have.
    """
    state = _attending.get()
    if state is None or not state.layout.blocks:
        raise RuntimeError(f"{IMPLEMENTATION} attention was called without a layout of blocks")
    if attention_mask is not None or position_bias is not None or not getattr(module, "is_causal", True):
        raise UnsupportedAttentionError(f"{type(module).__name__} has a mask or a bias of its own")
    if dropout:
        raise UnsupportedAttentionError(f"{type(module).__name__} has attention dropout")
    if query.shape[2] != state.layout.num_tokens or key.shape[2] != query.shape[2]:
        raise UnsupportedAttentionError(f"{type(module).__name__} attends to more than the row")
    state.windows.add(sliding_window)
    if torch.is_autocast_enabled(query.device.type):  # rotations leave float32 behind where weights are float32
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if query.device.type in VARLEN_DEVICES:
        choice = _choose(query, value, sliding_window, softcap, s_aux)
        state.refused |= choice.refused
        if choice.name is not None and choice.kernel is not None:
            state.kernels.add(choice.name)
            sequences = state.sequences()
            out_THD = attend_varlen(choice.kernel, sequences, query, key, value, scale, sliding_window, softcap)
            return out_THD[None], None
    if (repeats := query.shape[1] // key.shape[1]) > 1:
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    if softcap is not None or s_aux is not None:
        state.kernels.add("matrix products")
    elif has_cpu_kernel(query, value):
        state.kernels.add("PyTorch's flash kernel for the CPU")

        def mask_of(piece: Piece) -> torch.Tensor | None:
            return state.mask(piece, sliding_window, query.dtype)

        return CpuAttention.apply(query, key, value, state.pieces(), mask_of, scale), None  # type: ignore[return-value]
    else:
        state.kernels.add("scaled_dot_product_attention")
    if query.device.type in PIECEWISE_DEVICES:
        return _attend_pieces(state, query, key, value, scale, sliding_window, softcap, s_aux), None

    def attend_batch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        if softcap is None and s_aux is None:
            return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        return plain_attention(q, k, v, mask, scale, softcap, s_aux)

    return attend_batches(state.batches(sliding_window, query.dtype), query, key, value, attend_batch), None


AttentionInterface.register(IMPLEMENTATION, block_attention)


def _choose(
    query: torch.Tensor, value: torch.Tensor, window: int | None, softcap: float | None, sinks: torch.Tensor | None
) -> Choice:
    if sinks is not None:
        return Choice(None, None, dict.fromkeys(VARLEN_KERNELS, "its layers have sinks"))
    return choose_kernel(query, value, window, softcap)


def _attend_pieces(
    state: Attending,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """[1, H, T, D] each to [1, T, H, D]."""
    outputs = []
    blocks = state.layout.blocks
    lengths = [block.length for block in blocks]
    parts = (tensor.split(lengths, 2) for tensor in (query, key, value))
    for block, q, k, v in zip(blocks, *parts, strict=True):
        for piece in pieces_of(Block(0, block.runs)):
            new, keys, values = q[:, :, piece.queries], gather(k, piece.keys), gather(v, piece.keys)
            if softcap is None and sinks is None:
                mask = state.mask(piece, window, query.dtype)
                out = scaled_dot_product_attention(
                    new, keys, values, attn_mask=mask, is_causal=mask is None, scale=scale
                )
            else:
                mask = state.full_mask(piece, window, query.dtype)
                out = plain_attention(new, keys, values, mask, scale, softcap, sinks)
            outputs.append(out)
    return torch.cat(outputs, 2).transpose(1, 2)
