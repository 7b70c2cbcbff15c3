"""Sampled answers: from the right distribution, whatever shares the batch, the same every time."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch

from dpo_cli.data.tokens import TokenGroup
from dpo_cli.evaluation.decoding import Decoding
from dpo_cli.evaluation.generation import PromptTokens, Sampled, sample_answers
from dpo_cli.scoring.budget import TokenBudget
from dpo_cli.scoring.scorer import Scorer

STOP = 1


@pytest.fixture(scope="module")
def model(make_llama: Callable[..., Any]) -> Any:
    return make_llama(12, initializer_range=0.15)


def answer(
    model: Any, reporter: Any, prompts: Sequence[PromptTokens], max_tokens: int = 4096, **changes: Any
) -> dict[str, Sampled]:
    """Answers of a model to prompts, and what is kept of them on the way."""
    listener = changes.pop("listener", None)
    settings: dict[str, Any] = {"stop_ids": (STOP,), "temperature": 1.0, "max_new_tokens": 8, "stream": "dpo"} | changes
    kept: dict[str, Sampled] = {}
    with reporter.meter("answers", len(prompts), "prompts") as meter:
        found = sample_answers(
            model,
            prompts,
            Decoding(**settings),
            budget=TokenBudget(max_tokens, "test", reporter),
            autocast_dtype=torch.float32,
            meter=meter,
            keep=kept.update,
            listener=listener,
        )
    assert kept == found
    return found


@pytest.fixture
def sample(model: Any, reporter: Any) -> Callable[..., dict[str, Sampled]]:
    return partial(answer, model, reporter)


def some_prompts(count: int, vocabulary: int = 12) -> list[PromptTokens]:
    rng = random.Random(0)
    return [
        PromptTokens(f"prompt-{number:03d}", tuple(rng.randrange(2, vocabulary) for _ in range(rng.randint(1, 15))))
        for number in range(count)
    ]


def distribution(model: Any, tokens: Sequence[int], temperature: float = 1.0) -> torch.Tensor:
    with torch.no_grad():
        return (model(input_ids=torch.tensor([list(tokens)])).logits[0, -1].double() / temperature).softmax(0)


def test_a_scorer_that_is_still_open_changes_no_answer(
    model: Any, sample: Callable[..., dict[str, Sampled]], make_groups: Callable[..., list[TokenGroup]]
) -> None:
    prompts = some_prompts(6)
    before = sample(prompts)
    scorer = Scorer(model, torch.float32, "shared")
    scorer.score(make_groups(2, vocabulary=12))
    assert model.config._attn_implementation != scorer.own_attention
    assert sample(prompts) == before
    scorer.close()


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_who_listens_hears_every_token_and_may_end_an_answer(
    sample: Callable[..., dict[str, Sampled]], temperature: float
) -> None:
    prompts = some_prompts(24)
    together = sample(prompts, temperature=temperature)
    for prompt in prompts:
        heard: list[list[int]] = []

        def listen(rows: list[list[int]], heard: list[list[int]] = heard) -> bool:
            heard.extend(rows)
            return False

        found = sample([prompt], temperature=temperature, listener=listen)
        assert found == {prompt.id: together[prompt.id]}
        tokens = list(found[prompt.id].tokens)
        assert heard == [tokens[:end] for end in range(1, len(tokens) + 1)]
        stopped = sample([prompt], temperature=temperature, listener=lambda rows: len(rows[0]) == 2)
        assert stopped == {prompt.id: Sampled(tuple(tokens[:2]), finished=STOP in tokens[:2])}
    assert len({answer.tokens for answer in together.values()}) > 3, "answers all alike would prove little"


# --- determinism --------------------------------------------------------------------------


@pytest.mark.parametrize(("temperature", "max_tokens"), [(0.0, 20), (0.7, 1), (0.7, 20)])
def test_an_answer_does_not_depend_on_what_shares_its_batch(
    sample: Callable[..., dict[str, Sampled]], temperature: float, max_tokens: int
) -> None:
    prompts = some_prompts(24)
    together = sample(prompts, temperature=temperature, max_tokens=100_000)
    assert sample(prompts, temperature=temperature, max_tokens=max_tokens) == together
    assert sample(prompts[::-1], temperature=temperature, max_tokens=max_tokens) == together
    assert sample(prompts[5:9], temperature=temperature) == {p.id: together[p.id] for p in prompts[5:9]}


def test_seed_stream_and_prompt_fix_the_random_stream(sample: Callable[..., dict[str, Sampled]]) -> None:
    prompts = some_prompts(24)
    first = sample(prompts)
    assert sample(prompts) == first
    assert sample(prompts, seed=1) != first
    assert sample(prompts, stream="sft") != first
    renamed = sample([PromptTokens(f"other-{prompt.id}", prompt.tokens) for prompt in prompts])
    assert [renamed[f"other-{prompt.id}"] for prompt in prompts] != [first[prompt.id] for prompt in prompts]


def test_a_longer_limit_goes_on_with_the_same_answer(sample: Callable[..., dict[str, Sampled]]) -> None:
    prompts = some_prompts(24)
    short, long = sample(prompts, max_new_tokens=4), sample(prompts, max_new_tokens=9)
    assert all(long[prompt.id].tokens[:4] == short[prompt.id].tokens for prompt in prompts)


def test_torchs_random_state_is_neither_read_nor_moved(sample: Callable[..., dict[str, Sampled]]) -> None:
    prompts = some_prompts(6)
    state = torch.manual_seed(1).get_state()
    first = sample(prompts)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert sample(prompts) == first


# --- the distribution ---------------------------------------------------------------------


def test_temperature_0_takes_the_likeliest_token(model: Any, sample: Callable[..., dict[str, Sampled]]) -> None:
    prompts = some_prompts(10)
    answers = sample(prompts, temperature=0.0)
    for prompt in prompts:
        tokens = list(prompt.tokens)
        while len(tokens) < len(prompt.tokens) + 8:
            tokens.append(int(distribution(model, tokens).argmax()))
            if tokens[-1] == STOP:
                break
        assert answers[prompt.id].tokens == tuple(tokens[len(prompt.tokens) :])
    assert len({answer.tokens for answer in answers.values()}) > 3


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_the_first_token_follows_the_models_distribution(
    model: Any, sample: Callable[..., dict[str, Sampled]], temperature: float
) -> None:
    """Chi-square with 11 degrees of freedom: above 31.3 by chance once in a thousand seeds."""
    count = 3000
    prompt = (5, 7, 3)
    answers = sample(
        [PromptTokens(f"{number}", prompt) for number in range(count)], temperature=temperature, max_new_tokens=1
    )
    seen = Counter(answer.tokens[0] for answer in answers.values())
    expected = (distribution(model, prompt, temperature) * count).tolist()
    assert min(expected) > 0
    assert sum((seen[token] - mean) ** 2 / mean for token, mean in enumerate(expected)) < 31.3
    uniform = sum((seen[token] - count / 12) ** 2 / (count / 12) for token in range(12))
    assert uniform > 100, "the test could not tell the model from a uniform one"


@pytest.mark.parametrize(("top_p", "num_tokens"), [(0.05, 1), (0.5, None)])
def test_top_p_draws_from_the_fewest_likeliest_tokens(
    model: Any, sample: Callable[..., dict[str, Sampled]], top_p: float, num_tokens: int | None
) -> None:
    """In the proportions of the model; chi-square as above, with at most 11 degrees of freedom."""
    count = 2000
    prompt = (5, 7, 3)
    answers = sample([PromptTokens(f"{number}", prompt) for number in range(count)], top_p=top_p, max_new_tokens=1)
    seen = Counter(answer.tokens[0] for answer in answers.values())
    chances = dict(enumerate(distribution(model, prompt, 1.0).tolist()))
    nucleus: list[int] = []
    while sum(chances[token] for token in nucleus) < top_p:
        nucleus.append(max(chances.keys() - nucleus, key=lambda token: chances[token]))
    assert seen.keys() <= set(nucleus)
    assert len(nucleus) == num_tokens or 1 < len(nucleus) < 12
    whole = sum(chances[token] for token in nucleus)
    means = {token: chances[token] / whole * count for token in nucleus}
    assert sum((seen[token] - mean) ** 2 / mean for token, mean in means.items()) < 31.3


def test_the_second_token_is_drawn_apart_from_the_first(model: Any, sample: Callable[..., dict[str, Sampled]]) -> None:
    """Pairs of tokens follow the joint distribution; pooled below 5 expected, about 60 degrees of freedom."""
    count, prompt = 3000, (5, 7, 3)
    answers = sample([PromptTokens(f"{number}", prompt) for number in range(count)], max_new_tokens=2)
    seen = Counter(answer.tokens for answer in answers.values())
    first = distribution(model, prompt)
    expected: dict[tuple[int, ...], float] = {(STOP,): count * first[STOP].item()}
    for token in set(range(12)) - {STOP}:
        for following, share in enumerate(distribution(model, (*prompt, token)).tolist()):
            expected[token, following] = count * first[token].item() * share
    assert set(seen) <= set(expected)
    large = {tokens: mean for tokens, mean in expected.items() if mean >= 5}
    rest = count - sum(large.values())
    chi_square = sum((seen[tokens] - mean) ** 2 / mean for tokens, mean in large.items())
    chi_square += (count - sum(seen[tokens] for tokens in large) - rest) ** 2 / rest
    freedom = len(large)
    assert freedom > 30
    assert chi_square < freedom + 3.5 * (2 * freedom) ** 0.5


# --- where answers end --------------------------------------------------------------------


def test_an_answer_ends_with_its_first_stop_token_or_at_the_limit(sample: Callable[..., dict[str, Sampled]]) -> None:
    answers = sample(some_prompts(60), stop_ids=(1, 4)).values()
    for answer in answers:
        stops = [token in (1, 4) for token in answer.tokens]
        assert not any(stops[:-1])
        assert answer.finished == stops[-1]
        assert answer.finished or len(answer.tokens) == 8
        assert len(answer.tokens) <= 8
    assert {answer.finished for answer in answers} == {True, False}


def test_batches_keep_the_budget(
    model: Any, sample: Callable[..., dict[str, Sampled]], reporter: Any, monkeypatch: Any
) -> None:
    shapes: list[tuple[int, int]] = []
    generate = model.generate

    def watched(**arguments: Any) -> Any:
        shapes.append(tuple(arguments["input_ids"].shape))
        return generate(**arguments)

    monkeypatch.setattr(model, "generate", watched)
    sample(some_prompts(24), max_tokens=13)
    assert reporter.meters[-1].done == 24
    assert sum(rows for rows, _ in shapes) == 24
    assert all(rows * (length + 8) <= 100 for rows, length in shapes)
    assert len(shapes) < 24


def test_what_the_models_own_configuration_says_of_sampling_is_not_followed(
    make_llama: Callable[..., Any], reporter: Any
) -> None:
    """A shipped generation_config may cut the distribution (top_k, top_p) or forbid tokens."""
    from transformers import GenerationConfig

    prompts = [PromptTokens(f"{number}", (5, 7, 3)) for number in range(300)]
    found = []
    for shipped in (GenerationConfig(), GenerationConfig(do_sample=True, top_k=1, min_new_tokens=5, temperature=0.1)):
        model = make_llama(12, initializer_range=0.15)
        model.generation_config = shipped
        found.append(answer(model, reporter, prompts, max_new_tokens=3))
    assert found[0] == found[1]
    assert len({answer.tokens for answer in found[0].values()}) > 50


def test_where_memory_runs_out_it_goes_on_with_smaller_batches_and_the_same_answers(
    make_llama: Callable[..., Any], reporter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_llama(12, initializer_range=0.15)
    generate, sizes = model.generate, []

    def small(input_ids: torch.Tensor, **settings: Any) -> Any:
        sizes.append(len(input_ids))
        if len(input_ids) > 8:
            raise torch.OutOfMemoryError
        return generate(input_ids=input_ids, **settings)

    whole = answer(model, reporter, some_prompts(40), max_tokens=60)
    monkeypatch.setattr(model, "generate", small)
    assert answer(model, reporter, some_prompts(40), max_tokens=60) == whole
    assert max(sizes) > 8 >= sizes[-1]
