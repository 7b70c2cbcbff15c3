"""Matrix products whose sums are not rounded to what is multiplied, and the check of a kernel before it is used.

Legend: N rows, K what is summed over, M columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache

import torch

from dpo_cli.core.errors import first_line, is_out_of_memory

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


def reason_against_kernel(
    kernel: Callable[..., torch.Tensor],
    definition: Callable[..., torch.Tensor],
    inputs: Sequence[torch.Tensor],
    weights: torch.Tensor,
    tolerances: Mapping[str, float],
    asked: str = "",
) -> str | None:
    """Why a kernel or its gradients are not what the definition gives in float32; None where they are.

    Args:
        kernel: From the inputs to an output.
        definition: The same, in whatever dtype it is given.
        inputs: In the dtype that the kernel is for.
        weights: Factors of the output in the sum whose gradients are compared.
        tolerances: Names and the largest differences of the output and of each input's gradient; absolute where the
            exact number is 1 or less, else relative, since the last digit is worth more where numbers are larger.
        asked: What was asked of it beyond the usual, for the sentence.
    """

    def run(function: Callable[..., torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [tensor.detach().to(dtype, copy=True).requires_grad_() for tensor in inputs]
        out = function(*leaves)
        (out.float() * weights).sum().backward()
        none = torch.zeros((), device=out.device)
        return [out.detach().float(), *(none if leaf.grad is None else leaf.grad.float() for leaf in leaves)]

    with torch.enable_grad(), torch.autocast(weights.device.type, enabled=False):
        exact = run(definition, torch.float32)
        try:
            found = run(kernel, inputs[0].dtype)
        except Exception as error:  # whatever a kernel does that cannot, a compiler that is lacking included
            if is_out_of_memory(error):
                raise
            return f"it fails{asked} ({first_line(error)})"
    for (what, tolerance), ours, theirs in zip(tolerances.items(), exact, found, strict=True):
        off = ((theirs - ours).abs() / ours.abs().clamp(min=1.0)).nan_to_num(nan=math.inf).max().item()
        if not off <= tolerance:
            return f"its {what} is off{asked} by {off:.2g}"
    return None
