"""The head against its equation in float64: z = cap(scale * (W h + b)), logp = z[y] - log sum exp z.

Legend: N scored tokens, V vocabulary, D hidden.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dpo_cli.scoring.head import (
    LogitTransform,
    TokenStatistics,
    is_plain,
    token_logps,
)
from dpo_cli.scoring.kernels import wide_product
from tests.live_memory import LiveMemory

N, V, D = 23, 50, 16
TRANSFORMS = {
    "plain": LogitTransform(),
    "scale": LogitTransform(0.3),
    "soft cap": LogitTransform(1.0, 2.0),
    "scale and soft cap": LogitTransform(3.0, 5.0),
}
ONE_ROW, FEW_ROWS, ALL_ROWS = 1, 40 * V, 1 << 20
"""Bytes of logits that leave room for so many rows."""


def linear(bias: bool = False, cls: type[torch.nn.Linear] = torch.nn.Linear, size: tuple[int, int] = (D, V)) -> Any:
    """A frozen head of unit scale."""
    head = cls(*size, bias=bias)
    generator = torch.Generator().manual_seed(1)
    for parameter in head.parameters():
        parameter.data.normal_(generator=generator)
    return head.requires_grad_(False)


def inputs(num: int = N, vocabulary: int = V, width: int = D) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states that want a gradient, and targets."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num, width, generator=generator).requires_grad_()
    return hidden, torch.randint(vocabulary, (num,), generator=generator)


def by_definition(
    hidden: torch.Tensor, targets: torch.Tensor, head: torch.nn.Linear, transform: LogitTransform
) -> torch.Tensor:
    """float64 [N], differentiable in hidden states, weight and bias."""
    z = hidden.double() @ head.weight.double().T
    if head.bias is not None:
        z = z + head.bias.double()
    z = z * transform.scale
    if transform.softcap is not None:
        z = transform.softcap * torch.tanh(z / transform.softcap)
    return z.log_softmax(1)[torch.arange(len(targets)), targets]


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()


def weighted(logps: torch.Tensor) -> torch.Tensor:
    """A sum in which every row counts for something else."""
    return (logps.double() * torch.linspace(-1, 2, len(logps), dtype=torch.float64)).sum()


# --- values and gradients -----------------------------------------------------------------


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize(("bias", "head_bytes"), [(False, ONE_ROW), (True, FEW_ROWS), (False, ALL_ROWS)])
def test_values_and_gradients_are_those_of_the_equation(name: str, bias: bool, head_bytes: int) -> None:
    hidden, targets = inputs()
    head, transform = linear(bias), TRANSFORMS[name]
    ours = token_logps(hidden, targets, head, transform, head_bytes)
    theirs = by_definition(hidden, targets, head, transform)
    assert ours.dtype == torch.float32
    assert theirs.std() > 0.5
    assert (ours - theirs).abs().max() <= 4e-6
    (ours_grad,) = torch.autograd.grad(weighted(ours), hidden)
    (theirs_grad,) = torch.autograd.grad(weighted(theirs), hidden)
    assert relative(ours_grad, theirs_grad) <= 1e-6


@pytest.mark.parametrize("size", [1e-3, 100.0])
def test_logits_of_any_size_neither_overflow_nor_vanish(size: float) -> None:
    hidden, targets = inputs()
    hidden = (hidden.detach() * size).requires_grad_()
    for transform in (LogitTransform(), LogitTransform(1.0, 30.0)):
        ours = token_logps(hidden, targets, linear(), transform)
        theirs = by_definition(hidden, targets, linear(), transform)
        assert (ours - theirs).abs().max() <= 4e-6 * max(1.0, theirs.abs().max().item())
        grads = [torch.autograd.grad(weighted(logps), hidden)[0] for logps in (ours, theirs)]
        assert relative(*grads) <= 1e-5


def test_the_gradient_of_a_uniform_head_worked_out_by_hand() -> None:
    """W = 0 gives logp = -ln V.

    With W = 0 but for the rows of y and one other token, of weights 1 and -1 on the first hidden unit, and h = 0:
    d logp / d h_1 = w_y - mean over V of w = 1 - (1 - 1) / V = 1, and 0 elsewhere.
    """
    head = linear()
    head.weight.zero_()
    hidden, targets = torch.zeros(1, D, requires_grad=True), torch.tensor([3])
    assert token_logps(hidden, targets, head, LogitTransform()).item() == pytest.approx(-math.log(V))
    head.weight[3, 0], head.weight[4, 0] = 1, -1
    token_logps(hidden, targets, head, LogitTransform()).backward()
    assert hidden.grad is not None
    assert hidden.grad.tolist() == [[1.0] + [0.0] * (D - 1)]


# --- how much is held ---------------------------------------------------------------------


def peak_bytes(
    vocabulary: int,
    transform: LogitTransform,
    head_bytes: int,
    *,
    wanted: bool = True,
    trained: bool = False,
    dtype: torch.dtype = torch.float32,
) -> int:
    """The most that lives in the forward and, where a gradient is wanted, in the backward pass."""
    hidden, targets = inputs(64, vocabulary, 4)
    hidden = (hidden if wanted else hidden.detach()).to(dtype)
    head = linear(size=(4, vocabulary)).to(dtype).requires_grad_(trained)
    with LiveMemory() as memory:
        logps = token_logps(hidden, targets, head, transform, head_bytes)
        assert logps.requires_grad == wanted
        if wanted:
            logps.sum().backward()
    return memory.peak


@pytest.mark.parametrize(
    ("transform", "wanted", "dtype"),
    [
        (LogitTransform(), False, torch.float32),
        (LogitTransform(2.0), True, torch.bfloat16),
        (LogitTransform(1.0, 5.0), True, torch.float32),
    ],
)
def test_the_logits_of_one_chunk_live_at_a_time_whatever_the_vocabulary(
    transform: LogitTransform, wanted: bool, dtype: torch.dtype
) -> None:
    """All float32 logits would be 2 MiB at V = 8k and 32 MiB at V = 128k."""
    head_bytes = 2 << 20
    peaks = [peak_bytes(size << 10, transform, head_bytes, wanted=wanted, dtype=dtype) for size in (8, 32, 128)]
    assert max(peaks) <= 1.1 * head_bytes
    assert peaks[2] <= 1.1 * max(peaks[:2])


@pytest.mark.parametrize("transform", [LogitTransform(), LogitTransform(1.0, 5.0)])
def test_a_trained_head_holds_one_chunk_too_and_its_own_gradient(transform: LogitTransform) -> None:
    head_bytes = 4 << 20
    for vocabulary in (8 << 10, 32 << 10, 64 << 10):
        weight_bytes = 4 * 4 * vocabulary
        peak = peak_bytes(vocabulary, transform, head_bytes, trained=True)
        assert peak <= 1.1 * head_bytes + 3 * weight_bytes


def test_what_stays_for_the_backward_pass_is_a_row_of_hidden_size_for_each_token() -> None:
    hidden, targets = inputs(64, 8 << 10, 4)
    head = linear(size=(4, 8 << 10))
    with LiveMemory() as memory:
        logps = token_logps(hidden, targets, head, LogitTransform(), 1 << 20)
        assert memory.live <= 64 * 4 * 4 + 64 * 4 + 1024
        logps.sum().backward()
        assert memory.peak <= 1.1 * (1 << 20)


class Products(TorchDispatchMode):
    """Shapes of the factors of all matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            self.shapes.append(tuple(args[-2].shape) + tuple(args[-1].shape))
        return func(*args, **(kwargs or {}))


