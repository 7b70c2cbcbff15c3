"""The two models of preference (Rafailov et al. 2023, eq. 1 and 18) and Lemma 1; 1e-12, Lemma 1 1e-10.

Legend: K answers, O orders of them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dpo_cli.losses.pairwise import Pairs, sigmoid
from dpo_cli.losses.ranking import Ties, kendall_tau, plackett_luce, plackett_luce_nll
from tests.theory.worlds import BETAS, float64

REWARD = st.floats(-8, 8)
REWARDS = st.lists(REWARD, min_size=2, max_size=5)
TIES: list[Ties] = ["average", "groups"]


def orders(answers: int) -> list[tuple[int, ...]]:
    """All K! orders, the best answer first."""
    return list(itertools.permutations(range(answers)))


def strict(rewards_OK: torch.Tensor) -> torch.Tensor:
    """Ranks 1 to K, for each row."""
    return torch.arange(1, rewards_OK.shape[1] + 1).expand(rewards_OK.shape)


def probabilities(rewards: Sequence[float]) -> dict[tuple[int, ...], float]:
    """The product's probability of each order."""
    every = orders(len(rewards))
    rewards_OK = float64(rewards)[torch.tensor(every)]
    return dict(zip(every, (-plackett_luce_nll(rewards_OK, strict(rewards_OK))).exp().tolist(), strict=True))


def prefers(better: float, worse: float) -> float:
    """The product's probability that one answer is preferred: exp(-loss), the rewards as log-ratios, beta 1."""
    return math.exp(-sigmoid(Pairs(float64([[better, worse]]), torch.zeros(1, 2), torch.ones(1, 2)), 1.0).item())


def nll(rewards: Sequence[float], ranks: Sequence[int], ties: Ties = "average") -> float:
    return plackett_luce_nll(float64([rewards]), torch.tensor([ranks]), ties).item()


def formula(rewards: Sequence[float], order: Sequence[int]) -> float:
    """Eq. 18 in plain numbers: prod_k exp(r_k) / sum_{j >= k} exp(r_j)."""
    weights = [math.exp(rewards[answer]) for answer in order]
    return math.prod(weight / math.fsum(weights[k:]) for k, weight in enumerate(weights))


# --- the models -------------------------------------------------------------------------


@given(REWARD, REWARD)
def test_the_pairwise_loss_is_bradley_terry(better: float, worse: float) -> None:
    """Eq. 1: p(y_1 > y_2) = exp(r_1) / (exp(r_1) + exp(r_2)); eq. 7 is its -log."""
    expected = math.exp(better) / (math.exp(better) + math.exp(worse))
    assert abs(prefers(better, worse) - expected) < 1e-12


@given(REWARDS)
def test_the_ranking_loss_is_plackett_luce(rewards: list[float]) -> None:
    """Eq. 18, for each order."""
    for order, found in probabilities(rewards).items():
        assert abs(found - formula(rewards, order)) < 1e-12


@given(REWARDS)
def test_one_of_the_orders_must_be_the_true_one(rewards: list[float]) -> None:
    """Eq. 18 is a distribution: over the K! orders it sums to 1.

    The first factor, summed over who is best, is 1; what remains is the same sum over K - 1 answers.
    """
    assert abs(math.fsum(probabilities(rewards).values()) - 1) < 1e-12


@given(REWARD, REWARD)
def test_two_answers_are_bradley_terry(better: float, worse: float) -> None:
    """Appendix A.3: eq. 18 with K = 2 reduces to eq. 1, since its last factor is 1."""
    assert abs(math.exp(-nll([better, worse], [1, 2])) - prefers(better, worse)) < 1e-12


@pytest.mark.parametrize("beta", BETAS)
def test_dpo_on_two_ranked_answers_is_dpo_on_a_pair(beta: float) -> None:
    """Eq. 20 with K = 2 is eq. 7: the values and the gradients."""
    generator = torch.Generator().manual_seed(0)
    policy, reference = -60 * torch.rand(2, 50, 2, generator=generator, dtype=torch.float64)
    policy.requires_grad_()
    ranking = plackett_luce(policy, reference, strict(policy), beta)
    pairwise = sigmoid(Pairs(policy, reference, torch.ones(50, 2)), beta)
    assert (ranking - pairwise).abs().max() < 1e-12
    gradients = [torch.autograd.grad(losses.sum(), policy)[0] for losses in (ranking, pairwise)]
    assert (gradients[0] - gradients[1]).abs().max() < 1e-12


@given(REWARDS)
def test_any_two_answers_of_a_ranking_are_bradley_terry(rewards: list[float]) -> None:
    """Luce 1959: the orders that have i before j add up to sigma(r_i - r_j), whatever the others are worth."""
    found = probabilities(rewards)
    for i, j in itertools.permutations(range(len(rewards)), 2):
        before = math.fsum(chance for order, chance in found.items() if order.index(i) < order.index(j))
        assert abs(before - prefers(rewards[i], rewards[j])) < 1e-12


