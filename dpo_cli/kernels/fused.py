"""Norms, gated activations and rotations in one kernel each, where a model's own code takes two to ten.

Legend: D hidden, I the width of an MLP, H heads, T tokens, S a head's size.

    RMSNorm   y = w x / sqrt(mean x^2 + e)          (Zhang and Sennrich 2019)
    SwiGLU    y = silu(g) u, silu(g) = g sigmoid(g) (Shazeer 2020)
    rotation  y = (a, b) cos + (-b, a) sin of a head's halves a and b (Su et al. 2021)

A model's layers are recognized by what they compute, not by their names: a class whose forward gives other numbers is
left as it is. On a GPU each kernel is held against its definition before it is used. Sums and powers are float32 and
the result is rounded once, where the models' own code rounds in between: the values are the closer ones.

On CUDA the norm is PyTorch's kernel. The other two are compiled by PyTorch's jiterator when they are first used, which
needs nothing but what comes with PyTorch. Autograd and selective checkpointing see both as operations of this package.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from types import FunctionType, MethodType, SimpleNamespace
from typing import Any

import torch
from torch.nn.functional import silu

from dpo_cli.core.environment import is_gpu
from dpo_cli.core.errors import first_line, is_out_of_memory

NORM, SWIGLU, ROTATION = "RMSNorm", "SwiGLU", "rotation"
_NAMES = (NORM, SWIGLU, ROTATION)
_TOLERANCE = 0.02
"""Largest difference of a narrow kernel's result from the exact one, where that is 1 or less; else relative."""

_TEST_WIDTH = 96

# --- the activation -----------------------------------------------------------------------

SWIGLU_CODE = """
template <typename T> T swiglu(T gate, T up) {
  const float g = static_cast<float>(gate);
  return static_cast<T>(g / (1.0f + expf(-g)) * static_cast<float>(up));
}
"""
SWIGLU_BACKWARD_CODE = """
template <typename T> void swiglu_backward(T grad, T gate, T up, T& gate_grad, T& up_grad) {
  const float d = static_cast<float>(grad);
  const float g = static_cast<float>(gate);
  const float s = 1.0f / (1.0f + expf(-g));
  gate_grad = static_cast<T>(d * static_cast<float>(up) * s * (1.0f + g * (1.0f - s)));
  up_grad = static_cast<T>(d * g * s);
}
"""
"""d silu(g) / d g = s (1 + g (1 - s)) with s = sigmoid(g)."""


@torch.library.custom_op("dpo_cli::swiglu", mutates_args=())
def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, both of one shape and dtype, with gradients for both."""
    return (silu(gate.float()) * up.float()).to(gate.dtype)


@torch.library.custom_op("dpo_cli::swiglu_backward", mutates_args=())
def _swiglu_backward(grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    g, d = gate.float(), grad.float()
    s = g.sigmoid()
    return (d * up.float() * s * (1 + g * (1 - s))).to(gate.dtype), (d * g * s).to(up.dtype)


@cache
def _jitted(code: str, num_outputs: int) -> Callable[..., Any]:
    from torch.cuda import jiterator

    if num_outputs == 1:
        return jiterator._create_jit_fn(code)
    return jiterator._create_multi_output_jit_fn(code, num_outputs)


@swiglu.register_kernel("cuda")
def _(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return _jitted(SWIGLU_CODE, 1)(gate, up)


@_swiglu_backward.register_kernel("cuda")
def _(grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    gate_grad, up_grad = _jitted(SWIGLU_BACKWARD_CODE, 2)(grad, gate, up)
    return gate_grad, up_grad


@swiglu.register_fake
def _(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(gate)


@_swiglu_backward.register_fake
def _(grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(gate), torch.empty_like(up)


def _keep(ctx: Any, inputs: tuple[torch.Tensor, torch.Tensor], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return _swiglu_backward(grad, *ctx.saved_tensors)


swiglu.register_autograd(_differentiate, setup_context=_keep)


# --- the norm -----------------------------------------------------------------------------


@torch.library.custom_op("dpo_cli::rms_norm", mutates_args=())
def _rms_norm(x: torch.Tensor, weight_D: torch.Tensor, epsilon: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm, and 1 / sqrt(mean x^2 + epsilon), float32 [..., 1]."""
    wide = x.float()
    scale = (wide.square().mean(-1, keepdim=True) + epsilon).rsqrt()
    return (wide * scale * weight_D.float()).to(x.dtype), scale


