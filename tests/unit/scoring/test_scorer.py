"""The one scorer against the plainest thing that can be written: a forward pass a row and a log-softmax."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import transformers

from dpo_cli.data.tokenise import TokenGroup
from dpo_cli.scoring import head
from dpo_cli.scoring.head import LogitTransform
from dpo_cli.scoring.layout import split_by_tokens
from dpo_cli.scoring.scorer import Scorer

VOCABULARY = 100

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
_GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
    "initializer_range": 0.1,
    "bos_token_id": None,
    "eos_token_id": 1,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _COMMON | {"attention_bias": True}),
    "qwen2": ("Qwen2Config", _COMMON),
    "qwen3": ("Qwen3Config", _COMMON | {"head_dim": 16}),
    "gemma2": (
        "Gemma2Config",
        _COMMON
        | {
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "final_logit_softcapping": 2.0,
            "attn_logit_softcapping": 3.0,
            "sliding_window": 4,
        },
    ),
    "phi3": ("Phi3Config", _COMMON),
    "granite": (
        "GraniteConfig",
        _COMMON
        | {"logits_scaling": 4.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.3},
    ),
    "cohere": ("CohereConfig", _COMMON | {"logit_scale": 0.3}),
    "gpt2": ("GPT2Config", _GPT2),
    "gpt_neox": ("GPTNeoXConfig", {k: v for k, v in _COMMON.items() if k != "num_key_value_heads"}),
}


def build(family: str) -> Any:
    """A tiny random model of a family, float32, in eval mode."""
    name, values = FAMILIES[family]
    config = getattr(transformers, name)(**values)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    return model.eval()


def naive_logps(model: Any, groups: Sequence[TokenGroup]) -> torch.Tensor:
    """float64 [B, K]: every completion in a forward pass of its own, summed token by token."""
    rows = []
    for group in groups:
        for completion in group.completions:
            tokens = torch.tensor([[*group.prompt, *completion]])
            logps = model(input_ids=tokens).logits[0].float().log_softmax(-1)
            begin = len(group.prompt)
            picked = [logps[begin - 1 + i, token].double() for i, token in enumerate(completion)]
            rows.append(torch.stack(picked).sum())
    return torch.stack(rows).view(len(groups), -1)


def adapter_gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


# --- equal to the naive forward -----------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities_are_those_of_the_models_own_forward(
    family: str, make_groups: Callable[..., list[TokenGroup]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(family)
    groups = make_groups(8, vocabulary=VOCABULARY)
    calls: list[int] = []
    chunked = head.token_logps

    def counted(*args: Any) -> torch.Tensor:
        calls.append(1)
        return chunked(*args)

    monkeypatch.setattr("dpo_cli.scoring.scorer.token_logps", counted)
    with torch.no_grad():
        scores = Scorer(model, torch.float32).score(groups)
        expected = naive_logps(model, groups)
    assert scores.logps_BK.dtype == torch.float64
    assert (scores.logps_BK - expected).abs().max() <= 1e-4
    assert expected.std() > 1
    assert calls, "the bounded head should know this family's logits"


@pytest.mark.parametrize("family", FAMILIES)
def test_next_token_distributions_are_those_of_the_models_own_forward(
    family: str, make_groups: Callable[..., list[TokenGroup]]
) -> None:
    model = build(family)
    groups = make_groups(3, vocabulary=VOCABULARY, completions=1)
    together = Scorer(model, torch.float32).next_token_logps(groups)
    for group, ours in zip(groups, together, strict=True):
        (completion,) = group.completions
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*group.prompt, *completion]])).logits[0]
        begin = len(group.prompt)
        expected = logits[begin - 1 : begin + len(completion) - 1].float().log_softmax(-1)
        assert ours.shape == (len(completion), VOCABULARY)
        assert (ours - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere", "granite", "gpt2"])
def test_gradients_are_those_of_naive_autograd(family: str, make_groups: Callable[..., list[TokenGroup]]) -> None:
    model = build(family)
    groups = make_groups(6, vocabulary=VOCABULARY)
    weights = torch.linspace(-1, 1, 12, dtype=torch.float64).view(6, 2)
    (Scorer(model, torch.float32).score(groups).logps_BK * weights).sum().backward()
    ours = adapter_gradients(model)
    model.zero_grad()
    (naive_logps(model, groups) * weights).sum().backward()
    theirs = adapter_gradients(model)
    assert ours.keys() == theirs.keys()
    ours_all = torch.cat([gradient.flatten() for gradient in ours.values()])
    theirs_all = torch.cat([gradient.flatten() for gradient in theirs.values()])
    assert relative(ours_all, theirs_all) <= 1e-5


def test_token_log_probabilities_add_up_to_the_sums(make_groups: Callable[..., list[TokenGroup]]) -> None:
    groups = make_groups(7, completions=3)
    with torch.no_grad():
        scores = Scorer(build("llama"), torch.float32).score(groups)
    lengths = [len(completion) for group in groups for completion in group.completions]
    assert scores.num_tokens_BK.flatten().tolist() == lengths
    sums = torch.stack([piece.double().sum() for piece in scores.token_logps_N.split(lengths)])
    assert torch.allclose(sums, scores.logps_BK.flatten(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("num_completions", [1, 2, 3])
def test_a_row_does_not_depend_on_what_shares_its_batch(
    make_groups: Callable[..., list[TokenGroup]], num_completions: int
) -> None:
    groups = make_groups(12, completions=num_completions, prompt_lengths=(1, 30), completion_lengths=(1, 30))
    scorer = Scorer(build("llama"), torch.float32)
    with torch.no_grad():
        together = scorer.score(groups).logps_BK
        alone = torch.cat([scorer.score([group]).logps_BK for group in groups])
    assert (together - alone).abs().max() <= 1e-4


def test_log_probabilities_and_gradients_do_not_depend_on_the_micro_batch_budget(
    make_groups: Callable[..., list[TokenGroup]],
) -> None:
    model = build("llama")
    groups = make_groups(24, prompt_lengths=(2, 40), completion_lengths=(1, 30))
    scorer = Scorer(model, torch.float32)
    results = {}
    for budget in (256, 8192):
        model.zero_grad()
        batches = split_by_tokens(groups, budget)
        logps = torch.zeros(24, 2, dtype=torch.float64)
        for batch in batches:
            scored = scorer.score([groups[index] for index in batch]).logps_BK
            scored.sum().backward()
            logps[batch] = scored.detach()
        results[budget] = len(batches), logps, adapter_gradients(model)
    (many, small_logps, small), (one, large_logps, large) = results.values()
    assert many > one == 1
    assert (small_logps - large_logps).abs().max() <= 1e-4
    for name, gradient in large.items():
        assert relative(small[name], gradient) <= 1e-5, name


# --- the head -----------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_many_small_chunks_give_what_one_large_chunk_gives(
    family: str, make_groups: Callable[..., list[TokenGroup]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(family)
    groups = make_groups(20, vocabulary=VOCABULARY, completion_lengths=(5, 9))
    scorer = Scorer(model, torch.float32)
    rows: list[int] = []
    model.get_output_embeddings().register_forward_hook(lambda module, args, output: rows.append(output.shape[0]))

    def score() -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        model.zero_grad()
        with torch.no_grad():
            without = scorer.score(groups).logps_BK
        scores = scorer.score(groups)
        scores.logps_BK.sum().backward()
        return without, scores.logps_BK.detach(), adapter_gradients(model)

    whole = score()
    num_scored, largest = sum(map(len, (c for g in groups for c in g.completions))), max(rows)
    assert largest == num_scored
    rows.clear()
    monkeypatch.setattr(head, "_MIN_CHUNK_ROWS", 1)
    monkeypatch.setattr(head, "_CHUNK_BYTES", 8 * VOCABULARY * 7)
    chunks = score()
    assert max(rows) == 7
    for ours, theirs in zip(chunks[:2], whole[:2], strict=True):
        assert (ours - theirs).abs().max() <= 1e-5
    for name, gradient in whole[2].items():
        assert relative(chunks[2][name], gradient) <= 1e-5, name


def test_only_scored_positions_go_through_the_head(make_groups: Callable[..., list[TokenGroup]]) -> None:
    model = build("llama")
    scorer = Scorer(model, torch.float32)
    rows: list[int] = []
    model.lm_head.register_forward_hook(lambda module, args, output: rows.append(output.numel() // VOCABULARY))
    groups = make_groups(5, prompt_lengths=(30, 40))
    with torch.no_grad():
        scorer.score(groups)
    assert sum(rows) == sum(len(completion) for group in groups for completion in group.completions)


@pytest.mark.parametrize("field", ["logit_scale", "logits_scaling", "final_logit_softcapping"])
def test_a_model_that_does_not_do_what_its_configuration_says_is_taken_at_its_word(
    field: str, make_groups: Callable[..., list[TokenGroup]]
) -> None:
    """Hyperclovax multiplies by what granite divides by: only a probe tells."""
    model = build("llama")
    setattr(model.config, field, 2.0)
    groups = make_groups(6)
    scorer = Scorer(model, torch.float32)
    weights = torch.tensor([[1.0, -1.0]], dtype=torch.float64)
    scores = scorer.score(groups)
    expected = naive_logps(model, groups)
    assert (scores.logps_BK - expected).abs().max() <= 1e-4
    ours = torch.autograd.grad((scores.logps_BK * weights).sum(), model.lm_head.weight)[0]
    theirs = torch.autograd.grad((expected * weights).sum(), model.lm_head.weight)[0]
    assert relative(ours, theirs) <= 1e-5
    (single,) = make_groups(1, completions=1)
    assert scorer.next_token_logps([single])[0].exp().sum(1) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize(
    ("values", "scale", "softcap"),
    [
        ({}, 1.0, None),
        ({"logit_scale": 0.25}, 0.25, None),
        ({"logits_scaling": 4.0}, 0.25, None),
        ({"logit_scale": None, "final_logit_softcapping": 30.0}, 1.0, 30.0),
    ],
)
def test_the_transform_is_read_from_the_configuration(
    values: dict[str, Any], scale: float, softcap: float | None
) -> None:
    config = type("Config", (), values)()
    assert LogitTransform.of(config) == LogitTransform(scale, softcap)


def test_the_transform_scales_then_caps_in_float32() -> None:
    logits = torch.tensor([[-8.0, 0.0, 3.0]], dtype=torch.bfloat16)
    expected = 2.0 * torch.tanh(torch.tensor([[-4.0, 0.0, 1.5]]) / 2.0)
    found = LogitTransform(0.5, 2.0)(logits)
    assert found.dtype == torch.float32
    assert torch.allclose(found, expected)


# --- precision and adapters ---------------------------------------------------------------


def test_bfloat16_computes_and_float32_normalises(make_groups: Callable[..., list[TokenGroup]]) -> None:
    model = build("llama")
    groups = make_groups(12, completion_lengths=(5, 9))
    with torch.no_grad():
        exact = Scorer(model, torch.float32).score(groups).logps_BK
        rough = Scorer(model, torch.bfloat16).score(groups)
    assert rough.token_logps_N.dtype == torch.float32
    error = (rough.logps_BK - exact).abs().max()
    assert 1e-6 < error < 0.5


def test_a_peft_model_is_scored_with_its_adapter(
    make_llama: Callable[..., Any], make_groups: Callable[..., list[TokenGroup]]
) -> None:
    from dpo_cli.core.params import LoraParams
    from dpo_cli.models.adapters import add_adapter

    model = make_llama(VOCABULARY)
    groups = make_groups(6)
    with torch.no_grad():
        before = naive_logps(model, groups)
        tuned = add_adapter(model, LoraParams(r=4), seed=0)
        scorer = Scorer(tuned, torch.float32)
        assert (scorer.score(groups).logps_BK - before).abs().max() <= 1e-4
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
        moved = scorer.score(groups).logps_BK
        assert (moved - before).abs().max() > 0.1
        assert (moved - naive_logps(tuned, groups)).abs().max() <= 1e-4
