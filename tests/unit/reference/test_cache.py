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
from dpo_cli.data.tokens import TokenGroup, completion_key
from dpo_cli.reference import cache as cache_module
from dpo_cli.reference.cache import (
    SCHEMA,
    group_keys,
    read_cache,
    reference_logps,
    write_cache,
)

IDENTITY = {"base": "b1", "sft": "s1", "quantization": "nf4", "compute_dtype": "float32", "engine": 1, "torch": "2.13"}


def row(key: str, *token_logps: float) -> dict[str, Any]:
    return {"key": key, "logp": sum(token_logps), "num_tokens": len(token_logps), "token_logps": list(token_logps)}


def frame(rows: Sequence[dict[str, Any]]) -> pl.DataFrame:
    return pl.DataFrame(rows, schema=SCHEMA)


@pytest.fixture
def groups(make_groups: Callable[..., list[TokenGroup]]) -> list[TokenGroup]:
    return make_groups(20)


@pytest.fixture
def written(project: Path, groups: list[TokenGroup]) -> tuple[Path, dict[str, float]]:
    """A cache of all groups: its folder and its sums by key."""
    folder = paths.REFERENCE
    folder.mkdir(parents=True)
    rows = [row(key, -0.5 * number, -1.25) for number, group in enumerate(groups) for key in group_keys(group)]
    write_cache(folder, frame(rows).unique("key"), IDENTITY, {})
    return folder, {entry["key"]: entry["logp"] for entry in rows}


# --- keys ---------------------------------------------------------------------------------


def test_a_key_is_of_the_token_ids_and_of_where_the_completion_begins() -> None:
    keys = {
        completion_key((1, 2), (3, 4)),
        completion_key((1, 2, 3), (4,)),
        completion_key((1,), (2, 3, 4)),
        completion_key((1, 2), (3, 5)),
        completion_key((1, 2), (3, 4, 0)),
        completion_key((2, 1), (3, 4)),
        completion_key((1, 258), (3, 4)),
    }
    assert len(keys) == 7
    assert completion_key([1, 2], [3, 4]) in keys


def test_ids_of_row_and_prompt_are_not_in_the_key() -> None:
    one, two = (TokenGroup(name, name, (1, 2), ((3,), (4,))) for name in "ab")
    assert group_keys(one) == group_keys(two) == [completion_key((1, 2), (3,)), completion_key((1, 2), (4,))]


# --- writing and reading ------------------------------------------------------------------


def test_what_is_written_is_read(written: tuple[Path, dict[str, float]]) -> None:
    folder, sums = written
    assert read_cache(folder, IDENTITY) == sums


def test_the_same_rows_in_any_order_give_the_same_bytes(tmp_path: Path) -> None:
    rows = frame([row(f"{number:032x}", -float(number)) for number in range(50)])
    contents = []
    for name, shuffled in (("one", rows), ("two", rows.sample(fraction=1, shuffle=True, seed=0))):
        (tmp_path / name).mkdir()
        write_cache(tmp_path / name, shuffled, IDENTITY, {})
        contents.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
    assert contents[0] == contents[1]


def test_many_rows_make_several_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "_ROWS_A_PART", 7)
    rows = frame([row(f"{number:032x}", -float(number)) for number in range(20)])
    write_cache(tmp_path, rows, IDENTITY, {})
    assert len(list(tmp_path.glob("part-*.parquet"))) == 3
    assert read_cache(tmp_path, IDENTITY) == dict(zip(rows["key"], rows["logp"], strict=True))
    manifest = json.loads((tmp_path / REFERENCE.name).read_text())
    assert (manifest["facts"], manifest["made_of"]) == ({"num_rows": 20}, {"graph": IDENTITY})


def test_other_tools_can_read_the_parts(written: tuple[Path, dict[str, float]]) -> None:
    folder, sums = written
    table = pl.read_parquet(folder / "part-00000.parquet")
    assert table.schema == pl.Schema(SCHEMA)
    assert table.height == len(sums)
    assert all(logp == sum(tokens) for logp, tokens in zip(table["logp"], table["token_logps"].to_list(), strict=True))


# --- refusals -----------------------------------------------------------------------------


@pytest.mark.parametrize("field", IDENTITY)
def test_a_cache_of_another_graph_is_refused_with_the_field(written: tuple[Path, dict[str, float]], field: str) -> None:
    other = IDENTITY | {field: "other"}
    with pytest.raises(StaleArtifactError) as caught:
        read_cache(written[0], other)
    (problem,) = caught.value.problems
    assert f"{field} is 'other' now, was {IDENTITY[field]!r}" in problem
    assert problem.endswith("run: dpo-cli precompute-ref")


def test_every_field_that_differs_is_named(written: tuple[Path, dict[str, float]]) -> None:
    other = {name: value for name, value in IDENTITY.items() if name != "torch"} | {"base": "b2", "new": 1}
    with pytest.raises(StaleArtifactError) as caught:
        read_cache(written[0], other)
    assert [problem.split("graph: ")[1].split(" is ")[0] for problem in caught.value.problems] == [
        "base",
        "new",
        "torch",
    ]


def test_a_missing_cache_says_which_stage_to_run(project: Path) -> None:
    with pytest.raises(StaleArtifactError, match=r"manifest.json is missing; run: dpo-cli precompute-ref"):
        read_cache(paths.REFERENCE, IDENTITY)


def test_a_missing_part_is_refused(written: tuple[Path, dict[str, float]]) -> None:
    (written[0] / "part-00000.parquet").unlink()
    with pytest.raises(StaleArtifactError, match=r"part-00000.parquet is missing; run: dpo-cli precompute-ref"):
        read_cache(written[0], IDENTITY)


def test_a_damaged_part_is_refused_whichever_byte_it_is(written: tuple[Path, dict[str, float]]) -> None:
    part = written[0] / "part-00000.parquet"
    whole = part.read_bytes()
    for position in range(0, len(whole), 97):
        part.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        with pytest.raises(StaleArtifactError, match=r"part-00000.parquet has changed since it was made"):
            read_cache(written[0], IDENTITY)
    part.write_bytes(whole[:-1])
    with pytest.raises(StaleArtifactError, match=r"part-00000.parquet has changed since it was made"):
        read_cache(written[0], IDENTITY)


def test_a_manifest_that_is_cut_off_is_refused(written: tuple[Path, dict[str, float]]) -> None:
    manifest = written[0] / REFERENCE.name
    manifest.write_bytes(manifest.read_bytes()[:-20])
    with pytest.raises(StaleArtifactError, match="manifest.json is damaged"):
        read_cache(written[0], IDENTITY)


@pytest.mark.parametrize(
    "manifest", [[], "text", None, {"made_of": {"graph": IDENTITY}}, {"kind": "reference", "files": []}]
)
def test_a_manifest_of_another_shape_is_refused(written: tuple[Path, dict[str, float]], manifest: Any) -> None:
    (written[0] / REFERENCE.name).write_text(json.dumps(manifest))
    with pytest.raises(StaleArtifactError):
        read_cache(written[0], IDENTITY)


# --- joining ------------------------------------------------------------------------------


def test_rows_are_joined_by_key_and_not_by_position(
    written: tuple[Path, dict[str, float]], groups: list[TokenGroup]
) -> None:
    cache = read_cache(written[0], IDENTITY)
    forwards, backwards = reference_logps(cache, groups), reference_logps(cache, groups[::-1])
    assert forwards == backwards
    for group in groups:
        assert forwards[group.id] == [written[1][key] for key in group_keys(group)]


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
