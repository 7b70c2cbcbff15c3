"""Shared = padded = one by one, in log-probabilities and in gradients.

*One by one* is the plainest thing that can be written: a second model with the same weights and the attention that
transformers gives it, one completion at a time behind its prompt, a log-softmax over all logits and a sum.

For weights w the compared gradients are those of

    f(theta) = sum over groups b and completions k of w_bk * log pi_theta(completion_bk | prompt_b),

so a completion that leaks into another one changes both f and its gradient. The models are tiny and their weights
large: a key too many in one layer moves a log-probability by more than 0.01 nats, a hundred times what is allowed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from dpo_cli.core.params import RuntimeParams
from dpo_cli.core.training_params import LoraParams
from dpo_cli.data.tokens import TokenGroup
from dpo_cli.models.adapters import add_adapter
from dpo_cli.models.load import keep_weights_unpacked, load_model
from dpo_cli.scoring.attention import IMPLEMENTATION, block_attention
from dpo_cli.scoring.layout import LAYOUTS, MIN_SHARED_TOKENS, Layout, LayoutName, Run, lay_out
from dpo_cli.scoring.probe import open_scorer
from dpo_cli.scoring.scorer import Scorer

VOCABULARY = 128
LOGP_TOLERANCE = 1e-4
"""Nats, on sums over a completion."""
GRADIENT_TOLERANCE = 1e-5
"""Norm of the difference by norm of the gradient."""
WEIGHT_STD = 0.15
MEASURABLE = 0.01
"""Nats by which attention that is wrong on purpose must move some log-probability."""

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
_WIDE_HEADS = _COMMON | {"head_dim": 16}
_ALL_HEADS = {name: value for name, value in _COMMON.items() if name != "num_key_value_heads"}
_TOKENS = {"vocab_size": VOCABULARY, "bos_token_id": None, "eos_token_id": 1}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32, "num_experts": 4}

EXACT: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", _COMMON),
    "qwen2": ("Qwen2", _COMMON),
    "qwen3": ("Qwen3", _WIDE_HEADS),
    "mistral": ("Mistral", _WIDE_HEADS | {"sliding_window": 5}),
    "gemma2": (
        "Gemma2",
        _WIDE_HEADS
        | {
            "query_pre_attn_scalar": 16,
            "final_logit_softcapping": 2.0,
            "attn_logit_softcapping": 3.0,
            "sliding_window": 4,
        },
    ),
    "gemma3": ("Gemma3Text", _WIDE_HEADS | {"query_pre_attn_scalar": 16, "sliding_window": 4, "num_hidden_layers": 7}),
    "phi3": ("Phi3", _COMMON),
    "granite": (
        "Granite",
        _COMMON
        | {
            "logits_scaling": 4.0,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.3,
        },
    ),
    "cohere": ("Cohere", _COMMON | {"logit_scale": 0.3}),
    "gpt2": ("GPT2", _TOKENS | {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}),
    "gpt_neox": ("GPTNeoX", _ALL_HEADS),
    "gpt_oss": ("GptOss", _WIDE_HEADS | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4}),
    "mixtral": ("Mixtral", _COMMON | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": ("Qwen3Moe", _WIDE_HEADS | _EXPERTS),
}
"""Families that every layout is right for."""

WINDOWED = ("mistral", "gemma2", "gemma3", "gpt_oss")

NEEDS_PADDING: dict[str, tuple[str, dict[str, Any]]] = {
    "lfm2": ("Lfm2", _COMMON | {"layer_types": ["conv", "full_attention"]}),
    "qwen3_next": (
        "Qwen3Next",
        _WIDE_HEADS
        | _EXPERTS
        | {
            "shared_expert_intermediate_size": 32,
            "num_hidden_layers": 4,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
        },
    ),
    "bloom": ("Bloom", _TOKENS | {"hidden_size": 64, "n_layer": 2, "n_head": 4}),
    "mpt": ("Mpt", _TOKENS | {"d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 256}),
    "falcon": (
        "Falcon",
        _TOKENS | {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": True},
    ),
    "llama4": (
        "Llama4Text",
        _WIDE_HEADS
        | {
            "num_hidden_layers": 4,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "attention_chunk_size": 8,
            "intermediate_size_mlp": 96,
        },
    ),
}
"""Families with state that runs along a row, distances counted along it, or attention in chunks of it."""


def build(family: str) -> Any:
    """A tiny random model of a family, float32, in eval mode; the same weights every time.

    Biases and sinks, which begin at nearly 0, are drawn as well.
    """
    name, values = (EXACT | NEEDS_PADDING)[family]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, name + "Config")(**values))
    for parameter_name, parameter in model.named_parameters():
        if parameter.ndim > 1 or parameter_name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=WEIGHT_STD)
        elif parameter_name.endswith("sinks"):
            torch.nn.init.normal_(parameter)
    return model.eval()


def groups_of(num_completions: int, *, alike: bool) -> list[TokenGroup]:
    """Four groups of uneven lengths, most of them longer than any window.

    Where alike, all completions of a group but the last begin with the same tokens, the first two go on alike for a
    while, and in the last group the second one is the whole beginning of the first.
    """
    rng = random.Random(f"{num_completions} {alike}")

    def tokens(shortest: int, longest: int) -> tuple[int, ...]:
        return tuple(rng.randrange(2, VOCABULARY) for _ in range(rng.randint(shortest, longest)))

    groups = []
    for number, num_prompt in enumerate((1, 3, 12, 20)):
        common, further = tokens(MIN_SHARED_TOKENS, 11), tokens(MIN_SHARED_TOKENS, 10)
        completions = [tokens(1, 14) for _ in range(num_completions)]
        if alike:
            completions[:-1] = [common + completion for completion in completions[:-1]]
            completions[:2] = [common + further + completion for completion in completions[:2]]
            if number == 3:
                completions[0] = completions[1] + tokens(3, 3)
        prompt = tokens(num_prompt, num_prompt)
        groups.append(TokenGroup(f"row{number}", f"prompt{number}", prompt, tuple(completions)))
    return groups


CASES = [(1, False), (2, True), (5, False), (5, True)]
"""Completions a group, and whether they begin alike."""


@dataclass(frozen=True)
class Result:
    """Log-probabilities float64 [B, K], and gradients of their weighted sum by parameter."""

    logps_BK: torch.Tensor
    gradients: dict[str, torch.Tensor]

    @classmethod
    def of(cls, model: Any, logps_BK: torch.Tensor) -> Result:
        """Differentiate the weighted sum; weights of both signs, as a preference loss has."""
        generator = torch.Generator().manual_seed(0)
        weights = torch.randn(logps_BK.shape, dtype=torch.float64, generator=generator)
        model.zero_grad()
        (logps_BK * weights).sum().backward()
        gradients = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
        return cls(logps_BK.detach(), gradients)


def one_by_one(model: Any, groups: Sequence[TokenGroup]) -> torch.Tensor:
    """float64 [B, K]: log pi(completion | prompt) = sum over i of log softmax(logits_i)[token_i]."""
    sums = []
    for group in groups:
        begin = len(group.prompt)
        for completion in group.completions:
            logits = model(input_ids=torch.tensor([[*group.prompt, *completion]]), use_cache=False).logits[0]
            logps = logits.float().log_softmax(-1)
            sums.append(sum(logps[begin - 1 + i, token].double() for i, token in enumerate(completion)))
    return torch.stack(sums).view(len(groups), -1)


def all_ways(make: Callable[[], Any], groups: Sequence[TokenGroup]) -> dict[str, Result]:
    """The result of every layout, and one by one, each of its own fresh model."""
    model = make()
    results = {"one by one": Result.of(model, one_by_one(model, groups))}
    for layout in LAYOUTS:
        model = make()
        with Scorer(model, torch.float32, layout) as scorer:
            assert scorer.head == "linear", "the bounded head should know this family's logits"
            results[layout] = Result.of(model, scorer.score(groups).logps_BK)
    return results


def gradient_difference(ours: Result, theirs: Result) -> float:
    """Norm of the difference of all gradients by the norm of theirs."""
    assert ours.gradients.keys() == theirs.gradients.keys()
    ours_all, theirs_all = (torch.cat([g.flatten() for g in r.gradients.values()]) for r in (ours, theirs))
    return ((ours_all - theirs_all).norm() / theirs_all.norm()).item()


def worst_parameter(ours: Result, theirs: Result) -> float:
    """Largest relative difference of one parameter's gradient, where it is no rounding noise beside the others'.

    The bias of a key adds the same to all scores of a query, so its gradient is 0 but for rounding.
    """
    largest = max(gradient.norm().item() for gradient in theirs.gradients.values())
    return max(
        ((ours.gradients[name] - gradient).norm() / max(gradient.norm().item(), 0.01 * largest)).item()
        for name, gradient in theirs.gradients.items()
    )


def assert_all_agree(results: dict[str, Result]) -> None:
    """Every two ways agree."""
    for (ours, our_result), (theirs, their_result) in combinations(results.items(), 2):
        pair = f"{ours} and {theirs}"
        assert (our_result.logps_BK - their_result.logps_BK).abs().max() <= LOGP_TOLERANCE, pair
        assert gradient_difference(our_result, their_result) <= GRADIENT_TOLERANCE, pair
        assert worst_parameter(our_result, their_result) <= GRADIENT_TOLERANCE, pair


# --- every family -------------------------------------------------------------------------


@pytest.mark.parametrize(("num_completions", "alike"), CASES)
@pytest.mark.parametrize("family", EXACT)
def test_all_layouts_give_what_one_completion_at_a_time_gives(family: str, num_completions: int, alike: bool) -> None:
    """For pairs below a frozen head, which goes the other way: its gradient is taken in the forward pass."""

    def make() -> Any:
        model = build(family)
        model.get_output_embeddings().requires_grad_(num_completions != 2)
        return model

    results = all_ways(make, groups_of(num_completions, alike=alike))
    expected = results["one by one"]
    assert expected.logps_BK.std() > 1
    assert expected.gradients.keys() == {name for name, value in make().named_parameters() if value.requires_grad}
    assert_all_agree(results)


@pytest.mark.parametrize("num_completions", [2, 5])
def test_each_layout_does_less_than_the_one_behind_it(num_completions: int) -> None:
    """Otherwise the comparison would be of one thing with itself."""
    different, alike = groups_of(num_completions, alike=False), groups_of(num_completions, alike=True)
    for groups in (different, alike):
        sizes = [lay_out(groups, layout).num_tokens for layout in LAYOUTS]
        assert sizes == sorted(set(sizes))
    assert all(len(block.runs) > num_completions for block in lay_out(alike, "shared").blocks[:3])


@pytest.mark.parametrize("family", EXACT)
def test_the_probe_lets_them_share(family: str, project: Path, reporter: Any) -> None:
    scorer, verdict = open_scorer(build(family), torch.float32, RuntimeParams(), reporter, "train")
    with scorer:
        assert (scorer.layout, verdict.refused) == ("shared", {})
    assert verdict.difference <= LOGP_TOLERANCE


# --- 4-bit weights ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a saved model, some of whose layers have a bias."""
    path = tmp_path_factory.mktemp("qwen2")
    build("qwen2").save_pretrained(path)
    return path


