"""Rows that repeat or contradict each other, found by their digests in bounded memory.

Digests lie in one file, 50 bytes an example. They are compared in portions that hold all
examples of an opening, so that memory is bounded by the portion, however many there are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dpo_cli.data.blocks import DIGESTS

_EXAMPLES_A_PORTION = 4_000_000
_READ_AT_ONCE = 500_000

CHECKS = ("shared_prompt", "duplicate", "contradiction", "repeated_prompt")
"""In this order: what an earlier one drops, a later one does not see."""


@dataclass
class Repeats:
    """What was found.

    Attributes:
        indices: For each check, the examples that fail it, ascending, int64.
        others: For each of these, the row it repeats or contradicts, int64.
    """

    indices: dict[str, np.ndarray] = field(default_factory=dict)
    others: dict[str, np.ndarray] = field(default_factory=dict)


def find_repeats(file: Path, num_examples: int, policies: Mapping[str, str]) -> Repeats:
    """Compare all examples with each other.

    Args:
        file: Their digests (:data:`~dpo_cli.data.blocks.DIGESTS`), in order.
        num_examples: How many there are.
        policies: What becomes of those that fail a check: the ones that stay are compared further.
    """
    num_portions = 1 + num_examples // _EXAMPLES_A_PORTION
    hits: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {name: [] for name in CHECKS}
    for portion in range(num_portions):
        digests, indices = _read_portion(file, portion, num_portions)
        for name in CHECKS:
            key, find = _FINDERS[name]
            candidates = _repeated(digests[key])  # mostly few, so that the finder's sorting costs little
            at, others = (candidates[places] for places in find(digests[candidates]))
            hits[name].append((indices[at], digests["row"][others]))
            if policies[name] != "keep" and len(at):
                stays = np.ones(len(digests), bool)
                stays[at] = False
                digests, indices = digests[stays], indices[stays]
    result = Repeats()
    for name, found in hits.items():
        at, others = (np.concatenate(columns) for columns in zip(*found, strict=True))
        order = np.argsort(at, kind="stable")
        result.indices[name], result.others[name] = at[order], others[order]
    return result


def _read_portion(file: Path, portion: int, num_portions: int) -> tuple[np.ndarray, np.ndarray]:
    parts = [(found, indices) for found, indices in _read(file, portion, num_portions)]
    if not parts:
        return np.empty(0, DIGESTS), np.empty(0, np.int64)
    return np.concatenate([found for found, _ in parts]), np.concatenate([indices for _, indices in parts])


def _read(file: Path, portion: int, num_portions: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    with file.open("rb") as opened:
        start = 0
        while data := opened.read(_READ_AT_ONCE * DIGESTS.itemsize):
            block = np.frombuffer(data, DIGESTS)
            mine = np.flatnonzero(block["opening"] % np.uint64(num_portions) == portion)
            yield block[mine], mine + start
            start += len(block)


def _repeated(values: np.ndarray) -> np.ndarray:
    """Places, ascending, of the values that are there more than once."""
    ordered = np.sort(values)
    twice = ordered[1:][ordered[1:] == ordered[:-1]]
    return np.flatnonzero(np.isin(values, twice)) if len(twice) else np.empty(0, np.int64)


def _runs(*keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Order examples by some keys, then as they came; for each place in that order, where its run of equals begins."""
    num = len(keys[0])
    order = np.lexsort((np.arange(num), *reversed(keys)))
    begins = np.zeros(num, bool)
    for key in keys:
        ordered = key[order]
        begins[1:] |= ordered[1:] != ordered[:-1]
    begins[:1] = True
    starts = np.maximum.accumulate(np.where(begins, np.arange(num), 0))
    return order, starts


def _partners(order: np.ndarray, starts: np.ndarray, *keys: np.ndarray) -> np.ndarray:
    """For each place: where the run before or after it begins that has the same keys; -1: none."""
    begins = np.flatnonzero(starts == np.arange(len(order)))
    same = np.ones(max(len(begins) - 1, 0), bool)
    for key in keys:
        same &= key[order][begins[1:]] == key[order][begins[:-1]]
    partner = np.full(len(order), -1, np.int64)
    partner[begins[:-1][same]] = begins[1:][same]
    partner[begins[1:][same]] = begins[:-1][same]
    return partner[starts]


def _duplicates(digests: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    order, starts = _runs(digests["id_high"], digests["id_low"])
    later = starts != np.arange(len(order))
    return order[later], order[starts[later]]


def _contradictions(digests: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    order, starts = _runs(digests["group"], digests["sides"], digests["flipped"])
    partner = _partners(order, starts, digests["group"], digests["sides"])
    hit = partner >= 0
    return order[hit], order[partner[hit]]


def _shared_prompts(digests: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    order, starts = _runs(digests["opening"], digests["held_out"])
    partner = _partners(order, starts, digests["opening"])
    hit = (partner >= 0) & (digests["held_out"][order] == 0)
    return order[hit], order[partner[hit]]


def _repeated_prompts(digests: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    order, starts = _runs(digests["group"])
    rows = digests["row"][order]
    later = rows != rows[starts]  # pairs of one ranking share their row
    return order[later], order[starts[later]]


_FINDERS = {
    "duplicate": ("id_high", _duplicates),
    "contradiction": ("sides", _contradictions),
    "shared_prompt": ("opening", _shared_prompts),
    "repeated_prompt": ("group", _repeated_prompts),
}
"""For each check what must be equal at least, and the finder among those in which it is."""
