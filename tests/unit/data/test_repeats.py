"""Rows that repeat or contradict each other, compared with a plain search through all pairs."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dpo_cli.core.data_params import DataChecks
from dpo_cli.data import repeats
from dpo_cli.data.blocks import DIGESTS
from dpo_cli.data.repeats import CHECKS, find_repeats

DROP = DataChecks().model_dump() | {"repeated_prompt": "drop"}
KEEP = dict.fromkeys(CHECKS, "keep")


def example(prompt: int, chosen: int, rejected: int, row: int, held_out: bool = False) -> tuple[int, ...]:
    """Digests of a pair whose texts are numbers."""
    low, high = sorted((chosen, rejected))
    identity, sides = prompt * 10_000 + chosen * 100 + rejected, prompt * 10_000 + low * 100 + high
    return (identity, 7, prompt, prompt // 2, sides, int(chosen > rejected), int(held_out), row)


@pytest.fixture
def find(tmp_path: Path) -> Any:
    """What is found among some examples, as {check: [(index, other row)]}."""

    def find_in(examples: list[tuple[int, ...]], policies: dict[str, str]) -> dict[str, list[tuple[int, int]]]:
        file = tmp_path / "digests"
        np.array(examples, DIGESTS).tofile(file)
        found = find_repeats(file, len(examples), policies)
        return {name: list(zip(*(column.tolist() for column in found[name]), strict=True)) for name in CHECKS}

    return find_in


def test_what_one_check_drops_the_next_does_not_see(find: Any) -> None:
    examples = [example(1, 2, 3, 0), example(1, 2, 3, 1), example(1, 3, 2, 2), example(1, 8, 9, 3)]
    found = find(examples, DROP)
    assert found["duplicate"] == [(1, 0)]
    assert found["contradiction"] == [(0, 2), (2, 0)]
    assert found["repeated_prompt"] == []
    assert find(examples, KEEP)["repeated_prompt"] == [(1, 0), (2, 0), (3, 0)]


def test_a_held_out_row_stays_though_a_train_row_before_it_is_the_same(find: Any) -> None:
    found = find([example(1, 2, 3, 0), example(1, 2, 3, 1, held_out=True)], DROP)
    assert (found["shared_prompt"], found["duplicate"]) == ([(0, 1)], [])


def plain_search(examples: list[tuple[int, ...]]) -> dict[str, list[tuple[int, int]]]:
    """The same by comparing every example with every other."""
    found: dict[str, list[tuple[int, int]]] = {name: [] for name in CHECKS}
    for index, (id_high, _, group, opening, sides, flipped, held_out, row) in enumerate(examples):
        earlier = examples[:index]
        if first := next((other for other in earlier if other[0] == id_high), None):
            found["duplicate"].append((index, first[-1]))
        if other := next((o for o in examples if (o[2], o[4]) == (group, sides) and o[5] != flipped), None):
            found["contradiction"].append((index, other[-1]))
        if not held_out and (other := next((o for o in examples if o[3] == opening and o[6]), None)):
            found["shared_prompt"].append((index, other[-1]))
        first = next(o for o in examples if o[2] == group)
        if first[-1] != row:
            found["repeated_prompt"].append((index, first[-1]))
    return found


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("portion", [4_000_000, 40, 3])
def test_it_finds_what_a_plain_search_finds_however_small_the_portions(
    find: Any, monkeypatch: pytest.MonkeyPatch, seed: int, portion: int
) -> None:
    monkeypatch.setattr(repeats, "_EXAMPLES_A_PORTION", portion)
    monkeypatch.setattr(repeats, "_READ_AT_ONCE", 7)
    rng = random.Random(seed)
    rows = sorted(rng.randrange(60) for _ in range(80))
    examples = [example(rng.randrange(8), *rng.sample(range(5), 2), row, held_out=rng.random() < 0.2) for row in rows]
    assert find(examples, KEEP) == plain_search(examples)