@pytest.mark.parametrize(("num_completions", "alike"), CASES)
def test_they_agree_on_an_adapter_on_4_bit_weights(folder: Path, num_completions: int, alike: bool, cpu: Any) -> None:
    def make() -> Any:
        model = add_adapter(load_model(folder, cpu, quantization="nf4"), LoraParams(r=4, alpha=8.0), seed=0)
        keep_weights_unpacked(model)
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        return model.eval()

    results = all_ways(make, groups_of(num_completions, alike=alike))
    names = results["one by one"].gradients
    assert names.keys() == {name for name, value in make().named_parameters() if value.requires_grad}
    assert all("lora_" in name and gradient.norm() > 0 for name, gradient in names.items())
    assert_all_agree(results)


# --- families that only padding is right for ----------------------------------------------


@pytest.mark.parametrize("family", NEEDS_PADDING)
def test_the_probe_falls_back_to_padding_and_the_numbers_are_right(family: str, project: Path, reporter: Any) -> None:
    scorer, verdict = open_scorer(build(family), torch.float32, RuntimeParams(), reporter, "train")
    assert (scorer.layout, verdict.layout, verdict.forced) == ("padded", "padded", False)
    assert verdict.refused.keys() == {"shared"}
    assert len(reporter.said) == 1
    assert "layout padded" in reporter.said[0]
    for num_completions, alike in CASES:
        groups = groups_of(num_completions, alike=alike)
        with torch.no_grad():
            expected = one_by_one(build(family), groups)
            assert (scorer.score(groups).logps_BK - expected).abs().max() <= LOGP_TOLERANCE


