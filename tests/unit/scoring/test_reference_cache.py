"""The reference cache: by content, of one graph, whole or refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from dpo_cli.core import paths
from dpo_cli.core.errors import StaleArtifactError
from dpo_cli.core.manifest import REFERENCE
from dpo_cli.data.tokens import TokenGroup
from dpo_cli.scoring.reference import (
    SCHEMA,
    read_cache,
    reference_logps,
    write_cache,
)

Make = Callable[..., Any]

IDENTITY = {"base": "b1", "sft": "s1", "quantization": "nf4", "compute_dtype": "float32", "engine": 1, "torch": "2.13"}


def row(key: str, *token_logps: float) -> dict[str, Any]:
    return {"key": key, "logp": sum(token_logps), "num_tokens": len(token_logps), "token_logps": list(token_logps)}


def frame(rows: Sequence[dict[str, Any]]) -> pl.DataFrame:
    return pl.DataFrame(rows, schema=SCHEMA)


@pytest.fixture
def groups(make_groups: Make) -> list[TokenGroup]:
    return make_groups(20)


@pytest.fixture
def written(project: Path, groups: list[TokenGroup]) -> tuple[Path, dict[str, float]]:
    """A cache of all groups: its folder and its sums by key."""
    folder = paths.REFERENCE
    folder.mkdir(parents=True)
    rows = [row(key, -0.5 * number, -1.25) for number, group in enumerate(groups) for key in group.keys]
    write_cache(folder, frame(rows).unique("key"), IDENTITY, {})
    return folder, {entry["key"]: entry["logp"] for entry in rows}


# --- writing and reading ------------------------------------------------------------------


def test_the_same_rows_in_any_order_give_the_same_bytes(tmp_path: Path) -> None:
    rows = frame([row(f"{number:032x}", -float(number)) for number in range(50)])
    contents = []
    for name, shuffled in (("one", rows), ("two", rows.sample(fraction=1, shuffle=True, seed=0))):
        (tmp_path / name).mkdir()
        write_cache(tmp_path / name, shuffled, IDENTITY, {})
        contents.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
    assert contents[0] == contents[1]


def test_many_rows_make_several_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpo_cli.scoring.reference._ROWS_A_PART", 7)
    rows = frame([row(f"{number:032x}", -float(number)) for number in range(20)])
    write_cache(tmp_path, rows, IDENTITY, {})
    assert len(list(tmp_path.glob("part-*.parquet"))) == 3
    assert read_cache(tmp_path, IDENTITY) == dict(zip(rows["key"], rows["logp"], strict=True))
    manifest = json.loads((tmp_path / REFERENCE.name).read_text())
    assert (manifest["facts"], manifest["made_of"]) == ({"num_rows": 20}, {"graph": IDENTITY})


# --- refusals -----------------------------------------------------------------------------


def test_a_cache_of_another_graph_is_refused_with_the_field(written: tuple[Path, dict[str, float]]) -> None:
    field = "compute_dtype"
    other = IDENTITY | {field: "other"}
    with pytest.raises(StaleArtifactError) as caught:
        read_cache(written[0], other)
    (problem,) = caught.value.problems
    assert f"{field} is 'other' now, was {IDENTITY[field]!r}" in problem
    assert problem.endswith("run: dpo-cli precompute-ref")


def test_a_missing_cache_says_which_stage_to_run(project: Path) -> None:
    with pytest.raises(StaleArtifactError, match=r"manifest.json is missing; run: dpo-cli precompute-ref"):
        read_cache(paths.REFERENCE, IDENTITY)


# --- joining ------------------------------------------------------------------------------


def test_rows_are_joined_by_key_and_not_by_position(
    written: tuple[Path, dict[str, float]], groups: list[TokenGroup]
) -> None:
    cache = read_cache(written[0], IDENTITY)
    forwards, backwards = reference_logps(cache, groups), reference_logps(cache, groups[::-1])
    assert forwards == backwards
    for group in groups:
        assert forwards[group.id] == [written[1][key] for key in group.keys]


def test_swapped_sides_find_their_own_rows(written: tuple[Path, dict[str, float]], groups: list[TokenGroup]) -> None:
    cache, group = read_cache(written[0], IDENTITY), groups[0]
    swapped = TokenGroup("swapped", group.group, group.prompt, group.completions[::-1])
    found = reference_logps(cache, [group, swapped])
    assert found["swapped"] == found[group.id][::-1]


def test_a_completion_that_is_not_in_the_cache_is_refused_with_its_row(
    written: tuple[Path, dict[str, float]], groups: list[TokenGroup]
) -> None:
    cache, group = read_cache(written[0], IDENTITY), groups[3]
    changed = TokenGroup("new-row", group.group, group.prompt, (group.completions[0], (9, 9, 9)))
    with pytest.raises(StaleArtifactError, match=r"no row for new-row of data/preference: .*precompute-ref"):
        reference_logps(cache, [*groups, changed])
