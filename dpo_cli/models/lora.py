"""LoRA layers that do with fewer products and passes over memory what PEFT's do.

Legend: N tokens, I and O the layer's inputs and outputs, r the adapter's rank.

    y = x W^T + b + s (x A^T) B^T = x (W + s B A)^T + b        (Hu et al. 2021, equation 3)

PEFT computes the middle in two products, a scaling and a sum over [N, O], and lets autograd add up two
gradients of x. In float32 the right side costs one product of [N, I] with [I, O] and rounds no
worse, so it is taken wherever there are enough tokens to pay for B A; the adapter's own gradients never
need more than rank r. In narrower numbers a small update would be lost in the sum W + s B A, so there
the update is added to the output, in place; the backward pass unpacks the weight again and adds the
adapter's share to the input's gradient in place, too.

The adapter's matrices are float32. :func:`cast_adapters` casts them once for all that is computed
before they change.

They are PEFT's own layers with another forward, registered through its configuration: an adapter
is made, loaded and saved as ever, and whoever else loads it needs nothing from here. Whatever is not
a single plain adapter on a frozen layer goes through PEFT's forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn.modules import Linear4bit
from peft import LoraConfig
from peft.tuners import lora
from peft.tuners.lora import bnb as lora_bnb
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

from dpo_cli.scoring.kernels import wide_product


def use_short_layers(config: LoraConfig) -> LoraConfig:
    """Let a configuration make these layers; returns it."""
    config._register_custom_module({Linear4bit: ShortLinear4bit, torch.nn.Linear: ShortLinear})
    return config


class ShortLinear(lora.Linear):
    """LoRA on a plain linear layer."""

    cast: dict[str, tuple[torch.Tensor, torch.Tensor]] | None = None
    """A and B by adapter in the dtype that is computed in, while :func:`cast_adapters` lasts."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """[..., I] to [..., O]."""
        adapter = None if args or kwargs else _plain_adapter(self)
        base: Any = self.base_layer
        if adapter is None or not _is_fit(x, base.weight.dtype):
            return super().forward(x, *args, **kwargs)
        weight = (lambda: base.weight) if _is_only(base, torch.nn.Linear) else None
        return _with_adapter(self, adapter, x, weight)


class ShortLinear4bit(lora_bnb.Linear4bit):
    """LoRA on a 4-bit layer of bitsandbytes."""

    cast: dict[str, tuple[torch.Tensor, torch.Tensor]] | None = None
    """A and B by adapter in the dtype that is computed in, while :func:`cast_adapters` lasts."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """[..., I] to [..., O]."""
        adapter = None if args or kwargs else _plain_adapter(self)
        base: Any = self.base_layer
        state = base.weight.quant_state
        if adapter is None or state is None or not _is_fit(x, state.dtype):
            return super().forward(x, *args, **kwargs)
        weight = (lambda: dequantize_4bit(base.weight.data, state)) if _is_only(base, Linear4bit) else None
        return _with_adapter(self, adapter, x, weight)


@contextmanager
def cast_adapters(model: torch.nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Cast the adapters' matrices once, for as long as the context lasts; they must not change in it.

    Args:
        model: Holds the layers.
        dtype: What is computed in; nothing is cast to float32.
    """
    layers = [module for module in model.modules() if isinstance(module, ShortLinear | ShortLinear4bit)]
    if dtype == torch.float32 or not layers:
        yield
        return
    pairs: list[tuple[Any, str]] = [(layer, name) for layer in layers for name in [*layer.lora_A.keys()]]
    matrices = [part[name].weight.detach() for layer, name in pairs for part in (layer.lora_A, layer.lora_B)]
    narrow = [torch.empty_like(matrix, dtype=dtype) for matrix in matrices]
    torch._foreach_copy_(narrow, matrices)  # type: ignore[attr-defined]
    for layer in layers:
        layer.cast = {}
    for index, (layer, name) in enumerate(pairs):
        layer.cast[name] = narrow[2 * index], narrow[2 * index + 1]
    try:
        yield
    finally:
        for layer in layers:
            layer.cast = None


