"""What goes over the device: kernels, bytes, operations, memory, copies, and what should not happen.

An operation that is no view counts as one kernel that reads its inputs and writes its outputs once, with three
exceptions that are known: ``addmm`` out of place copies its summand first, a 4-bit product of many rows dequantizes
its weight first, and PyTorch's optimizers and norms take a list of tensors a kernel. Caches are not counted, so bytes
are an upper bound. Operations are counted for products and attention.
"""

from __future__ import annotations

import traceback
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_ALLOCATION = 512
"""Bytes that an allocation is rounded up to."""
_FUSED_ROWS = 64
"""Rows up to which a 4-bit product needs no dequantized weight."""
_NARROW = 64
"""A product whose shortest side is up to so long counts as the adapter's."""


@dataclass
class Kernels:
    """Some kernels of a kind.

    Attributes:
        kernels: How many.
        bytes: That they read and wrote.
        flops: That they did.
    """

    kernels: int = 0
    bytes: int = 0
    flops: int = 0

    def add(self, other: Kernels) -> None:
        """Add some more."""
        self.kernels += other.kernels
        self.bytes += other.bytes
        self.flops += other.flops


@dataclass
class Counts:
    """What was counted.

    Attributes:
        by_kind: By kind of kernel.
        by_operation: The same by PyTorch's name of the operation.
        launches: Each kernel in its order: kind, bytes and operations.
        peak_bytes: Most bytes of tensors at one time.
        base_bytes: Bytes of tensors when counting began.
        num_async_copies: Copies from the host that nobody waited for.
        blocking_copies: Where the host waited for a copy after the first product was queued.
        read_backs: Where something was copied from the device to the host.
        strays: Where an operation on the device read a tensor of the host that is no single number.
    """

    by_kind: dict[str, Kernels] = field(default_factory=dict)
    by_operation: dict[str, Kernels] = field(default_factory=dict)
    launches: list[tuple[str, int, int]] = field(default_factory=list)
    peak_bytes: int = 0
    base_bytes: int = 0
    num_async_copies: int = 0
    blocking_copies: Counter[str] = field(default_factory=Counter)
    read_backs: Counter[str] = field(default_factory=Counter)
    strays: Counter[str] = field(default_factory=Counter)

    @property
    def total(self) -> Kernels:
        """All kinds together."""
        total = Kernels()
        for work in self.by_kind.values():
            total.add(work)
        return total


