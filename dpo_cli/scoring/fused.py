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

from collections.abc import Callable
from functools import cache
from types import FunctionType, MethodType, SimpleNamespace
from typing import Any

import torch
from torch.nn.functional import silu

from dpo_cli.core.environment import is_gpu
from dpo_cli.scoring.kernels import reason_against_kernel

NORM, SWIGLU, ROTATION = "RMSNorm", "SwiGLU", "rotation"
_NAMES = (NORM, SWIGLU, ROTATION)
_TOLERANCE = 0.02
"""Largest difference of a narrow kernel's result from the exact one, where that is 1 or less; else relative."""
_TEST_WIDTH = 96

Operation = Callable[..., Any]


def _operation(name: str, *, cuda: Operation, fake: Operation) -> Callable[[Operation], Any]:
    """Make an operation of PyTorch of a function, which stays what computes it on the CPU.

    Args:
        name: Its name.
        cuda: The kernel on CUDA.
        fake: Makes empty results of the right shapes and dtypes.
    """

    def register(function: Operation) -> Any:
        operation = torch.library.custom_op(f"dpo_cli::{name}", function, mutates_args=())
        operation.register_kernel("cuda")(cuda)
        operation.register_fake(fake)
        return operation

    return register


@cache
def _jitted(code: str, num_outputs: int) -> Operation:
    from torch.cuda import jiterator

    if num_outputs == 1:
        return jiterator._create_jit_fn(code)
    return jiterator._create_multi_output_jit_fn(code, num_outputs)


def _like(x: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty_like(x)


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


@_operation("swiglu", cuda=lambda gate, up: _jitted(SWIGLU_CODE, 1)(gate, up), fake=_like)
def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, both of one shape and dtype, with gradients for both."""
    return (silu(gate.float()) * up.float()).to(gate.dtype)


@_operation(
    "swiglu_backward",
    cuda=lambda grad, gate, up: tuple(_jitted(SWIGLU_BACKWARD_CODE, 2)(grad, gate, up)),
    fake=lambda grad, gate, up: (torch.empty_like(gate), torch.empty_like(up)),
)
def _swiglu_backward(grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    g, d = gate.float(), grad.float()
    s = g.sigmoid()
    return (d * up.float() * s * (1 + g * (1 - s))).to(gate.dtype), (d * g * s).to(up.dtype)


swiglu.register_autograd(
    lambda ctx, grad: _swiglu_backward(grad, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


# --- the norm -----------------------------------------------------------------------------


def _norm_backward_on_cuda(
    grad: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, weight_D: torch.Tensor
) -> torch.Tensor:
    grad = grad.contiguous()  # as autograd hands it over; norms of heads get transposed ones
    return torch.ops.aten._fused_rms_norm_backward(grad, x, [x.shape[-1]], scale, weight_D, [True, False])[0]


@_operation(
    "rms_norm",
    cuda=lambda x, weight_D, epsilon: torch.ops.aten._fused_rms_norm(x, [x.shape[-1]], weight_D, epsilon),
    fake=lambda x, weight_D, epsilon: (torch.empty_like(x), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)),
)
def _rms_norm(x: torch.Tensor, weight_D: torch.Tensor, epsilon: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm, and 1 / sqrt(mean x^2 + epsilon), float32 [..., 1]."""
    wide = x.float()
    scale = (wide.square().mean(-1, keepdim=True) + epsilon).rsqrt()
    return (wide * scale * weight_D.float()).to(x.dtype), scale


@_operation("rms_norm_backward", cuda=_norm_backward_on_cuda, fake=lambda grad, x, *_: torch.empty_like(x))
def _rms_norm_backward(
    grad: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, weight_D: torch.Tensor
) -> torch.Tensor:
    """With r the scale and d = grad w: r d - r^3 x mean(d x)."""
    wide, weighted = x.float(), grad.float() * weight_D.float()
    along = (weighted * wide).mean(-1, keepdim=True)
    return (scale * weighted - scale**3 * wide * along).to(x.dtype)


_rms_norm.register_autograd(
    lambda ctx, grad, _: (_rms_norm_backward(grad, *ctx.saved_tensors), None, None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0], output[1], inputs[1]),
)


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


def _halves(x: torch.Tensor) -> torch.Tensor:
    """A view [..., 2, S / 2] of [..., S]."""
    return x.unflatten(-1, (2, -1))


