"""The one scorer against the plainest thing that can be written: a forward pass a row and a log-softmax."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import transformers
from transformers.modeling_outputs import CausalLMOutputWithPast

from dpo_cli.core.training_params import LoraParams
from dpo_cli.data.tokens import TokenGroup
from dpo_cli.models.adapters import add_adapter
from dpo_cli.scoring.attention import IMPLEMENTATION
from dpo_cli.scoring.layout import LAYOUTS, LayoutName, lay_out
from dpo_cli.scoring.recompute import GRADES, Recompute, set_recompute
from dpo_cli.scoring.scorer import Scorer

Make = Callable[..., Any]

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
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _COMMON | {"attention_bias": True}),
    "gemma2": (
        "Gemma2Config",
        _COMMON
        | {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"], "head_dim": 16}
        | {"query_pre_attn_scalar": 16, "final_logit_softcapping": 2.0, "attn_logit_softcapping": 3.0},
    ),
    "granite": ("GraniteConfig", _COMMON | {"logits_scaling": 4.0, "attention_multiplier": 0.3}),
}
"""The parity tests hold log-probabilities and gradients of more families against their own forward."""


def build(family: str) -> Any:
    """A tiny random model of a family, float32, in eval mode."""
    name, values = FAMILIES[family]
    config = getattr(transformers, name)(**values)
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def naive_logps(model: Any, groups: Sequence[TokenGroup]) -> torch.Tensor:
    """float64 [B, K]: every completion in a forward pass of its own, summed token by token."""
    rows = []
    for group in groups:
        for completion in group.completions:
            tokens = torch.tensor([[*group.prompt, *completion]])
            logps = model(input_ids=tokens, use_cache=False).logits[0].float().log_softmax(-1)
            begin = len(group.prompt)
            picked = [logps[begin - 1 + i, token].double() for i, token in enumerate(completion)]
            rows.append(torch.stack(picked).sum())
    return torch.stack(rows).view(len(groups), -1)


def all_gradients(model: Any) -> torch.Tensor:
    """All gradients of a model in one vector; they are gone from it then."""
    found = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    return torch.cat(found)


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


def branching_groups(make_groups: Make, count: int = 6) -> list[TokenGroup]:
    """Groups of four completions: two that begin alike for ten tokens, one of another kind, and one of one token."""
    groups = []
    for group in make_groups(count, completions=5, vocabulary=VOCABULARY, completion_lengths=(2, 9)):
        trunk, one, two, other, short = group.completions
        trunk = (trunk * 5)[:10]
        groups.append(TokenGroup(group.id, group.group, group.prompt, (trunk + one, other, trunk + two, short[:1])))
    return groups


# --- equal to the naive forward -----------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_next_token_distributions_are_those_of_the_models_own_forward(
    family: str, layout: LayoutName, make_groups: Make
) -> None:
    model = build(family)
    groups = make_groups(3, vocabulary=VOCABULARY, completions=1)
    with Scorer(model, torch.float32, layout) as scorer:
        together = scorer.next_token_logps(scorer.predict(groups))
    for group, ours in zip(groups, together.split([len(g.completions[0]) for g in groups]), strict=True):
        (completion,) = group.completions
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*group.prompt, *completion]])).logits[0]
        begin = len(group.prompt)
        expected = logits[begin - 1 : begin + len(completion) - 1].float().log_softmax(-1)
        assert ours.shape == (len(completion), VOCABULARY)
        assert (ours - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("layout", LAYOUTS)
def test_token_log_probabilities_add_up_to_the_sums(layout: LayoutName, make_groups: Make) -> None:
    groups = branching_groups(make_groups)
    with torch.no_grad():
        scores = Scorer(build("llama"), torch.float32, layout).score(groups)
    lengths = [len(completion) for group in groups for completion in group.completions]
    assert scores.token_logps_M.dtype == torch.float32
    assert scores.num_tokens_BK.flatten().tolist() == lengths
    sums = torch.stack([piece.double().sum() for piece in scores.token_logps_M.split(lengths)])
    assert torch.allclose(sums, scores.logps_BK.flatten(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_log_probabilities_and_gradients_do_not_depend_on_the_micro_batch_budget(
    layout: LayoutName, make_groups: Make
) -> None:
    model = build("llama")
    groups = make_groups(24, prompt_lengths=(2, 40), completion_lengths=(1, 30))
    scorer = Scorer(model, torch.float32, layout)
    results = {}
    for budget in (256, 8192):
        batches = scorer.split(groups, budget)
        for batch in batches:
            num_tokens = lay_out([groups[index] for index in batch], layout).num_tokens
            assert num_tokens <= budget or len(batch) == 1
        logps = torch.zeros(24, 2, dtype=torch.float64)
        for batch in batches:
            scored = scorer.score([groups[index] for index in batch]).logps_BK
            scored.sum().backward()
            logps[batch] = scored.detach()
        results[budget] = len(batches), logps, all_gradients(model)
    (many, small_logps, small), (one, large_logps, large) = results.values()
    assert many > one == 1
    assert (small_logps - large_logps).abs().max() <= 1e-4
    assert relative(small, large) <= 1e-5


# --- attention is lent --------------------------------------------------------------------


def test_a_model_has_its_own_attention_back_when_a_scorer_is_closed(make_groups: Make) -> None:
    model = build("llama")
    groups = make_groups(3)
    with torch.no_grad():
        before = naive_logps(model, groups)
        with Scorer(model, torch.float32, "shared") as scorer:
            scorer.score(groups)
            assert model.config._attn_implementation == IMPLEMENTATION
            assert scorer.last_attended is not None
            assert scorer.last_attended.windows == {None}
        assert model.config._attn_implementation == "eager"
        assert torch.equal(naive_logps(model, groups), before)
        scorer.score(groups)
        scorer.close()
        scorer.close()
        assert model.config._attn_implementation == "eager"


def test_a_second_scorer_knows_the_own_attention_while_the_first_has_its_own_attached(make_groups: Make) -> None:
    model = build("llama")
    groups = make_groups(3)
    with torch.no_grad():
        expected = naive_logps(model, groups)
        first = Scorer(model, torch.float32, "shared")
        first.score(groups)
        assert model.config._attn_implementation == IMPLEMENTATION
        second = Scorer(model, torch.float32, "padded")
        assert model.config._attn_implementation == "eager"
        for scorer in (second, first, second, first):
            assert (scorer.score(groups).logps_BK - expected).abs().max() <= 1e-4
        assert model.config._attn_implementation == IMPLEMENTATION
        second.close()
        assert model.config._attn_implementation == "eager"


def test_padded_rows_never_touch_the_attention(make_groups: Make) -> None:
    model = build("llama")
    calls: list[str] = []
    model.set_attn_implementation = calls.append
    scorer = Scorer(model, torch.float32, "padded")
    scorer.score(make_groups(3))
    scorer.close()
    assert calls == []
    assert scorer.last_attended is None


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("grade", GRADES)
def test_gradients_of_an_earlier_batch_are_right_after_a_later_one_was_scored(
    grade: Recompute, layout: LayoutName, make_tuned: Make, make_groups: Make
) -> None:
    first, second = branching_groups(make_groups)[:3], make_groups(3, completions=4, seed=1)
    plain = make_tuned()
    naive_logps(plain, first).sum().backward()
    expected = all_gradients(plain)
    model = make_tuned()
    set_recompute(model, grade)
    scorer = Scorer(model, torch.float32, layout)
    earlier, later = scorer.score(first), scorer.score(second)
    earlier.logps_BK.sum().backward()
    assert relative(all_gradients(model), expected) <= 1e-5
    later.logps_BK.sum().backward()
    naive_logps(plain, second).sum().backward()
    assert relative(all_gradients(model), all_gradients(plain)) <= 1e-5


def test_scores_that_are_gone_hold_no_memory(make_tuned: Make, make_groups: Any) -> None:
    """The last forward's layout is kept, its activations are not."""
    scorer = Scorer(make_tuned(), torch.float32, "shared")

    def count() -> int:
        gc.collect()
        return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())

    groups = branching_groups(make_groups)
    scorer.score(groups)
    before = count()
    for _ in range(3):
        scorer.score(groups)
    assert count() <= before


