"""Tensors without numbers on ``cuda:0``, and what must be pretended so that the code for CUDA takes them.

Under :func:`dry_cuda` a tensor on the device has shape, dtype and no numbers (PyTorch's FakeTensorMode). What would
read a number back from the device raises, so a program that runs through reads none. What the code asks of numbers or
of the driver is answered here: whether autocast may be used, where the random streams are, how much memory is free,
whether a variable-length kernel aligns as it must, whether logits are those of the output embedding. And where
a CPU build of PyTorch would take an operation apart that CUDA has a kernel for, it is kept whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import _meta_registrations
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.nn.functional import scaled_dot_product_attention

from dpo_cli.core.params import RuntimeParams
from dpo_cli.models.device import Machine, prepare_machine
from dpo_cli.scoring import varlen
from dpo_cli.scoring.pieces import AttentionSettings
from dpo_cli.scoring.scorer import Scorer

CUDA = torch.device("cuda", 0)

_HOST_NUMBERS = 1 << 16
"""Tensors of the host of up to so many numbers keep them, as what is made of lists does."""
_TURING_END = (8, 0)
"""Compute capability from which on GPUs have bfloat16, and FlashAttention runs."""


@contextmanager
def dry_cuda(
    capability: tuple[int, int] = (8, 9),
    memory_bytes: int = 24 << 30,
    allocated_bytes: Callable[[], int] = lambda: 0,
    *,
    has_varlen: bool = True,
) -> Iterator[FakeTensorMode]:
    """Pretend that ``cuda:0`` is there.

    Args:
        capability: Its compute capability; below 8.0 no variable-length kernel runs.
        memory_bytes: Its memory.
        allocated_bytes: How much of it tensors take now.
        has_varlen: Whether a kernel for sequences of any length is installed.
    """
    fraction = 1.0

    def bound_memory(share: float, *_: Any) -> None:
        nonlocal fraction
        fraction = share

    def free_memory(*_: Any) -> tuple[int, int]:
        return memory_bytes - allocated_bytes(), memory_bytes

    def reason_against(
        kernel: varlen.VarlenKernel,
        device: torch.device,
        dtype: torch.dtype,
        head_size: int,
        settings: AttentionSettings,
    ) -> str | None:
        """What stands in the kernel's own way; that it computes what it must cannot be seen here."""
        if not has_varlen:
            return "is not installed"
        if not is_new:
            return "needs compute capability 8.0"
        query, key = (torch.empty(8, heads, head_size, dtype=dtype, device=device) for heads in (4, 2))
        starts = torch.zeros(2, dtype=torch.int32, device=device)
        try:
            kernel(query, key, key, varlen.Sequences(None, starts, starts, 8, 8), settings)
        except NotImplementedError as error:
            return f"it fails ({error})"
        return None

    is_new = capability >= _TURING_END
    by_definition = scaled_dot_product_attention

    def attention(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        """The kernel that PyTorch chooses on CUDA: FlashAttention where there is no mask, else the efficient one."""
        if query.device.type != "cuda" or (query.dtype == torch.bfloat16 and not is_new):
            return by_definition(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        if attn_mask is None and is_new and query.dtype != torch.float32:
            flash = torch.ops.aten._scaled_dot_product_flash_attention
            return flash(query, key, value, dropout_p, is_causal, scale=scale)[0]
        if (repeats := query.shape[1] // key.shape[1]) > 1:
            key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
        if attn_mask is not None:
            shape = (*query.shape[:3], key.shape[2])
            attn_mask = attn_mask.to(query.dtype).expand(shape)  # of a bool one a copy, as there
        needs_gradient = torch.is_grad_enabled() and query.requires_grad
        efficient = torch.ops.aten._scaled_dot_product_efficient_attention
        return efficient(query, key, value, attn_mask, needs_gradient, dropout_p, is_causal, scale=scale)[0]

    def packed_sequences(position_ids: torch.Tensor) -> None:
        """What transformers finds of one text a row; for that it reads a number back, which counts as such."""
        position_ids[:1, -1:].to("cpu")

    pretended = {
        "torch._subclasses.fake_tensor.CONSTANT_NUMEL_LIMIT": _HOST_NUMBERS,
        "torch.cuda.amp.common.amp_definitely_not_available": lambda: False,
        "torch.cuda.is_bf16_supported": lambda including_emulation=True: including_emulation or is_new,
        "torch.cuda.get_device_capability": lambda *_: capability,
        "torch.cuda.current_device": lambda: 0,
        "torch.cuda.get_rng_state": lambda *_: torch.empty(16, dtype=torch.uint8),
        "torch.cuda.set_rng_state": lambda *_: None,
        "torch.cuda.mem_get_info": free_memory,
        "torch.cuda.memory_reserved": lambda *_: allocated_bytes(),
        "torch.cuda.memory_allocated": lambda *_: allocated_bytes(),
        "torch.cuda.get_per_process_memory_fraction": lambda *_: fraction,
        "torch.cuda.set_per_process_memory_fraction": bound_memory,
        "torch.nn.functional.scaled_dot_product_attention": attention,
        "transformers.utils.import_utils.is_fake_tensor": lambda _: False,  # or it takes another way
        "transformers.masking_utils.find_packed_sequence_indices": packed_sequences,
        "dpo_cli.scoring.attention.scaled_dot_product_attention": attention,
        "dpo_cli.scoring.varlen.reason_against": reason_against,
    }
    with ExitStack() as stack:
        for name, value in pretended.items():
            stack.enter_context(patch(name, value))
        stack.enter_context(patch.object(Scorer, "_agree", lambda _, ours, theirs: ours.shape == theirs.shape))
        _keep_whole(stack)
        varlen._choose.cache_clear()
        stack.callback(varlen._choose.cache_clear)
        yield stack.enter_context(FakeTensorMode())


@contextmanager
def dry_cpu() -> Iterator[FakeTensorMode]:
    """Tensors without numbers on the CPU, as the code for the CPU takes them; no compiler is needed."""
    pretended = {
        "torch._subclasses.fake_tensor.CONSTANT_NUMEL_LIMIT": _HOST_NUMBERS,
        "transformers.utils.import_utils.is_fake_tensor": lambda _: False,
        "transformers.masking_utils.find_packed_sequence_indices": lambda _: None,
    }
    with ExitStack() as stack:
        for name, value in pretended.items():
            stack.enter_context(patch(name, value))
        stack.enter_context(patch.object(Scorer, "_agree", lambda _, ours, theirs: ours.shape == theirs.shape))
        _know_grouped_products(stack)
        yield stack.enter_context(FakeTensorMode())


def prepare_dry_machine(runtime: RuntimeParams) -> Machine:
    """The dry device with the dtype and the bound on memory that a real one would get; call under ``dry_cuda``.

    What the settings say of the device is of this machine, and not asked.
    """
    with patch("torch.cuda.is_available", lambda: True):
        return prepare_machine(runtime.model_copy(update={"device": "cuda"}), embedded=False)


@contextmanager
def read_backs_give_zeros(hear: Callable[[str], None]) -> Iterator[None]:
    """Let numbers be read back from the dry device, as zeros: for passes that end with a result on the host.

    Args:
        hear: Gets the name of what read: ``item``, ``tolist``, ``__bool__``.
    """
    item, as_list, as_bool = torch.Tensor.item, FakeTensor.tolist, torch.Tensor.__bool__

    def is_known(tensor: torch.Tensor) -> bool:
        return not isinstance(tensor, FakeTensor) or tensor.constant is not None

    def read_item(tensor: torch.Tensor) -> Any:
        if is_known(tensor):
            return item(tensor)
        hear("item")
        return 0.0 if tensor.dtype.is_floating_point else 0

    def read_list(tensor: FakeTensor) -> Any:
        if is_known(tensor):
            return as_list(tensor)
        hear("tolist")
        with unset_fake_temporarily():
            return torch.zeros(tensor.shape, dtype=tensor.dtype).tolist()

    def read_bool(tensor: torch.Tensor) -> bool:
        if is_known(tensor):
            return as_bool(tensor)
        hear("__bool__")
        return False

    with (
        patch.object(torch.Tensor, "item", read_item),
        patch.object(FakeTensor, "tolist", read_list),
        patch.object(torch.Tensor, "__bool__", read_bool),
    ):
        yield


def _keep_whole(stack: ExitStack) -> None:
    """Register what has a kernel of its own on CUDA, so that autograd does not take it apart."""
    library = stack.enter_context(torch.library._scoped_library("aten", "IMPL"))
    library.impl("silu_backward", lambda grad_output, inputs: torch.empty_like(inputs), "CUDA")
    _know_grouped_products(stack)


def _know_grouped_products(stack: ExitStack) -> None:
    """Products of experts: what PyTorch knows of their shape without numbers it knows in bfloat16 alone."""
    shape_of = _meta_registrations._meta_grouped_mm_common

    def grouped_product(left: torch.Tensor, right: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return shape_of(left.bfloat16(), right.bfloat16(), *args, **kwargs).to(left.dtype)

    stack.enter_context(patch.object(_meta_registrations, "_meta_grouped_mm_common", grouped_product))