@cache
def _which_half(device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """[2, 1]: 0 for the first half and 1 for the second."""
    return torch.arange(2, device=device, dtype=dtype)[:, None]


def _rotate_on_cuda(
    x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, *, is_back: bool = False
) -> torch.Tensor:
    halves, half = _halves(x), _which_half(x.device, x.dtype)
    sines = (_halves(sine)[..., :1, :], _halves(sine)[..., 1:, :]) if is_back else (_halves(sine),)
    kernel = _jitted(ROTATION_BACKWARD_CODE if is_back else ROTATION_CODE, 1)
    return kernel(halves[..., :1, :], halves[..., 1:, :], _halves(cosine), *sines, half).flatten(-2)


@_operation("rotate", cuda=_rotate_on_cuda, fake=_like)
def rotate(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Rotated [B, H, T, S] by tables [B or 1, 1, T, S], all of one dtype; with a gradient for x alone."""
    (a, b), (cos_a, cos_b), (sin_a, sin_b) = (tensor.float().chunk(2, -1) for tensor in (x, cosine, sine))
    return torch.cat([a * cos_a - b * sin_a, b * cos_b + a * sin_b], -1).to(x.dtype)


@_operation("rotate_back", cuda=lambda *tensors: _rotate_on_cuda(*tensors, is_back=True), fake=_like)
def _rotate_back(grad: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    (a, b), (cos_a, cos_b), (sin_a, sin_b) = (tensor.float().chunk(2, -1) for tensor in (grad, cosine, sine))
    return torch.cat([a * cos_a + b * sin_b, b * cos_b - a * sin_a], -1).to(grad.dtype)


rotate.register_autograd(
    lambda ctx, grad: (_rotate_back(grad, *ctx.saved_tensors), None, None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[1:]),
)


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
    known = {_norm_forward: NORM, _gated_forward: SWIGLU}
    replaced = {vars(module)["forward"].__func__ for module in model.modules() if "forward" in vars(module)}
    names = [name for name in _NAMES if name in {known.get(forward, ROTATION) for forward in replaced}]
    refused = {name: reason for name in _NAMES if (reason := _reason_in(model, name, device, dtype)) is not None}
    *first, last = names or [""]
    said = [f"{', '.join(first)}{' and ' if first else ''}{last} in one kernel"] if names else []
    return "".join(f"; {part}" for part in [*said, *(f"not {name}: {reason}" for name, reason in refused.items())])


def _norm_forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    weight = self.weight
    if hidden_states.dtype != weight.dtype or weight.dtype == torch.float32 or weight.requires_grad:
        return type(self).forward(self, hidden_states)
    epsilon = self.variance_epsilon if hasattr(self, "variance_epsilon") else self.eps
    return rms_norm(hidden_states, weight, epsilon)


def _gated_forward(self: Any, x: torch.Tensor) -> torch.Tensor:
    gate, up = self.gate_proj(x), self.up_proj(x)
    if gate.dtype != up.dtype or gate.dtype == torch.float32:
        return self.down_proj(self.act_fn(gate) * up)
    return self.down_proj(swiglu(gate, up))


_ROTATES = "apply_rotary_pos_emb"
"""What transformers' attention calls its rotation: (query, key, cosine, sine, unsqueeze_dim) to (query, key)."""


@cache
def _rotating_forward(kind: type) -> Operation | None:
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
def _is_rotation(function: Operation) -> bool:
    """Whether a function rotates queries and keys as defined above, by tables with a dimension put in at 1."""
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, heads, 5, 8, generator=generator) for heads in (4, 2))
    cosine, sine = torch.randn(2, 2, 5, 8, generator=generator)
    expected = torch.cat([rotate(tensor, cosine[:, None], sine[:, None]) for tensor in (query, key)], 1)
    return _gives(lambda: torch.cat(function(query, key, cosine, sine), 1), expected)


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


@cache
def reason_against(name: str, device: torch.device, dtype: torch.dtype, width: int = _TEST_WIDTH) -> str | None:
    """Why a kernel or its gradients are not what the definition gives; None where they are.

    The output's gradient comes transposed, as it does where a model norms heads.
    """
    generator = torch.Generator().manual_seed(0)
    one, other = (3 * torch.randn(33, width, generator=generator).to(device, dtype) for _ in range(2))
    weights = torch.randn(width, 33, generator=generator).to(device).T
    angles = other[:11].float()[None, None]  # [1, 1, 11, S], and those of the halves differ
    cosine, sine = angles.cos().to(dtype), angles.sin().to(dtype)

    def norm_by_definition(x: torch.Tensor) -> torch.Tensor:
        return other[0].float() * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def rotate_by_definition(rows: torch.Tensor) -> torch.Tensor:
        heads, (a, b) = _heads(rows), _heads(rows).chunk(2, -1)
        return _rows(heads * cosine.float() + torch.cat([-b, a], -1) * sine.float())

    inputs, kernel, definition = {
        NORM: ([one], lambda x: rms_norm(x, other[0], 1e-6), norm_by_definition),
        SWIGLU: ([one, other], lambda gate, up: swiglu(gate, up), lambda gate, up: gate * gate.sigmoid() * up),
        ROTATION: ([one], lambda rows: _rows(rotate(_heads(rows), cosine, sine)), rotate_by_definition),
    }[name]
    names = ("output", "first gradient", "second gradient")[: 1 + len(inputs)]
    return reason_against_kernel(kernel, definition, inputs, weights, dict.fromkeys(names, _TOLERANCE))


def _heads(rows: torch.Tensor) -> torch.Tensor:
    """Rows as 3 heads of 11 tokens, [1, 3, 11, S], with the strides that attention's queries have."""
    return rows.view(1, 11, 3, -1).transpose(1, 2)


def _rows(heads: torch.Tensor) -> torch.Tensor:
    return heads.transpose(1, 2).reshape(33, -1)
