"""The reward model as a judge: Bradley-Terry's probability, for texts and for tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from dpo_cli.data.chat import ChatEncoder
from dpo_cli.data.tokens import TokenGroup
from dpo_cli.judging.known_reward import RewardJudge, preference
from dpo_cli.judging.reward_model import RewardModel
from dpo_cli.judging.win_rate import Pair, compare_all
from dpo_cli.scoring.budget import TokenBudget
from dpo_cli.scoring.reward_scorer import RewardScorer
from dpo_cli.scoring.scorer import Scorer


@pytest.fixture
def model(make_llama: Callable[..., Any], tokenizer: Any, reporter: Any) -> RewardModel:
    causal = make_llama(len(tokenizer))
    head = torch.nn.Linear(64, 1, bias=False)
    torch.nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(0))
    scorer = RewardScorer(Scorer(causal, torch.float32, "shared"), head)
    return RewardModel(scorer, ChatEncoder(tokenizer, "auto"), TokenBudget(100, "test", reporter))


@pytest.mark.parametrize(("first", "second"), [(1.0, 0.0), (0.0, 1.0), (3.0, 3.0), (1e4, -1e4), (-1e4, 1e4)])
def test_the_preference_is_bradley_terrys(first: float, second: float) -> None:
    found = preference(first, second)
    assert found + preference(second, first) == pytest.approx(1)
    assert found == pytest.approx(0.5 * (1 + math.tanh((first - second) / 2)))


def test_rewards_come_in_the_order_of_the_groups_whatever_their_number_of_answers(
    model: RewardModel, make_groups: Callable[..., list[TokenGroup]]
) -> None:
    groups = [*make_groups(5, seed=1), *make_groups(4, completions=3, seed=2), *make_groups(3, completions=1, seed=3)]
    groups = groups[::2] + groups[1::2]
    together = model.rewards(groups)
    for group, found in zip(groups, together, strict=True):
        assert found == pytest.approx(model.rewards([group])[0], abs=1e-5)
        assert len(found) == len(group.completions)
    assert model.rewards([]) == []


def test_it_judges_texts_as_their_tokens(model: RewardModel) -> None:
    texts: Sequence[str] = ["4", "five", ""]
    rewards = model.rewards_of_texts([{"role": "user", "content": "2 and 2?"}], texts)
    assert len(set(rewards)) == 3
    judge = RewardJudge("learned", lambda _, text: rewards[texts.index(text)], is_exact=False)
    found = compare_all(judge, [Pair("2 and 2?", "4", "five"), Pair("2 and 2?", "4", "4")])
    assert [each.win for each in found] == [pytest.approx(preference(rewards[0], rewards[1]), abs=1e-12), 0.5]
    assert model.rewards_of_texts([{"role": "user", "content": "2 and 2?"}], []) == []
