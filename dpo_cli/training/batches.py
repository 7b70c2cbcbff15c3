"""Where the groups of each optimizer step come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeVar

import torch

Item = TypeVar("Item")
Gives = TypeVar("Gives", covariant=True)


class BatchSource(Protocol[Gives]):
    """What the training loop needs to know of its data.

    A source of fixed data has no state. One whose data the policy makes itself, such as rollouts, does so within
    :meth:`batch` at the steps that begin a round, and hands it out over the following ones; what it holds then is its
    state, which every checkpoint keeps.
    """

    def batch(self, step: int) -> Sequence[Gives]:
        """The groups of an optimizer step, counted from 0; the same in every process and in a run that went on."""
        ...

    def state(self) -> Mapping[str, Any]:
        """What it needs to go on after the last step: numbers, texts, tensors, and lists and mappings of them."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take up the state of an earlier run."""


class Shuffled(BatchSource[Item]):
    """Fixed data in epochs, each in an order of its own; the last batch of an epoch may be a short one.

    Args:
        items: All there is.
        batch_size: Items of a step.
        seed: The order of epoch ``e`` is the permutation that torch draws with ``seed + e``.
    """

    def __init__(self, items: Sequence[Item], batch_size: int, seed: int) -> None:
        self._items = items
        self._batch_size = batch_size
        self._seed = seed
        self._epoch = -1
        self._order: list[int] = []

    def batch(self, step: int) -> Sequence[Item]:
        """The items of a step."""
        epoch, place = divmod(step, -(-len(self._items) // self._batch_size))
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self._seed + epoch)
            self._epoch, self._order = epoch, torch.randperm(len(self._items), generator=generator).tolist()
        start = place * self._batch_size
        return [self._items[index] for index in self._order[start : start + self._batch_size]]