def _with_adapter(layer: Any, adapter: str, x: torch.Tensor, weight: Callable[[], torch.Tensor] | None) -> torch.Tensor:
    """A layer's output; ``weight`` gives its frozen weight where there is nothing more to it."""
    x = x.to(_compute_dtype(x))
    down, up, factor = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight, layer.scaling[adapter]
    if weight is not None and merging_pays(x, down, up):
        return _MergedLora.apply(x, weight, layer.base_layer.bias, down, up, factor)  # type: ignore[return-value]
    if weight is None or x.dtype == torch.float32:
        return _LoraUpdate.apply(layer.base_layer(x), x, down, up, factor)  # type: ignore[return-value]
    narrow = (layer.cast or {}).get(adapter)
    if narrow is None or narrow[0].dtype != x.dtype:
        narrow = down.detach().to(x.dtype), up.detach().to(x.dtype)
    down_cast, up_cast = narrow
    if not torch.is_grad_enabled():
        y = layer.base_layer(x)
        _add_update(y, x, down_cast, up_cast, factor)
        return y
    base = layer.base_layer
    return _LoraInPlace.apply(x, base, weight, down, up, down_cast, up_cast, factor)  # type: ignore[return-value]


def _is_fit(x: torch.Tensor, weight_dtype: torch.dtype) -> bool:
    """Whether input and weight go together without a conversion of PEFT's, or through autocast's."""
    return x.dtype == weight_dtype or torch.is_autocast_enabled(x.device.type)


def _is_only(base: torch.nn.Module, kind: type) -> bool:
    """Whether a layer is a frozen one of a kind and nothing besides."""
    hooked = base._forward_hooks or base._forward_pre_hooks
    return type(base) is kind and not hooked and not any(part.requires_grad for part in base.parameters())


def merging_pays(x: torch.Tensor, down_rI: torch.Tensor, up_Or: torch.Tensor) -> bool:
    """Whether W + s B A costs less than two narrow products over all tokens, and loses nothing."""
    inputs, outputs = down_rI.shape[1], up_Or.shape[0]
    num_tokens = x.numel() // inputs
    return x.dtype == down_rI.dtype == torch.float32 and num_tokens * (inputs + outputs) > inputs * outputs


def _compute_dtype(x: torch.Tensor) -> torch.dtype:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _plain_adapter(layer: Any) -> str | None:
    """The one active adapter of a layer, if it is nothing more than two matrices and a factor."""
    if layer.disable_adapters or layer.merged:
        return None
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(active) != 1:
        return None
    (name,) = active
    dropout = layer.lora_dropout[name]
    drops = isinstance(dropout, torch.nn.Dropout) and dropout.p > 0 and dropout.training
    plain = name not in layer.lora_variant and not layer.fan_in_fan_out and layer.lora_B[name].bias is None
    return name if plain and not drops else None


def _sum_and_product(base: torch.Tensor, left: torch.Tensor, right: torch.Tensor, factor: float) -> torch.Tensor:
    """The sum base + factor * left @ right, a narrow product.

    Written into a tensor of its own, which selective checkpointing (recompute.py) does not keep: it is cheap to make
    again, and base is kept where it was a product.
    """
    return torch.addmm(base, left, right, alpha=factor, out=torch.empty_like(base))


class _MergedLora(torch.autograd.Function):
    """x (W + s B A)^T + b; the sum is made again in the backward pass, since [O, I] may be large."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: Callable[[], torch.Tensor],
        bias_O: torch.Tensor | None,
        down_rI: torch.Tensor,
        up_Or: torch.Tensor,
        factor: float,
    ) -> torch.Tensor:
        x_NI = x.reshape(-1, x.shape[-1])
        merged_OI = _sum_and_product(weight(), up_Or, down_rI, factor)
        y_NO = x_NI @ merged_OI.T if bias_O is None else torch.addmm(bias_O, x_NI, merged_OI.T)
        ctx.save_for_backward(x_NI, down_rI, up_Or)
        ctx.weight, ctx.factor, ctx.shape = weight, factor, x.shape
        return y_NO.view(*x.shape[:-1], y_NO.shape[-1])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_NI, down_rI, up_Or = ctx.saved_tensors
        grad_NO = grads[0].reshape(-1, grads[0].shape[-1])
        low_grad_Nr = grad_NO @ up_Or
        down_grad, up_grad = _adapter_gradients(grad_NO, low_grad_Nr, x_NI, x_NI @ down_rI.T, ctx.factor)
        x_grad = None
        if ctx.needs_input_grad[0]:
            x_grad = (grad_NO @ _sum_and_product(ctx.weight(), up_Or, down_rI, ctx.factor)).view(ctx.shape)
        return x_grad, None, None, down_grad, up_grad, None


def _add_update(
    y: torch.Tensor, x: torch.Tensor, down_rI: torch.Tensor, up_Or: torch.Tensor, factor: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add s (x A^T) B^T in place to a fresh output y [..., O]; returns the sum, and x A^T [N, r]."""
    low_Nr = x.reshape(-1, x.shape[-1]) @ down_rI.T
    sum_NO = y.view(-1, y.shape[-1]).addmm_(low_Nr, up_Or.T, alpha=factor)
    return sum_NO.view(y.shape), low_Nr


