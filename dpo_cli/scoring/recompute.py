"""What the backward pass computes again instead of keeping: nothing, all but the products, or whole layers.

``none`` keeps what every operation needs. ``elementwise`` keeps the outputs of matrix products and of
attention, and computes norms, rotations, activations and dequantized weights again: no product is
done twice. ``layers`` keeps the input of each layer and computes the layer again: one more forward
pass for the least memory (Chen et al. 2016). Gradients are the same.

It goes through the model's own switch for activation checkpointing; nothing is patched.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from dpo_cli.scoring.attention import Attending, attend, attending

Recompute = Literal["none", "elementwise", "layers"]
GRADES: tuple[Recompute, ...] = ("none", "elementwise", "layers")
"""From the fastest to the smallest."""

_PRODUCTS = (
    "mm",
    "addmm",
    "bmm",
    "baddbmm",
    "linear",
    "gemm_4bit",
    "_grouped_mm",  # of experts
    "grouped_mm_fallback",
    "_flash_attention_forward",
    "_efficient_attention_forward",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_varlen_attn",
    "_flash_attn_varlen_forward",
    "_flash_attn_forward",
)
"""Operations, by name without their namespace, whose outputs are kept under ``elementwise``.

Not those that write into a given tensor: so a layer makes a weight that is cheap to make again.
"""


class CannotRecomputeError(Exception):
    """The model has no activation checkpointing."""


def set_recompute(model: torch.nn.Module, grade: Recompute) -> None:
    """Choose what a model's backward pass computes again.

    Raises:
        CannotRecomputeError: The model has no activation checkpointing, and the grade needs it.
    """
    causal: Any = getattr(model, "get_base_model", lambda: model)()  # of a PeftModel; else itself
    if grade == "none":
        if causal.supports_gradient_checkpointing:
            causal.gradient_checkpointing_disable()
        return
    if not causal.supports_gradient_checkpointing:
        raise CannotRecomputeError(f"{type(causal).__name__} cannot compute its activations again")
    contexts = _layer_contexts if grade == "layers" else _elementwise_contexts
    arguments = {"use_reentrant": False, "context_fn": contexts}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the older of its two names is known to all versions
        causal.gradient_checkpointing_enable(gradient_checkpointing_kwargs=arguments)


Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]


def _layer_contexts() -> Contexts:
    return nullcontext(), _again(nullcontext(), attending())


def _elementwise_contexts() -> Contexts:
    first, again = create_selective_checkpoint_contexts(_keep_products)
    return first, _again(again, attending())


@contextmanager
def _again(context: AbstractContextManager[Any], state: Attending | None) -> Iterator[None]:
    """The repeated forward attends to what the first one did, whatever has been scored since."""
    with attend(state), context:
        yield


def _keep_products(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if _is_product(operation) else CheckpointPolicy.PREFER_RECOMPUTE


def _is_product(operation: Any) -> bool:
    name, _, overload = operation.name().partition("::")[2].partition(".")
    return name in _PRODUCTS and overload != "out"


# --- how much is kept ---------------------------------------------------------------------


@dataclass(frozen=True)
class KeptBytes:
    """Bytes that stay in memory from the forward pass to the backward pass.

    Attributes:
        fixed: Whatever the number of tokens.
        per_token: By grade, for each token.
    """

    fixed: float
    per_token: dict[Recompute, float]

    def of(self, grade: Recompute, num_tokens: int) -> float:
        """Bytes for so many tokens."""
        return self.fixed + self.per_token[grade] * num_tokens


def measure_kept(model: torch.nn.Module, forward: Callable[[int], int], num_layers: int, hidden_size: int) -> KeptBytes:
    """Count what a model's forward pass keeps, on two short rows.

    Args:
        model: The model, with nothing computed again.
        forward: Runs a row of about so many tokens, with gradients; returns how many it had.
        num_layers: Layers of the model.
        hidden_size: Numbers that go from layer to layer for each token.
    """
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    counts = [_count_kept(own, forward, size) for size in (64, 192)]
    (short, kept_short, products_short), (long, kept_long, products_long) = counts
    kept = max(0.0, (kept_long - kept_short) / (long - short))
    products = max(0.0, (products_long - products_short) / (long - short))
    layer_inputs = 4.0 * num_layers * hidden_size
    per_token: dict[Recompute, float] = {
        "none": kept,
        "elementwise": min(kept, products + layer_inputs + kept / num_layers),
        "layers": min(kept, layer_inputs + kept / num_layers),
    }
    return KeptBytes(max(0.0, kept_short - kept * short), per_token)


def _count_kept(own: set[int], forward: Callable[[int], int], size: int) -> tuple[int, int, int]:
    """Tokens of a forward pass, bytes that autograd kept of it, and bytes that its products gave."""
    kept: dict[int, int] = {}
    counter = _ProductCounter()

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:  # the place of the storage, which one without numbers has, too
            kept[storage._cdata] = storage.nbytes()
        return tensor.detach()  # the tensor itself would keep its own graph alive

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), counter:
        num_tokens = forward(size)
    return num_tokens, sum(kept.values()), counter.num_bytes


class _ProductCounter(TorchDispatchMode):
    """Adds up the outputs of products."""

    num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if _is_product(func):
            first = result[0] if isinstance(result, tuple) else result
            self.num_bytes += first.numel() * first.element_size()
        return result


def first_that_fits(kept: KeptBytes, num_tokens: int, free_bytes: float) -> Recompute:
    """The fastest grade whose activations of so many tokens fit into memory; ``layers`` where none does."""
    for grade in GRADES:
        if kept.of(grade, num_tokens) <= free_bytes:
            return grade
    return "layers"
