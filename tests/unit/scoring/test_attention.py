"""Attention within blocks against its definition: a token sees its own text up to itself, and nothing else.

Legend: T tokens of the row, H query heads, G key heads, D head size.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AttentionInterface

from dpo_cli.data.tokens import TokenGroup
from dpo_cli.scoring import attention, varlen
from dpo_cli.scoring.attention import (
    IMPLEMENTATION,
    Attending,
    UnsupportedLayerError,
    attend,
    attending,
    block_attention,
)
from dpo_cli.scoring.layout import Block, Layout, Run, lay_out
from dpo_cli.scoring.pieces import AttentionSettings, batches_of, pieces_of
from dpo_cli.scoring.varlen import attend_varlen, choose_kernel, reason_against, sequences_of
from tests.slow_kernel import slow_kernel
from tests.waiting import NoWaiting

CPU = torch.device("cpu")
HEADS, KEY_HEADS, SIZE = 4, 2, 8
LAYER: Any = SimpleNamespace(is_causal=True)
GROUPS = [
    TokenGroup("a", "a", (11, 12, 13), ((21, 22, 23, 24, 25), (31, 32, 33), (41,))),
    TokenGroup("b", "b", (14,), ((*range(50, 60), 1, 2, 3), (*range(50, 60), 4, 5), (6, 7, 8, 9))),
]
APART = [TokenGroup("", "", group.prompt, (answer,)) for group in GROUPS for answer in group.completions]
"""The same with each completion behind a prompt of its own."""
ROOT = 16**-0.5


# --- by definition ------------------------------------------------------------------------


def texts_of(blocks: Sequence[Block]) -> list[list[int]]:
    """For each position of the row the positions of its text up to itself: its run's, its run's parent's, and so on."""
    texts = []
    for block in blocks:
        starts = list(accumulate((run.length for run in block.runs), initial=block.start))
        for index, run in enumerate(block.runs):
            before: list[int] = []
            parent = run.parent
            while parent >= 0:
                before = [*range(starts[parent], starts[parent + 1]), *before]
                parent = block.runs[parent].parent
            texts += [[*before, *range(starts[index], starts[index] + offset + 1)] for offset in range(run.length)]
    return texts


def visible(blocks: Sequence[Block], window: int | None) -> list[list[int]]:
    return [text if window is None else text[-window:] for text in texts_of(blocks)]


