"""The probe: the cheapest layout that gives a model's own numbers, found by numbers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AttentionInterface

from dpo_cli.core import environment, paths
from dpo_cli.core.errors import MachineError
from dpo_cli.core.params import RuntimeParams
from dpo_cli.core.training_params import LoraParams
from dpo_cli.data.tokens import TokenGroup
from dpo_cli.models.adapters import add_adapter
from dpo_cli.models.load import load_model
from dpo_cli.scoring import attention, probe, varlen
from dpo_cli.scoring.attention import IMPLEMENTATION, attending, block_attention
from dpo_cli.scoring.probe import (
    TOLERANCE,
    allowed_difference,
    open_scorer,
    probe_groups,
    probe_layouts,
)
from dpo_cli.scoring.scorer import Scorer
from tests.slow_kernel import slow_kernel

Make = Callable[..., Any]

_COMMON = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
RIGHT: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _COMMON),
    "mistral": ("MistralConfig", _COMMON | {"sliding_window": 8}),
}
LEAKY: dict[str, tuple[str, dict[str, Any], str]] = {
    "bloom": (
        "BloomConfig",
        {"vocab_size": 100, "hidden_size": 64, "n_layer": 2, "n_head": 4, "initializer_range": 0.1},
        "off by",
    ),
    "lfm2": (
        "Lfm2Config",
        _COMMON | {"layer_types": ["conv", "full_attention"]},
        "its configuration has layers of conv",
    ),
}
"""Configuration, and why shared will not do: distances along the row, convolutions. The parity tests have more."""
F32 = torch.float32


def build(name: str, values: dict[str, Any]) -> Any:
    """A tiny random model, float32, in eval mode."""
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**values)).eval()


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The layout of every forward pass of a scorer."""
    calls: list[str] = []
    score = Scorer.score

    def counted(self: Scorer, groups: Sequence[TokenGroup], layout: Any = None) -> Any:
        calls.append(layout or self.layout)
        return score(self, groups, layout)

    monkeypatch.setattr(Scorer, "score", counted)
    return calls


@pytest.fixture(autouse=True)
def _quiet(project: Path) -> Iterator[None]:
    """In a project folder, without the libraries' remarks on models that cannot be switched."""
    before = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    yield
    transformers.utils.logging.set_verbosity(before)


@pytest.fixture
def open_(reporter: Any) -> Callable[..., Any]:
    """``open_(model)``: open_scorer in float32, with runtime.layout as given."""

    def open_one(model: Any, layout: Any = "auto", dtype: torch.dtype = F32) -> Any:
        return open_scorer(model, dtype, RuntimeParams(layout=layout), reporter, "train")

    return open_one


# --- which layout -------------------------------------------------------------------------


def test_sums_of_hundreds_of_nats_may_differ_in_their_seventh_digit(open_: Make) -> None:
    """As those of random tokens do in a model that was trained: 20 nats a token."""
    model: Any = build(*RIGHT["llama"])
    with torch.no_grad():
        model.lm_head.weight *= 10
    _, verdict = open_(model)
    assert (verdict.layout, verdict.refused) == ("shared", {})
    assert 2 * TOLERANCE < verdict.tolerance < 0.01


@pytest.mark.parametrize("family", LEAKY)
def test_a_model_whose_texts_would_leak_into_each_other_is_padded_with_the_reason(
    family: str, open_: Make, reporter: Any
) -> None:
    name, values, not_shared = LEAKY[family]
    scorer, verdict = open_(build(name, values))
    assert (scorer.layout, verdict.layout) == ("padded", "padded")
    assert verdict.refused["shared"].startswith(not_shared)
    (line,) = reporter.said
    assert line.startswith(f"train: layout padded; not shared: {not_shared}")
    assert f"; not shared: {not_shared}" in line
    assert "\n" not in line
    assert verdict.metrics()["layout_refused"] == verdict.refused