class _LoraInPlace(torch.autograd.Function):
    """x W^T + b + s (x A^T) B^T for a frozen W, in a dtype narrower than the adapter's.

    With g the gradient: dx = g W + s (g B) A, dA = s (g B)^T x, dB = s g^T (x A^T), the last two summed in float32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        base: Callable[[torch.Tensor], torch.Tensor],
        weight: Callable[[], torch.Tensor],
        down_rI: torch.Tensor,
        up_Or: torch.Tensor,
        down_cast_rI: torch.Tensor,
        up_cast_Or: torch.Tensor,
        factor: float,
    ) -> torch.Tensor:
        y = base(x)
        # Selective checkpointing (recompute.py) keeps this product, and then the sum, which lies in the same place: to
        # it that is no change, so the version stays.
        with _unsafe_preserve_version_counter(y):
            y, low_Nr = _add_update(y, x, down_cast_rI, up_cast_Or, factor)
        ctx.save_for_backward(x, low_Nr, down_cast_rI, up_cast_Or)
        ctx.weight, ctx.factor = weight, factor
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, low_Nr, down_rI, up_Or = ctx.saved_tensors
        x_NI = x.reshape(-1, x.shape[-1])
        grad_NO = grads[0].reshape(-1, grads[0].shape[-1])
        low_grad_Nr = grad_NO @ up_Or
        x_grad = None
        if ctx.needs_input_grad[0]:
            x_grad = grad_NO @ ctx.weight().to(grad_NO.dtype)
            x_grad = x_grad.addmm_(low_grad_Nr, down_rI, alpha=ctx.factor).view(x.shape)
        down_grad = wide_product(low_grad_Nr.T, x_NI).mul_(ctx.factor)
        up_grad = wide_product(low_Nr.T, grad_NO).mul_(ctx.factor).T.contiguous()
        return x_grad, None, None, down_grad, up_grad, None, None, None


class _LoraUpdate(torch.autograd.Function):
    """result + s (x A^T) B^T, on the output of a layer that takes care of its own gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        result: torch.Tensor,
        x: torch.Tensor,
        down_rI: torch.Tensor,
        up_Or: torch.Tensor,
        factor: float,
    ) -> torch.Tensor:
        x_NI = x.reshape(-1, x.shape[-1])
        low_Nr = x_NI @ down_rI.to(x.dtype).T
        # not in place: the result may be a view that was made inside of bitsandbytes' own function
        flat_NO = result.reshape(-1, result.shape[-1])
        y_NO = _sum_and_product(flat_NO, low_Nr, up_Or.to(x.dtype).T, factor)
        ctx.save_for_backward(x_NI, low_Nr, down_rI, up_Or)
        ctx.factor, ctx.shape = factor, x.shape
        return y_NO.view(result.shape)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_NI, low_Nr, down_rI, up_Or = ctx.saved_tensors
        grad_NO = grads[0].reshape(-1, grads[0].shape[-1])
        low_grad_Nr = grad_NO @ up_Or.to(grad_NO.dtype)
        down_grad, up_grad = _adapter_gradients(grad_NO, low_grad_Nr, x_NI, low_Nr, ctx.factor)
        x_grad = None
        if ctx.needs_input_grad[1]:
            x_grad = (low_grad_Nr @ down_rI.to(x_NI.dtype)).mul_(ctx.factor).view(ctx.shape)
        return grads[0], x_grad, down_grad.to(down_rI.dtype), up_grad.to(up_Or.dtype), None


def _adapter_gradients(
    grad_NO: torch.Tensor, low_grad_Nr: torch.Tensor, x_NI: torch.Tensor, low_Nr: torch.Tensor, factor: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of A [r, I] and of B [O, r]; the latter's transpose is the faster product."""
    return (low_grad_Nr.T @ x_NI).mul_(factor), (low_Nr.T @ grad_NO).T.mul(factor).contiguous()