def test_no_logits_are_computed_twice() -> None:
    """Two products a chunk, h W^T and its gradient's, both in the forward pass; one without a gradient."""
    hidden, targets = inputs()
    with Products() as forward:
        logps = token_logps(hidden, targets, linear(), LogitTransform(), FEW_ROWS)
    rows = [shape[0] for shape in forward.shapes[::2]]
    assert sum(rows) == N
    assert len(rows) > 2
    assert forward.shapes == [shape for num in rows for shape in ((num, D, D, V), (num, V, V, D))]
    with Products() as backward:
        weighted(logps).backward()
    assert backward.shapes == []
    with Products() as without:
        token_logps(hidden.detach(), targets, linear(), LogitTransform(), FEW_ROWS)
    assert without.shapes == [(num, D, D, V) for num in rows]


# --- heads that are more than a frozen linear layer ---------------------------------------


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("head_bytes", [FEW_ROWS, ALL_ROWS])
def test_a_trained_head_gets_its_gradient(name: str, head_bytes: int) -> None:
    hidden, targets = inputs()
    head, transform = linear(True).requires_grad_(True), TRANSFORMS[name]
    sought = [hidden, head.weight, head.bias]
    ours = token_logps(hidden, targets, head, transform, head_bytes)
    theirs = by_definition(hidden, targets, head, transform)
    assert (ours - theirs).abs().max() <= 4e-6
    ours_grads = torch.autograd.grad(weighted(ours), sought)
    theirs_grads = torch.autograd.grad(weighted(theirs), sought)
    for one, other in zip(ours_grads, theirs_grads, strict=True):
        assert relative(one, other) <= 2e-6


def hooked(rows: list[int]) -> Any:
    head = linear()
    head.register_forward_hook(lambda module, args, output: rows.append(len(output)) or output * 2)
    return head


def pre_hooked(rows: list[int]) -> Any:
    head = linear()
    head.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])) or (args[0] * 2,))
    return head


