"""Short LoRA layers against PEFT's own: the same values and gradients, the same files, and PEFT's forward for the rest.

Legend: N tokens, I and O a layer's inputs and outputs, r the adapter's rank.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners import lora
from peft.tuners.lora import bnb as lora_bnb
from torch.utils._python_dispatch import TorchDispatchMode

from dpo_cli.core.training_params import LoraParams
from dpo_cli.models.adapters import add_adapter, save_adapter
from dpo_cli.models.lora import ShortLinear, ShortLinear4bit, cast_adapters, merging_pays, use_short_layers
from dpo_cli.scoring.scorer import Scorer

Make = Callable[..., Any]

INPUTS, OUTPUTS, RANK = 64, 128, 4
FEW, MANY = 5, 400
"""Tokens for which it does not pay to add B A to the weight, and for which it does."""
KINDS = ("plain", "nf4")


def base_layer(kind: str, bias: bool = True) -> Any:
    """A frozen layer of I inputs and O outputs, the same each time."""
    torch.manual_seed(0)
    plain = torch.nn.Linear(INPUTS, OUTPUTS, bias=bias)
    if kind == "plain":
        return plain.requires_grad_(False)
    layer = Linear4bit(INPUTS, OUTPUTS, bias=bias, compute_dtype=torch.float32, quant_type="nf4")
    layer.load_state_dict(plain.state_dict())
    layer = layer.to("cpu")
    layer.support_avx512bf16_for_cpu = False
    assert layer.weight.quant_state is not None
    return layer.requires_grad_(False)


def wrap(base: Any, short: bool, **settings: Any) -> Any:
    """A PEFT model of one layer whose adapter does something."""
    config = LoraConfig(**({"r": RANK, "lora_alpha": 8, "target_modules": ["layer"]} | settings))
    whole: Any = torch.nn.ModuleDict({"layer": base})
    whole.is_loaded_in_4bit = isinstance(base, Linear4bit)
    model = get_peft_model(whole, use_short_layers(config) if short else config)
    randomise(model)
    return model


def randomise(model: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)


def both(kind: str, *, bias: bool = True, **settings: Any) -> tuple[Any, Any]:
    """The layer as ours and as PEFT's, with the same numbers in it."""
    ours, theirs = (wrap(base_layer(kind, bias), short, **settings) for short in (True, False))
    return layer_of(ours), layer_of(theirs)


def layer_of(model: Any) -> Any:
    return model.base_model.model["layer"]


def inputs(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, INPUTS, generator=torch.Generator().manual_seed(2)).requires_grad_()


