"""KL estimates against the exact figure, on a model small enough to enumerate every answer."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from dpo_cli.data.tokens import TokenGroup
from dpo_cli.evaluation import kl
from dpo_cli.evaluation.kl import SequenceKl, estimates_disagree, sequence_kl
from dpo_cli.scoring.scorer import Scorer
from tests.live_memory import LiveMemory

VOCABULARY, END, LONGEST = 10, 1, 3


def answers() -> list[tuple[int, ...]]:
    """Every answer: tokens up to the end token, or cut at the longest length."""
    others = [token for token in range(VOCABULARY) if token != END]
    found = [(*body, END) for length in range(LONGEST) for body in itertools.product(others, repeat=length)]
    return found + list(itertools.product(others, repeat=LONGEST))


def kl_of(exact: float, k1: float, variance: float = 0.0) -> SequenceKl:
    return SequenceKl(exact, k1, 0.0, 0.0, 0.0, variance, 1)


@pytest.fixture(scope="module")
def both(make_llama: Callable[..., Any]) -> list[tuple[float, float, SequenceKl]]:
    """log pi, log ref and the two estimates of every answer to one prompt."""
    policy, reference = (Scorer(make_llama(VOCABULARY, seed=seed), torch.float32) for seed in (1, 2))
    rows = []
    for tokens in answers():
        group = TokenGroup("a", "a", (3, 4, 5), (tokens,))
        policy_logps, reference_logps = (
            scorer.next_token_logps(scorer.predict([group])) for scorer in (policy, reference)
        )
        index = torch.tensor(tokens)[:, None]
        sums = [logps.double().gather(1, index).sum().item() for logps in (policy_logps, reference_logps)]
        rows.append((sums[0], sums[1], sequence_kl(policy_logps, reference_logps, tokens)))
    return rows


def test_both_estimates_are_right_on_average_over_all_answers(both: list[tuple[float, float, SequenceKl]]) -> None:
    mass = sum(math.exp(policy) for policy, _, _ in both)
    assert mass == pytest.approx(1, abs=1e-5)
    exact = sum(math.exp(policy) * (policy - reference) for policy, reference, _ in both)
    assert exact > 0.5
    assert sum(math.exp(policy) * kl.exact for policy, _, kl in both) == pytest.approx(exact, rel=1e-4)
    assert sum(math.exp(policy) * kl.k1 for policy, _, kl in both) == pytest.approx(exact, rel=1e-4)


def test_the_headline_is_within_its_error_of_the_truth_and_the_steadiest_estimate(
    both: list[tuple[float, float, SequenceKl]],
) -> None:
    """From 400 samples of the policy; k3 = r - 1 - log r with r = ref / pi (Schulman 2020), by token and by answer."""
    policy, reference = (torch.tensor([row[column] for row in both], dtype=torch.float64) for column in (0, 1))
    truth = float((policy.exp() * (policy - reference)).sum())
    estimates = torch.stack(
        [
            torch.tensor([row[2].exact for row in both], dtype=torch.float64),
            policy - reference,
            torch.tensor([row[2].k3 for row in both], dtype=torch.float64),
            (reference - policy).exp() - 1 + policy - reference,
        ]
    )
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        drawn = estimates[:, torch.multinomial(policy.exp(), 400, replacement=True, generator=generator)]
        exact, *others = drawn.std(1).tolist()
        assert abs(drawn[0].mean() - truth) < 3 * exact / math.sqrt(400)
        assert exact < min(others)


def test_samples_of_the_policy_agree_and_samples_of_another_model_do_not(
    both: list[tuple[float, float, SequenceKl]],
) -> None:
    def sample(column: int, seed: int) -> list[SequenceKl]:
        weights = torch.tensor([row[column] for row in both], dtype=torch.float64).exp()
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.multinomial(weights, 400, replacement=True, generator=generator)
        return [both[index][2] for index in drawn.tolist()]

    assert not any(estimates_disagree(sample(0, seed)) for seed in range(20))
    assert all(estimates_disagree(sample(1, seed)) for seed in range(20))


def test_a_model_has_no_distance_from_itself() -> None:
    logps = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).log_softmax(1)
    found = sequence_kl(logps, logps, [0, 1, 2, 3, 4])
    assert (found.exact, found.k1, found.k3) == (0.0, 0.0, 0.0)
    assert found.entropy == found.reference_entropy > 0
    assert found.num_tokens == 5


def test_the_estimates_by_hand() -> None:
    policy = torch.tensor([[0.5, 0.25, 0.25], [0.8, 0.1, 0.1]]).log()
    reference = torch.tensor([[0.25, 0.5, 0.25], [0.8, 0.1, 0.1]]).log()
    found = sequence_kl(policy, reference, [0, 2])
    assert found.exact == pytest.approx(0.5 * math.log(2) - 0.25 * math.log(2), rel=1e-6)
    assert found.k1 == pytest.approx(math.log(2), rel=1e-6)


def test_a_long_answer_is_looked_at_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else float64 copies of [N, V] would take more memory than the model."""
    generator = torch.Generator().manual_seed(0)
    policy, reference = (torch.randn(256, 1000, generator=generator).log_softmax(1) for _ in range(2))
    tokens = torch.randint(1000, (256,), generator=generator).tolist()
    whole = sequence_kl(policy, reference, tokens)
    monkeypatch.setattr(kl, "_MAX_BYTES", 1 << 20)
    with LiveMemory() as memory:
        found = sequence_kl(policy, reference, tokens)
    assert memory.peak <= 1 << 20
    assert vars(found) == pytest.approx(vars(whole), rel=1e-12)


