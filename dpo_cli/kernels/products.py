"""Matrix products whose sums are not rounded to what is multiplied.

Legend: N rows, K what is summed over, M columns.
"""

from __future__ import annotations

from functools import cache

import torch

from dpo_cli.core.errors import is_out_of_memory

_WIDENED = 4096
"""Columns that are copied to float32 at a time where a device multiplies nothing narrower into it."""


def wide_product(left_NK: torch.Tensor, right_KM: torch.Tensor, out_NM: torch.Tensor | None = None) -> torch.Tensor:
    """The product of two matrices in float32, whatever they are: what it adds up is not rounded to their dtype.

    Without a gradient. On a device that has no such product the sums are rounded after all, and
    :func:`describe_products` says so.

    Args:
        left_NK: [N, K].
        right_KM: [K, M].
        out_NM: float32 [N, M], where the product is written, if anywhere.
    """
    if left_NK.dtype == torch.float32:
        return torch.mm(left_NK, right_KM, out=out_NM)
    if left_NK.device.type == "cpu":
        if out_NM is None:
            out_NM = left_NK.new_empty(left_NK.shape[0], right_KM.shape[1], dtype=torch.float32)
        with torch.autocast("cpu", enabled=False):
            for out, right in zip(out_NM.split(_WIDENED, 1), right_KM.split(_WIDENED, 1), strict=True):
                out.copy_(left_NK.float() @ right.float())
        return out_NM
    if _has_wide_product(left_NK.device, left_NK.dtype):
        return torch.mm(left_NK, right_KM, out_dtype=torch.float32, out=out_NM)
    rounded = torch.mm(left_NK, right_KM)
    return rounded.float() if out_NM is None else out_NM.copy_(rounded)


def describe_products(device: torch.device, dtype: torch.dtype) -> str:
    """What is said of a GPU whose products round their sums, as a part of a sentence; empty elsewhere."""
    if device.type == "cpu" or dtype == torch.float32 or _has_wide_product(device, dtype):
        return ""
    name = str(dtype).removeprefix("torch.")
    return f"; logits are rounded to {name}, for there is no product of it in float32 on this device"


@cache
def _has_wide_product(device: torch.device, dtype: torch.dtype) -> bool:
    matrix = torch.zeros(16, 16, device=device, dtype=dtype)
    try:
        torch.mm(matrix, matrix, out_dtype=torch.float32)
    except (RuntimeError, NotImplementedError, TypeError) as error:
        if is_out_of_memory(error):
            raise
        return False
    return True