@given(st.lists(REWARD, min_size=3, max_size=5))
def test_a_ranking_without_one_answer_is_a_ranking_of_the_rest(rewards: list[float]) -> None:
    """Luce 1959: orders that differ in the place of one answer only add up to the order of the others."""
    found = probabilities(rewards)
    for order, chance in probabilities(rewards[:-1]).items():
        places = [(*order[:place], len(order), *order[place:]) for place in range(len(rewards))]
        assert abs(math.fsum(found[whole] for whole in places) - chance) < 1e-12


@given(REWARDS)
def test_rewards_order_the_rankings_drawn_from_them_as_often_as_bradley_terry_says(rewards: list[float]) -> None:
    """A pair agrees with probability sigma(|d|), d its difference in reward: 2 sigma(|d|) - 1 = tanh(|d| / 2) of tau.

    Kendall's tau is a mean over pairs, so its expectation over all orders is the mean of tanh(|d| / 2).
    """
    expected_tau = math.fsum(
        chance * kendall_tau(float64([[rewards[answer] for answer in order]]), strict(torch.ones(1, len(order)))).item()
        for order, chance in probabilities(rewards).items()
    )
    pairs = list(itertools.combinations(rewards, 2))
    assert abs(expected_tau - math.fsum(math.tanh(abs(a - b) / 2) for a, b in pairs) / len(pairs)) < 1e-12


# --- Lemma 1 -------------------------------------------------------------------------------


@given(REWARD, REWARD, st.floats(-50, 50), st.sampled_from(BETAS))
def test_lemma_1_of_bradley_terry(better: float, worse: float, shift: float, beta: float) -> None:
    """Lemma 1: r and r + f(x) make the same preferences: r_1 + f(x) - (r_2 + f(x)) = r_1 - r_2.

    With r = beta log(pi / pi_ref) the shift of f(x) is one of f(x) / beta in both log-probabilities.
    """

    def loss(policy: list[float]) -> float:
        return sigmoid(Pairs(float64([policy]), float64([[-3.0, -4.0]]), torch.ones(1, 2)), beta).item()

    policy = [better / beta, worse / beta]
    assert abs(loss([logp + shift / beta for logp in policy]) - loss(policy)) < 1e-10


@given(REWARDS, st.floats(-50, 50))
def test_lemma_1_of_plackett_luce(rewards: list[float], shift: float) -> None:
    """Lemma 1, appendix A.5: exp(f(x)) is a factor of every exp(r) and cancels in eq. 18, order by order."""
    moved = probabilities([reward + shift for reward in rewards])
    for order, chance in probabilities(rewards).items():
        assert abs(moved[order] - chance) < 1e-10


@given(REWARDS, st.floats(0.1, 5), st.data())
def test_rewards_that_differ_by_more_than_a_shift_make_other_preferences(
    rewards: list[float], gain: float, data: st.DataObject
) -> None:
    """The converse of Lemma 1: one answer alone worth more is first more often."""
    answer = data.draw(st.integers(0, len(rewards) - 1))
    raised = [reward + gain * (number == answer) for number, reward in enumerate(rewards)]

    def odds(of: list[float]) -> float:
        """Odds that it comes first: exp(r) over the sum of the others'."""
        chances = probabilities(of)
        first = math.fsum(chance for order, chance in chances.items() if order[0] == answer)
        return first / math.fsum(chance for order, chance in chances.items() if order[0] != answer)

    assert odds(raised) == pytest.approx(odds(rewards) * math.exp(gain), rel=1e-8)


# --- gradients, ties and missing answers ------------------------------------------------------


def derivative(function: Callable[[float], float], step: float = 2e-3) -> float:
    """At 0, by central differences of fourth order."""
    near, far = (function(size) - function(-size) for size in (step, 2 * step))
    return (8 * near - far) / (12 * step)


@pytest.mark.parametrize("ties", TIES)
@pytest.mark.parametrize(
    "ranks", [[1, 2], [1, 2, 3, 4, 5], [1, 1, 2, 3], [1, 2, 2, 3], [1, 2, 3, 3], [1, 1, 2, 2], [1, 1, 1], [1, 2, 2, 0]]
)
def test_the_gradient_of_a_ranking_is_that_of_finite_differences(ranks: list[int], ties: Ties) -> None:
    """Of eq. 20 by each log-probability, with ties and without, 1e-10: nothing is detached or masked wrongly."""
    beta = 0.7
    generator = torch.Generator().manual_seed(0)
    policy, reference = torch.randn(2, 1, len(ranks), generator=generator, dtype=torch.float64)
    policy.requires_grad_()

    def loss(logps: torch.Tensor) -> torch.Tensor:
        return plackett_luce(logps, reference, torch.tensor([ranks]), beta, ties).sum()

    (found,) = torch.autograd.grad(loss(policy), policy)
    for answer in range(len(ranks)):
        direction = torch.nn.functional.one_hot(torch.tensor([answer]), len(ranks)).double()
        along = derivative(lambda size, d=direction: loss(policy.detach() + size * d).item())
        assert abs(found[0, answer].item() - along) < 1e-10