class Counting(TorchDispatchMode):
    """Counts what goes over the dry device while it is on; enter it under ``dry_cuda``, before the model is made.

    Attributes:
        counts: What was counted since :meth:`restart`.
        attention_pairs: (query, key) pairs that see each other in a call of variable-length attention, which does
            not show in its arguments.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counts()
        self.attention_pairs = 0
        self._live: dict[int, int] = {}
        self._now = 0
        self._has_queued = False

    @property
    def live_bytes(self) -> int:
        """Bytes of tensors on the device now."""
        return self._now

    def restart(self) -> None:
        """Count anew from here on; tensors that are there stay counted."""
        self.counts = Counts(peak_bytes=self._now, base_bytes=self._now)
        self._has_queued = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count it."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func.namespace == "prim":  # asks for a property
            return result
        given, made = list(_tensors((args, kwargs))), list(_tensors(result))
        if any(tensor.device.type == "cuda" for tensor in (*given, *made)):
            self._count(func, args, kwargs, given, made)
        return result

    # --- one operation --------------------------------------------------------------------

    def _count(
        self, func: Any, args: Any, kwargs: dict[str, Any], given: list[torch.Tensor], made: list[torch.Tensor]
    ) -> None:
        for tensor in (*given, *made):
            self._note(tensor)
        name = func.name().partition("::")[2]
        base = name.partition(".")[0]
        if base in ("_to_copy", "copy_", "_copy_from"):
            self._check_copy(base, args, kwargs, given, made)
        elif any(_is_host_data(tensor) for tensor in given):
            self.counts.strays[f"{name} at {_place()}"] += 1
        if func.is_view or base in _VIEWS:
            return
        work, kind = self._work(base, args, [t for t in given if _on_device(t)], [t for t in made if _on_device(t)])
        if kind in _PRODUCT_KINDS:
            self._has_queued = True
        self.counts.by_kind.setdefault(kind, Kernels()).add(work)
        self.counts.by_operation.setdefault(name, Kernels()).add(work)
        self.counts.launches.append((kind, work.bytes, work.flops))

    def _check_copy(
        self, base: str, args: Any, kwargs: dict[str, Any], given: list[torch.Tensor], made: list[torch.Tensor]
    ) -> None:
        source = given[0] if base == "_to_copy" else args[1]
        target = made[0] if base == "_to_copy" else args[0]
        if not isinstance(source, torch.Tensor):
            return
        is_async = kwargs.get("non_blocking", False) or (base != "_to_copy" and len(args) > 2 and args[2])
        if _on_device(source) and not _on_device(target):
            self.counts.read_backs[_place()] += 1
        elif _on_device(target) and not _on_device(source):
            if is_async:
                self.counts.num_async_copies += 1
            elif self._has_queued:
                self.counts.blocking_copies[_place()] += 1

    def _work(self, base: str, args: Any, given: list[torch.Tensor], made: list[torch.Tensor]) -> tuple[Kernels, str]:
        """What an operation costs, and its kind."""
        written = sum(map(_num_bytes, made))
        moved = written + sum(_num_bytes(tensor) for tensor in given if not _is_only_written(base, tensor, made))
        if base in _PICKS:
            return Kernels(1, 2 * written), "elementwise"
        if base == "index_copy_":  # only what is put in
            return Kernels(1, 2 * _num_bytes(args[3])), "elementwise"
        if base in ("mm", "bmm"):
            return _product(moved, args[0], args[1])
        if base == "_grouped_mm":
            return Kernels(1, moved, 2 * args[0].numel() * made[0].shape[-1]), "products"
        if base in ("addmm", "baddbmm"):
            summand, result = args[0], made[0]
            if summand.dim() > 1 and not _same_storage(summand, result):
                self._launch("sums", _num_bytes(summand) + _num_bytes(result))
                moved += _num_bytes(result)
            return _product(moved, args[1], args[2])
        if base == "gemm_4bit":
            rows, (outputs, inputs) = args[0].numel() // args[0].shape[-1], args[2]
            flops = 2 * rows * outputs * inputs
            if rows <= _FUSED_ROWS:
                return Kernels(1, moved, flops), "products"
            weight = outputs * inputs * made[0].element_size()
            self._launch("dequantization", weight + outputs * inputs // 2)
            self._pass_by(weight)
            return Kernels(1, _num_bytes(args[0]) + weight + _num_bytes(made[0]), flops), "products"
        if base in ("dequantize_4bit", "dequantize_blockwise"):
            return Kernels(1, moved), "dequantization"
        if base in _ATTENTION:
            return Kernels(1, moved, self._attention_flops(base, args)), "attention"
        if base.startswith("_foreach"):
            return Kernels(1, moved), "optimizer"
        return Kernels(1, moved), "elementwise"

    def _attention_flops(self, base: str, args: Any) -> int:
        """Two products of each pair forward and five backward; of padded rows all pairs, seen or not."""
        is_backward = "backward" in base
        factor = 10 if is_backward else 4
        if "varlen" in base:
            heads, size = args[0].shape[-2:]
            return factor * heads * size * self.attention_pairs
        query, key = args[is_backward], args[is_backward + 1]
        return factor * query.numel() * key.shape[2]

    def _launch(self, kind: str, moved: int) -> None:
        self.counts.by_kind.setdefault(kind, Kernels()).add(Kernels(1, moved))
        self.counts.launches.append((kind, moved, 0))

    # --- memory ---------------------------------------------------------------------------

    def _note(self, tensor: torch.Tensor) -> None:
        if not _on_device(tensor):
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live:
            return
        size = -(-storage.nbytes() // _ALLOCATION) * _ALLOCATION
        self._live[key] = size
        self._now += size
        self.counts.peak_bytes = max(self.counts.peak_bytes, self._now)
        weakref.finalize(storage, self._let_go, key)

    def _let_go(self, key: int) -> None:
        self._now -= self._live.pop(key)

    def _pass_by(self, size: int) -> None:
        """Memory that is taken within an operation."""
        self.counts.peak_bytes = max(self.counts.peak_bytes, self._now + size)


_PRODUCT_KINDS = ("products", "adapter products")
_ATTENTION = (
    "_varlen_attn",
    "_varlen_attn_backward",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_backward",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_efficient_attention_backward",
)
_VIEWS = ("detach", "_unsafe_view", "lift_fresh", "alias", "empty", "empty_like", "empty_strided", "new_empty")
"""Operations that start no kernel though PyTorch does not call them views."""


_FILLS = ("copy_", "fill_", "zero_", "normal_", "uniform_")
"""Operations in place that do not read what they write to."""
_PICKS = ("embedding", "gather", "index", "index_select")
"""Operations that read as much of their first input as they write."""


def _is_only_written(base: str, tensor: torch.Tensor, made: list[torch.Tensor]) -> bool:
    """Whether an argument is where the result goes, and is not read."""
    return (not base.endswith("_") or base in _FILLS) and any(tensor is result for result in made)


def _product(moved: int, left: torch.Tensor, right: torch.Tensor) -> tuple[Kernels, str]:
    rows, inner, columns = left.shape[-2], left.shape[-1], right.shape[-1]
    batch = left.shape[0] if left.dim() == 3 else 1
    kind = "adapter products" if left.dim() == 2 and min(rows, inner, columns) <= _NARROW else "products"
    return Kernels(1, moved, 2 * batch * rows * inner * columns), kind


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    return (value for value in tree_leaves(values) if isinstance(value, torch.Tensor))


def _on_device(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cuda"


def _is_host_data(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.dim() > 0


def _num_bytes(tensor: torch.Tensor) -> int:
    """Bytes that are read or written of a tensor; one that repeats its storage has no more than that."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _same_storage(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.untyped_storage()._cdata == other.untyped_storage()._cdata


def _place() -> str:
    """The innermost line of this package that is at work, and that of another package within it."""
    frames = [frame for frame in traceback.extract_stack() if not _is_beside(frame.filename)]
    if not frames:  # autograd's own thread
        return "the backward pass"
    own = next((frame for frame in reversed(frames) if "/dpo_cli/" in frame.filename), frames[-1])
    return " in ".join(dict.fromkeys(f"{_short(frame.filename)}:{frame.lineno}" for frame in (frames[-1], own)))


def _is_beside(name: str) -> bool:
    """Whether a file is PyTorch's or this room's."""
    return "/torch/" in name or "/dpo_cli/dry_run/" in name


def _short(name: str) -> str:
    return "/".join(name.split("/")[-2:])
