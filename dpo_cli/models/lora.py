"""LoRA layers that do with fewer products and passes over memory what PEFT's do.

Legend: N tokens, I and O the layer's inputs and outputs, r the adapter's rank.

    y = x W^T + b + s (x A^T) B^T = x (W + s B A)^T + b        (Hu et al. 2021, equation 3)

PEFT computes the middle in two products, a scaling and a sum over [N, O], and lets autograd add up two
gradients of x. In float32 the right side costs one product of [N, I] with [I, O] and rounds no
worse, so it is taken wherever there are enough tokens to pay for B A; the adapter's own gradients never
need more than rank r. In bfloat16 a small update would be lost in the sum W + s B A, so there the
update is added to the output.

They are PEFT's own layers with another forward, registered through its configuration: an adapter
is made, loaded and saved as ever, and whoever else loads it needs nothing from here. Whatever is not
a single plain adapter on a frozen layer goes through PEFT's forward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn.modules import Linear4bit
from peft import LoraConfig
from peft.tuners import lora
from peft.tuners.lora import bnb as lora_bnb


def use_short_layers(config: LoraConfig) -> LoraConfig:
    """Let a configuration make these layers; returns it."""
    config._register_custom_module({Linear4bit: ShortLinear4bit, torch.nn.Linear: ShortLinear})
    return config


class ShortLinear(lora.Linear):
    """LoRA on a plain linear layer."""

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

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """[..., I] to [..., O]."""
        adapter = None if args or kwargs else _plain_adapter(self)
        base: Any = self.base_layer
        state = base.weight.quant_state
        if adapter is None or state is None or not _is_fit(x, state.dtype):
            return super().forward(x, *args, **kwargs)
        weight = (lambda: dequantize_4bit(base.weight.data, state)) if _is_only(base, Linear4bit) else None
        return _with_adapter(self, adapter, x, weight)


def _with_adapter(layer: Any, adapter: str, x: torch.Tensor, weight: Callable[[], torch.Tensor] | None) -> torch.Tensor:
    """A layer's output; ``weight`` gives its frozen weight where there is nothing more to it."""
    x = x.to(_compute_dtype(x))
    down, up, factor = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight, layer.scaling[adapter]
    if weight is not None and merging_pays(x, down, up):
        return _MergedLora.apply(x, weight, layer.base_layer.bias, down, up, factor)  # type: ignore[return-value]
    return _LoraUpdate.apply(layer.base_layer(x), x, down, up, factor)  # type: ignore[return-value]


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


def _merged(weight_OI: torch.Tensor, down_rI: torch.Tensor, up_Or: torch.Tensor, factor: float) -> torch.Tensor:
    """W + s B A."""
    return _sum_and_product(weight_OI, up_Or, down_rI, factor)


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
        merged_OI = _merged(weight(), down_rI, up_Or, factor)
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
            x_grad = (grad_NO @ _merged(ctx.weight(), down_rI, up_Or, ctx.factor)).view(ctx.shape)
        return x_grad, None, None, down_grad, up_grad, None


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
