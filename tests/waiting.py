"""What waits for a device, seen without one: tensors on ``meta`` stand for those on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class NoWaiting(TorchFunctionMode):
    """Refuses copies from the CPU to ``meta`` that a GPU's stream would be waited for.

    What reads a value back (``tolist``, ``item``, ``bool``) fails on ``meta`` by itself.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        source = args[0] if args else None
        if isinstance(result, torch.Tensor) and result.device.type == "meta" and not kwargs.get("non_blocking"):
            from_list = func in (torch.tensor, torch.as_tensor) and not isinstance(source, torch.Tensor)
            from_cpu = isinstance(source, torch.Tensor) and source.device.type == "cpu" and source.ndim > 0
            is_copy = func in (torch.Tensor.to, torch.Tensor.type, torch.as_tensor)
            if from_list or (from_cpu and is_copy):
                raise AssertionError(f"{func.__name__} copies to the device and waits for it")
        return result
