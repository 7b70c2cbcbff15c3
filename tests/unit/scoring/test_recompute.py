"""What the backward pass computes again: the same gradients, and no product twice where none should be."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dpo_cli.core.training_params import LoraParams
from dpo_cli.data.tokens import TokenGroup
from dpo_cli.models.adapters import add_adapter
from dpo_cli.models.load import load_model
from dpo_cli.scoring.layout import LAYOUTS, LayoutName
from dpo_cli.scoring.recompute import (
    GRADES,
    CannotRecomputeError,
    KeptBytes,
    MemoryPlan,
    Recompute,
    StepShape,
    measure_kept,
    plan_memory,
    set_recompute,
)
from dpo_cli.scoring.scorer import Scorer
from tests.live_memory import LiveMemory

Make = Callable[..., Any]

VOCABULARY = 100


@pytest.fixture
def groups(make_groups: Make) -> list[TokenGroup]:
    return make_groups(6, completions=3, completion_lengths=(4, 12))


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


class Products(TorchDispatchMode):
    """Counts matrix products over tokens and attention, by name and by the shapes of what goes in.

    A product of weights alone, an adapter's update B A on top of a weight, is small and has no tokens in it.
    """

    _NAMES = ("mm", "addmm", "bmm", "baddbmm", "_scaled_dot_product_flash_attention_for_cpu")

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.counts: Counter[tuple[Any, ...]] = Counter()
        self._weights = {parameter.shape for parameter in model.parameters()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__.rstrip("_")
        shapes = [arg.shape for arg in args if isinstance(arg, torch.Tensor)]
        is_product = name in self._NAMES or name.endswith("for_cpu_backward")
        if is_product and not all(shape in self._weights for shape in shapes):
            self.counts[name, *map(tuple, shapes)] += 1
        return func(*args, **(kwargs or {}))


def count_products(
    model: Any, grade: Recompute, groups: list[TokenGroup], layout: LayoutName
) -> tuple[Counter[Any], Counter[Any]]:
    """Products of the forward and of the backward pass.

    Checkpointing makes the first layer's input require a gradient, which costs a few products in the
    backward pass; here the embeddings require one in any case, so that they count for every grade.
    """
    set_recompute(model, grade)
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_())
    scorer = Scorer(model, torch.float32, layout)
    with Products(model) as forward:
        logps = scorer.score(groups).logps_BK
    with Products(model) as backward:
        logps.sum().backward()
    return forward.counts, backward.counts


# --- the same gradients -------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_grades_give_the_same_log_probabilities_and_gradients(
    layout: LayoutName, dtype: torch.dtype, make_tuned: Make, groups: list[TokenGroup]
) -> None:
    results = []
    for grade in GRADES:
        model = make_tuned()
        set_recompute(model, grade)
        logps = Scorer(model, dtype, layout).score(groups).logps_BK
        (logps * torch.linspace(-1, 1, 3, dtype=torch.float64)).sum().backward()
        results.append((logps.detach(), gradients(model)))
    (logps, expected), *others = results
    assert len(expected) == 2 * 2 * 7
    for other_logps, other in others:
        assert torch.equal(other_logps, logps)
        assert other.keys() == expected.keys()
        for name, gradient in expected.items():
            assert (other[name] - gradient).norm() <= 1e-6 * gradient.norm(), name


def test_four_bit_weights_give_the_same_gradients_too(tiny_folder: Path, cpu: Any, groups: list[TokenGroup]) -> None:
    results = []
    for grade in GRADES:
        model = add_adapter(load_model(tiny_folder, cpu, quantization="nf4"), LoraParams(r=4), seed=0).train()
        set_recompute(model, grade)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.fill_(0.05)
        Scorer(model, torch.float32, "shared").score(groups).logps_BK[:, 0].sum().backward()
        results.append(gradients(model))
    for other in results[1:]:
        assert len(other) == 2 * 2 * 7
        for name, gradient in results[0].items():
            assert (other[name] - gradient).norm() <= 1e-6 * gradient.norm(), name


def test_a_grade_can_be_taken_back(make_tuned: Make, groups: list[TokenGroup]) -> None:
    model = make_tuned()
    expected = count_products(model, "none", groups, "shared")
    for grade in ("elementwise", "layers", "none"):
        found = count_products(model, grade, groups, "shared")
    assert found == expected


def test_without_gradients_nothing_is_computed_twice(make_tuned: Make, groups: list[TokenGroup]) -> None:
    counts = []
    for grade in GRADES:
        model = make_tuned().eval()
        set_recompute(model, grade)
        scorer = Scorer(model, torch.float32, "shared")
        with torch.no_grad(), Products(model) as products:
            scorer.score(groups)
        counts.append(products.counts)
    assert counts[0] == counts[1] == counts[2]


# --- what is done twice -------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_elementwise_does_no_product_twice(layout: LayoutName, make_tuned: Make, groups: list[TokenGroup]) -> None:
    none = count_products(make_tuned(), "none", groups, layout)
    elementwise = count_products(make_tuned(), "elementwise", groups, layout)
    assert sum(none[0].values()) > 14
    assert any("attention" in name for name, *_ in none[0])
    assert elementwise == none


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layers_does_the_products_of_the_layers_twice_and_no_others(
    layout: LayoutName, make_tuned: Make, groups: list[TokenGroup]
) -> None:
    """The repetition may stop before the last product of a layer, whose output nothing needs; the head is no layer."""
    forward, none = count_products(make_tuned(), "none", groups, layout)
    forward_again, layers = count_products(make_tuned(), "layers", groups, layout)
    assert forward_again == forward
    of_layers = Counter({key: count for key, count in forward.items() if not any(VOCABULARY in s for s in key[1:])})
    assert sum(forward.values()) > sum(of_layers.values()) > 14
    assert none - layers == Counter()
    again = layers - none
    assert again - of_layers == Counter()
    assert sum((of_layers - again).values()) <= 2 * 3
    for key, count in of_layers.items():
        if "attention" in key[0]:
            assert again[key] == count


def test_a_model_that_cannot_compute_again_says_so(make_tuned: Make) -> None:
    model = make_tuned()
    model.get_base_model().supports_gradient_checkpointing = False
    set_recompute(model, "none")
    for grade in ("elementwise", "layers"):
        with pytest.raises(CannotRecomputeError, match="LlamaForCausalLM cannot compute its activations again"):
            set_recompute(model, grade)


# --- how much is kept ---------------------------------------------------------------------


SHAPE = {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 6, "max_position_embeddings": 512}


def text_of(size: int) -> TokenGroup:
    text = tuple(3 + (7 * place) % 90 for place in range(size))
    return TokenGroup("text", "text", text[: size // 2], (text[size // 2 :],))


HEAD_BYTES = 64 << 10


def measure(model: Any, dtype: torch.dtype = torch.float32) -> KeptBytes:
    """As stage train does it."""
    scorer = Scorer(model, dtype, "shared", HEAD_BYTES)
    set_recompute(model, "none")

    def forward(size: int) -> int:
        scorer.score([text_of(size)])
        return size - 1

    return measure_kept(model, forward, SHAPE["num_hidden_layers"], HEAD_BYTES)


def live_after_forward(model: Any, grade: Recompute, size: int, layout: LayoutName = "shared") -> int:
    """Bytes that live between forward and backward, of a text of so many tokens."""
    scorer = Scorer(model, torch.float32, layout)
    set_recompute(model, grade)
    scorer.score([text_of(size)])  # whatever is made once and kept is there then
    with LiveMemory() as memory:
        scores = scorer.score([text_of(size)])
        num_bytes = memory.live
    assert scores.logps_BK.requires_grad
    return num_bytes


@pytest.mark.parametrize("size", [100, 300])
def test_no_grade_keeps_more_than_the_one_before(size: int, make_tuned: Make) -> None:
    """However few tokens there are: what is kept has a row for each of them, and no weight is kept anew."""
    model = make_tuned(**SHAPE)
    found = [live_after_forward(model, grade, size) for grade in GRADES]
    assert found[0] >= found[1] >= found[2] > 0


@pytest.mark.parametrize("grade", GRADES)
@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 400), (torch.bfloat16, 200)])
def test_the_estimate_is_of_the_most_that_lives(
    grade: Recompute, dtype: torch.dtype, size: int, make_tuned: Make
) -> None:
    """In forward and backward pass, in both dtypes: what goes from layer to layer is not always float32."""
    model = make_tuned(**SHAPE)
    if dtype == torch.bfloat16:
        for parameter in model.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
    estimate = measure(model, dtype).of(grade, size - 1)
    scorer = Scorer(model, dtype, "shared", HEAD_BYTES)
    set_recompute(model, grade)
    scorer.score([text_of(size)])  # whatever is made once and kept is there then
    with LiveMemory() as memory:
        scorer.score([text_of(size)]).logps_BK.sum().backward()
    assert 0.75 * memory.peak <= estimate <= 1.15 * memory.peak


def test_measuring_leaves_no_gradients_and_no_memory(make_tuned: Make) -> None:
    model = make_tuned(**SHAPE)
    measure(model)
    with LiveMemory() as memory:
        measure(model)
        gc.collect()
        assert memory.live <= 64 << 10
    assert gradients(model) == {}


KEPT = KeptBytes(0.0, {"none": 100.0, "elementwise": 60.0, "layers": 10.0})
STEP = StepShape(mean_tokens=3400.0, most_tokens=3500, longest_group=300)
BUDGETS = (1024, 2048, 4096)


def plan(free: float, step: StepShape = STEP, grades: Any = GRADES, budgets: Any = BUDGETS, **model: Any) -> MemoryPlan:
    """For layers of an 8B model in 4 bits."""
    return plan_memory(KEPT, step, free, grades, budgets, **{"layer_weights": 218e6, "is_quantized": True} | model)


def test_the_fastest_that_fits_is_taken() -> None:
    """Less memory first costs smaller micro-batches, and the products of the layers only where those do not do."""
    found = [plan(free) for free in (350_000, 349_999, 204_800, 204_799, 102_399, 61_440, 61_439, 10_240)]
    assert [(each.grade, each.max_tokens) for each in found] == [
        ("none", 4096),
        ("none", 2048),
        ("none", 2048),
        ("none", 1024),
        ("elementwise", 1024),
        ("elementwise", 1024),
        ("layers", 4096),
        ("layers", 1024),
    ]
    assert all(each.fits for each in found)


def test_a_budget_is_judged_by_the_largest_micro_batch_that_can_occur() -> None:
    """No step has 4096 tokens, so 3500 must fit; and a group is never cut."""
    assert plan(350_000, budgets=(4096,), grades=("none",)).num_bytes == 350_000
    long = StepShape(mean_tokens=3400.0, most_tokens=9000, longest_group=2500)
    assert plan(1e9, long, budgets=(1024,), grades=("layers",)).num_bytes == 25_000


def test_where_nothing_fits_the_smallest_is_taken() -> None:
    found = plan(100)
    assert (found.grade, found.max_tokens, found.fits) == ("layers", 1024, False)


def test_a_small_model_takes_all_of_a_step_at_once() -> None:
    """The GPU waits for the host there, which works longest where everything but products is computed again."""
    step = StepShape(mean_tokens=14_000.0, most_tokens=15_000, longest_group=300)
    budgets = (*BUDGETS, 8192, 16384)
    small = {"layer_weights": 15e6, "is_quantized": True}
    assert plan(1e9, step, budgets=budgets, **small).max_tokens == 16384
    tight = plan(500_000, step, budgets=budgets, **small)
    assert tight.grade != "elementwise", "it would fit at 8192"
    assert plan(1e9, step, budgets=budgets, **small).grade == "none"