@torch.library.custom_op("dpo_cli::rms_norm_backward", mutates_args=())
def _rms_norm_backward(
    grad: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, weight_D: torch.Tensor
) -> torch.Tensor:
    """With r the scale and d = grad w: r d - r^3 x mean(d x)."""
    wide, weighted = x.float(), grad.float() * weight_D.float()
    along = (weighted * wide).mean(-1, keepdim=True)
    return (scale * weighted - scale**3 * wide * along).to(x.dtype)


@_rms_norm.register_kernel("cuda")
def _(x: torch.Tensor, weight_D: torch.Tensor, epsilon: float) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ops.aten._fused_rms_norm(x, [x.shape[-1]], weight_D, epsilon)


@_rms_norm_backward.register_kernel("cuda")
def _(grad: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, weight_D: torch.Tensor) -> torch.Tensor:
    wanted = [True, False]
    grad = grad.contiguous()  # as autograd hands it over; norms of heads get transposed ones
    return torch.ops.aten._fused_rms_norm_backward(grad, x, [x.shape[-1]], scale, weight_D, wanted)[0]


@_rms_norm.register_fake
def _(x: torch.Tensor, weight_D: torch.Tensor, epsilon: float) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(x), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)


@_rms_norm_backward.register_fake
def _(grad: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, weight_D: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def _keep_norm(ctx: Any, inputs: tuple[torch.Tensor, torch.Tensor, float], output: Any) -> None:
    x, weight_D, _ = inputs
    ctx.save_for_backward(x, output[1], weight_D)


def _differentiate_norm(ctx: Any, grad: torch.Tensor, _: Any) -> tuple[torch.Tensor, None, None]:
    return _rms_norm_backward(grad, *ctx.saved_tensors), None, None


_rms_norm.register_autograd(_differentiate_norm, setup_context=_keep_norm)


def rms_norm(x: torch.Tensor, weight_D: torch.Tensor, epsilon: float) -> torch.Tensor:
    """The norm over the last dimension, [..., D]; no gradient for the weight."""
    return _rms_norm(x, weight_D, epsilon)[0]


# --- the rotation -------------------------------------------------------------------------

ROTATION_CODE = """
template <typename T> T rotate(T first, T second, T cosine, T sine, T half) {
  const float a = static_cast<float>(first);
  const float b = static_cast<float>(second);
  const bool is_second = static_cast<float>(half) > 0.5f;
  const float own = is_second ? b : a;
  const float other = is_second ? a : -b;
  return static_cast<T>(own * static_cast<float>(cosine) + other * static_cast<float>(sine));
}
"""
ROTATION_BACKWARD_CODE = """
template <typename T> T rotate_back(T first, T second, T cosine, T first_sine, T second_sine, T half) {
  const float a = static_cast<float>(first);
  const float b = static_cast<float>(second);
  const bool is_second = static_cast<float>(half) > 0.5f;
  const float own = is_second ? b : a;
  const float other = is_second ? -a * static_cast<float>(first_sine) : b * static_cast<float>(second_sine);
  return static_cast<T>(own * static_cast<float>(cosine) + other);
}
"""
"""Both compute one number of a half from the numbers at its place in both halves."""


@torch.library.custom_op("dpo_cli::rotate", mutates_args=())
def rotate(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Rotated [B, H, T, S] by tables [B or 1, 1, T, S], all of one dtype; with a gradient for x alone."""
    (a, b), (cos_a, cos_b), (sin_a, sin_b) = (tensor.float().chunk(2, -1) for tensor in (x, cosine, sine))
    return torch.cat([a * cos_a - b * sin_a, b * cos_b + a * sin_b], -1).to(x.dtype)


@torch.library.custom_op("dpo_cli::rotate_back", mutates_args=())
def _rotate_back(grad: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    (a, b), (cos_a, cos_b), (sin_a, sin_b) = (tensor.float().chunk(2, -1) for tensor in (grad, cosine, sine))
    return torch.cat([a * cos_a + b * sin_b, b * cos_b - a * sin_a], -1).to(grad.dtype)


def _halves(x: torch.Tensor) -> torch.Tensor:
    """A view [..., 2, S / 2] of [..., S]."""
    return x.unflatten(-1, (2, -1))


@cache
def _which_half(device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """[2, 1]: 0 for the first half and 1 for the second."""
    return torch.arange(2, device=device, dtype=dtype)[:, None]


@rotate.register_kernel("cuda")
def _rotate_on_cuda(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    halves = _halves(x)
    half = _which_half(x.device, x.dtype)
    tables = _halves(cosine), _halves(sine)
    return _jitted(ROTATION_CODE, 1)(halves[..., :1, :], halves[..., 1:, :], *tables, half).flatten(-2)


@_rotate_back.register_kernel("cuda")
def _rotate_back_on_cuda(grad: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    halves, sines = _halves(grad), _halves(sine)
    half = _which_half(grad.device, grad.dtype)
    tables = _halves(cosine), sines[..., :1, :], sines[..., 1:, :]
    return _jitted(ROTATION_BACKWARD_CODE, 1)(halves[..., :1, :], halves[..., 1:, :], *tables, half).flatten(-2)


@rotate.register_fake
def _(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


@_rotate_back.register_fake
def _(grad: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(grad)


def _keep_tables(ctx: Any, inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _differentiate_rotation(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
    return _rotate_back(grad, *ctx.saved_tensors), None, None


rotate.register_autograd(_differentiate_rotation, setup_context=_keep_tables)


# --- a model's layers ---------------------------------------------------------------------


def use_fused(model: torch.nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Have a model's norms and gated MLPs use the kernels, on a device that has such and for narrow numbers."""
    if is_gpu(device) and dtype != torch.float32:
        install(model, [name for name in _NAMES if _reason_in(model, name, device, dtype) is None])


def install(model: torch.nn.Module, names: list[str]) -> None:
    """Replace the forward of each layer that is recognized, where its numbers are narrow; see :func:`use_fused`."""
    for module in model.modules():
        kind = type(module)
        if NORM in names and _is_norm(kind) and isinstance(getattr(module, "weight", None), torch.Tensor):
            module.forward = MethodType(_norm_forward, module)
        elif SWIGLU in names and _is_gated(kind) and _is_silu(module.act_fn):
            module.forward = MethodType(_gated_forward, module)
        elif ROTATION in names and (own := _rotating_forward(kind)) is not None:
            module.forward = MethodType(own, module)


def describe_fused(model: torch.nn.Module, device: torch.device, dtype: torch.dtype) -> str:
    """What a model computes in one kernel, and what not and why, as a part of a sentence; empty where none could be."""
    if not is_gpu(device) or dtype == torch.float32:
        return ""
    replaced = {vars(module)["forward"].__func__ for module in model.modules() if "forward" in vars(module)}
    names = [name for name in _NAMES if any(_name_of(forward) == name for forward in replaced)]
    refused = {name: reason for name in _NAMES if (reason := _reason_in(model, name, device, dtype)) is not None}
    *first, last = names or [""]
    said = [f"{', '.join(first)}{' and ' if first else ''}{last} in one kernel"] if names else []
    return "".join(f"; {part}" for part in [*said, *(f"not {name}: {reason}" for name, reason in refused.items())])


def _norm_forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    weight = self.weight
    if hidden_states.dtype != weight.dtype or weight.dtype == torch.float32 or weight.requires_grad:
        return type(self).forward(self, hidden_states)
    return rms_norm(hidden_states, weight, _epsilon(self))


def _gated_forward(self: Any, x: torch.Tensor) -> torch.Tensor:
    gate, up = self.gate_proj(x), self.up_proj(x)
    if gate.dtype != up.dtype or gate.dtype == torch.float32:
        return self.down_proj(self.act_fn(gate) * up)
    return self.down_proj(swiglu(gate, up))


def _name_of(forward: Callable[..., Any]) -> str:
    return {_norm_forward: NORM, _gated_forward: SWIGLU}.get(forward, ROTATION)


_ROTATES = "apply_rotary_pos_emb"
"""What transformers' attention calls its rotation: (query, key, cosine, sine, unsqueeze_dim) to (query, key)."""


@cache
def _rotating_forward(kind: type) -> Callable[..., Any] | None:
    """A class's forward in which that name stands for :func:`rotate`; None where it rotates in another way.

    It is a copy with names of its own: neither the class nor its module is changed.
    """
    forward = kind.forward
    if not isinstance(forward, FunctionType) or _ROTATES not in forward.__code__.co_names or forward.__closure__:
        return None
    eager = forward.__globals__.get(_ROTATES)
    if not callable(eager) or not _is_rotation(eager):
        return None

    def rotated(
        query: torch.Tensor, key: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        tensors = (query, key, cosine, sine)
        is_alike = {tensor.dtype for tensor in tensors} == {query.dtype} and query.dtype != torch.float32
        fits = is_alike and query.ndim == 4 and cosine.ndim == 3 and cosine.shape[1:] == query.shape[2:]
        if args or kwargs or not fits or cosine.requires_grad:
            return eager(*tensors, *args, **kwargs)
        cosine, sine = cosine[:, None], sine[:, None]
        return rotate(query, cosine, sine), rotate(key, cosine, sine)

    names = {**forward.__globals__, _ROTATES: rotated}
    own = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__)
    own.__kwdefaults__ = forward.__kwdefaults__
    return own


@cache
def _is_rotation(function: Callable[..., Any]) -> bool:
    """Whether a function rotates queries and keys as defined above, by tables with a dimension put in at 1."""
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, heads, 5, 8, generator=generator) for heads in (4, 2))
    cosine, sine = torch.randn(2, 2, 5, 8, generator=generator)
    expected = torch.cat([rotate(tensor, cosine[:, None], sine[:, None]) for tensor in (query, key)], 1)
    return _gives(lambda: torch.cat(function(query, key, cosine, sine), 1), expected)


