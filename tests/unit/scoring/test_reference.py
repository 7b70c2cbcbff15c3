"""The reference pass and its cache: what is missing is scored once; kept by content, of one graph, whole or refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

from dpo_cli.core import paths
from dpo_cli.core.errors import StaleArtifactError
from dpo_cli.core.manifest import REFERENCE
from dpo_cli.data.tokens import TokenGroup, completion_key
from dpo_cli.scoring.budget import TokenBudget
from dpo_cli.scoring.layout import LAYOUTS, LayoutName
from dpo_cli.scoring.reference import SCHEMA, missing_groups, read_cache, reference_logps, score_groups, write_cache
from dpo_cli.scoring.scorer import Scorer

Make = Callable[..., Any]

VOCABULARY = 100


def group(name: str, prompt: Sequence[int], *completions: Sequence[int]) -> TokenGroup:
    return TokenGroup(name, name, tuple(prompt), tuple(map(tuple, completions)))


def contents(groups: Sequence[TokenGroup]) -> list[tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]]:
    return [(found.prompt, found.completions) for found in groups]


# --- what is missing ----------------------------------------------------------------------


def test_completions_of_one_prompt_come_together_each_once() -> None:
    groups = [
        group("a", (1, 2), (3,), (4, 5)),
        group("b", (9,), (3,), (4,)),
        group("c", (1, 2), (6,), (3,)),
        group("d", (1, 2), (4, 5), (7,)),
    ]
    assert contents(missing_groups(groups, set(), 1000)) == [((1, 2), ((3,), (4, 5), (6,), (7,))), ((9,), ((3,), (4,)))]


def test_known_completions_are_left_out_and_prompts_without_others_too() -> None:
    groups = [group("a", (1, 2), (3,), (4, 5)), group("b", (9,), (3,), (4,)), group("c", (8,), (3,))]
    known = {completion_key((1, 2), (3,)), *groups[1].keys, completion_key((7,), (3,))}
    assert contents(missing_groups(groups, known, 1000)) == [((1, 2), ((4, 5),)), ((8,), ((3,),))]
    assert missing_groups(groups, {key for one in groups for key in one.keys}, 1000) == []
    assert missing_groups([], set(), 1000) == []


@pytest.mark.parametrize(
    ("max_tokens", "portions"),
    [(100, [4]), (14, [4]), (13, [3, 1]), (11, [3, 1]), (8, [2, 2]), (7, [1, 1, 1, 1]), (1, [1, 1, 1, 1])],
)
def test_a_prompt_makes_as_many_groups_as_the_budget_needs(max_tokens: int, portions: list[int]) -> None:
    """A prompt of two tokens and completions of three: 5, 8, 11 and 14 tokens, one after another."""
    completions = [(number, 20, 21) for number in range(10, 14)]
    found = missing_groups([group("a", (1, 2), *completions)], set(), max_tokens)
    assert [len(one.completions) for one in found] == portions
    assert [completion for one in found for completion in one.completions] == completions
    for one in found:
        num_tokens = len(one.prompt) + sum(map(len, one.completions))
        assert num_tokens <= max_tokens or len(one.completions) == 1


def test_the_same_data_makes_the_same_groups_with_names_of_their_own(make_groups: Make) -> None:
    groups = make_groups(30, vocabulary=6, prompt_lengths=(1, 2))
    found = missing_groups(groups, set(), 20)
    assert found == missing_groups(groups, set(), 20)
    assert len({one.id for one in found}) == len(found)
    prompts = [one.prompt for one in found]
    assert list(dict.fromkeys(prompts)) == list(dict.fromkeys(one.prompt for one in groups))
    keys = [key for one in found for key in one.keys]
    assert sorted(keys) == sorted({key for one in groups for key in one.keys})


def test_names_are_of_the_content_and_not_of_the_row(make_groups: Make) -> None:
    groups = make_groups(5)
    renamed = [TokenGroup(f"x{one.id}", "x", one.prompt, one.completions) for one in groups]
    assert missing_groups(groups, set(), 1000) == missing_groups(renamed, set(), 1000)


# --- scoring ------------------------------------------------------------------------------


@pytest.fixture
def scorer(make_llama: Make) -> Scorer:
    return Scorer(make_llama(VOCABULARY), torch.float32, "shared")


def naive_row(model: Any, prompt: tuple[int, ...], completion: tuple[int, ...]) -> list[float]:
    with torch.no_grad():
        logps = model(input_ids=torch.tensor([[*prompt, *completion]])).logits[0].double().log_softmax(-1)
    return [logps[len(prompt) - 1 + place, token].item() for place, token in enumerate(completion)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("max_tokens", [30, 10_000])
def test_rows_are_those_of_one_completion_at_a_time(
    layout: LayoutName, max_tokens: int, make_llama: Make, make_groups: Make, reporter: Any
) -> None:
    model = make_llama(VOCABULARY)
    groups = make_groups(6, completions=3) + make_groups(4, completions=1, seed=1)
    expected = {
        completion_key(one.prompt, completion): naive_row(model, one.prompt, completion)
        for one in groups
        for completion in one.completions
    }
    scorer = Scorer(model, torch.float32, layout)
    batches = list(score_groups(scorer, groups, TokenBudget(max_tokens, "precompute-ref", reporter)))
    assert len(batches) == 2 if max_tokens > 30 else len(batches) > 4
    rows = [row for batch in batches for row in batch]
    assert sorted(row["key"] for row in rows) == sorted(expected)
    for row in rows:
        tokens = expected[row["key"]]
        assert row["num_tokens"] == len(tokens) == len(row["token_logps"])
        assert row["token_logps"] == pytest.approx(tokens, abs=1e-4)
        assert row["logp"] == pytest.approx(sum(tokens), abs=1e-4)
        assert row["logp"] == pytest.approx(sum(row["token_logps"]), abs=1e-12)


def test_rows_have_no_graph_and_gradients_are_on_again_between_them(
    scorer: Scorer, make_groups: Make, reporter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    enabled: list[bool] = []
    score = scorer.score
    monkeypatch.setattr(scorer, "score", lambda batch: enabled.append(torch.is_grad_enabled()) or score(batch))
    for rows in score_groups(scorer, make_groups(6), TokenBudget(40, "precompute-ref", reporter)):
        assert torch.is_grad_enabled()
        assert all(type(row["logp"]) is float for row in rows)
    assert len(enabled) > 1
    assert not any(enabled)


# --- out of memory ------------------------------------------------------------------------


def budget_of(max_tokens: int, reporter: Any) -> TokenBudget:
    return TokenBudget(max_tokens, "precompute-ref", reporter)


def test_what_was_scored_before_memory_ran_out_is_not_scored_again(
    scorer: Scorer, make_groups: Make, reporter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third micro-batch fails once: the two before it stay, the rest goes on at half the budget."""
    groups = make_groups(30)
    batches = scorer.split(groups, 100)
    assert len(batches) > 3
    scored: list[list[str]] = []
    score = scorer.score

    def fails_third(batch: Sequence[TokenGroup]) -> Any:
        scored.append([one.id for one in batch])
        if len(scored) == 3:
            raise MemoryError
        return score(batch)

    monkeypatch.setattr(scorer, "score", fails_third)
    budget = budget_of(100, reporter)
    rows = [row["key"] for batch in score_groups(scorer, groups, budget) for row in batch]
    assert budget.max_tokens == 50
    assert scored[:3] == [[groups[index].id for index in batch] for batch in batches[:3]]
    done = [name for batch in scored[:2] + scored[3:] for name in batch]
    assert sorted(done) == sorted(one.id for one in groups)
    assert sorted(rows) == sorted(key for one in groups for key in one.keys)


# --- the cache ------------------------------------------------------------------------------

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
