"""Rewards: the hidden state at each completion's last token, in every layout, and a head on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from dpo_cli.core.errors import MachineError
from dpo_cli.data.tokens import TokenGroup
from dpo_cli.scoring.layout import LAYOUTS, LayoutName, lay_out
from dpo_cli.scoring.reward_scorer import RewardScorer
from dpo_cli.scoring.scorer import Scorer

Make = Callable[..., Any]

VOCABULARY = 100
TOLERANCE = 1e-5


def awkward_groups(make_groups: Make) -> list[TokenGroup]:
    """Groups of four: two that begin alike, the second's beginning as an answer of its own, and a repeat of it.

    The token that is laid out behind each is 0, so one of them goes on with a 0 where another ends.
    """
    groups = []
    for group in make_groups(5, completions=3, vocabulary=VOCABULARY, completion_lengths=(2, 9)):
        trunk, one, two = group.completions
        trunk = (trunk * 6)[:11]
        groups.append(TokenGroup(group.id, group.group, group.prompt, (trunk + one, trunk, (*trunk, 0, *two), trunk)))
    return groups


def naive(model: Any, groups: Sequence[TokenGroup]) -> torch.Tensor:
    """[B, K, D]: each prompt with one completion through the backbone alone, at its last position."""
    rows = [
        model.get_base_model().model(torch.tensor([group.prompt + completion]))[0][0, -1]
        for group in groups
        for completion in group.completions
    ]
    return torch.stack(rows).view(len(groups), len(groups[0].completions), -1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_hidden_state_is_that_of_the_text_alone(layout: LayoutName, make_tuned: Make, make_groups: Make) -> None:
    model = make_tuned()
    for groups in (awkward_groups(make_groups), make_groups(6), make_groups(3, completions=1)):
        with torch.no_grad():
            expected = naive(model, groups)  # before the scorer switches the attention
            with Scorer(model, torch.float32, layout) as scorer:
                found = scorer.last_hidden(groups)
        assert found.shape == expected.shape
        assert (found - expected).abs().max() <= TOLERANCE
        assert (found[:, 0] - found[:, -1]).abs().max() > 0.1 or found.shape[1] == 1


def test_a_repeated_answer_has_the_very_same_state(make_tuned: Make, make_groups: Make) -> None:
    with torch.no_grad(), Scorer(make_tuned(), torch.float32, "shared") as scorer:
        found = scorer.last_hidden(awkward_groups(make_groups))
    assert torch.equal(found[:, 1], found[:, 3])


def test_gradients_are_those_of_padded_rows(make_tuned: Make, make_groups: Make) -> None:
    groups = awkward_groups(make_groups)
    weights = torch.randn(len(groups), 4, 64, generator=torch.Generator().manual_seed(0))

    def gradient(name: LayoutName) -> torch.Tensor:
        model = make_tuned()
        with Scorer(model, torch.float32, name) as scorer:
            (scorer.last_hidden(groups) * weights).sum().backward()
        return torch.cat([value.grad.flatten() for value in model.parameters() if value.grad is not None])

    ours, theirs = gradient("shared"), gradient("padded")
    assert theirs.norm() > 1
    assert ((ours - theirs).norm() / theirs.norm()).item() <= TOLERANCE


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rewards_are_the_heads_of_the_last_tokens_and_their_layout_is_counted_whole(
    layout: LayoutName, make_tuned: Make, make_groups: Make
) -> None:
    model, groups = make_tuned(), make_groups(12)
    head = torch.nn.Linear(64, 1, bias=False)
    with torch.no_grad():
        expected = head(naive(model, groups)).squeeze(-1).double()
        scorer = RewardScorer(Scorer(model, torch.float32, layout), head)
        found = scorer.score(groups).rewards_BK
        assert found.dtype == torch.float64
        assert (found - expected).abs().max() <= TOLERANCE
        for budget in (1, 60, 300):
            batches = scorer.split(groups, budget)
            assert sorted(index for batch in batches for index in batch) == list(range(12))
            for batch in batches:
                behind = [
                    TokenGroup(
                        groups[i].id, groups[i].group, groups[i].prompt, tuple((*c, 0) for c in groups[i].completions)
                    )
                    for i in batch
                ]
                assert len(batch) == 1 or lay_out(behind, layout).num_tokens <= budget
                assert (scorer.score([groups[i] for i in batch]).rewards_BK - expected[batch]).abs().max() <= TOLERANCE


def test_the_head_is_float32_under_autocast(make_tuned: Make, make_groups: Make) -> None:
    seen: list[torch.Tensor] = []

    class Head(torch.nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            result = super().forward(input)
            seen.append(result)
            return result

    model, groups = make_tuned(), make_groups(4)
    head = Head(64, 1, bias=False)
    with torch.no_grad():
        expected = head(naive(model, groups)).squeeze(-1)
        found = RewardScorer(Scorer(model, torch.bfloat16, "shared"), head).score(groups).rewards_BK
    assert seen[-1].dtype == torch.float32
    assert (found - expected).abs().max() < 0.1


def test_a_model_without_a_backbone_is_refused(
    make_llama: Make, make_groups: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dpo_cli.scoring.scorer._backbone", lambda causal: None)
    with pytest.raises(MachineError, match="LlamaForCausalLM has no part that gives hidden states"):
        Scorer(make_llama(VOCABULARY), torch.float32).last_hidden(make_groups(2))