@pytest.mark.parametrize("family", ["lfm2", "bloom", "llama4"])
def test_what_the_probe_refuses_is_wrong_indeed(family: str) -> None:
    groups = groups_of(2, alike=True)
    with torch.no_grad():
        expected = one_by_one(build(family), groups)
        with Scorer(build(family), torch.float32, "shared") as scorer:
            assert (scorer.score(groups).logps_BK - expected).abs().max() > MEASURABLE


# --- the comparison can fail --------------------------------------------------------------


@pytest.fixture
def leak_siblings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every run goes on from the one before it in the row, so a completion sees those written before it."""

    def leaky(groups: Sequence[TokenGroup], name: LayoutName) -> Layout:
        layout = lay_out(groups, name)
        blocks = [
            replace(block, runs=tuple(Run(run.length, number - 1) for number, run in enumerate(block.runs)))
            for block in layout.blocks
        ]
        return replace(layout, blocks=tuple(blocks))

    monkeypatch.setattr("dpo_cli.scoring.scorer.lay_out", leaky)


@pytest.fixture(params=["ignored", "one wider"])
def wrong_windows(request: pytest.FixtureRequest) -> Iterator[None]:
    """Layers get another window than they ask for."""

    def wrong(*args: Any, sliding_window: int | None = None, **kwargs: Any) -> Any:
        if sliding_window is not None:
            sliding_window = None if request.param == "ignored" else sliding_window + 1
        return block_attention(*args, sliding_window=sliding_window, **kwargs)

    transformers.AttentionInterface.register(IMPLEMENTATION, wrong)
    yield
    transformers.AttentionInterface.register(IMPLEMENTATION, block_attention)


def assert_seen(family: str, layouts: Sequence[LayoutName]) -> None:
    """These layouts are off, by far, and the comparison says so."""
    results = all_ways(lambda: build(family), groups_of(2, alike=False))
    expected = results["one by one"]
    for layout in layouts:
        assert (results[layout].logps_BK - expected.logps_BK).abs().max() > MEASURABLE
        assert gradient_difference(results[layout], expected) > 100 * GRADIENT_TOLERANCE
        with pytest.raises(AssertionError):
            assert_all_agree({name: results[name] for name in ("one by one", layout)})


@pytest.mark.parametrize("family", EXACT)
def test_completions_that_see_each_other_are_noticed(family: str, leak_siblings: None) -> None:
    assert_seen(family, ["shared"])


@pytest.mark.parametrize("family", WINDOWED)
def test_windows_that_are_not_kept_are_noticed(family: str, wrong_windows: None) -> None:
    assert_seen(family, ["shared"])


def test_positions_that_do_not_go_on_from_the_prompt_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def numbered_along_the_row(groups: Sequence[TokenGroup], name: LayoutName) -> Layout:
        layout = lay_out(groups, name)
        return layout if name == "padded" else replace(layout, positions_RT=torch.arange(layout.num_tokens)[None])

    monkeypatch.setattr("dpo_cli.scoring.scorer.lay_out", numbered_along_the_row)
    assert_seen("llama", ["shared"])
    assert_seen("gpt2", ["shared"])
