"""In which order items are asked, and answers shown: by a stored seed, so that it is the same tomorrow."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

import numpy as np

from dpo_cli.labeling.items import ItemStore
from dpo_cli.labeling.settings import Settings

Drawn = Literal["random", "uncertain", "repeat", "adjudication", "chat"]
"""Why an item is asked."""


@dataclass(frozen=True)
class Asked:
    """A question to a rater.

    Attributes:
        number: Of the line that the answer will be.
        index: Of the item.
        order: Places of the item's answers, as they are shown.
        drawn: Why this item.
    """

    number: int
    index: int
    order: tuple[int, ...]
    drawn: Drawn


def shown_order(seed: int, rater: str, item_id: str, num_answers: int, *, is_flipped: bool) -> tuple[int, ...]:
    """Places of an item's answers as a rater sees them; flipped, the other way round."""
    order = list(range(num_answers))
    random.Random(f"{seed} {rater} {item_id}").shuffle(order)
    return tuple(reversed(order) if is_flipped else order)


def is_repeat(seed: int, rater: str, number: int, share: float) -> bool:
    """Whether a rater's question of this number is to be one that comes again: of every 1 / share one is, by chance."""
    if not share:
        return False
    every = round(1 / share)
    return number % every == random.Random(f"{seed} {rater} again {number // every}").randrange(every)


def item_order(items: ItemStore, settings: Settings) -> tuple[np.ndarray, np.ndarray]:
    """All items in the order in which they are asked, and whether each is there because it is uncertain.

    A coin says of every item which of the two it is, so that those drawn at random stand for all of them.
    """
    shuffled = np.random.default_rng(settings.seed).permutation(len(items))
    by_round = shuffled[np.argsort(items.rounds[shuffled], kind="stable")]
    coins = np.random.default_rng([settings.seed, 1]).random(len(items)) < settings.uncertain
    is_uncertain = coins & ~np.isnan(items.margins)
    closest = by_round[np.lexsort((items.margins[by_round], items.rounds[by_round]))]
    lists = [by_round[~is_uncertain[by_round]], closest[is_uncertain[closest]]]
    places = np.concatenate([(np.arange(len(each)) + 0.5) / max(len(each), 1) for each in lists])
    return np.concatenate(lists)[np.argsort(places, kind="stable")], is_uncertain
