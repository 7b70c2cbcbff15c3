"""PyTorch's flash attention for the CPU over the pieces of a row, as one operation of autograd.

Legend: T tokens of the row, H heads, D head size.

Called piece by piece from autograd it would cost a slice, a concatenation and their gradients for
each; here the kernel reads and writes the row itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dpo_cli.scoring.blocks import Piece, gather

MaskOf = Callable[[Piece], torch.Tensor | None]
"""The mask to add to a piece's scores; None where causality says it all."""


def has_cpu_kernel(query: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether the kernel can be called by itself, as scaled_dot_product_attention does."""
    return (
        query.device.type == "cpu"
        and query.shape[-1] == value.shape[-1]
        and query.dtype == value.dtype
        and hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward")
    )


class CpuAttention(torch.autograd.Function):
    """Query, key and value [1, H, T, D] to [1, T, H, D]; a piece without a mask is causal."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        pieces: list[Piece],
        mask_of: MaskOf,
        scale: float,
    ) -> torch.Tensor:
        """Read the row, write the row."""
        out = query.new_empty(1, query.shape[2], query.shape[1], query.shape[3])
        kept: list[torch.Tensor] = []
        for piece in pieces:
            mask = mask_of(piece)
            part, normalizer = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                query[:, :, piece.queries],
                gather(key, piece.keys),
                gather(value, piece.keys),
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
                gather(key, piece.keys),
                gather(value, piece.keys),
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
