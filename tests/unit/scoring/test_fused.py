"""Fused norms and activations against their definitions in float64, and in the models that they are put into."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.nn.functional import silu

from dpo_cli.core import environment
from dpo_cli.scoring import fused, kernels
from dpo_cli.scoring.fused import (
    NORM,
    ROTATION,
    SWIGLU,
    describe_fused,
    install,
    reason_against,
    rms_norm,
    rotate,
    swiglu,
    use_fused,
)
from dpo_cli.scoring.scorer import Scorer

Make = Callable[..., Any]

BFLOAT16, CPU = torch.bfloat16, torch.device("cpu")


def random(*shape: int, seed: int = 0, dtype: torch.dtype = BFLOAT16) -> torch.Tensor:
    return (3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def with_gradients(function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> list[torch.Tensor]:
    """The output, and the gradients of a weighted sum of it."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    out = function(*leaves)
    weights = random(*out.shape, seed=9).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, weights)]


def largest_errors(found: list[torch.Tensor], exact: list[torch.Tensor]) -> list[float]:
    return [(one.double() - other.double()).norm().item() for one, other in zip(found, exact, strict=True)]


def assert_closer(ours: list[torch.Tensor], eager: list[torch.Tensor], exact: list[torch.Tensor]) -> None:
    """Ours are rounded once, and eager values in between, too."""
    for our_error, their_error, value in zip(
        largest_errors(ours, exact), largest_errors(eager, exact), exact, strict=True
    ):
        assert our_error <= 1.02 * their_error
        assert our_error <= 0.005 * value.norm().item()


def test_swiglu_is_closer_to_its_definition_than_what_models_do() -> None:
    gate, up = random(50, 64, seed=1), random(50, 64, seed=2)
    exact = with_gradients(lambda gate, up: gate * gate.sigmoid() * up, gate.double(), up.double())
    assert_closer(with_gradients(swiglu, gate, up), with_gradients(lambda g, u: silu(g) * u, gate, up), exact)


def test_the_norm_is_closer_to_its_definition_than_what_models_do(make_llama: Make) -> None:
    x, weight = random(50, 64, seed=1), random(64, seed=2)

    def eager(x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)).to(x.dtype)

    def definition(x: torch.Tensor) -> torch.Tensor:
        return weight.double() * x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()

    exact = with_gradients(definition, x.double())
    assert_closer(with_gradients(lambda x: rms_norm(x, weight, 1e-5), x), with_gradients(eager, x), exact)


