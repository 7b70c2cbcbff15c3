"""How many bytes of tensors are alive at once, counted on any device and without the allocator's help.

On the CPU nothing tells the peak of what PyTorch holds: the process's resident memory keeps what was freed, and moves
with everything else. Here every operation reports the storages of its outputs; a storage counts from then on until the
last tensor that looks into it is gone. What an operation needs inside of itself is not seen.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """Counts what is made inside of the context.

        with LiveMemory() as memory:
            loss(model(tokens)).backward()
        print(memory.peak)

    A storage that an operation is given before any has made it was there before, as weights are: it counts nothing. Nor
    does one on the meta device, which holds nothing.

    Attributes:
        live: Bytes alive now.
        peak: Most bytes that were alive at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for tensor in _tensors((args, kwargs)):
            self._note(tensor, counts=False)
        result = func(*args, **kwargs)
        for tensor in _tensors(result):
            self._note(tensor, counts=True)
        return result

    def _note(self, tensor: torch.Tensor, *, counts: bool) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._known:
            return
        num_bytes = storage.nbytes() if counts and tensor.device.type != "meta" else 0
        self._known.add(storage._cdata)
        self.live += num_bytes
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, storage._cdata, num_bytes).atexit = False

    def _forget(self, key: int, num_bytes: int) -> None:
        self._known.discard(key)
        self.live -= num_bytes


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