# --- the head -----------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_only_scored_positions_go_through_the_head(layout: LayoutName, make_groups: Make) -> None:
    model = build("llama")
    scorer = Scorer(model, torch.float32, layout)
    rows: list[int] = []
    model.lm_head.register_forward_hook(lambda module, args, output: rows.append(output.numel() // VOCABULARY))
    groups = make_groups(5, prompt_lengths=(30, 40))
    with torch.no_grad():
        scorer.score(groups)
    num_scored = len(lay_out(groups, layout).targets_N)
    assert sum(rows) == num_scored <= sum(len(completion) for group in groups for completion in group.completions)


@pytest.mark.parametrize(
    ("field", "layout"),
    [("logit_scale", "shared"), ("logits_scaling", "padded"), ("final_logit_softcapping", "shared")],
)
def test_a_model_that_does_not_do_what_its_configuration_says_is_taken_at_its_word(
    field: str, layout: LayoutName, make_groups: Make
) -> None:
    model = build("llama")
    setattr(model.config, field, 2.0)
    groups = make_groups(6)
    expected = naive_logps(model, groups)
    scorer = Scorer(model, torch.float32, layout)
    assert scorer.head == "whole"
    weights = torch.tensor([[1.0, -1.0]], dtype=torch.float64)
    scores = scorer.score(groups)
    assert (scores.logps_BK - expected).abs().max() <= 1e-4
    ours = torch.autograd.grad((scores.logps_BK * weights).sum(), model.lm_head.weight)[0]
    theirs = torch.autograd.grad((expected * weights).sum(), model.lm_head.weight)[0]
    assert relative(ours, theirs) <= 1e-5
    (single,) = make_groups(1, completions=1)
    assert scorer.next_token_logps(scorer.predict([single])).exp().sum(1) == pytest.approx(1.0, abs=1e-5)


HEADS: dict[str, tuple[str, dict[str, Any], str]] = {
    "hyperclovax": ("HyperCLOVAXConfig", _COMMON | {"logits_scaling": 4.0}, "linear"),
    "recurrent_gemma": (
        "RecurrentGemmaConfig",
        _COMMON | {"logits_soft_cap": 2.0, "lru_width": 64, "num_hidden_layers": 3},
        "linear",
    ),
    "modernbert-decoder": ("ModernBertDecoderConfig", _COMMON | {"bos_token_id": 1}, "whole"),
    "bert": ("BertConfig", _COMMON | {"is_decoder": True}, "whole"),
    "electra": ("ElectraConfig", _COMMON | {"is_decoder": True}, "whole"),
    "inkling": (
        "InklingTextConfig",
        _COMMON
        | {"unpadded_vocab_size": VOCABULARY - 5, "logits_mup_width_multiplier": 2.0}
        | {"n_routed_experts": 8, "moe_intermediate_size": 32},
        "whole",
    ),
}
"""Families whose logits are more than the output embedding of the hidden states, and where they come from: another
scale, a cap of another name, further layers, a hidden state of another width, fewer logits than embeddings.
"""


@pytest.mark.parametrize("family", HEADS)
def test_whatever_a_model_does_behind_its_backbone_is_done(family: str, make_groups: Make) -> None:
    name, values, head_name = HEADS[family]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**values)).eval()
    groups = make_groups(4, vocabulary=VOCABULARY - 5, prompt_lengths=(1, 5))
    weights = torch.linspace(-1, 1, 8, dtype=torch.float64).view(4, 2)
    results = []
    for head_bytes in (4 * 28 * VOCABULARY, 1 << 20):
        with Scorer(model, torch.float32, head_bytes=head_bytes) as scorer:
            assert scorer.head == head_name
            scores = scorer.score(groups)
        (scores.logps_BK * weights).sum().backward()
        results.append((scores.logps_BK.detach(), all_gradients(model)))
    expected = naive_logps(model, groups)
    (expected * weights).sum().backward()
    gradients = all_gradients(model)
    for logps, ours in results:
        assert (logps - expected).abs().max() <= 1e-4
        assert relative(ours, gradients) <= 1e-5


