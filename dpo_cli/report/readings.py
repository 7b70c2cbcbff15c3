"""What the curves of a training say, in plain words: rules over its table of steps.

Each rule is a pure function that returns None where it has nothing to say, or not yet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean, median
from typing import NamedTuple

from dpo_cli.core.progress import Status
from dpo_cli.evaluation.flags import LESS_ENTROPY, Finding, percent
from dpo_cli.report.inputs import Row
from dpo_cli.report.steps import points_of

FEWEST = 10
"""Batches below which their mean says nothing."""
_WINDOW = 20
"""Batches, at the beginning and at the end, whose means are compared."""
_RISE = 0.1
"""Part of what the held-out loss fell by that it may rise again before it counts as rising."""
_SPIKE, _MOST_SPIKES = 10.0, 2
"""A gradient so many times the median one is a spike; so many may be among the last batches."""
_NO_WEIGHT = 0.05
"""Gradient weight of a pair below which it is as good as learned."""
_TOLD_APART, _MEMORIZED = 0.55, 0.15
"""Accuracy above one half that counts, and by how much that of training may be above the held-out one."""

Rule = Callable[[str, Sequence[Row]], Finding | None]


class _Change(NamedTuple):
    start: float
    now: float

    def __str__(self) -> str:
        return f"{self.start:.3f} -> {self.now:.3f}"

    @property
    def by(self) -> float:
        return self.now - self.start


def readings(stage: str, steps: Sequence[Row]) -> list[Finding]:
    """What can be said of a training so far.

    Args:
        stage: The stage whose log it is: base, sft, train, reward or ppo.
        steps: Its table.
    """
    return [found for rule in RULES if (found := rule(stage, steps)) is not None]


def worst(findings: Sequence[Finding]) -> Status:
    """How a training stands: as the worst of what is said of it."""
    ranks: Sequence[Status] = ("plain", "good", "warn", "bad")
    found: list[Status] = ["plain", *(each.status for each in findings)]
    return max(found, key=ranks.index)


def both_answers(stage: str, steps: Sequence[Row]) -> Finding | None:
    """Where the log-probabilities of chosen and rejected answers go (Razin et al. 2024, likelihood displacement)."""
    if stage != "train":
        return None
    chosen, rejected = (_held_out(steps, f"logps/{side}") for side in ("chosen", "rejected"))
    unit = "nats"
    if chosen is None or rejected is None:  # rewards are differences, so batches can be compared
        chosen, rejected = (_from_zero(steps, f"rewards/{side}") for side in ("chosen", "rejected"))
        unit = "reward"
    if chosen is None or rejected is None:
        return None
    value = f"chosen {chosen.by:+.2f}, rejected {rejected.by:+.2f} {unit}"
    if chosen.by >= 0 > rejected.by:
        return Finding("log-probs", value, "good", "chosen answers became likelier, rejected ones less likely")
    if chosen.by < rejected.by:
        meaning = (
            "rejected answers gain on chosen ones, the wrong way: does the data have them the right way round?"
            " Otherwise lower train.learning_rate"
        )
        return Finding("log-probs", value, "bad", meaning)
    if chosen.by < 0:
        meaning = "both fall: common with DPO; look at the win rate; loss dpop, or sft_norm beside it, holds chosen up"
        return Finding("log-probs", value, "warn", meaning)
    return Finding("log-probs", value, "plain", "both answers became likelier, chosen ones more so")


def held_out_loss(stage: str, steps: Sequence[Row]) -> Finding | None:
    """Whether the held-out loss falls, and if it rises, whether training has turned into memorizing."""
    points = points_of(steps, "eval_loss")
    if len(points) < 2:
        return None
    (start_step, start), (_, now) = points[0], points[-1]
    best_step, best = min(points, key=lambda point: point[1])
    value = f"{start:.4f} -> {now:.4f}"
    name = "held-out loss"
    if best_step == start_step:
        return Finding(name, value, "warn", f"no step has lowered it; if it stays so, lower {stage}.learning_rate")
    if now - best <= _RISE * (start - best):
        return Finding(name, value, "good", "falls")
    value = f"{start:.4f} -> {best:.4f} at step {best_step:.0f} -> {now:.4f}"
    losses = points_of(steps, "loss")
    until = [loss for step, loss in losses if step <= best_step][-_WINDOW:]
    lately = [loss for step, loss in losses if step > best_step][-_WINDOW:]
    if until and lately and fmean(lately) < fmean(until):
        meaning = (
            f"rises while the training loss falls: over-fitting; {stage}.keep best publishes the lowest,"
            f" {stage}.patience stops there"
        )
    else:
        meaning = f"rises, and the training loss does not fall: lower {stage}.learning_rate"
    return Finding(name, value, "warn", meaning)


def accuracy(stage: str, steps: Sequence[Row]) -> Finding | None:
    """Whether chosen answers are told from rejected ones, on pairs that were not trained on, too."""
    column = "rewards/accuracies"
    held_out, training = _held_out(steps, column), _trained(steps, column)
    shown = held_out or training
    if shown is None:
        return None
    name = "held-out accuracy" if held_out else "accuracy"
    value = f"{percent(shown.start)} -> {percent(shown.now)}"
    if held_out and training and training.now - held_out.now > _MEMORIZED:
        meaning = f"{percent(training.now)} in training: pairs are memorized; train less, or on more pairs"
        return Finding(name, value, "warn", meaning)
    if shown.now < _TOLD_APART:
        meaning = f"hardly better than a coin, yet: if it stays so, raise {stage}.learning_rate, or look at the labels"
        return Finding(name, value, "warn", meaning)
    return Finding(name, value, "good", "chosen answers are told from rejected ones")


def gradients(stage: str, steps: Sequence[Row]) -> Finding | None:
    """Spikes that do not pass."""
    norms = [value for _, value in points_of(steps, "grad_norm")]
    if len(norms) < 2 * FEWEST:
        return None
    usual = median(norms)
    num_spikes = sum(norm > _SPIKE * usual for norm in norms[-_WINDOW:])
    if num_spikes <= _MOST_SPIKES:
        return None
    value = f"{num_spikes} of the last {_WINDOW} above {_SPIKE:g} times {usual:.3g}"
    return Finding("gradient norm", value, "warn", f"spikes that do not pass: lower {stage}.learning_rate")


def nothing_left(stage: str, steps: Sequence[Row]) -> Finding | None:
    """Pairs that are told apart by so much that their gradients vanish."""
    weight = _trained(steps, "gradient_weight")
    if weight is None or weight.now >= _NO_WEIGHT:
        return None
    return Finding("gradient weight", str(weight), "plain", "the pairs are learned; further steps change little")


def entropy(stage: str, steps: Sequence[Row]) -> Finding | None:
    """A model that grows sure of one way to answer."""
    column = "objective/entropy" if stage == "ppo" else "entropy"
    found = _held_out(steps, column) or _trained(steps, column)
    if found is None or found.now >= LESS_ENTROPY * found.start:
        return None
    remedy = {"ppo": "; raise ppo.kl_coefficient", "train": "; raise train.beta, or train less"}.get(stage, "")
    return Finding("entropy", f"{found} nats", "warn", f"collapses: answers become alike{remedy}")


def reward_and_kl(stage: str, steps: Sequence[Row]) -> Finding | None:
    """What PPO gains, and at what distance from the reference."""
    score, kl = (_trained(steps, f"objective/{name}") for name in ("scores", "kl"))
    if stage != "ppo" or score is None or kl is None:
        return None
    value = f"{score} at {kl.now:.2f} nats KL"
    if score.by > 0:
        return Finding("reward of its answers", value, "good", "rises; whether people agree, the win rate says")
    meaning = "does not rise" + (" while KL does" if kl.by > 0 else "") + "; lower ppo.learning_rate"
    return Finding("reward of its answers", value, "warn", meaning)


RULES: Sequence[Rule] = (held_out_loss, accuracy, both_answers, reward_and_kl, entropy, gradients, nothing_left)


def _held_out(steps: Sequence[Row], column: str) -> _Change | None:
    """From before the first step to the last measurement."""
    points = points_of(steps, f"eval_{column}")
    return _Change(points[0][1], points[-1][1]) if len(points) > 1 else None


def _trained(steps: Sequence[Row], column: str) -> _Change | None:
    """Means over batches at the beginning and at the end."""
    values = [value for _, value in points_of(steps, column)]
    if len(values) < FEWEST:
        return None
    width = min(_WINDOW, len(values) // 4)
    return _Change(fmean(values[:width]), fmean(values[-width:]))


def _from_zero(steps: Sequence[Row], column: str) -> _Change | None:
    """The mean of the last batches of what is zero before the first step, where it is: not without a reference."""
    points, found = points_of(steps, column), _trained(steps, column)
    return _Change(0.0, found.now) if found is not None and abs(points[0][1]) < 1e-2 else None
