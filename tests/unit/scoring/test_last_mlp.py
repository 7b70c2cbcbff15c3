"""The last MLP on what is read alone: the same numbers, fewer rows, and only where that is right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dpo_cli.core.params import RuntimeParams
from dpo_cli.core.training_params import LoraParams
from dpo_cli.data.tokens import TokenGroup
from dpo_cli.models.adapters import add_adapter
from dpo_cli.models.load import keep_weights_unpacked, load_model
from dpo_cli.scoring import attention
from dpo_cli.scoring.layout import lay_out
from dpo_cli.scoring.probe import open_scorer
from dpo_cli.scoring.recompute import GRADES, Recompute, set_recompute
from dpo_cli.scoring.scorer import MAX_READ_SHARE, Scorer

Make = Callable[..., Any]


@pytest.fixture
def make_tuned(make_llama: Make, tmp_path: Any, cpu: Any) -> Callable[[], Any]:
    """``make_tuned()``: the same tiny llama each time, with an adapter on all its products, in train mode."""
    make_llama(100).save_pretrained(tmp_path)

    def make() -> Any:
        model = add_adapter(load_model(tmp_path, cpu, quantization="nf4"), LoraParams(r=4), seed=0)
        keep_weights_unpacked(model)
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        return model.train()

    return make


@pytest.fixture
def groups(make_groups: Make) -> list[TokenGroup]:
    """Pairs whose prompts are longer than their answers."""
    return make_groups(5, prompt_lengths=(15, 20))


def rows_of(model: Any) -> list[int]:
    """How many positions each call of the last MLP's last product has, from now on."""
    rows: list[int] = []
    product = model.get_base_model().model.layers[-1].mlp.down_proj
    product.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[1]))
    return rows


@pytest.mark.parametrize("grade", GRADES)
def test_values_and_gradients_stay_the_same_on_fewer_rows(
    grade: Recompute, make_tuned: Make, groups: list[TokenGroup]
) -> None:
    results = []
    laid_out = lay_out(groups, "shared")
    assert laid_out.read_P is not None
    for share in (0.0, MAX_READ_SHARE):
        model = make_tuned()
        set_recompute(model, grade)
        rows = rows_of(model)
        scorer = Scorer(model, torch.float32, "shared")
        scorer.max_read_share = share
        rows.clear()
        earlier, later = scorer.score(groups), scorer.score(groups[:2])
        (earlier.logps_BK * torch.tensor([1.0, -1.0])).sum().backward()
        assert rows[0] == (len(laid_out.read_P) if share else laid_out.num_tokens)
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        results.append((earlier.logps_BK.detach(), later.logps_BK.detach(), torch.cat(gradients)))
    for ours, theirs in zip(results[1][:2], results[0][:2], strict=True):
        assert (ours - theirs).abs().max() <= 1e-5
    assert (results[1][2] - results[0][2]).norm() <= 1e-5 * results[0][2].norm()


def test_hooks_do_nothing_to_the_models_own_forward_and_are_gone_in_the_end(
    make_llama: Make, groups: list[TokenGroup]
) -> None:
    model = make_llama(100)
    mlp = model.model.layers[-1].mlp
    row = torch.tensor([groups[0].prompt])
    with torch.no_grad():
        expected = Scorer(model, torch.float32, "padded").score(groups).logps_BK
        own = model(row).logits
        first, second = (Scorer(model, torch.float32, "shared") for _ in range(2))
        first.max_read_share = second.max_read_share = MAX_READ_SHARE
        for scorer in (first, second, first):
            assert (scorer.score(groups).logps_BK - expected).abs().max() <= 1e-4
        assert len(mlp._forward_hooks) == 2
        model.set_attn_implementation("sdpa")
        assert torch.equal(model(row).logits, own)
        nearly_all = [TokenGroup(group.id, "", group.prompt[:1], group.completions) for group in groups]
        first.score(nearly_all)
        assert first.last_attended is not None
        assert first.last_attended.read_P is None
    first.close()
    second.close()
    assert not mlp._forward_hooks
    assert not mlp._forward_pre_hooks


# --- the probe ----------------------------------------------------------------------------


def open_(model: Any, reporter: Any) -> Any:
    return open_scorer(model, torch.float32, RuntimeParams(), reporter, "train")


def test_the_probe_lets_a_llama_select(project: Any, make_llama: Make, reporter: Any) -> None:
    for _ in range(2):
        scorer, verdict = open_(make_llama(100), reporter)
        assert (scorer.layout, scorer.max_read_share) == ("shared", MAX_READ_SHARE)
        assert verdict.metrics()["last_mlp"] == "what is read"


def test_rows_in_the_wrong_place_are_noticed_and_all_are_computed(
    project: Any, make_llama: Make, groups: list[TokenGroup], reporter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_back = attention._put_back

    def rolled(mlp: Any, args: Any, output: Any) -> Any:
        return put_back(mlp, args, output.roll(1, 1))

    monkeypatch.setattr(attention, "_put_back", rolled)
    model = make_llama(100)
    scorer, verdict = open_(model, reporter)
    assert (scorer.layout, scorer.max_read_share, verdict.refused) == ("shared", 0.0, {})
    assert verdict.last_mlp.startswith("all positions (off by ")
    with torch.no_grad():
        expected = scorer.score(groups, "padded").logps_BK
        assert (scorer.score(groups).logps_BK - expected).abs().max() <= 1e-4
