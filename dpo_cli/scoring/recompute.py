"""What the backward pass computes again instead of keeping: nothing, all but the products, or whole layers.

``none`` keeps what every operation needs. ``elementwise`` keeps the outputs of matrix products and of
attention, and computes norms, rotations, activations and dequantized weights again: no product is
done twice. ``layers`` keeps the input of each layer and computes the layer again: one more forward
pass for the least memory (Chen et al. 2016). Gradients are the same.

It goes through the model's own switch for activation checkpointing; nothing is patched.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from dpo_cli.scoring.attention import Attending, attend, attending
from dpo_cli.scoring.limits import causal_of

Recompute = Literal["none", "elementwise", "layers"]
GRADES: tuple[Recompute, ...] = ("none", "elementwise", "layers")
"""From the fastest to the smallest."""

_PRODUCTS = (
    "mm",
    "addmm",
    "addmm_",  # of an adapter, on what a product gave
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


Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]


def set_recompute(model: torch.nn.Module, grade: Recompute) -> None:
    """Choose what a model's backward pass computes again.

    Raises:
        CannotRecomputeError: The model has no activation checkpointing, and the grade needs it.
    """
    causal = causal_of(model)
    if grade == "none":
        if causal.supports_gradient_checkpointing:
            causal.gradient_checkpointing_disable()
        return
    _checkpoint(causal, _layer_contexts if grade == "layers" else _elementwise_contexts)


def _checkpoint(causal: Any, contexts: Callable[[], Contexts]) -> None:
    if not causal.supports_gradient_checkpointing:
        raise CannotRecomputeError(f"{type(causal).__name__} cannot compute its activations again")
    arguments = {"use_reentrant": False, "context_fn": contexts}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the older of its two names is known to all versions
        causal.gradient_checkpointing_enable(gradient_checkpointing_kwargs=arguments)


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
    return name in _PRODUCTS and not overload.endswith("out")


# --- how much memory that takes -----------------------------------------------------------


@dataclass(frozen=True)
class KeptBytes:
    """The most that activations take in a forward and backward pass.

    Attributes:
        fixed: Bytes, whatever the number of tokens.
        per_token: Bytes by grade, for each token.
    """

    fixed: float
    per_token: dict[Recompute, float]

    def of(self, grade: Recompute, num_tokens: int) -> float:
        """Bytes for so many tokens."""
        return self.fixed + self.per_token[grade] * num_tokens


def measure_kept(model: torch.nn.Module, forward: Callable[[int], int], num_layers: int, head_bytes: int) -> KeptBytes:
    """Count what a model's forward pass keeps, on two short rows, and work out the most that there is at one time.

    That is early in the backward pass, when nearly all that was kept is there still: beside it stand one layer's
    activations, made again, and gradients of the widest of them; before that, at the end of the forward pass, the
    logits. What is computed again is left as the model has it.

    Args:
        model: The model, with nothing computed again.
        forward: Runs a row of about so many tokens, with gradients; returns how many it had.
        num_layers: Layers of the model.
        head_bytes: Bytes of logits that are held at once.
    """
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    short, long = (_count_kept(model, own, forward, size) for size in (64, 192))
    num_short, num_long = short[0], long[0]
    slopes = [max(0.0, (more - less) / (num_long - num_short)) for less, more in zip(short[1:], long[1:], strict=True)]
    kept, inputs, products, widest = slopes
    inputs = min(kept, inputs)
    a_layer, gradients = (kept - inputs) / num_layers, _GRADIENTS_AT_ONCE * widest
    made_again = max(0.0, a_layer - products / num_layers)
    none = kept + gradients
    per_token: dict[Recompute, float] = {
        "none": none,
        "elementwise": min(none, inputs + products + made_again + gradients),
        "layers": min(none, inputs + a_layer + gradients),
    }
    fixed = max(0.0, short[1] - kept * num_short) + max(head_bytes, largest_weight_bytes(model))
    return KeptBytes(fixed, per_token)


_GRADIENTS_AT_ONCE = 1.5
"""Tensors as wide as a layer's widest product that live at once in the backward pass, beside those that were kept."""


def _count_kept(
    model: torch.nn.Module, own: set[int], forward: Callable[[int], int], size: int
) -> tuple[int, int, int, int, int]:
    """Tokens of a forward pass, and bytes.

    Those that autograd keeps where nothing is computed again, and where layers are; those that the layers' products
    give, and the most that one of them gives.
    """
    causal = causal_of(model)
    num_tokens, kept = _kept_by(own, forward, size)
    counter = _ProductCounter()
    if not causal.supports_gradient_checkpointing:
        return num_tokens, kept, kept, 0, 0
    _checkpoint(causal, lambda: (counter, nullcontext()))
    try:
        _, inputs = _kept_by(own, forward, size)
    finally:
        set_recompute(model, "none")
    products = counter.num_bytes.values()
    return num_tokens, kept, inputs, sum(products), max(products, default=0)


