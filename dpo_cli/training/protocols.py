"""What the training loop needs to know: of its data, of a forward pass, and of what is minimized."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import torch

from dpo_cli.data.tokens import TokenGroup
from dpo_cli.scoring.scorer import Statistics

Scored = TypeVar("Scored")
Gives = TypeVar("Gives", covariant=True)
Takes = TypeVar("Takes", contravariant=True)


class BatchSource(Protocol[Gives]):
    """What the training loop needs to know of its data.

    A source of fixed data has no state. One whose data the policy makes itself, such as rollouts, does so within
    :meth:`batch` at the steps that begin a round, and hands it out over the following ones; what it holds then is its
    state, which every checkpoint keeps.
    """

    def batch(self, step: int) -> Sequence[Gives]:
        """The groups of an optimizer step, counted from 0; the same in every process and in a run that went on."""
        ...

    def after_step(self, metrics: Mapping[str, float]) -> None:
        """Take notice of the means of a step that was taken."""

    def state(self) -> Mapping[str, Any]:
        """What it needs to go on after the last step: numbers, texts, tensors, and lists and mappings of them."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take up the state of an earlier run."""


class GroupScorer(Protocol[Gives]):
    """What the training loop needs to know of a forward pass: a Scorer gives log-probabilities, another one rewards."""

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        ...

    @property
    def config(self) -> Any:
        """The text model's configuration."""
        ...

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of matrix products."""
        ...

    @property
    def head_bytes(self) -> int:
        """Bytes of logits that are held at once."""
        ...

    def num_tokens(self, group: TokenGroup) -> int:
        """Tokens of a group that go through the model."""
        ...

    def split(self, groups: Sequence[TokenGroup], max_tokens: int) -> list[list[int]]:
        """Micro-batches of at most ``max_tokens`` tokens, as indices of groups."""
        ...

    def score(self, groups: Sequence[TokenGroup], *, statistics: Statistics = "none") -> Gives:
        """What the objective reads of some groups with one number of completions, with gradients."""
        ...


@dataclass(frozen=True)
class GroupLosses:
    """Losses of some groups, and what else is worth a mean over them.

    Attributes:
        losses_B: float64 [B], with gradient.
        metrics: Detached float64 [B] each, by the names TRL uses.
    """

    losses_B: torch.Tensor
    metrics: Mapping[str, torch.Tensor]


class Objective(Protocol[Takes]):
    """What the training loop needs to know of an objective of log-probabilities, or of rewards.

    Attributes:
        is_coupled: Whether the loss of one group depends on all others of its optimizer step; for
            log-probabilities alone.
        statistics: What it reads of the tokens' distributions.
    """

    is_coupled: bool
    statistics: Statistics

    @property
    def metric_names(self) -> Sequence[str]:
        """Names of the metrics that come with the losses; known before anything is scored."""
        ...

    def weight(self, groups: Sequence[TokenGroup]) -> float:
        """What the sum of the groups' losses is divided by."""
        ...

    def losses(self, groups: Sequence[TokenGroup], scores: Takes, step: Sequence[TokenGroup]) -> GroupLosses:
        """The losses of groups that were scored, some or all of those of an optimizer step."""
        ...


@runtime_checkable
class Adaptive(Protocol):
    """An objective that depends on the metrics of earlier steps."""

    def after_step(self, metrics: Mapping[str, float]) -> None:
        """Take in the mean metrics of a finished step; a resumed run reports its earlier steps again, in order."""
        ...


@dataclass(frozen=True)
class Learner(Generic[Scored]):
    """A model, what scores groups with it, and what is minimized.

    Attributes:
        model: Its trainable parameters are marked.
        scorer: Scores groups with that model.
        objective: Reads the scores.
    """

    model: torch.nn.Module
    scorer: GroupScorer[Scored]
    objective: Objective[Scored]

    @property
    def trained(self) -> dict[str, torch.nn.Parameter]:
        """The parameters that are trained, by name."""
        return {name: value for name, value in self.model.named_parameters() if value.requires_grad}