def subclassed(rows: list[int]) -> Any:
    class Doubling(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            rows.append(len(x))
            return super().forward(x) * 2

    return linear(cls=Doubling)


@pytest.mark.parametrize("make", [hooked, pre_hooked, subclassed])
def test_a_head_with_more_to_it_goes_through_its_own_forward_a_chunk_at_a_time(
    make: Callable[[list[int]], Any],
) -> None:
    rows: list[int] = []
    head = make(rows)
    assert not is_plain(head)
    hidden, targets = inputs()
    ours = token_logps(hidden, targets, head, LogitTransform(), FEW_ROWS)
    assert sum(rows) == N
    assert max(rows) * 4 * V <= FEW_ROWS
    theirs = by_definition(hidden, targets, linear(), LogitTransform(2.0))
    assert (ours - theirs).abs().max() <= 4e-6
    grads = [torch.autograd.grad(weighted(logps), hidden)[0] for logps in (ours, theirs)]
    assert relative(*grads) <= 1e-6


# --- bfloat16 -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRANSFORMS)
def test_under_autocast_only_the_product_is_rounded(name: str) -> None:
    """Hidden states, weights and logits have 8 bits; sums over the vocabulary and over tokens have 24."""
    hidden, targets = inputs(400)
    head, transform = linear(True), TRANSFORMS[name]
    with torch.autocast("cpu", torch.bfloat16):
        ours = token_logps(hidden, targets, head, transform, FEW_ROWS)
    theirs = by_definition(hidden, targets, head, transform)
    assert ours.dtype == torch.float32
    error = ours - theirs
    assert 1e-6 < error.abs().max() <= 0.02 * theirs.abs().max()
    assert error.mean().abs() <= 0.003
    (ours_grad,) = torch.autograd.grad(weighted(ours), hidden)
    (theirs_grad,) = torch.autograd.grad(weighted(theirs), hidden)
    assert ours_grad.dtype == torch.float32
    assert relative(ours_grad, theirs_grad) <= 0.02


# --- what the configuration says ----------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "scales", "softcap"),
    [
        ({}, [1.0], None),
        ({"logit_scale": 0.25}, [0.25], None),
        ({"logits_scaling": 4.0}, [0.25, 4.0], None),
        ({"logits_scaling": 1.0}, [1.0], None),
        ({"lm_head_multiplier": 0.5}, [0.5], None),
        ({"logit_scale": 3.0, "logits_scaling": 2.0, "lm_head_multiplier": 4.0}, [6.0, 24.0], None),
        ({"logit_scale": None, "final_logit_softcapping": 30.0}, [1.0], 30.0),
        ({"logits_soft_cap": 20.0}, [1.0], 20.0),
        ({"output_logit_soft_cap": 10.0, "final_logit_softcapping": None}, [1.0], 10.0),
        ({"logit_scale": None, "logits_scaling": None, "final_logit_softcapping": None}, [1.0], None),
    ],
)
def test_transforms_are_read_from_the_configuration(
    values: dict[str, Any], scales: list[float], softcap: float | None
) -> None:
    """Granite divides by logits_scaling, HyperCLOVA X multiplies."""
    readings = list(LogitTransform.readings(SimpleNamespace(**values)))
    assert readings == [LogitTransform(scale, softcap) for scale in scales]


@pytest.mark.parametrize("trained", [False, True])
def test_logits_of_narrow_numbers_are_not_rounded_to_them(trained: bool) -> None:
    """bfloat16 numbers between 16 and 32 are 0.125 apart: such a grid would move a log-probability by 0.05."""
    hidden, targets = inputs(200, 4096, 256)
    head = linear(size=(256, 4096)).bfloat16().requires_grad_(trained)
    hidden = hidden.detach().bfloat16().requires_grad_()
    exact = by_definition(hidden, targets, head, LogitTransform())
    assert exact.min() < -40
    with torch.autocast("cpu", torch.bfloat16):
        ours = token_logps(hidden, targets, head, LogitTransform(), 100 * 4096 * 20)
    assert (ours - exact).abs().max() <= 1e-4
    (our_grad,) = torch.autograd.grad(weighted(ours), hidden, retain_graph=True)
    (their_grad,) = torch.autograd.grad(weighted(exact), hidden, retain_graph=True)
    assert relative(our_grad, their_grad) <= 0.01
    if trained:
        (our_grad,) = torch.autograd.grad(weighted(ours), head.weight)
        (their_grad,) = torch.autograd.grad(weighted(exact), head.weight)
        assert relative(our_grad, their_grad) <= 0.01