def mixed_derivatives(rewards: Sequence[float], ranks: Sequence[int], ties: Ties) -> torch.Tensor:
    """d^2 / dr_i dr_j of the loss, [K, K]."""
    found = torch.autograd.functional.hessian(
        lambda leaf: plackett_luce_nll(leaf[None], torch.tensor([ranks]), ties).sum(), float64(rewards)
    )
    assert isinstance(found, torch.Tensor)
    return found


def rankings_with_ties(answers: int) -> Iterator[list[int]]:
    """All ranks of K sorted answers: each is tied with the one before it or not, 2^(K - 1) in all."""
    for steps in itertools.product([0, 1], repeat=answers - 1):
        yield list(itertools.accumulate(steps, initial=1))


@pytest.mark.parametrize("ranks", [ranks for answers in range(2, 6) for ranks in rankings_with_ties(answers)], ids=str)
def test_ties_average_is_the_mean_over_the_orders_they_allow(ranks: list[int]) -> None:
    """Any order within a tie may be the true one: the mean of -log of eq. 18 over them, and of its gradient.

    The gradient by r_m of one order's -log P is sum over k <= place of m of exp(r_m) / sum_{j >= k} exp(r_j), less 1.
    """
    answers = len(ranks)
    rewards = [1.3 * math.sin(2.0 * number + 1) for number in range(answers)]
    allowed = [order for order in orders(answers) if all(ranks[a] <= ranks[b] for a, b in itertools.pairwise(order))]
    expected = -math.fsum(math.log(formula(rewards, order)) for order in allowed) / len(allowed)
    gradient = [-1.0] * answers
    for order in allowed:
        weights = [math.exp(rewards[answer]) for answer in order]
        for k, m in itertools.combinations_with_replacement(range(answers), 2):
            gradient[order[m]] += weights[m] / math.fsum(weights[k:]) / len(allowed)

    leaf = float64([rewards]).requires_grad_()
    found = plackett_luce_nll(leaf, torch.tensor([ranks]), "average").sum()
    assert abs(found.item() - expected) < 1e-12
    assert (torch.autograd.grad(found, leaf)[0] - float64([gradient])).abs().max() < 1e-12


@pytest.mark.parametrize("ranks", [ranks for answers in range(2, 6) for ranks in rankings_with_ties(answers)], ids=str)
def test_ties_groups_does_not_compare_the_tied(ranks: list[int]) -> None:
    """Each answer is first among itself and those below its rank: eq. 18 summed over the orders that begin with it.

    So none of their terms holds two of the tied, and the mixed derivative by two that are tied for best is 0; by
    two of different rank it is not, nor is it with ``average``.
    """
    answers = len(ranks)
    rewards = [1.3 * math.sin(2.0 * number + 1) for number in range(answers)]
    expected = 0.0
    for answer in range(answers):
        field = [rewards[answer], *(rewards[other] for other in range(answers) if ranks[other] > ranks[answer])]
        expected -= math.log(math.fsum(formula(field, order) for order in orders(len(field)) if order[0] == 0))
    assert abs(nll(rewards, ranks, "groups") - expected) < 1e-12

    groups, average = (mixed_derivatives(rewards, ranks, ties) for ties in ("groups", "average"))
    for a, b in itertools.combinations(range(answers), 2):
        if ranks[a] != ranks[b]:
            assert groups[a, b].abs() > 1e-6
        elif ranks[a] == 1:  # answers above would hold both of the tied in their sums
            assert groups[a, b].abs() < 1e-12
            assert average[a, b].abs() > 1e-6


@pytest.mark.parametrize("ties", TIES)
@pytest.mark.parametrize("ranks", [[1, 2], [1, 2, 3], [1, 1, 2], [1, 2, 2], [1, 1], [1]])
@pytest.mark.parametrize("filler", [0.0, 50.0, -1e4])
def test_an_answer_of_rank_0_takes_no_part(ranks: list[int], filler: float, ties: Ties) -> None:
    """Eq. 18 is over the K answers that there are: the rest changes neither value nor gradient and gets none."""
    rewards = [0.4, -1.1, 0.9][: len(ranks)]
    alone, padded = float64([rewards]).requires_grad_(), float64([[*rewards, filler, filler]]).requires_grad_()
    without = plackett_luce_nll(alone, torch.tensor([ranks]), ties).sum()
    with_them = plackett_luce_nll(padded, torch.tensor([[*ranks, 0, 0]]), ties).sum()
    assert abs(without.item() - with_them.item()) < 1e-12
    if len(ranks) == 1:
        assert without.item() == 0
    gradients = [torch.autograd.grad(*both)[0] for both in ((without, alone), (with_them, padded))]
    assert (gradients[0] - gradients[1][:, :-2]).abs().max() < 1e-12
    assert not gradients[1][:, -2:].any()
