"""What is said of curves: each rule on a table where it speaks, and on one where it has no reason to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from dpo_cli.report.inputs import read_rows, steps_file
from dpo_cli.report.readings import (
    accuracy,
    both_answers,
    entropy,
    gradients,
    held_out_loss,
    nothing_left,
    readings,
    reward_and_kl,
    worst,
)

Steps = Sequence[dict[str, Any]]


def table(num_steps: int = 40, **columns: tuple[float, float] | Sequence[float]) -> Steps:
    """Rows whose columns go straight from one value to another, or have the values given; ``__`` stands for ``/``."""
    rows: list[dict[str, Any]] = [{"step": float(step)} for step in range(1, num_steps + 1)]
    for name, values in columns.items():
        if len(values) == 2:
            values = [values[0] + (values[1] - values[0]) * row / (num_steps - 1) for row in range(num_steps)]
        for row, value in zip(rows, values, strict=True):
            row[name.replace("__", "/")] = value
    return rows


def held_out(*values: float, column: str = "loss") -> Steps:
    return [{"step": 10.0 * place, f"eval_{column}": value} for place, value in enumerate(values)]


@pytest.mark.parametrize(
    ("chosen", "rejected", "status", "says"),
    [
        ((0.0, 2.0), (0.0, -3.0), "good", "chosen answers became likelier"),
        ((0.0, -1.0), (0.0, -3.0), "warn", "both fall: common with DPO; look at the win rate; loss dpop, or sft_norm"),
        ((0.0, -3.0), (0.0, -1.0), "bad", "the wrong way"),
        ((0.0, 1.0), (0.0, 3.0), "bad", "the wrong way"),
        ((0.0, 3.0), (0.0, 1.0), "plain", "both answers became likelier"),
    ],
)
@pytest.mark.parametrize("where", ["held out", "training"])
def test_where_the_log_probabilities_go(
    chosen: tuple[float, float], rejected: tuple[float, float], status: str, says: str, where: str
) -> None:
    steps = table(rewards__chosen=chosen, rewards__rejected=rejected)
    if where == "held out":
        steps = [
            {"step": float(step), "eval_logps/chosen": chosen[step] - 40, "eval_logps/rejected": rejected[step] - 30}
            for step in (0, 1)
        ]
    found = both_answers("train", steps)
    assert found is not None
    assert found.status == status
    assert says in found.meaning
    assert both_answers("reward", steps) is None, "a reward model's rewards are no log-probabilities"


def test_rewards_without_a_reference_say_nothing_of_log_probabilities() -> None:
    assert both_answers("train", table(rewards__chosen=(-3.0, -4.0), rewards__rejected=(-3.0, -5.0))) is None


@pytest.mark.parametrize(
    ("values", "losses", "status", "says"),
    [
        ([0.7, 0.5, 0.4], (0.7, 0.3), "good", "falls"),
        ([0.7, 0.4, 0.41], (0.7, 0.3), "good", "falls"),
        ([0.7, 0.5, 0.6], (0.7, 0.2), "warn", "over-fitting; train.keep best"),
        ([0.7, 0.5, 0.6], (0.7, 0.9), "warn", "training loss does not fall: lower train.learning_rate"),
        ([0.7, 0.8], (0.7, 0.5), "warn", "no step has lowered it"),
    ],
)
def test_the_held_out_loss(values: list[float], losses: tuple[float, float], status: str, says: str) -> None:
    found = held_out_loss("train", [*held_out(*values), *table(20, loss=losses)])
    assert found is not None
    assert found.status == status
    assert says in found.meaning


def test_of_one_measurement_nothing_is_said() -> None:
    assert held_out_loss("sft", held_out(0.7)) is None
    assert readings("train", table(3, loss=(0.7, 0.6), grad_norm=(1.0, 9.0), rewards__accuracies=(0.0, 1.0))) == []


@pytest.mark.parametrize(
    ("held", "trained", "status", "says"),
    [
        ((0.5, 0.8), (0.5, 0.85), "good", "told from"),
        ((0.5, 0.7), (1.0, 1.0), "warn", "100.0% in training: pairs are memorized"),
        ((0.5, 0.52), (0.5, 0.53), "warn", "hardly better than a coin"),
        ((), (0.5, 0.95), "good", "told from"),
    ],
)
def test_accuracy(held: tuple[float, ...], trained: tuple[float, float], status: str, says: str) -> None:
    column = "rewards/accuracies"
    found = accuracy("train", [*held_out(*held, column=column), *table(rewards__accuracies=trained)])
    assert found is not None
    assert found.status == status
    assert says in found.meaning
    assert found.name == ("held-out accuracy" if held else "accuracy")


def test_spikes_that_do_not_pass() -> None:
    calm, early, late = ([1.0] * 60 for _ in range(3))
    early[5:9] = late[45:49] = [50.0] * 4
    assert gradients("sft", table(60, grad_norm=calm)) is None
    assert gradients("sft", table(60, grad_norm=early)) is None
    found = gradients("sft", table(60, grad_norm=late))
    assert found is not None
    assert found.value == "4 of the last 20 above 10 times 1"
    assert "sft.learning_rate" in found.meaning


def test_nothing_left_to_learn() -> None:
    assert nothing_left("train", table(gradient_weight=(0.3, 0.1))) is None
    assert nothing_left("train", table(gradient_weight=(0.3, 0.0))) is not None


@pytest.mark.parametrize(
    ("stage", "column", "remedy"),
    [
        ("train", "entropy", "train.beta"),
        ("ppo", "objective/entropy", "ppo.kl_coefficient"),
        ("sft", "entropy", "alike"),
    ],
)
def test_entropy_that_collapses(stage: str, column: str, remedy: str) -> None:
    def found(now: float) -> Any:
        return entropy(stage, table(**{column.replace("/", "__"): (2.0, now)}))

    assert found(1.5) is None
    assert remedy in found(0.2).meaning


@pytest.mark.parametrize(
    ("scores", "status", "says"), [((0.1, 0.9), "good", "rises"), ((0.5, 0.4), "warn", "does not rise while KL does")]
)
def test_what_ppo_gains(scores: tuple[float, float], status: str, says: str) -> None:
    found = reward_and_kl("ppo", table(objective__scores=scores, objective__kl=(0.0, 4.0)))
    assert found is not None
    assert found.status == status
    assert says in found.meaning


def test_the_committed_training_reads_well() -> None:
    found = readings("train", read_rows(steps_file("train"), ("step", "loss")))
    assert {each.name: each.status for each in found} == {
        "held-out loss": "good",
        "held-out accuracy": "good",
        "log-probs": "good",
        "gradient weight": "plain",
    }
    assert worst(found) == "good"
    assert worst([]) == "plain"