def _kept_by(own: set[int], forward: Callable[[int], int], size: int) -> tuple[int, int]:
    """Tokens of a forward pass, and bytes that autograd kept of it."""
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:  # the place of the storage, which one without numbers has, too
            kept[storage._cdata] = storage.nbytes()
        return tensor.detach()  # the tensor itself would keep its own graph alive

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        num_tokens = forward(size)
    return num_tokens, sum(kept.values())


class _ProductCounter(TorchDispatchMode):
    """Bytes of products' outputs by where they are; one that is written over counts once."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes: dict[int, int] = {}
        self._outputs: list[torch.Tensor] = []  # so that no place is taken twice

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if _is_product(func):
            first = result[0] if isinstance(result, tuple) else result
            storage = first.untyped_storage()
            self.num_bytes[storage._cdata] = storage.nbytes()
            self._outputs.append(first.detach())
        return result


def largest_weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of the largest 4-bit weight in the dtype that it is unpacked to; 0 where there is none."""
    states = [state for parameter in model.parameters() if (state := getattr(parameter, "quant_state", None))]
    return max((math.prod(state.shape) * state.dtype.itemsize for state in states), default=0)


# --- which is the fastest -----------------------------------------------------------------

_PRODUCT_PASSES: dict[Recompute, int] = {"none": 2, "elementwise": 2, "layers": 3}
"""How often a step multiplies with each frozen weight."""
_ELEMENTWISE_AGAIN: dict[Recompute, float] = {"none": 0.0, "elementwise": 0.25, "layers": 0.25}
"""What computing norms, rotations and activations again costs, in passes of products."""
_DEQUANTIZATION_TOKENS = 200
"""So many tokens' product with a weight takes as long as unpacking it from 4 bits.

2.5 bytes a weight at 850 GB/s against 2 operations a weight and token at 140 TFLOP/s; of other cards the quotient is
much the same.
"""
_HOST_S: dict[Recompute, float] = {"none": 5e-3, "elementwise": 12e-3, "layers": 9e-3}
"""What the host does for a layer and micro-batch, seconds: a GPU waits for it where that takes longer than its work.

Measured on two server processors, with next to no arithmetic: 3.5 to 7, 8 to 18 and 6.5 to 13 ms.
"""
_OPERATIONS_A_SECOND = 100e12
"""Of a product on a GPU that is neither the slowest nor the fastest; only when the host is waited for depends on it."""


@dataclass(frozen=True)
class StepShape:
    """What an optimizer step puts through the model.

    Attributes:
        mean_tokens: Tokens of a step, on average.
        most_tokens: Tokens of a step of the longest groups.
        longest_group: Tokens of the longest group, which is never cut.
    """

    mean_tokens: float
    most_tokens: int
    longest_group: int

    def largest(self, budget: int) -> int:
        """Tokens of the largest micro-batch that can occur."""
        return max(self.longest_group, min(budget, self.most_tokens))

    def usual(self, budget: int) -> float:
        """Tokens of a micro-batch on average."""
        return self.mean_tokens / max(1, math.ceil(self.mean_tokens / budget))


@dataclass(frozen=True)
class MemoryPlan:
    """How a step goes through the memory: tokens of a micro-batch, the most bytes its activations may take."""

    grade: Recompute
    max_tokens: int
    num_bytes: float
    fits: bool


def plan_memory(
    kept: KeptBytes,
    step: StepShape,
    free_bytes: float,
    grades: Sequence[Recompute],
    budgets: Sequence[int],
    *,
    layer_weights: float,
    is_quantized: bool,
) -> MemoryPlan:
    """The grade and the token budget that fit together and take the least time; what takes the least memory if none do.

    Args:
        kept: What activations take.
        step: What goes through the model.
        free_bytes: What activations may take.
        grades: To choose from.
        budgets: To choose from, tokens.
        layer_weights: Weights of a layer's products.
        is_quantized: Whether those are unpacked from 4 bits for each micro-batch.
    """
    plans = [
        MemoryPlan(grade, budget, needed := kept.of(grade, step.largest(budget)), needed <= free_bytes)
        for grade in grades
        for budget in budgets
    ]
    if not any(plan.fits for plan in plans):
        return min(plans, key=lambda plan: (plan.num_bytes, plan.max_tokens))

    def seconds_a_token(plan: MemoryPlan) -> float:
        tokens = step.usual(plan.max_tokens)
        unpacking = _DEQUANTIZATION_TOKENS / tokens if is_quantized else 0.0
        passes = _PRODUCT_PASSES[plan.grade] * (1 + unpacking) + _ELEMENTWISE_AGAIN[plan.grade]
        device = passes * 2 * layer_weights / _OPERATIONS_A_SECOND
        return max(device, _HOST_S[plan.grade] / tokens)

    return min((plan for plan in plans if plan.fits), key=lambda plan: (seconds_a_token(plan), plan.num_bytes))