def test_a_layer_that_fails_is_a_reason_of_one_line(
    open_: Make, make_llama: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no such kernel\nand a long story")

    _replace_attention(monkeypatch, failing)
    scorer, verdict = open_(make_llama(100))
    assert scorer.layout == "padded"
    assert verdict.refused == {"shared": "it fails (no such kernel)"}


def test_a_model_that_drops_positions_is_padded(open_: Make, make_llama: Make) -> None:
    """A completion's positions go on from the prompt's: a model that counts along the row must be noticed."""
    model = make_llama(100)
    forward = model.model.forward
    model.model.forward = lambda position_ids=None, **kwargs: forward(**kwargs)
    scorer, verdict = open_(model)
    assert "shared" in verdict.refused
    assert scorer.layout == "padded"


def _replace_attention(monkeypatch: pytest.MonkeyPatch, function: Callable[..., Any]) -> None:
    monkeypatch.setitem(AttentionInterface._global_mapping, IMPLEMENTATION, function)


def _seeing_the_whole_row(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
    attending().windows.add(None)  # type: ignore[union-attr]
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2), None


def _blind_to_the_window(*args: Any, **kwargs: Any) -> Any:
    return block_attention(*args, **{**kwargs, "sliding_window": None})


def _window_off_by_one(*args: Any, **kwargs: Any) -> Any:
    window = kwargs.pop("sliding_window")
    return block_attention(*args, **kwargs, sliding_window=window and window - 1)


@pytest.mark.parametrize("function", [_seeing_the_whole_row, _blind_to_the_window, _window_off_by_one])
def test_wrong_attention_is_noticed(function: Callable[..., Any], open_: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    _replace_attention(monkeypatch, function)
    scorer, verdict = open_(build(*RIGHT["mistral"]))
    assert scorer.layout == "padded"
    assert all(reason.startswith("off by") for reason in verdict.refused.values())


def test_a_window_that_no_layer_asks_for_is_refused_however_long_it_is(open_: Make, make_llama: Make) -> None:
    """Llama says no window: a configuration that claims one is not done justice, beyond what the probe can see."""
    model = make_llama(100)
    model.config.layer_types = ["sliding_attention", "full_attention"]
    model.config.sliding_window = 4096
    scorer, verdict = open_(model)
    assert scorer.layout == "padded"
    assert set(verdict.refused.values()) == {"its layers do not say which window they slide"}
    chunked = make_llama(100)
    chunked.config.attention_chunk_size = 8192
    assert set(open_(chunked)[1].refused.values()) == {"its attention is in chunks"}


def test_a_model_that_is_not_causal_cannot_be_scored() -> None:
    model = build("XLNetConfig", {"vocab_size": 100, "d_model": 64, "n_layer": 2, "n_head": 4, "d_inner": 96})
    model.eval()
    with pytest.raises(MachineError, match=r"depend on what else is in a batch \(padded: .*cannot be scored"):
        probe_layouts(Scorer(model, F32), model)


def test_what_is_allowed_in_bfloat16_has_a_limit_that_grows_with_the_length() -> None:
    bfloat16 = torch.bfloat16
    assert allowed_difference(1e-6, 20, F32) == pytest.approx(1e-4)
    assert allowed_difference(0.3, 20, F32) == pytest.approx(1.2)
    assert allowed_difference(0.001, 20, bfloat16) == pytest.approx(0.05)
    assert allowed_difference(0.1, 20, bfloat16) == pytest.approx(0.4)
    assert allowed_difference(0.3, 20, bfloat16) == pytest.approx(0.5)
    assert allowed_difference(0.3, 100, bfloat16) == pytest.approx(1.0)
    assert allowed_difference(0.3, 900, bfloat16) == pytest.approx(1.2)


def test_a_noisy_model_is_not_allowed_all_its_noise(make_llama: Make) -> None:
    """Large logits: bfloat16 alone would ask for more than half a nat, and so much may be a wrong layout."""
    model = make_llama(100)
    model.lm_head.weight.data *= 60
    with torch.no_grad(), Scorer(model, torch.bfloat16) as scorer:
        verdict = probe_layouts(scorer, model)
        assert verdict.asked > 0.5
        assert verdict.layout == "padded" or verdict.tolerance == 0.5
        assert "though rounding alone asks for" in verdict.describe()


def test_a_tuned_model_is_probed_with_its_adapter_and_left_in_its_mode(
    open_: Make, make_llama: Make, scored: list[str]
) -> None:
    model = add_adapter(make_llama(100), LoraParams(r=4, dropout=0.3), seed=0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    for mode in (True, False):
        model.train(mode)
        scorer, _ = open_(model)
        assert scorer.layout == "shared"
        assert {module.training for module in model.modules()} == {mode}
    assert scored
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_head_that_the_configuration_does_not_describe_is_named(open_: Make, make_llama: Make, reporter: Any) -> None:
    _, verdict = open_(make_llama(100))
    assert verdict.metrics()["head"] == "linear"
    assert "logits" not in reporter.said[0]
    model = make_llama(100)
    model.config.logit_scale = 2.0  # which it does not read
    for _ in range(2):
        _, verdict = open_(model)
        assert (verdict.layout, verdict.metrics()["head"]) == ("shared", "whole")
        assert reporter.said.pop().endswith(
            "; logits from the model's whole forward: runtime.head_mib cannot bound them"
        )


@pytest.mark.parametrize(("family", "slides"), [("llama", False), ("mistral", True)])
def test_the_kernel_of_the_attention_is_named_and_why_others_are_not(
    family: str, slides: bool, open_: Make, reporter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel that has no windows is refused where the model slides some, and nowhere else."""

    def no_window(*args: Any) -> Any:
        if args[4].window is not None:
            raise NotImplementedError("no window in this version")
        return slow_kernel(*args)

    monkeypatch.setattr(probe, "BFLOAT16_TOLERANCE", 0.2)  # these weights are large
    monkeypatch.setattr(attention, "VARLEN_DEVICES", ("cpu",))
    monkeypatch.setattr(varlen, "VARLEN_KERNELS", {"absent": lambda: None, "old": lambda: no_window})
    varlen._choose.cache_clear()
    for _ in range(2):  # the second time from memory
        scorer, verdict = open_(build(*RIGHT[family]), dtype=torch.bfloat16)
        assert (scorer.layout, verdict.refused) == ("shared", {})
        line = reporter.said.pop()
        if slides:
            assert verdict.attention == "PyTorch's flash kernel for the CPU"
            assert (
                f"; attention by {verdict.attention}; not absent: not installed"
                "; not old: it fails with a window (no window in this version)"
            ) in line
        else:
            assert verdict.metrics()["attention"] == "old"
            assert verdict.metrics()["attention_refused"] == {"absent": "not installed"}
            assert "; attention by old; not absent: not installed" in line
    varlen._choose.cache_clear()


def test_a_model_generates_after_kernels_were_tried_out_on_a_gpu(
    open_: Make, make_llama: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "GPU_TYPES", ("cuda", "cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a GPU")
    for _ in range(2):  # probed, then remembered
        model = make_llama(100)
        scorer, verdict = open_(model)
        assert scorer.layout == "shared"
        assert verdict.attention == "PyTorch's flash kernel for the CPU", "what was tried out is known"
        assert model.config._attn_implementation == scorer.own_attention
        assert model(torch.tensor([[1, 2]])).logits.isfinite().all()


def test_what_nf4_leaves_in_plain_numbers_is_named_with_its_bytes(
    open_: Make, cpu: Any, tmp_path: Path, reporter: Any
) -> None:
    """transformers holds experts as one tensor of three dimensions, and bitsandbytes replaces linear layers."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "head_dim": 16}
    models = {"experts": build("Qwen3MoeConfig", _COMMON | experts), "dense": build(*RIGHT["llama"])}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
        open_(load_model(tmp_path / name, cpu, quantization="nf4"))
    (warning,) = reporter.warned
    assert warning.startswith("train: quantization nf4 is of linear layers alone and leaves 0.00 GiB of weights as")
    assert warning.endswith(": model.layers.*.mlp.experts.gate_up_proj, model.layers.*.mlp.experts.down_proj")
    open_(models["experts"])
    assert len(reporter.warned) == 1, "a plain model leaves nothing"


# --- forced -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "kernel"), [("shared", "PyTorch's flash kernel for the CPU"), ("padded", "the model's own sdpa")]
)
def test_a_layout_can_be_forced(layout: Any, kernel: str, open_: Make, make_llama: Make, reporter: Any) -> None:
    scorer, verdict = open_(make_llama(100), layout)
    assert (scorer.layout, verdict.layout, verdict.refused, verdict.forced) == (layout, layout, {}, True)
    assert reporter.said[0] == f"train: layout {layout} (forced); attention by {kernel}"
    assert (verdict.attention, verdict.attention_refused) == (kernel, {})


@pytest.mark.parametrize("family", ["bloom", "lfm2"])
def test_a_forced_layout_that_is_wrong_is_refused_by_the_name_of_the_setting(family: str, open_: Make) -> None:
    name, values, reason = LEAKY[family]
    for _ in range(2):
        with pytest.raises(MachineError, match=rf"params.yaml: runtime.layout shared is wrong .*: {reason}.*to auto"):
            open_(build(name, values), "shared")


# --- memory -------------------------------------------------------------------------------


@pytest.fixture
def memory(project: Path) -> Path:
    return paths.scratch_root() / "layouts.json"


def test_a_verdict_is_remembered_by_the_configuration(
    open_: Make, make_llama: Make, scored: list[str], memory: Path
) -> None:
    _, first = open_(make_llama(100))
    assert scored
    scored.clear()
    scorer, second = open_(make_llama(100, seed=1))
    assert scored == []
    assert (second, scorer.layout) == (first, "shared")
    assert memory.is_file()


def test_another_configuration_dtype_class_or_force_is_probed_anew(
    open_: Make, make_llama: Make, scored: list[str]
) -> None:
    base = make_llama(100)
    kinds = [
        (base, "auto", F32),
        (make_llama(100, rope_theta=500.0), "auto", F32),
        (make_llama(100, intermediate_size=64), "auto", F32),
        (base, "auto", torch.bfloat16),
        (base, "shared", F32),
        (base, "padded", F32),
        (add_adapter(make_llama(100), LoraParams(r=4), seed=0), "auto", F32),
    ]
    for kind in kinds:
        scored.clear()
        open_(*kind)
        assert scored
    for kind in kinds:
        scored.clear()
        open_(*kind)
        assert scored == []


@pytest.mark.parametrize("damage", [b"{", b"[]", b"\xff\xfe"])
def test_a_damaged_memory_is_survived_and_mended(
    damage: bytes, open_: Make, make_llama: Make, scored: list[str], memory: Path
) -> None:
    memory.parent.mkdir()
    memory.write_bytes(damage)
    open_(make_llama(100))
    assert scored
    scored.clear()
    open_(make_llama(100))
    assert scored == []


@pytest.mark.parametrize("entry", [5, None, {"layout": "shared"}, {"unknown": 1}])
def test_a_damaged_verdict_is_made_anew(
    entry: Any, open_: Make, make_llama: Make, scored: list[str], memory: Path
) -> None:
    _, first = open_(make_llama(100))
    kept = json.loads(memory.read_text())
    (key,) = kept
    memory.write_text(json.dumps({key: entry, "other": kept[key]}))
    scored.clear()
    assert open_(make_llama(100))[1] == first
    assert scored
    assert json.loads(memory.read_text()) == {**kept, "other": kept[key]}


def test_a_scratch_area_that_cannot_be_written_only_costs_the_next_probe(
    open_: Make, make_llama: Make, scored: list[str]
) -> None:
    paths.scratch_root().write_text("a file where a folder should be")
    for _ in range(2):
        scored.clear()
        scorer, _ = open_(make_llama(100))
        assert scorer.layout == "shared"
        assert scored


# --- what is asked ------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [32, 60, 4096])
@pytest.mark.parametrize("window", [None, 8, 300])
def test_the_probe_stays_within_the_positions_that_a_model_knows(
    limit: int, window: int | None, make_llama: Make
) -> None:
    model = make_llama(100, max_position_embeddings=limit, sliding_window=window)
    longest = probe._longest_prompt(model.config)
    assert max(group.longest for group in probe_groups(100, longest)) <= limit
    assert longest <= 600
    if window in (8, 300) and limit > window + 50:
        assert longest > window


def test_a_model_that_gives_nan_is_refused_with_the_tensor(make_llama: Make) -> None:
    model = make_llama(100)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(MachineError, match=r"gives NaN .*: model.layers.1.mlp.up_proj.weight holds NaN or infinity"):
        probe_layouts(Scorer(model, torch.float32, "padded", None), model)