def _epsilon(module: Any) -> float:
    return module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps


@cache
def _is_norm(kind: type) -> bool:
    """Whether a class's forward is a norm as defined above, of what it calls weight and epsilon."""
    if not kind.__name__.endswith("RMSNorm") or not issubclass(kind, torch.nn.Module):
        return False
    x, weight = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0)), torch.linspace(-1, 2, 8)
    module = SimpleNamespace(weight=weight, variance_epsilon=0.5, eps=0.5)
    return _gives(lambda: kind.forward(module, x), weight * x / (x.square().mean(-1, keepdim=True) + 0.5).sqrt())


@cache
def _is_gated(kind: type) -> bool:
    """Whether a class's forward is down(act(gate(x)) * up(x))."""
    if not issubclass(kind, torch.nn.Module):
        return False
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    module = SimpleNamespace(
        gate_proj=lambda x: 2 * x - 1, up_proj=lambda x: x + 3, down_proj=lambda x: x.flip(-1), act_fn=torch.tanh
    )
    return _gives(lambda: kind.forward(module, x), ((2 * x - 1).tanh() * (x + 3)).flip(-1))


@cache
def _is_silu(activation: Callable[[torch.Tensor], torch.Tensor]) -> bool:
    x = torch.linspace(-9, 9, 50)
    return _gives(lambda: activation(x), x * x.sigmoid())