def test_on_a_gpu_sums_come_in_float32_from_the_product() -> None:
    """Nothing is made in bfloat16 and widened then; ``meta`` stands for any device but the CPU."""

    class Made(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[str] = []

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.seen.append(str(func))
            return func(*args, **(kwargs or {}))

    left, right = torch.zeros(5, D, device="meta").bfloat16(), torch.zeros(V, D, device="meta").bfloat16()
    wide_product(left, right.T)  # finds out whether there is such a product
    buffer = torch.empty(5, V, device="meta")
    with Made() as made:
        assert wide_product(left, right.T).dtype == torch.float32
        assert wide_product(left, right.T, buffer) is buffer
    assert [name for name in made.seen if "mm" in name or "copy" in name] == ["aten.mm.dtype", "aten.mm.dtype_out"]


def test_in_bfloat16_a_sure_model_keeps_its_gradient() -> None:
    """onehot - softmax is nearly 0 where p(y) is nearly 1: rounded first and subtracted then, little of it is left.

    Autograd, which rounds the difference, is the measure: both lose what bfloat16 logits lose.
    """
    vocabulary, width = 4096, 256
    head = linear(size=(width, vocabulary)).to(torch.bfloat16)
    head.weight.data *= 0.05
    hidden, targets = inputs(64, vocabulary, width)
    rows = head.weight[targets].float()
    sure = (hidden.detach() + 20 * rows / rows.norm(dim=1, keepdim=True)).to(torch.bfloat16)

    def gradient(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        logps = (hidden @ weight.T).to(torch.promote_types(weight.dtype, torch.float32)).log_softmax(-1)
        picked = logps.gather(1, targets[:, None])
        assert picked.exp().mean() > 0.99
        return torch.autograd.grad(picked.sum(), hidden)[0].double()

    exact = gradient(sure.double().requires_grad_(), head.weight.double())
    rounded = gradient(sure.clone().requires_grad_(), head.weight)
    leaf = sure.clone().requires_grad_()
    found = torch.autograd.grad(token_logps(leaf, targets, head, LogitTransform()).sum(), leaf)[0].double()
    assert relative(found, exact) <= 1.5 * relative(rounded, exact)


def test_in_float16_a_flat_distribution_over_many_tokens_has_a_gradient() -> None:
    """Powers of 70,000 equal logits sum to more than float16's largest number, 65,504."""
    vocabulary = 70_000
    head = linear(size=(D, vocabulary)).to(torch.float16)
    hidden = torch.zeros(3, D, dtype=torch.float16, requires_grad=True)
    targets = torch.tensor([0, 5, vocabulary - 1])
    with torch.autocast("cpu", torch.float16):
        logps = token_logps(hidden, targets, head, LogitTransform())
    assert logps.tolist() == pytest.approx([-math.log(vocabulary)] * 3, abs=1e-5)
    (gradient,) = torch.autograd.grad(logps.sum(), hidden)
    weight = head.weight.double()
    assert torch.allclose(gradient.double(), weight[targets] - weight.mean(0), atol=0.01)


# --- statistics -----------------------------------------------------------------------------


@pytest.mark.parametrize(("trained", "head_bytes"), [(False, ONE_ROW), (False, ALL_ROWS), (True, FEW_ROWS)])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_statistics_are_those_of_the_whole_distributions(name: str, head_bytes: int, trained: bool) -> None:
    """Whatever the chunks, frozen or trained; asking for them changes neither a value nor a gradient."""
    hidden, targets = inputs()
    head, transform = linear(True), TRANSFORMS[name]
    distributions = transform(hidden.double() @ head.weight.double().T + head.bias.double()).double().log_softmax(1)
    targets[::3] = distributions.argmax(1)[::3]  # else the likeliest is hardly ever the target
    head.requires_grad_(trained)
    statistics = TokenStatistics.empty(N, torch.device("cpu"), squares=True)
    logps = token_logps(hidden, targets, head, transform, head_bytes, statistics)
    logps.sum().backward()
    powers = distributions.exp()
    torch.testing.assert_close(statistics.entropies_N.double(), -(powers * distributions).sum(1), atol=1e-5, rtol=1e-5)
    assert statistics.log_sum_squares_N is not None
    torch.testing.assert_close(
        statistics.log_sum_squares_N.double(), powers.square().sum(1).log(), atol=1e-5, rtol=1e-5
    )
    assert torch.equal(statistics.is_likeliest_N.bool(), distributions.argmax(1) == targets)
    assert 0 < statistics.is_likeliest_N.sum() < N
    assert not statistics.entropies_N.requires_grad
    plain = hidden.detach().clone().requires_grad_()
    without = token_logps(plain, targets, head, transform, head_bytes)
    without.sum().backward()
    torch.testing.assert_close(without, logps, atol=1e-5, rtol=1e-6)  # other chunks, other roundings
    torch.testing.assert_close(plain.grad, hidden.grad, atol=1e-5, rtol=1e-5)