def test_the_rotation_is_closer_to_its_definition_than_what_models_do() -> None:
    """Queries have the strides of attention; tables of the halves differ, which in models they do not."""
    x, (cosine, sine) = random(2, 7, 4, 16, seed=1).transpose(1, 2), random(2, 2, 1, 7, 16, seed=2)

    def by_definition(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
        a, b = x.chunk(2, -1)
        return x * cosine + torch.cat([-b, a], -1) * sine

    exact = with_gradients(lambda x: by_definition(x, cosine.double(), sine.double()), x.double())
    ours = with_gradients(lambda x: rotate(x, cosine, sine), x)
    assert_closer(ours, with_gradients(lambda x: by_definition(x, cosine, sine), x), exact)


@pytest.fixture
def compile_for_cpu(tmp_path: Path) -> Callable[[str], Any]:
    """``compile_for_cpu(source)``: the function ``run`` of C++ code."""
    if (compiler := shutil.which("g++")) is None:
        pytest.skip("no C++ compiler")

    def compiled(source: str) -> Any:
        (tmp_path / "kernel.cpp").write_text(source)
        library = tmp_path / "kernel.so"
        subprocess.run([compiler, "-shared", "-fPIC", "-o", library, tmp_path / "kernel.cpp"], check=True)
        return ctypes.CDLL(str(library)).run

    return compiled


@pytest.mark.parametrize("code", [fused.ROTATION_CODE, fused.ROTATION_BACKWARD_CODE])
def test_what_a_gpu_compiles_rotates_the_same(
    code: str, compile_for_cpu: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The source of the kernels compiled for the CPU, on what CUDA's kernels are given, number by number."""
    is_back = code is fused.ROTATION_BACKWARD_CODE
    name, number = ("rotate_back", 6) if is_back else ("rotate", 5)
    parameters = [f"x{index}" for index in range(number)]
    run = compile_for_cpu(f"""{code}
extern "C" float run({", ".join(f"float {each}" for each in parameters)}) {{
  return {name}<float>({", ".join(parameters)});
}}""")
    run.argtypes, run.restype = [ctypes.c_float] * number, ctypes.c_float

    def jitted(source: str, num_outputs: int) -> Callable[..., torch.Tensor]:
        assert (source, num_outputs) == (code, 1)

        def kernel(*inputs: torch.Tensor) -> torch.Tensor:
            given = torch.broadcast_tensors(*inputs)
            numbers = [run(*each) for each in zip(*(tensor.flatten().tolist() for tensor in given), strict=True)]
            return torch.tensor(numbers).view(given[0].shape)

        return kernel

    monkeypatch.setattr(fused, "_jitted", jitted)
    x = random(2, 5, 3, 8, seed=1, dtype=torch.float32).transpose(1, 2)
    cosine, sine = random(2, 2, 1, 5, 8, seed=2, dtype=torch.float32)
    expected = (fused._rotate_back if is_back else rotate)(x, cosine, sine)
    assert torch.allclose(fused._rotate_on_cuda(x, cosine, sine, is_back=is_back), expected, atol=1e-5)


@pytest.mark.parametrize("code", [fused.SWIGLU_CODE, fused.SWIGLU_BACKWARD_CODE])
def test_what_a_gpu_compiles_computes_the_same(code: str, compile_for_cpu: Callable[[str], Any]) -> None:
    """The source of the kernels, compiled for the CPU, number by number."""
    call = (
        "*first = swiglu<float>(gate, up);"
        if code is fused.SWIGLU_CODE
        else "swiglu_backward<float>(grad, gate, up, *first, *second);"
    )
    run = compile_for_cpu(f"""#include <cmath>
{code}
extern "C" void run(float grad, float gate, float up, float* first, float* second) {{ {call} }}""")
    run.argtypes = [ctypes.c_float] * 3 + [ctypes.POINTER(ctypes.c_float)] * 2
    for grad, gate, up in random(50, 3, dtype=torch.float64).tolist():
        first, second = ctypes.c_float(), ctypes.c_float()
        run(grad, gate, up, ctypes.byref(first), ctypes.byref(second))
        leaves = [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (gate, up)]
        out = silu(leaves[0]) * leaves[1]
        expected = [out] if code is fused.SWIGLU_CODE else torch.autograd.grad(grad * out, leaves)
        for found, value in zip((first, second), expected, strict=False):
            assert found.value == pytest.approx(value.item(), rel=1e-5, abs=1e-6)


# --- in models ----------------------------------------------------------------------------


def build(config: str) -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 50}
    heads = {"num_attention_heads": 2} | ({} if config == "GPTNeoXConfig" else {"num_key_value_heads": 1})
    return transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**sizes, **heads))


def replaced(model: Any) -> set[str]:
    """Classes of the modules whose forward is another one."""
    return {type(module).__name__ for module in model.modules() if "forward" in vars(module)}


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("LlamaConfig", {"LlamaRMSNorm", "LlamaMLP", "LlamaAttention"}),
        ("Qwen2Config", {"Qwen2RMSNorm", "Qwen2MLP", "Qwen2Attention"}),
        ("Qwen3Config", {"Qwen3RMSNorm", "Qwen3MLP", "Qwen3Attention"}),
        ("MistralConfig", {"MistralRMSNorm", "MistralMLP", "MistralAttention"}),
        ("Gemma2Config", {"Gemma2Attention"}),  # one plus the weight, and another activation
        ("CohereConfig", {"CohereMLP"}),  # rotates numbers beside each other
        ("GPTNeoXConfig", {"GPTNeoXAttention"}),
    ],
)
def test_layers_are_recognized_by_what_they_compute(family: str, expected: set[str]) -> None:
    model = build(family)
    forwards = {type(module): type(module).forward for module in model.modules()}
    install(model, [NORM, SWIGLU, ROTATION])
    assert replaced(model) == expected
    assert forwards == {kind: kind.forward for kind in forwards}, "classes stay as they are"