def test_a_token_that_is_impossible_for_the_policy_adds_nothing() -> None:
    """lim p -> 0 of p log p is 0; models mask padded vocabulary with minus infinity."""
    policy = torch.tensor([[0.5, 0.5, 0.0]]).log()
    reference = torch.tensor([[0.25, 0.75, 0.0]]).log()
    expected = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert sequence_kl(policy, reference, [0]).exact == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("samples", [[], [kl_of(1.0, 9.0, 5.0)]])
def test_too_few_samples_cannot_disagree(samples: list[SequenceKl]) -> None:
    assert not estimates_disagree(samples)


def test_rounding_alone_is_no_mismatch() -> None:
    assert not estimates_disagree([kl_of(0.0, 1e-9)] * 50)
    assert estimates_disagree([kl_of(0.0, 1e-3)] * 50)


def test_the_variance_is_that_of_k1_around_exact() -> None:
    policy = torch.tensor([[0.7, 0.2, 0.1]]).log()
    reference = torch.tensor([[0.2, 0.2, 0.6]]).log()
    found = [sequence_kl(policy, reference, [token]) for token in range(3)]
    weights = policy.exp()[0].double().tolist()
    assert sum(w * (kl.k1 - kl.exact) for w, kl in zip(weights, found, strict=True)) == pytest.approx(0, abs=1e-6)
    spread = sum(w * (kl.k1 - kl.exact) ** 2 for w, kl in zip(weights, found, strict=True))
    assert found[0].variance == pytest.approx(spread, rel=1e-5)


def test_a_policy_that_is_all_but_certain_sets_no_false_alarm() -> None:
    """p = .999 against .9: hardly any run samples the rare token, so the samples' own deviation is 0."""
    num_prompts = 10
    policy = torch.tensor([[0.999, 0.001]]).log()
    reference = torch.tensor([[0.9, 0.1]]).log()
    common, rare = (sequence_kl(policy, reference, [token]) for token in (0, 1))
    generator = torch.Generator().manual_seed(0)
    alarms = 0
    for _ in range(1000):
        drawn = int((torch.rand(num_prompts, generator=generator) < 0.001).sum())
        alarms += estimates_disagree([rare] * drawn + [common] * (num_prompts - drawn))
    assert alarms <= 20
    assert estimates_disagree([rare] * num_prompts), "every token is the rare one: that is no sample of this policy"