def _gives(compute: Callable[[], Any], expected: torch.Tensor) -> bool:
    try:
        found = compute()
    except Exception:  # whatever another forward does with arguments that are not its own
        return False
    return (
        isinstance(found, torch.Tensor)
        and found.shape == expected.shape
        and torch.allclose(found, expected, 1e-5, 1e-5)
    )


# --- the check ----------------------------------------------------------------------------


def _reason_in(model: torch.nn.Module, name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a kernel will not do for a model's widths: which one CUDA starts depends on them."""
    widths = {_TEST_WIDTH}
    if name == NORM:
        norms = (module for module in model.modules() if _is_norm(type(module)))
        widths |= {module.weight.shape[-1] for module in norms if isinstance(module.weight, torch.Tensor)}
    reasons = (reason_against(name, device, dtype, width) for width in sorted(widths))
    return next((reason for reason in reasons if reason is not None), None)


def _heads(rows: torch.Tensor) -> torch.Tensor:
    """Rows as 3 heads of 11 tokens, [1, 3, 11, S], with the strides that attention's queries have."""
    return rows.view(1, 11, 3, -1).transpose(1, 2)


def _rows(heads: torch.Tensor) -> torch.Tensor:
    return heads.transpose(1, 2).reshape(33, -1)


@cache
def reason_against(name: str, device: torch.device, dtype: torch.dtype, width: int = _TEST_WIDTH) -> str | None:
    """Why a kernel or its gradients are not what the definition gives; None where they are.

    The output's gradient comes transposed, as it does where a model norms heads.
    """
    generator = torch.Generator().manual_seed(0)
    inputs = [3 * torch.randn(33, width, generator=generator).to(device, dtype) for _ in range(2)]
    weights = torch.randn(width, 33, generator=generator).to(device).T
    angles = inputs[1][:11].float()[None, None]  # [1, 1, 11, S], and those of the halves differ
    tables = angles.cos().to(dtype), angles.sin().to(dtype)

    def exact(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        if name == SWIGLU:
            return one * one.sigmoid() * other
        if name == ROTATION:
            heads, (a, b) = _heads(one), _heads(one).chunk(2, -1)
            cosine, sine = (table.float() for table in tables)
            return _rows(heads * cosine + torch.cat([-b, a], -1) * sine)
        return other[0] * one / (one.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def fused(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        if name == ROTATION:
            return _rows(rotate(_heads(one), *tables))
        return swiglu(one, other) if name == SWIGLU else rms_norm(one, other[0].detach(), 1e-6)

    def run(function: Callable[..., torch.Tensor], number: torch.dtype) -> list[torch.Tensor]:
        leaves = [tensor.to(number).requires_grad_() for tensor in inputs]
        out = function(*leaves)
        (out.float() * weights).sum().backward()
        gradients = [leaf.grad for leaf in leaves[: 2 if name == SWIGLU else 1]]
        return [out.detach().float(), *(gradient.float() for gradient in gradients if gradient is not None)]

    with torch.enable_grad(), torch.autocast(device.type, enabled=False):
        expected = run(exact, torch.float32)
        try:
            found = run(fused, dtype)
        except Exception as error:  # a compiler that is lacking, too
            if is_out_of_memory(error):
                raise
            return f"it fails ({first_line(error)})"
    if len(found) != len(expected):
        return "it has no gradient"
    for what, ours, theirs in zip(("output", "first gradient", "second gradient"), expected, found, strict=False):
        off = ((theirs - ours).abs() / ours.abs().clamp(min=1.0)).nan_to_num(nan=math.inf).max().item()
        if not off <= _TOLERANCE:
            return f"its {what} is off by {off:.2g}"
    return None