def test_a_class_of_the_name_that_computes_something_else_is_left_alone(make_llama: Make) -> None:
    class ScaledRMSNorm(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.variance_epsilon = torch.nn.Parameter(torch.ones(8)), 1e-6

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * self.weight * x / (x.square().mean(-1, keepdim=True) + self.variance_epsilon).sqrt()

    model = torch.nn.ModuleList([ScaledRMSNorm()])
    install(model, [NORM, SWIGLU])
    assert replaced(model) == set()


def test_a_models_log_probabilities_are_as_close_as_they_were(make_llama: Make, make_groups: Make) -> None:
    """In bfloat16 against float32, with and without; in float32 not a bit changes."""
    groups = make_groups(20)

    def logps(dtype: torch.dtype, *, is_fused: bool) -> torch.Tensor:
        model = make_llama(100)
        if dtype == BFLOAT16:
            model = model.to(BFLOAT16)
        if is_fused:
            install(model, [NORM, SWIGLU, ROTATION])
        with torch.no_grad(), Scorer(model, dtype, "shared") as scorer:
            return scorer.score(groups).logps_BK

    exact = logps(torch.float32, is_fused=False)
    assert torch.equal(logps(torch.float32, is_fused=True), exact)
    ours, eager = ((logps(BFLOAT16, is_fused=is_fused) - exact).abs().mean() for is_fused in (True, False))
    assert 0 < ours <= 1.2 * eager


def test_kernels_are_used_on_a_gpu_for_narrow_numbers_and_only_if_they_are_right(
    make_llama: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_llama(100)
    use_fused(model, CPU, BFLOAT16)
    assert replaced(model) == set()
    monkeypatch.setattr(environment, "GPU_TYPES", ("cpu",))
    use_fused(model, CPU, torch.float32)
    assert replaced(model) == set()
    with monkeypatch.context() as patch:
        patch.setattr(fused, "swiglu", lambda gate, up: silu(gate) * up * 1.1)
        reason_against.cache_clear()
        use_fused(model, CPU, BFLOAT16)
        assert replaced(model) == {"LlamaRMSNorm", "LlamaAttention"}
        said = describe_fused(model, CPU, BFLOAT16)
        assert said.startswith("; RMSNorm and rotation in one kernel; not SwiGLU: its output is off by")
    reason_against.cache_clear()
    assert reason_against(NORM, CPU, BFLOAT16) is None
    use_fused(model, CPU, BFLOAT16)
    assert replaced(model) == {"LlamaRMSNorm", "LlamaMLP", "LlamaAttention"}
    assert describe_fused(model, CPU, BFLOAT16) == "; RMSNorm, SwiGLU and rotation in one kernel"


def test_a_card_that_is_full_says_nothing_of_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is found is remembered, so it must not be taken for a kernel that fails, or a product that is not there."""

    def full(*_: Any, **__: Any) -> None:
        raise RuntimeError("CUDA driver error: out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(fused, "swiglu", full)
        reason_against.cache_clear()
        with pytest.raises(RuntimeError, match="out of memory"):
            reason_against(SWIGLU, CPU, BFLOAT16)
    assert reason_against(SWIGLU, CPU, BFLOAT16) is None
    monkeypatch.setattr(torch, "mm", full)
    kernels._has_wide_product.cache_clear()
    with pytest.raises(RuntimeError, match="out of memory"):
        kernels._has_wide_product(CPU, BFLOAT16)


def test_a_backward_kernel_that_takes_gradients_as_they_lie_in_memory_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Careless(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, weight_D: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(x, weight_D)
            return rms_norm(x, weight_D, 1e-6)

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
            x, weight_D = ctx.saved_tensors
            with torch.enable_grad():
                leaf = x.detach().requires_grad_()
                out = rms_norm(leaf, weight_D, 1e-6)
            in_memory = grads[0].as_strided(grads[0].shape, (grads[0].shape[1], 1))
            return torch.autograd.grad(out, leaf, in_memory)[0], None

    monkeypatch.setattr(fused, "rms_norm", lambda x, weight_D, _: Careless.apply(x, weight_D))
    reason_against.cache_clear()
    reason = reason_against(NORM, CPU, BFLOAT16)
    reason_against.cache_clear()
    assert reason is not None
    assert reason.startswith("its first gradient is off by")


def test_a_norm_is_tried_at_the_widths_of_the_model(make_llama: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which kernel CUDA starts depends on the width."""
    model = make_llama(100)
    monkeypatch.setattr(environment, "GPU_TYPES", ("cpu",))
    right = rms_norm
    monkeypatch.setattr(
        fused, "rms_norm", lambda x, weight_D, e: right(x, weight_D, e) * (1.1 if x.shape[-1] == 64 else 1.0)
    )
    reason_against.cache_clear()
    use_fused(model, CPU, BFLOAT16)
    reason_against.cache_clear()
    assert replaced(model) == {"LlamaMLP", "LlamaAttention"}


def test_logits_that_are_rounded_after_all_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("meta")
    monkeypatch.setattr(kernels, "_has_wide_product", lambda device, dtype: False)
    said = "; logits are rounded to bfloat16, for there is no product of it in float32 on this device"
    assert kernels.describe_products(gpu, BFLOAT16) == said
    assert kernels.describe_products(gpu, torch.float32) == kernels.describe_products(CPU, BFLOAT16) == ""
    monkeypatch.setattr(kernels, "_has_wide_product", lambda device, dtype: True)
    assert kernels.describe_products(gpu, BFLOAT16) == ""
