"""The reference pass: what is missing is scored once, whatever memory there is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from dpo_cli.data.tokens import TokenGroup, completion_key
from dpo_cli.scoring.budget import TokenBudget
from dpo_cli.scoring.layout import LAYOUTS, LayoutName
from dpo_cli.scoring.reference import missing_groups, score_groups
from dpo_cli.scoring.scorer import Scorer

Make = Callable[..., Any]

VOCABULARY = 100


def group(name: str, prompt: Sequence[int], *completions: Sequence[int]) -> TokenGroup:
    return TokenGroup(name, name, tuple(prompt), tuple(map(tuple, completions)))


def contents(groups: Sequence[TokenGroup]) -> list[tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]]:
    return [(found.prompt, found.completions) for found in groups]


# --- what is missing ----------------------------------------------------------------------


def test_completions_of_one_prompt_come_together_each_once() -> None:
    groups = [
        group("a", (1, 2), (3,), (4, 5)),
        group("b", (9,), (3,), (4,)),
        group("c", (1, 2), (6,), (3,)),
        group("d", (1, 2), (4, 5), (7,)),
    ]
    assert contents(missing_groups(groups, set(), 1000)) == [((1, 2), ((3,), (4, 5), (6,), (7,))), ((9,), ((3,), (4,)))]


def test_known_completions_are_left_out_and_prompts_without_others_too() -> None:
    groups = [group("a", (1, 2), (3,), (4, 5)), group("b", (9,), (3,), (4,)), group("c", (8,), (3,))]
    known = {completion_key((1, 2), (3,)), *groups[1].keys, completion_key((7,), (3,))}
    assert contents(missing_groups(groups, known, 1000)) == [((1, 2), ((4, 5),)), ((8,), ((3,),))]
    assert missing_groups(groups, {key for one in groups for key in one.keys}, 1000) == []
    assert missing_groups([], set(), 1000) == []


@pytest.mark.parametrize(
    ("max_tokens", "portions"),
    [(100, [4]), (14, [4]), (13, [3, 1]), (11, [3, 1]), (8, [2, 2]), (7, [1, 1, 1, 1]), (1, [1, 1, 1, 1])],
)
def test_a_prompt_makes_as_many_groups_as_the_budget_needs(max_tokens: int, portions: list[int]) -> None:
    """A prompt of two tokens and completions of three: 5, 8, 11 and 14 tokens, one after another."""
    completions = [(number, 20, 21) for number in range(10, 14)]
    found = missing_groups([group("a", (1, 2), *completions)], set(), max_tokens)
    assert [len(one.completions) for one in found] == portions
    assert [completion for one in found for completion in one.completions] == completions
    for one in found:
        num_tokens = len(one.prompt) + sum(map(len, one.completions))
        assert num_tokens <= max_tokens or len(one.completions) == 1


def test_the_same_data_makes_the_same_groups_with_names_of_their_own(make_groups: Make) -> None:
    groups = make_groups(30, vocabulary=6, prompt_lengths=(1, 2))
    found = missing_groups(groups, set(), 20)
    assert found == missing_groups(groups, set(), 20)
    assert len({one.id for one in found}) == len(found)
    prompts = [one.prompt for one in found]
    assert list(dict.fromkeys(prompts)) == list(dict.fromkeys(one.prompt for one in groups))
    keys = [key for one in found for key in one.keys]
    assert sorted(keys) == sorted({key for one in groups for key in one.keys})


def test_names_are_of_the_content_and_not_of_the_row(make_groups: Make) -> None:
    groups = make_groups(5)
    renamed = [TokenGroup(f"x{one.id}", "x", one.prompt, one.completions) for one in groups]
    assert missing_groups(groups, set(), 1000) == missing_groups(renamed, set(), 1000)


# --- scoring ------------------------------------------------------------------------------


@pytest.fixture
def scorer(make_llama: Make) -> Scorer:
    return Scorer(make_llama(VOCABULARY), torch.float32, "shared")


def naive_row(model: Any, prompt: tuple[int, ...], completion: tuple[int, ...]) -> list[float]:
    with torch.no_grad():
        logps = model(input_ids=torch.tensor([[*prompt, *completion]])).logits[0].double().log_softmax(-1)
    return [logps[len(prompt) - 1 + place, token].item() for place, token in enumerate(completion)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("max_tokens", [30, 10_000])
def test_rows_are_those_of_one_completion_at_a_time(
    layout: LayoutName, max_tokens: int, make_llama: Make, make_groups: Make, reporter: Any
) -> None:
    model = make_llama(VOCABULARY)
    groups = make_groups(6, completions=3) + make_groups(4, completions=1, seed=1)
    expected = {
        completion_key(one.prompt, completion): naive_row(model, one.prompt, completion)
        for one in groups
        for completion in one.completions
    }
    scorer = Scorer(model, torch.float32, layout)
    batches = list(score_groups(scorer, groups, TokenBudget(max_tokens, "precompute-ref", reporter)))
    assert len(batches) == 2 if max_tokens > 30 else len(batches) > 4
    rows = [row for batch in batches for row in batch]
    assert sorted(row["key"] for row in rows) == sorted(expected)
    for row in rows:
        tokens = expected[row["key"]]
        assert row["num_tokens"] == len(tokens) == len(row["token_logps"])
        assert row["token_logps"] == pytest.approx(tokens, abs=1e-4)
        assert row["logp"] == pytest.approx(sum(tokens), abs=1e-4)
        assert row["logp"] == pytest.approx(sum(row["token_logps"]), abs=1e-12)


def test_rows_have_no_graph_and_gradients_are_on_again_between_them(
    scorer: Scorer, make_groups: Make, reporter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    enabled: list[bool] = []
    score = scorer.score
    monkeypatch.setattr(scorer, "score", lambda batch: enabled.append(torch.is_grad_enabled()) or score(batch))
    for rows in score_groups(scorer, make_groups(6), TokenBudget(40, "precompute-ref", reporter)):
        assert torch.is_grad_enabled()
        assert all(type(row["logp"]) is float for row in rows)
    assert len(enabled) > 1
    assert not any(enabled)


# --- out of memory ------------------------------------------------------------------------


def budget_of(max_tokens: int, reporter: Any) -> TokenBudget:
    return TokenBudget(max_tokens, "precompute-ref", reporter)


def test_what_was_scored_before_memory_ran_out_is_not_scored_again(
    scorer: Scorer, make_groups: Make, reporter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third micro-batch fails once: the two before it stay, the rest goes on at half the budget."""
    groups = make_groups(30)
    batches = scorer.split(groups, 100)
    assert len(batches) > 3
    scored: list[list[str]] = []
    score = scorer.score

    def fails_third(batch: Sequence[TokenGroup]) -> Any:
        scored.append([one.id for one in batch])
        if len(scored) == 3:
            raise MemoryError
        return score(batch)

    monkeypatch.setattr(scorer, "score", fails_third)
    budget = budget_of(100, reporter)
    rows = [row["key"] for batch in score_groups(scorer, groups, budget) for row in batch]
    assert budget.max_tokens == 50
    assert scored[:3] == [[groups[index].id for index in batch] for batch in batches[:3]]
    done = [name for batch in scored[:2] + scored[3:] for name in batch]
    assert sorted(done) == sorted(one.id for one in groups)
    assert sorted(rows) == sorted(key for one in groups for key in one.keys)