class Whole(transformers.LlamaForCausalLM):
    """Has no backbone of its own."""

    base_model_prefix = "nothing"

    def get_decoder(self) -> Any:
        return self


class Around(transformers.LlamaForCausalLM):
    """Goes around its backbone: its logits cannot be had from hidden states."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.model.forward(*args, **kwargs)
        return CausalLMOutputWithPast(logits=2 * self.lm_head(output.last_hidden_state))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", [Whole, Around])
def test_a_model_whose_backbone_does_not_tell_gives_logits(kind: Any, layout: LayoutName, make_groups: Make) -> None:
    torch.manual_seed(0)
    model = kind(transformers.LlamaConfig(**_COMMON)).eval()
    groups = branching_groups(make_groups)
    with torch.no_grad():
        expected = naive_logps(model, groups)
        scorer = Scorer(model, torch.float32, layout)
        assert scorer.head == "whole"
        assert (scorer.score(groups).logps_BK - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("vocabulary", [VOCABULARY, 8192])
def test_room_for_distributions_is_what_logits_may_take(vocabulary: int, make_llama: Make) -> None:
    model = make_llama(vocabulary)
    assert Scorer(model, torch.float32, "padded", 1 << 20).max_distribution_rows == (1 << 20) // (16 * vocabulary)
    assert Scorer(model, torch.float32, "padded", 1).max_distribution_rows == 1


# --- precision and adapters ---------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_peft_model_is_scored_with_its_adapter(layout: LayoutName, make_llama: Make, make_groups: Make) -> None:
    model = make_llama(VOCABULARY)
    groups = make_groups(6)
    with torch.no_grad():
        before = naive_logps(model, groups)
        tuned = add_adapter(model, LoraParams(r=4), seed=0)
        scorer = Scorer(tuned, torch.float32, layout)
        assert (scorer.score(groups).logps_BK - before).abs().max() <= 1e-4
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
        moved = scorer.score(groups).logps_BK
        assert (moved - before).abs().max() > 0.1
        scorer.close()
        assert (moved - naive_logps(tuned, groups)).abs().max() <= 1e-4


def test_dropout_of_a_model_in_train_mode_is_not_taken_for_another_head(make_tuned: Make) -> None:
    """Two forward passes with dropout differ, whatever the head does; the mode is left as it was."""
    model = make_tuned(LoraParams(r=4, dropout=0.5))
    before = [module.training for module in model.modules()]
    scorer = Scorer(model, torch.float32, "padded")
    assert scorer.head == "linear"
    assert [module.training for module in model.modules()] == before
