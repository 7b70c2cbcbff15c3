"""The token budget: halved when memory runs out, remembered, and no lower than one group at a time."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from dpo_cli.core.errors import MachineError, is_out_of_memory
from dpo_cli.data.tokens import TokenGroup
from dpo_cli.scoring.budget import TokenBudget, in_micro_batches
from dpo_cli.scoring.layout import split_by_tokens

Make = Callable[..., Any]

SEVERAL = [[0, 1], [2]]


# --- whether memory ran out ---------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        torch.cuda.OutOfMemoryError("CUDA out of memory."),
        MemoryError(),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("CUDA driver error: out of memory"),
        RuntimeError("HIP out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you ..."
        ),
    ],
)
def test_memory_that_ran_out_is_recognized(error: BaseException) -> None:
    assert is_out_of_memory(error)


def test_the_error_of_pytorch_itself_is_recognized() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60)
    assert is_out_of_memory(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        ValueError("DefaultCPUAllocator: can't allocate memory"),
        OSError(12, "Cannot allocate memory"),
        KeyboardInterrupt(),
    ],
)
def test_other_errors_are_not_taken_for_it(error: BaseException) -> None:
    assert not is_out_of_memory(error)


# --- halving ------------------------------------------------------------------------------


def test_half_is_taken_each_time_and_said(reporter: Any) -> None:
    budget = TokenBudget(1000, "train", reporter)
    assert budget.max_tokens == 1000
    for expected in (500, 250, 125, 62, 31, 15, 7, 3, 1, 1):
        budget.halve(SEVERAL)
        assert budget.max_tokens == expected
    assert reporter.warned[0] == (
        "train: out of memory; continuing with 500 tokens at once (runtime.max_tokens_per_microbatch);"
        " without dropout that changes no result beyond rounding"
    )


@pytest.mark.parametrize("batches", [[[7]], [[0], [1], [2]]])
def test_single_groups_that_do_not_fit_are_the_users_to_mend(
    batches: list[list[int]], reporter: Any, tmp_path: Path
) -> None:
    memory = tmp_path / "budget.json"
    budget = TokenBudget(1000, "precompute-ref", reporter, memory)
    with pytest.raises(MachineError) as caught:
        budget.halve(batches)
    (problem,) = caught.value.problems
    assert problem.startswith("precompute-ref: out of memory with a single prompt and its answers at a time; ")
    assert "runtime.recompute" in problem
    assert "max_length" in problem
    assert budget.max_tokens == 1000
    assert reporter.warned == []
    assert not memory.exists()


# --- memory -------------------------------------------------------------------------------


def test_a_halved_budget_is_remembered(reporter: Any, tmp_path: Path) -> None:
    memory = tmp_path / "budget.json"
    budget = TokenBudget(1000, "train", reporter, memory)
    assert not memory.exists()
    budget.halve(SEVERAL)
    budget.halve(SEVERAL)
    assert json.loads(memory.read_text()) == {"max_tokens_per_microbatch": 250}
    assert TokenBudget(1000, "train", reporter, memory).max_tokens == 250


def test_the_smaller_of_what_is_set_and_what_is_remembered_counts(reporter: Any, tmp_path: Path) -> None:
    memory = tmp_path / "budget.json"
    memory.write_text('{"max_tokens_per_microbatch": 300}')
    assert TokenBudget(1000, "train", reporter, memory).max_tokens == 300
    assert TokenBudget(200, "train", reporter, memory).max_tokens == 200


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{}",
        b"\xff",
        b'{"max_tokens_per_microbatch": null}',
        b'{"max_tokens_per_microbatch": "many"}',
    ],
)
def test_a_damaged_memory_is_nothing_remembered(content: bytes, reporter: Any, tmp_path: Path) -> None:
    memory = tmp_path / "budget.json"
    memory.write_bytes(content)
    budget = TokenBudget(1000, "train", reporter, memory)
    assert budget.max_tokens == 1000
    budget.halve(SEVERAL)
    assert TokenBudget(1000, "train", reporter, memory).max_tokens == 500


# --- work in micro-batches ----------------------------------------------------------------


def split(groups: Sequence[TokenGroup], max_tokens: int) -> list[list[int]]:
    return split_by_tokens(groups, max_tokens, "shared")


def ids(groups: Sequence[TokenGroup]) -> list[str]:
    return [group.id for group in groups]


def test_every_group_is_worked_on_once_and_comes_with_what_came_of_it(reporter: Any, make_groups: Make) -> None:
    groups = make_groups(30)
    found = list(in_micro_batches(groups, TokenBudget(100, "train", reporter), split, ids))
    assert [ids(batch) for batch, _ in found] == [
        ids([groups[index] for index in batch]) for batch in split(groups, 100)
    ]
    assert all(result == ids(batch) for batch, result in found)
    assert list(in_micro_batches([], TokenBudget(100, "train", reporter), split, ids)) == []


@pytest.mark.parametrize("room", [1, 2, 5])
def test_where_memory_runs_out_every_group_is_still_worked_on_once(room: int, reporter: Any, make_groups: Make) -> None:
    groups = make_groups(30) + make_groups(5, completions=4, seed=1)
    budget = TokenBudget(400, "train", reporter)

    def work(batch: list[TokenGroup]) -> int:
        if len(batch) > room:
            raise MemoryError
        return len(batch)

    found = list(in_micro_batches(groups, budget, split, work))
    assert sorted(name for batch, _ in found for name in ids(batch)) == sorted(ids(groups))
    assert all(result == len(batch) <= room for batch, result in found)
    assert budget.max_tokens == 400 >> len(reporter.warned) < 400


def test_what_filled_the_memory_is_gone_before_the_budget_is_halved(
    reporter: Any, make_groups: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error's traceback holds the frames it came through, and they hold the tensors."""
    filled: list[weakref.ref[torch.Tensor]] = []
    left: list[bool] = []

    def work(batch: list[TokenGroup]) -> None:
        if len(batch) > 1:
            activations = torch.zeros(10)
            filled.append(weakref.ref(activations))
            raise torch.OutOfMemoryError("CUDA out of memory")

    budget = TokenBudget(100, "train", reporter)
    halve = budget.halve

    def halve_and_look(batches: Sequence[Sequence[Any]]) -> None:
        left.append(filled[-1]() is not None)
        halve(batches)

    monkeypatch.setattr(budget, "halve", halve_and_look)
    for _ in in_micro_batches(make_groups(10), budget, split, work):
        pass
    assert left
    assert not any(left)


def test_a_group_that_does_not_fit_ends_the_work_where_it_is(reporter: Any, make_groups: Make) -> None:
    groups = make_groups(10)
    done: list[str] = []

    def work(batch: list[TokenGroup]) -> None:
        if groups[4] in batch:
            raise MemoryError

    with pytest.raises(MachineError, match="train: out of memory with a single prompt"):
        for batch, _ in in_micro_batches(groups, TokenBudget(60, "train", reporter), split, work):
            done += ids(batch)
    assert 0 < len(done) == len(set(done)) < 10
    assert groups[4].id not in done
