"""Attention within the blocks of a layout, registered with transformers as ``dpo_blocks``; and the last layer's MLP.

Legend: T tokens of the row, P of them that are read, H query heads, G key heads (H a multiple of G), D head size.

A token sees the tokens of its own text that come before it: those of its run and of the runs its
run comes from. No mask function is registered under the name, so transformers builds no mask and
hands each layer's own sliding window, soft cap and sinks to :func:`block_attention`.

On CUDA one call of a variable-length FlashAttention serves all blocks (``varlen.py``), on the CPU
PyTorch's flash kernel. For what such kernels cannot do, texts' new queries go through
scaled_dot_product_attention, or through plain matrix products where there is a soft cap or a sink: those
of like length in one call, on the CPU each by itself (``pieces.py``).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cached_property
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from dpo_cli.scoring.layout import Layout
from dpo_cli.scoring.pieces import (
    AttentionSettings,
    CpuAttention,
    Piece,
    PieceBatches,
    aligned_mask,
    attend_batches,
    attend_pieces,
    batches_of,
    has_cpu_kernel,
    pieces_of,
    plain_attention,
)
from dpo_cli.scoring.varlen import VARLEN_DEVICES, Sequences, attend_varlen, choose_kernel, sequences_of

PIECEWISE_DEVICES = ("cpu",)
"""Types of devices on which a call for each piece is the fastest: there it starts at once and nothing is padded."""
IMPLEMENTATION = "dpo_blocks"
"""The name to switch a model's attention to."""


class UnsupportedLayerError(Exception):
    """A layer does what blocks or read positions cannot have: a mask or a bias of its own, more than the row."""


# --- which layout is attended -------------------------------------------------------------