def run(layer: Any, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Output, and gradients of the input and of all that is trained."""
    layer.zero_grad()
    x = x.detach().requires_grad_(x.requires_grad)
    out = layer(x)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    (out.float() * weights).sum().backward()
    found = {name: parameter.grad for name, parameter in layer.named_parameters() if parameter.grad is not None}
    return out.detach(), found | ({"x": x.grad} if x.grad is not None else {})


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()


def assert_same(ours: Any, theirs: Any, x: torch.Tensor, tolerance: float = 1e-6) -> dict[str, torch.Tensor]:
    """Equal values and gradients; returns ours."""
    (our_out, our_grads), (their_out, their_grads) = run(ours, x), run(theirs, x)
    assert our_out.dtype == their_out.dtype
    assert our_out.shape == their_out.shape
    assert relative(our_out, their_out) <= tolerance
    assert our_grads.keys() == their_grads.keys()
    for name, gradient in their_grads.items():
        assert our_grads[name].dtype == gradient.dtype
        assert relative(our_grads[name], gradient) <= tolerance, name
    return our_grads


def goes_short(layer: Any, x: torch.Tensor) -> bool:
    """Whether the output comes from a function of ours rather than from PEFT's forward."""
    made_by = getattr(layer(x).grad_fn, "_forward_cls", None)
    return made_by is not None and made_by.__module__ == ShortLinear.__module__


# --- the same layer -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("bias", "shape"), [(True, (FEW,)), (False, (MANY,)), (True, (2, MANY)), (False, (3, 2, FEW))])
def test_values_and_gradients_are_those_of_peft(kind: str, bias: bool, shape: tuple[int, ...]) -> None:
    ours, theirs = both(kind, bias=bias)
    assert type(ours) is (ShortLinear if kind == "plain" else ShortLinear4bit)
    assert type(theirs) is (lora.Linear if kind == "plain" else lora_bnb.Linear4bit)
    x = inputs(*shape)
    assert goes_short(ours, x)
    assert not goes_short(theirs, x)
    gradients = assert_same(ours, theirs, x)
    assert set(gradients) == {"x", "lora_A.default.weight", "lora_B.default.weight"}


@pytest.mark.parametrize("num_tokens", [FEW, MANY])
def test_values_and_gradients_are_those_of_the_equation(num_tokens: int) -> None:
    """y = x W^T + b + s (x A^T) B^T with s = alpha / r = 2, in float64.

    With g the gradient of y: dx = g W + s (g B) A, dA = s (g B)^T x, dB = s g^T (x A^T).
    """
    ours, _ = both("plain")
    x = inputs(num_tokens)
    weight, bias = ours.base_layer.weight.double(), ours.base_layer.bias.double()
    a, b = ours.lora_A["default"].weight.double(), ours.lora_B["default"].weight.double()
    out, gradients = run(ours, x)
    g = torch.randn(num_tokens, OUTPUTS, generator=torch.Generator().manual_seed(3)).double()
    x64 = x.detach().double()
    assert relative(out, x64 @ weight.T + bias + 2 * (x64 @ a.T) @ b.T) <= 1e-6
    assert relative(gradients["x"], g @ weight + 2 * (g @ b) @ a) <= 1e-6
    assert relative(gradients["lora_A.default.weight"], 2 * (g @ b).T @ x64) <= 1e-6
    assert relative(gradients["lora_B.default.weight"], 2 * g.T @ (x64 @ a.T)) <= 1e-6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_tokens", [FEW, MANY])
def test_without_gradients_the_values_are_the_same_and_the_base_is_not_changed(kind: str, num_tokens: int) -> None:
    ours, theirs = both(kind)
    before = copy.deepcopy(ours.state_dict())
    x = inputs(num_tokens)
    with torch.no_grad():
        assert relative(ours.eval()(x), theirs.eval()(x)) <= 1e-6
    run(ours, x)
    assert all(torch.equal(value, ours.state_dict()[name]) for name, value in before.items() if torch.is_tensor(value))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_tokens", [FEW, MANY])
def test_a_second_adapter_that_is_the_only_active_one_is_used(kind: str, num_tokens: int) -> None:
    ours, theirs = two_adapters(kind)
    outputs = []
    for name in ("default", "other"):
        for model in (ours, theirs):
            model.set_adapter(name)
        assert goes_short(layer_of(ours), inputs(num_tokens))
        gradients = assert_same(layer_of(ours), layer_of(theirs), inputs(num_tokens))
        assert f"lora_A.{name}.weight" in gradients
        outputs.append(layer_of(ours)(inputs(num_tokens)).detach())
    assert relative(*outputs) > 0.01


def two_adapters(kind: str) -> tuple[Any, Any]:
    models = [wrap(base_layer(kind), short) for short in (True, False)]
    for model in models:
        model.add_adapter("other", LoraConfig(r=2, lora_alpha=3, target_modules=["layer"]))
        randomise(model)
    return models[0], models[1]


def test_in_float32_the_forward_pass_is_products_and_nothing_else() -> None:
    ours, theirs = both("plain")
    x = torch.randn(INPUTS, 2, MANY, generator=torch.Generator().manual_seed(2)).permute(2, 1, 0)  # of any strides
    assert_same(ours, theirs, x.requires_grad_())
    for few_or_many in (inputs(FEW), inputs(MANY)):
        with Kernels() as short:
            ours(few_or_many)
        assert set(short.names) <= {"mm", "addmm"}


def test_merging_pays_from_as_many_tokens_as_make_it_cheaper() -> None:
    """2 N r (I + O) operations over tokens against 2 r I O for B A: from N = I O / (I + O) = 42.7 on, in float32."""
    a, b = torch.zeros(RANK, INPUTS), torch.zeros(OUTPUTS, RANK)
    assert not merging_pays(torch.zeros(42, INPUTS), a, b)
    assert merging_pays(torch.zeros(43, INPUTS), a, b)
    assert merging_pays(torch.zeros(1, 43, INPUTS), a, b)
    assert not merging_pays(torch.zeros(4000, INPUTS, dtype=torch.bfloat16), a, b)


# --- bfloat16 -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_tokens", [FEW, MANY])
def test_under_autocast_values_are_bfloat16_and_adapters_stay_float32(kind: str, num_tokens: int) -> None:
    ours, theirs = both(kind)
    exact_out, exact = run(theirs, inputs(num_tokens))
    with torch.autocast("cpu", torch.bfloat16):
        assert goes_short(ours, inputs(num_tokens))
        (our_out, our_grads), (their_out, their_grads) = (run(layer, inputs(num_tokens)) for layer in (ours, theirs))
    assert our_out.dtype == torch.bfloat16
    assert relative(our_out, exact_out) <= max(0.01, 1.2 * relative(their_out, exact_out))
    assert our_grads.keys() == their_grads.keys()
    for name, gradient in exact.items():
        assert our_grads[name].dtype == torch.float32
        assert relative(our_grads[name], gradient) <= max(0.015, 1.2 * relative(their_grads[name], gradient)), name
    assert {p.dtype for name, p in ours.named_parameters() if "lora_" in name} == {torch.float32}


class Kernels(TorchDispatchMode):
    """Names of all operations that are no views, and what adds or scales as much as an output or an input has."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.wide: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not func.is_view and name not in ("detach", "_unsafe_view", "lift_fresh", "empty_like"):
            self.names.append(name)
            if name.strip("_") in ("add", "mul", "copy") and result.numel() >= MANY * INPUTS:
                self.wide.append(name)
        return result


@pytest.mark.parametrize("kind", KINDS)
def test_in_bfloat16_nothing_passes_over_inputs_or_outputs_but_products(kind: str) -> None:
    """The adapter's share is added in place to the output, and to the input's gradient; PEFT's is added apart."""
    counted = []
    for layer in both(kind):
        x = inputs(MANY).detach().bfloat16().requires_grad_()
        with Kernels() as kernels:
            with torch.autocast("cpu", torch.bfloat16):
                out = layer(x)
            out.backward(torch.ones_like(out))
        counted.append(kernels)
    assert counted[0].wide == []
    assert len(counted[1].wide) >= 2
    assert counted[0].names.count("addmm_") == 2


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_cast_once_while_it_stays_as_it_is(kind: str) -> None:
    """The same values and gradients, without a cast of a matrix in forward or backward; and none is kept afterwards."""
    found, casts = [], []
    for is_cast in (False, True):
        ours, _ = both(kind)
        with cast_adapters(ours, torch.bfloat16 if is_cast else torch.float32):
            x = inputs(MANY).detach().bfloat16().requires_grad_()
            with Kernels() as kernels:
                with torch.autocast("cpu", torch.bfloat16):
                    out = ours(x)
                out.backward(torch.ones_like(out))
        casts.append(kernels.names.count("_to_copy"))
        found.append((out.detach(), ours.lora_A["default"].weight.grad, ours.lora_B["default"].weight.grad))
        assert ours.cast is None
    assert all(torch.equal(left, right) for left, right in zip(*found, strict=True))
    assert casts[0] - casts[1] == 2


def test_a_step_between_two_casts_is_seen() -> None:
    ours, _ = both("plain")
    x = inputs(MANY).detach().bfloat16()
    outputs = []
    for _ in range(2):
        with torch.no_grad(), cast_adapters(ours, torch.bfloat16), torch.autocast("cpu", torch.bfloat16):
            outputs.append(ours(x))
        ours.lora_B["default"].weight.data += 1.0
    assert relative(*outputs) > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_without_gradients_no_node_of_autograd_is_made(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For one token at a time, as in generation, what the host does decides the speed."""
    ours, theirs = both(kind)
    for name in ("_LoraInPlace", "_LoraUpdate", "_MergedLora"):
        monkeypatch.setattr(f"dpo_cli.models.lora.{name}.apply", None)
    x = torch.randn(2, 1, INPUTS).bfloat16()
    for without in (torch.no_grad(), torch.inference_mode()):
        with without, torch.autocast("cpu", torch.bfloat16):
            assert relative(ours(x), theirs(x)) <= 0.01


@pytest.mark.parametrize("num_tokens", [FEW, MANY])
def test_a_small_update_is_not_lost_in_bfloat16(num_tokens: int) -> None:
    """An update of a thousandth of the weights is below their rounding, and still moves the output as it should."""
    ours, _ = both("plain")
    for matrices in (ours.lora_A, ours.lora_B):
        matrices["default"].weight.data *= 0.03
    x = inputs(num_tokens).detach()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        zero = copy.deepcopy(ours)
        zero.lora_B["default"].weight.data.zero_()
        base = torch.nn.functional.linear(x, ours.base_layer.weight, ours.base_layer.bias)
        moved, unmoved = ours(x).double(), zero(x).double()
    assert torch.equal(unmoved, base.double())
    update = 2 * x.double() @ ours.lora_A["default"].weight.double().T @ ours.lora_B["default"].weight.double().T
    slope = ((moved - unmoved) * update).sum() / update.square().sum()
    assert slope.item() == pytest.approx(1, abs=0.3)


def test_a_bfloat16_base_without_autocast_is_left_to_peft_or_done_right() -> None:
    ours, theirs = both("plain")
    for layer in (ours, theirs):
        layer.base_layer.to(torch.bfloat16)
    x = inputs(FEW).detach().bfloat16().requires_grad_()
    assert_same(ours, theirs, x, tolerance=0.01)


# --- what goes through PEFT's forward -----------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_tokens", [FEW, MANY])
def test_dropout_is_left_to_peft_while_training(kind: str, num_tokens: int) -> None:
    ours, theirs = both(kind, lora_dropout=0.4)
    results = []
    for layer in (ours, theirs):
        torch.manual_seed(5)
        results.append(run(layer.train(), inputs(num_tokens)))
    assert not goes_short(ours, inputs(num_tokens))
    assert relative(results[0][0], results[1][0]) <= 1e-6
    assert all(relative(results[0][1][name], gradient) <= 1e-6 for name, gradient in results[1][1].items())
    assert relative(ours(inputs(num_tokens)).detach(), results[1][0]) > 0.01
    assert goes_short(ours.eval(), inputs(num_tokens))
    assert_same(ours, theirs.eval(), inputs(num_tokens))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_tokens", [FEW, MANY])
def test_two_active_adapters_are_left_to_peft(kind: str, num_tokens: int) -> None:
    ours, theirs = two_adapters(kind)
    for model in (ours, theirs):
        model.base_model.set_adapter(["default", "other"])
    assert not goes_short(layer_of(ours), inputs(num_tokens))
    gradients = assert_same(layer_of(ours), layer_of(theirs), inputs(num_tokens))
    assert {"lora_A.default.weight", "lora_A.other.weight"} <= set(gradients)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("settings", [{"use_dora": True}, {"lora_bias": True}])
def test_more_than_two_matrices_are_left_to_peft(kind: str, settings: dict[str, Any]) -> None:
    ours, theirs = both(kind, **settings)
    for num_tokens in (FEW, MANY):
        assert not goes_short(ours, inputs(num_tokens))
        assert_same(ours, theirs, inputs(num_tokens), tolerance=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_tokens", [FEW, MANY])
def test_disabled_adapters_leave_the_base_alone(kind: str, num_tokens: int) -> None:
    models = [wrap(base_layer(kind), short) for short in (True, False)]
    x = inputs(num_tokens)
    with models[0].disable_adapter(), models[1].disable_adapter():
        found = [layer_of(model)(x) for model in models]
        assert torch.equal(found[0], layer_of(models[0]).base_layer(x))
        assert torch.equal(*found)
    assert relative(layer_of(models[0])(x).detach(), found[0].detach()) > 0.1
    assert_same(layer_of(models[0]), layer_of(models[1]), x)


@pytest.mark.parametrize("num_tokens", [FEW, MANY])
def test_merged_adapters_are_not_added_twice(num_tokens: int) -> None:
    ours, theirs = both("plain")
    x = inputs(num_tokens).detach()
    before = ours(x).detach()
    for layer in (ours, theirs):
        layer.merge()
    assert relative(ours(x), before) <= 1e-6
    assert relative(ours(x), theirs(x)) <= 1e-6
    ours.unmerge()
    assert goes_short(ours, x)
    assert relative(ours(x).detach(), before) <= 1e-6


@pytest.mark.parametrize("num_tokens", [FEW, MANY])
def test_a_trained_base_gets_its_gradients(num_tokens: int) -> None:
    """PEFT trains biases where ``bias`` says so, and whole weights where somebody unfreezes them."""
    for settings, trained in (({"bias": "all"}, ["bias"]), ({}, ["weight"]), ({}, ["weight", "bias"])):
        layers = both("plain", **settings)
        for layer in layers:
            for name in trained:
                getattr(layer.base_layer, name).requires_grad_(True)
        gradients = assert_same(*layers, inputs(num_tokens))
        assert {f"base_layer.{name}" for name in trained} <= set(gradients)


@pytest.mark.parametrize("num_tokens", [FEW, MANY])
def test_a_base_layer_with_more_to_it_goes_through_its_own_forward(num_tokens: int) -> None:
    class Doubling(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    def subclassed() -> Any:
        layer = Doubling(INPUTS, OUTPUTS)
        layer.load_state_dict(base_layer("plain").state_dict())
        return layer.requires_grad_(False)

    def hooked() -> Any:
        layer = base_layer("plain")
        layer.register_forward_hook(lambda module, args, output: 2 * output)
        return layer

    for make in (subclassed, hooked):
        ours, theirs = (layer_of(wrap(make(), short)) for short in (True, False))
        assert_same(ours, theirs, inputs(num_tokens))


# --- files --------------------------------------------------------------------------------


def test_a_saved_adapter_is_loaded_by_plain_peft_with_the_same_outputs(
    make_llama: Make, make_groups: Make, tmp_path: Path
) -> None:
    model = add_adapter(make_llama(100).requires_grad_(False), LoraParams(r=RANK), seed=0)
    randomise(model)
    short = [module for module in model.modules() if isinstance(module, ShortLinear)]
    assert len(short) == 2 * 7
    save_adapter(model, tmp_path, "mine")
    plain = PeftModel.from_pretrained(make_llama(100), str(tmp_path)).eval()
    assert not any(isinstance(module, ShortLinear) for module in plain.modules())
    assert sum(type(module) is lora.Linear for module in plain.modules()) == 2 * 7
    groups = make_groups(20)
    with torch.no_grad():
        logps = [Scorer(each.eval(), torch.float32, "shared").score(groups).logps_BK for each in (model, plain)]
        bare = Scorer(make_llama(100), torch.float32, "shared").score(groups).logps_BK
    assert (logps[0] - logps[1]).abs().max() <= 1e-4
    assert (logps[0] - bare).abs().max() > 0.1