def naive_attention(
    blocks: Sequence[Block],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """[1, T, H, D]: a softmax for each position and head over the keys that it sees, in the dtype of the inputs."""
    rows = []
    for index, keys in enumerate(visible(blocks, window)):
        heads = []
        for head in range(query.shape[1]):
            group = head // (query.shape[1] // key.shape[1])
            scores = key[0, group, keys] @ query[0, head, index] * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            if sinks is not None:
                scores = torch.cat([scores, sinks[head : head + 1]])
            weights = scores.softmax(0)[: len(keys)]
            heads.append(weights @ value[0, group, keys])
        rows.append(torch.stack(heads))
    return torch.stack(rows)[None]


def random_blocks(seed: int) -> tuple[Block, ...]:
    """Some trees of runs, behind each other in one row."""
    rng = random.Random(seed)
    blocks, start = [], 0
    for _ in range(rng.randint(1, 4)):
        runs = tuple(
            Run(rng.randint(1, 7), rng.randrange(index) if index else -1) for index in range(rng.randint(1, 6))
        )
        blocks.append(Block(start, runs))
        start += blocks[-1].length
    return tuple(blocks)


def layout_of(blocks: tuple[Block, ...]) -> Layout:
    nothing = torch.zeros(0, dtype=torch.long)
    num_tokens = sum(block.length for block in blocks)
    row = torch.zeros(1, num_tokens, dtype=torch.long)
    return Layout(row, row, nothing, nothing, None, nothing, nothing, blocks, 1, 1, 0)


def random_inputs(
    num_tokens: int, seed: int = 0, value_size: int = SIZE, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query [1, H, T, D], key [1, G, T, D] and value [1, G, T, value_size]."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((HEADS, SIZE), (KEY_HEADS, SIZE), (KEY_HEADS, value_size))
    query, key, value = (torch.randn(1, h, num_tokens, size, generator=generator).to(dtype) for h, size in shapes)
    return query, key, value


def sequences(*blocks: Block) -> varlen.Sequences:
    return sequences_of([piece for block in blocks for piece in pieces_of(block)], CPU)


def in_layout(blocks: tuple[Block, ...], *inputs: torch.Tensor, **options: Any) -> torch.Tensor:
    with attend(Attending(layout_of(blocks))):
        return block_attention(LAYER, *inputs, None, **options)[0]


# --- values and gradients -----------------------------------------------------------------


@pytest.fixture(params=["each piece by itself", "pieces of like length together"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How pieces go through attention: as on the CPU, or as on a GPU without a variable-length kernel."""
    if request.param != "each piece by itself":
        monkeypatch.setattr(attention, "PIECEWISE_DEVICES", ())
        monkeypatch.setattr(attention, "has_cpu_kernel", lambda query, value: False)
    return request.param


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scaled": {"scaling": 0.7},
    "a window of one": {"sliding_window": 1},
    "a window": {"sliding_window": 4},
    "a wide window": {"sliding_window": 100},
    "a soft cap": {"softcap": 1.5},
    "sinks": {"s_aux": torch.tensor([-1.0, 0.0, 1.0, 2.0])},
    "all": {"scaling": 0.5, "sliding_window": 3, "softcap": 2.0, "s_aux": torch.tensor([0.5, -0.5, 1.0, 0.0])},
}


def expected_of(blocks: tuple[Block, ...], *inputs: torch.Tensor, **options: Any) -> torch.Tensor:
    """The definition in float64."""
    sinks = options.get("s_aux")
    return naive_attention(
        blocks,
        *(tensor.double() for tensor in inputs),
        scale=options.get("scaling", SIZE**-0.5),
        window=options.get("sliding_window"),
        softcap=options.get("softcap"),
        sinks=None if sinks is None else sinks.double(),
    )


@pytest.mark.parametrize("value_size", [SIZE, 5])
@pytest.mark.parametrize("name", OPTIONS)
def test_values_and_gradients_are_those_of_each_text_by_itself(name: str, value_size: int, way: str) -> None:
    options = dict(OPTIONS[name])
    layout = lay_out(GROUPS, "shared")
    inputs = [tensor.requires_grad_() for tensor in random_inputs(layout.num_tokens, value_size=value_size)]
    if "s_aux" in options:
        options["s_aux"] = options["s_aux"].clone().requires_grad_()
    sought = [*inputs, *(value for value in options.values() if isinstance(value, torch.Tensor))]
    ours = in_layout(layout.blocks, *inputs, **options)
    theirs = expected_of(layout.blocks, *inputs, **options)
    assert ours.shape == (1, layout.num_tokens, HEADS, value_size)
    assert ours.dtype == torch.float32
    assert (ours - theirs).abs().max() <= 2e-6
    weights = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1))
    ours_grads = torch.autograd.grad((ours * weights).sum(), sought)
    theirs_grads = torch.autograd.grad((theirs * weights).sum(), sought)
    for ours_grad, theirs_grad in zip(ours_grads, theirs_grads, strict=True):
        assert (ours_grad - theirs_grad).abs().max() <= 1e-5


@pytest.mark.parametrize(("seed", "window"), [(0, None), (1, 3), (2, None), (3, 3)])
def test_any_tree_of_runs_is_attended_as_its_texts_are(seed: int, window: int | None, way: str) -> None:
    blocks = random_blocks(seed)
    inputs = [tensor.requires_grad_() for tensor in random_inputs(sum(block.length for block in blocks), seed)]
    ours = in_layout(blocks, *inputs, sliding_window=window)
    theirs = expected_of(blocks, *inputs, sliding_window=window)
    assert (ours - theirs).abs().max() <= 2e-6
    grads = [torch.autograd.grad(out.sin().sum(), inputs) for out in (ours, theirs)]
    assert all((one - other).abs().max() <= 1e-5 for one, other in zip(*grads, strict=True))


def test_pieces_of_like_length_are_few_batches_of_little_padding() -> None:
    """Of 40 pieces; and nothing is copied to the device that it waits for, which masks are made on."""
    rng = random.Random(0)
    runs = [
        (Run(rng.randint(50, 200), -1), Run(rng.randint(20, 60), 0), Run(rng.randint(20, 60), 0)) for _ in range(20)
    ]
    starts = accumulate((sum(run.length for run in block) for block in runs), initial=0)
    pieces = [piece for start, block in zip(starts, runs, strict=False) for piece in pieces_of(Block(start, block))]
    assert len(pieces) == 40
    batches = batches_of(pieces, None, torch.float32, torch.device("cpu")).batches
    assert len(batches) <= 5
    needed = sum(piece.num_queries * piece.num_keys for piece in pieces)
    assert sum(batch.mask_B1QK.numel() for batch in batches) <= 2 * needed
    assert all(batch.mask_B1QK.shape[-1] % 8 == 0 for batch in batches), "or kernels copy it in every layer"
    with NoWaiting():
        on_device = batches_of(pieces, 30, torch.bfloat16, torch.device("meta"))
    assert {batch.mask_B1QK.device.type for batch in on_device.batches} == {"meta"}


@pytest.mark.parametrize("trained", [(0,), (1,), (2,), (1, 2)])
def test_gradients_do_not_depend_on_which_of_them_are_asked_for(trained: tuple[int, ...]) -> None:
    """LoRA on the values of the first layer alone leaves query and key without a gradient."""
    blocks = lay_out(GROUPS, "shared").blocks
    whole = [tensor.requires_grad_() for tensor in random_inputs(sum(block.length for block in blocks))]
    expected = torch.autograd.grad(in_layout(blocks, *whole).sin().sum(), whole)
    some = [tensor.detach().requires_grad_(index in trained) for index, tensor in enumerate(whole)]
    in_layout(blocks, *some).sin().sum().backward()
    for index, tensor in enumerate(some):
        if index in trained:
            assert tensor.grad is not None
            assert torch.allclose(tensor.grad, expected[index], rtol=0, atol=1e-6)
        else:
            assert tensor.grad is None


def test_bfloat16_goes_in_and_comes_out_and_is_as_close_as_it_can_be() -> None:
    blocks = lay_out(GROUPS, "shared").blocks
    inputs = random_inputs(sum(block.length for block in blocks), dtype=torch.bfloat16)
    for options in ({}, {"sliding_window": 3}, {"softcap": 2.0}):
        ours = in_layout(blocks, *inputs, **options)
        assert ours.dtype == torch.bfloat16
        assert (ours.double() - expected_of(blocks, *inputs, **options)).abs().max() <= 0.02


# --- as transformers calls it -------------------------------------------------------------


def test_the_name_is_registered_and_no_mask_is_built_for_it() -> None:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    assert AttentionInterface()[IMPLEMENTATION] is block_attention
    assert IMPLEMENTATION not in ALL_MASK_ATTENTION_FUNCTIONS


@pytest.mark.parametrize(
    ("layer", "options", "message"),
    [
        (LAYER, {"attention_mask": torch.zeros(1, 1, 14, 14)}, "has a mask or a bias of its own"),
        (LAYER, {"position_bias": torch.zeros(1, 4, 14, 14)}, "has a mask or a bias of its own"),
        (SimpleNamespace(is_causal=False), {}, "has a mask or a bias of its own"),
        (LAYER, {"dropout": 0.1}, "has attention dropout"),
        (LAYER, {}, "attends to more than the row"),
    ],
)
def test_what_blocks_cannot_have_is_refused(layer: Any, options: dict[str, Any], message: str) -> None:
    layout = lay_out(GROUPS, "shared")
    if message == "attends to more than the row":
        layout = lay_out(APART, "shared")
    arguments = {"attention_mask": None} | options
    with attend(Attending(layout)), pytest.raises(UnsupportedLayerError, match=f"SimpleNamespace {message}"):
        block_attention(layer, *random_inputs(lay_out(GROUPS, "shared").num_tokens), **arguments)


@pytest.mark.parametrize("state", [None, Attending(lay_out(GROUPS, "padded"))])
def test_attention_without_blocks_is_an_error_and_not_a_guess(state: Attending | None) -> None:
    with attend(state), pytest.raises(RuntimeError, match="without a layout of blocks"):
        block_attention(LAYER, *random_inputs(5), None)


def test_what_is_attended_is_known_inside_and_restored_outside() -> None:
    outer, inner = (Attending(lay_out(groups, "shared")) for groups in (GROUPS, APART))
    assert attending() is None
    with attend(outer):
        with attend(inner):
            assert attending() is inner
        with pytest.raises(ZeroDivisionError), attend(None):
            assert attending() is None
            raise ZeroDivisionError
        assert attending() is outer
    assert attending() is None


# --- pieces and sequences -----------------------------------------------------------------


def test_sequences_of_a_shared_row_worked_out_by_hand() -> None:
    """The prompts 0-2 and 4, the completions 3 (of 0-2), 5-8 and 9 (of 4).

    0-3 and 4-8 are texts that lie in one piece; 9 is one query, whose text is 4 and 9.
    """
    blocks = (Block(0, (Run(3, -1), Run(1, 0))), Block(4, (Run(1, -1), Run(4, 0), Run(1, 0))))
    found = sequences(*blocks)
    assert found.key_index is not None
    assert found.key_index.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 4, 9]
    assert found.query_starts.tolist() == [0, 4, 9, 10]
    assert found.key_starts.tolist() == [0, 4, 9, 11]
    assert (found.max_queries, found.max_keys) == (5, 5)
    assert found.query_starts.dtype == found.key_starts.dtype == torch.int32


@pytest.mark.parametrize("seed", range(10))
def test_the_last_query_of_a_sequence_sees_its_last_key_and_all_see_what_the_blocks_say(seed: int) -> None:
    """Query i of n sees the first (keys - n + i + 1) keys of its sequence, in the order of its text."""
    blocks = random_blocks(seed)
    found = sequences(*blocks)
    num_tokens = sum(block.length for block in blocks)
    index = list(range(num_tokens)) if found.key_index is None else found.key_index.tolist()
    query_starts, key_starts = found.query_starts.tolist(), found.key_starts.tolist()
    assert (query_starts[-1], key_starts[-1]) == (num_tokens, len(index))
    seen = []
    for (first_query, end_query), (first_key, end_key) in zip(
        pairwise(query_starts), pairwise(key_starts), strict=True
    ):
        num_later = end_query - first_query - 1
        assert num_later >= 0
        seen += [index[first_key : end_key - later] for later in range(num_later, -1, -1)]
    assert seen == texts_of(blocks)
    assert found.max_queries == max(end - begin for begin, end in pairwise(query_starts))
    assert found.max_keys == max(end - begin for begin, end in pairwise(key_starts))


# --- variable-length kernels --------------------------------------------------------------


def without(**fixed: Any) -> Callable[..., torch.Tensor]:
    """The kernel with some of its settings or arguments replaced."""

    def kernel(*args: Any) -> torch.Tensor:
        changes = {name: fixed[name] for name in fixed if name in ("scale", "window", "softcap")}
        wrong = {name: fixed[name] for name in fixed if name not in changes}
        return slow_kernel(*args[:4], replace(args[4], **changes), **wrong)

    return kernel


def raising(error: type[Exception]) -> Callable[..., torch.Tensor]:
    def kernel(*_: Any) -> torch.Tensor:
        raise error("this kernel cannot do it")

    return kernel


@pytest.mark.parametrize(
    ("dtype", "window", "softcap"),
    [(torch.float32, None, None), (torch.bfloat16, 8, None), (torch.bfloat16, None, 30.0), (torch.float16, 8, 30.0)],
)
def test_a_right_kernel_is_taken(dtype: torch.dtype, window: int | None, softcap: float | None) -> None:
    assert reason_against(slow_kernel, CPU, dtype, 16, AttentionSettings(ROOT, window, softcap)) is None


WRONG: dict[str, Callable[..., torch.Tensor]] = {
    "aligned at the start": without(align="start"),
    "without the window": without(window=None),
    "with another window": lambda q, k, v, s, settings: slow_kernel(
        q, k, v, s, replace(settings, window=settings.window and settings.window + 1)
    ),
    "with another scale": without(scale=1.0),
    "with the wrong heads": without(grouped=False),
    "of nothing": lambda q, *_: q * torch.nan,
    **{f"that raises {error.__name__}": raising(error) for error in (RuntimeError, NotImplementedError, TypeError)},
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_kernel_is_refused_and_the_reason_given(name: str) -> None:
    reason = reason_against(WRONG[name], CPU, torch.bfloat16, 16, AttentionSettings(ROOT, 8))
    raises = "that raises" in name
    assert reason is not None
    assert reason.startswith("it fails with a window (this kernel" if raises else "its output is off with a window by ")
    without_window = reason_against(WRONG[name], CPU, torch.bfloat16, 16, AttentionSettings(ROOT))
    assert (without_window is None) == (name in ("without the window", "with another window"))


@pytest.mark.parametrize("share", [0.5, 0.0])
@pytest.mark.parametrize(("place", "what"), enumerate(("queries", "keys", "values")))
def test_a_kernel_whose_gradients_are_wrong_or_missing_is_refused(place: int, what: str, share: float) -> None:
    def part_of_a_gradient(*args: Any) -> torch.Tensor:
        whole = args[place].detach()
        part = share * args[place] + (1 - share) * whole if share else whole
        return slow_kernel(*args[:place], part, *args[place + 1 :])

    reason = reason_against(part_of_a_gradient, CPU, torch.bfloat16, 16, AttentionSettings(ROOT))
    assert reason is not None
    assert reason.startswith(f"its gradient of {what} is off by ")


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Callable[[], Any]]]:
    """The kernels that are looked for, to be filled by a test."""
    found: dict[str, Callable[[], Any]] = {}
    monkeypatch.setattr(varlen, "VARLEN_KERNELS", found)
    varlen._choose.cache_clear()
    yield found
    varlen._choose.cache_clear()


def test_a_kernel_that_ignores_the_soft_cap_of_a_model_is_not_used_for_it(
    kernels: dict[str, Callable[[], Any]],
) -> None:
    """Gemma 2 caps at 50, which hardly bends scores of unit size: the check must ask in a way that shows it."""
    kernels["deaf"] = lambda: without(softcap=None)
    query = torch.zeros(1, HEADS, 1, 16, dtype=torch.bfloat16)
    assert choose_kernel(query, query, AttentionSettings(ROOT)).name == "deaf"
    assert choose_kernel(query, query, AttentionSettings(ROOT, softcap=50.0)).name is None


def test_the_first_right_kernel_that_is_there_is_used_and_checked_once(kernels: dict[str, Callable[[], Any]]) -> None:
    made: list[str] = []

    def offer(name: str, kernel: Any) -> Callable[[], Any]:
        def make() -> Any:
            made.append(name)
            return kernel

        return make

    kernels.update(
        missing=offer("missing", None),
        wrong=offer("wrong", without(align="start")),
        right=offer("right", slow_kernel),
        later=offer("later", raising(RuntimeError)),
    )
    half = torch.zeros(1, HEADS, 1, 16, dtype=torch.bfloat16)
    for _ in range(2):
        found = choose_kernel(half, half, AttentionSettings(ROOT))
        assert (found.name, found.kernel) == ("right", slow_kernel)
        assert found.refused.keys() == {"missing", "wrong"}
        assert found.refused["missing"] == "not installed"
        assert found.refused["wrong"].startswith("its output is off by ")
    assert made == ["missing", "wrong", "right"]


def test_float32_and_values_of_another_size_go_block_by_block(kernels: dict[str, Callable[[], Any]]) -> None:
    kernels["right"] = lambda: slow_kernel
    half = torch.zeros(1, HEADS, 1, 16, dtype=torch.bfloat16)
    assert choose_kernel(half, half, AttentionSettings(ROOT)).kernel is slow_kernel
    assert choose_kernel(half.float(), half.float(), AttentionSettings(ROOT)).refused == {
        "right": "numbers are float32"
    }
    assert choose_kernel(half, half[..., :8], AttentionSettings(ROOT)).refused == {
        "right": "values are of another size than queries"
    }
    kernels.clear()
    varlen._choose.cache_clear()
    assert choose_kernel(half, half, AttentionSettings(ROOT)).kernel is None


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("window", [None, 4])
def test_what_computes_a_layers_attention_is_noted_and_what_does_not(
    window: int | None, sinks: bool, kernels: dict[str, Callable[[], Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "VARLEN_DEVICES", ("cpu",))
    kernels |= {"missing": lambda: None, "fake": lambda: slow_kernel}
    layout = lay_out(GROUPS, "shared")
    state = Attending(layout)
    halves = [tensor.bfloat16() for tensor in random_inputs(layout.num_tokens)]
    extra = {"s_aux": torch.zeros(HEADS)} if sinks else {}
    with attend(state):
        found = block_attention(LAYER, *halves, None, sliding_window=window, **extra)[0]
    exact = naive_attention(
        layout.blocks,
        *(half.double() for half in halves),
        scale=SIZE**-0.5,
        window=window,
        sinks=torch.zeros(HEADS).double() if sinks else None,
    )
    assert (found.double() - exact).abs().max() <= 0.05
    if sinks:
        assert (state.kernels, state.refused) == (
            {"matrix products"},
            dict.fromkeys(kernels, "its layers have sinks"),
        )
    else:
        assert (state.kernels, state.refused) == ({"fake"}, {"missing": "not installed"})


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (1, None), (4, 1.5), (100, None)])
def test_sequences_and_blocks_give_the_same_values_and_gradients(window: int | None, softcap: float | None) -> None:
    layout = lay_out(GROUPS, "shared")
    inputs = [tensor.requires_grad_() for tensor in random_inputs(layout.num_tokens)]
    settings = AttentionSettings(0.4, window, softcap)
    ours = attend_varlen(slow_kernel, sequences(*layout.blocks), *inputs, settings)[None]
    theirs = in_layout(layout.blocks, *inputs, scaling=0.4, sliding_window=window, softcap=softcap)
    assert (ours - theirs).abs().max() <= 2e-6
    weights = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1))
    grads = [torch.autograd.grad((out * weights).sum(), inputs) for out in (ours, theirs)]
    assert all((one - other).abs().max() <= 1e-5 for one, other in zip(*grads, strict=True))