class Attending:
    """The layout in work, with what is worked out of it once and serves all layers.

    Attributes:
        layout: The layout.
        read_P: The positions that the last layer's MLP is computed on; None for all.
        windows: The sliding windows that layers asked for; None stands for full attention.
        kernels: What computed the layers' attention.
        refused: Why a kernel was not used for some layer, by its name.
    """

    def __init__(self, layout: Layout, read_P: torch.Tensor | None = None) -> None:
        self.layout = layout
        self.read_P = read_P
        self.windows: set[int | None] = set()
        self.kernels: set[str] = set()
        self.refused: dict[str, str] = {}
        self._masks: dict[tuple[int, int, int | None, torch.dtype], torch.Tensor] = {}
        self._batches: dict[tuple[int | None, torch.dtype], PieceBatches] = {}

    @cached_property
    def pieces(self) -> list[Piece]:
        """All pieces of the row."""
        return [piece for block in self.layout.blocks for piece in pieces_of(block)]

    @cached_property
    def sequences(self) -> Sequences:
        """The row as variable-length sequences."""
        return sequences_of(self.pieces, self.layout.tokens_RT.device)

    def mask(self, piece: Piece, window: int | None, dtype: torch.dtype) -> torch.Tensor | None:
        """The mask to add to a piece's scores; None where causality says it all."""
        if piece.num_queries == piece.num_keys and (window is None or window >= piece.num_keys):
            return None
        return self.full_mask(piece, window, dtype)

    def full_mask(self, piece: Piece, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        """The mask to add to a piece's scores, [Q, K]."""
        key = piece.num_queries, piece.num_keys, window, dtype
        if key not in self._masks:
            self._masks[key] = aligned_mask(*key, self.layout.tokens_RT.device)
        return self._masks[key]

    def batches(self, window: int | None, dtype: torch.dtype) -> PieceBatches:
        """All pieces of the row, those of like length together."""
        key = window, dtype
        if key not in self._batches:
            self._batches[key] = batches_of(self.pieces, window, dtype, self.layout.tokens_RT.device)
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

    Query is [1, H, T, D], key and value are [1, G, T, D]. Scaling is 1 / sqrt(D) where None; the sliding window, the
    soft cap and the sinks s_aux are those of :class:`AttentionSettings`. A mask or a bias of a layer is refused,
    and so is dropout: the positions of a shared prompt would be dropped for all alike.

    Returns:
        [1, T, H, D] and no weights.

    Raises:
        UnsupportedLayerError: The layer asks for what blocks cannot have.
    """
    state = _attending.get()
    if state is None or not state.layout.blocks:
        raise RuntimeError(f"{IMPLEMENTATION} attention was called without a layout of blocks")
    if attention_mask is not None or position_bias is not None or not getattr(module, "is_causal", True):
        raise UnsupportedLayerError(f"{type(module).__name__} has a mask or a bias of its own")
    if dropout:
        raise UnsupportedLayerError(f"{type(module).__name__} has attention dropout")
    if query.shape[2] != state.layout.num_tokens or key.shape[2] != query.shape[2]:
        raise UnsupportedLayerError(f"{type(module).__name__} attends to more than the row")
    state.windows.add(sliding_window)
    if torch.is_autocast_enabled(query.device.type):  # rotations leave float32 behind where weights are float32
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    settings = AttentionSettings(scale, sliding_window, softcap, s_aux)
    if query.device.type in VARLEN_DEVICES:
        choice = choose_kernel(query, value, settings)
        state.refused |= choice.refused
        if choice.name is not None and choice.kernel is not None:
            state.kernels.add(choice.name)
            return attend_varlen(choice.kernel, state.sequences, query, key, value, settings)[None], None
    if (repeats := query.shape[1] // key.shape[1]) > 1:
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    return _attend_rest(state, query, key, value, settings), None


AttentionInterface.register(IMPLEMENTATION, block_attention)


def _attend_rest(
    state: Attending, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, settings: AttentionSettings
) -> torch.Tensor:
    """[1, H, T, D] each to [1, T, H, D], without a variable-length kernel."""
    window, dtype = settings.window, query.dtype
    if settings.is_plain and has_cpu_kernel(query, value):
        state.kernels.add("PyTorch's flash kernel for the CPU")
        return CpuAttention.apply(  # type: ignore[return-value]
            query, key, value, state.pieces, lambda piece: state.mask(piece, window, dtype), settings.scale
        )
    state.kernels.add("scaled_dot_product_attention" if settings.is_plain else "matrix products")

    def attend_batch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        if settings.is_plain:
            return scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=settings.scale)
        assert mask is not None
        return plain_attention(q, k, v, mask, settings)

    def attend_piece(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, piece: Piece) -> torch.Tensor:
        mask = state.mask if settings.is_plain else state.full_mask
        return attend_batch(q, k, v, mask(piece, window, dtype))

    if query.device.type in PIECEWISE_DEVICES:
        return attend_pieces(state.layout.blocks, query, key, value, attend_piece)
    return attend_batches(state.batches(window, dtype), query, key, value, attend_batch)


# --- the last layer's MLP -----------------------------------------------------------------


class ReadRows:
    """Hooks that compute an MLP on the positions that are read alone, from :meth:`attach` to :meth:`detach`.

    Behind the last layer's attention no position looks at another one, so what its MLP makes of a position that
    predicts nothing is never read. The hooks take the read positions out of what goes in and put what comes out back
    among zeros. They act on what is attended, so a layer that is computed again in the backward pass does as it did,
    and do nothing otherwise; several on one MLP do what one does.
    """

    def __init__(self, mlp: torch.nn.Module) -> None:
        self._mlp = mlp
        self._hooks: list[Any] = []

    @classmethod
    def of(cls, backbone: Any) -> ReadRows | None:
        """Those of a backbone's last layer; None where it has no MLP of that name."""
        layers = getattr(backbone, "layers", None)
        mlp = getattr(layers[-1], "mlp", None) if isinstance(layers, torch.nn.ModuleList) and len(layers) else None
        return cls(mlp) if isinstance(mlp, torch.nn.Module) else None

    def attach(self) -> None:
        """Begin."""
        if not self._hooks:
            self._hooks = [self._mlp.register_forward_pre_hook(_take), self._mlp.register_forward_hook(_put_back)]

    def detach(self) -> None:
        """End; the MLP is as it was."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


def _take(mlp: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """[1, T, D] to [1, P, D]."""
    state = attending()
    if state is None or state.read_P is None:
        return None
    if len(args) != 1 or not isinstance(args[0], torch.Tensor) or args[0].ndim != 3:
        raise UnsupportedLayerError(f"{type(mlp).__name__} takes more than the row")
    if args[0].shape[1] != state.layout.num_tokens:
        return None  # taken already
    return (args[0].index_select(1, state.read_P),)


def _put_back(mlp: torch.nn.Module, _args: Any, output: Any) -> torch.Tensor | None:
    """[1, P, D] to [1, T, D]."""
    state = attending()
    if state is None or state.read_P is None:
        return None
    if not isinstance(output, torch.Tensor) or output.ndim != 3:
        raise UnsupportedLayerError(f"{type(mlp).__name__} gives more than the row")
    if output.shape[1] != len(state.read_P):
        return None  # put back already
    whole = output.new_zeros(1, state.layout.num_tokens, output.shape[2])
    return whole.index_copy(1, state.read_P, output)
