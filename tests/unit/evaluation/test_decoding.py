"""Decoding in places that stay: the same answers as from a cache that grows, and no record that is not right."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import pytest
import torch

from dpo_cli.core import environment
from dpo_cli.evaluation import decoding
from dpo_cli.evaluation.generation import PromptTokens, Sampled
from tests.parity.test_layouts_agree import EXACT, NEEDS_PADDING, VOCABULARY, WINDOWED, build
from tests.unit.evaluation.test_generation import answer, some_prompts

PLACELESS = {
    "lfm2": "it fails (its cache has a LinearAttentionLayer)",
    "qwen3_next": "it fails (its cache has a LinearAttentionLayer)",
}
"""Families whose state has no places, and what is said of them."""


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU is taken for a GPU."""
    monkeypatch.setattr(environment, "GPU_TYPES", ("cuda", "cpu"))


def sample(
    model: Any, reporter: Any, prompts: Sequence[PromptTokens] = (), max_tokens: int = 30, **changes: Any
) -> dict[str, Sampled]:
    prompts = prompts or some_prompts(12, VOCABULARY)
    return answer(model, reporter, prompts, max_tokens, **{"max_new_tokens": 20, **changes})


# --- the same answers ---------------------------------------------------------------------


@pytest.mark.parametrize("family", [*EXACT, *NEEDS_PADDING])
def test_answers_are_those_of_a_cache_that_grows(family: str, reporter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sampled and greedy, in batches of prompts of uneven lengths, well over every window."""
    model = build(family)
    grown = [sample(model, reporter, temperature=temperature) for temperature in (1.0, 0.0)]
    monkeypatch.setattr(environment, "GPU_TYPES", ("cuda", "cpu"))
    if family not in PLACELESS:
        monkeypatch.setattr(model, "generate", None)
    assert [sample(model, reporter, temperature=temperature) for temperature in (1.0, 0.0)] == grown
    assert len({answer.tokens for answer in grown[0].values()}) > 6
    (note,) = {note for meter in reporter.meters for note in meter.notes}
    if family in PLACELESS:
        assert note.endswith(PLACELESS[family])
    else:
        assert note.startswith("step by step, since it cannot be recorded ("), "there is no CUDA here"


TAKE_STEP = decoding._Run.step


@pytest.mark.parametrize("family", WINDOWED)
def test_where_steps_give_other_numbers_the_cache_grows(
    family: str, reporter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here they do not keep windows."""
    model = build(family)
    grown = sample(model, reporter)
    monkeypatch.setattr(environment, "GPU_TYPES", ("cuda", "cpu"))

    def step(run: Any) -> torch.Tensor:
        with patch(
            "transformers.masking_utils.sliding_window_overlay", lambda _: lambda b, h, query, key: key <= query
        ):
            return TAKE_STEP(run)

    monkeypatch.setattr(decoding._Run, "step", step)
    assert sample(model, reporter) == grown
    assert "are not right for this model: a next-token distribution is off by" in reporter.meters[-1].notes[0]


def test_the_host_looks_at_every_eighth_step_whether_all_answers_have_ended(
    on_gpu: None, reporter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build("llama")
    steps = []
    monkeypatch.setattr(decoding._Run, "step", lambda run: (steps.append(run), TAKE_STEP(run))[1])
    answers = sample(model, reporter, stop_ids=tuple(range(VOCABULARY)), max_new_tokens=40)
    assert all(len(answer.tokens) == 1 for answer in answers.values())
    runs = {id(run): steps.count(run) for run in steps if run.answers_RS.shape[1] == 40}
    assert set(runs.values()) == {7}, "the prompts give the first of eight tokens"


# --- records ------------------------------------------------------------------------------


class FakeRecord:
    """Stands for a CUDA graph: the step itself, or one that goes wrong in some way."""

    def __init__(self, fault: str) -> None:
        self.fault = fault
        self.replayed = 0

    def __call__(self, step: Any) -> Any:
        run = step.__self__
        logits_RV = torch.zeros(run.answers_RS.shape[0], VOCABULARY)
        token_R1 = run.token_R1.clone()

        def replay() -> None:
            self.replayed += 1
            before = [tensor.clone() for tensor in run.state]
            if self.fault == "an old token":
                run.token_R1.copy_(token_R1)
            if self.fault == "an old place":
                run.state[2].fill_(1)
            logits_RV.copy_(step())
            if self.fault == "no number":
                logits_RV.fill_(torch.nan)
            if self.fault == "it stands still":
                for tensor, value in zip(run.state, before, strict=True):
                    tensor.copy_(value)

        return "it cannot be recorded (no)" if self.fault == "no record" else decoding._Record(replay, logits_RV)


REASONS = {
    "": None,
    "an old token": "its record gives a distribution that is off by",
    "an old place": "its record gives a distribution that is off by",
    "no number": "its record gives a distribution that is off by inf",
    "it stands still": "its record does not go on",
    "no record": "it cannot be recorded (no)",
}


@pytest.mark.parametrize("fault", REASONS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_record_is_used_only_if_it_does_what_the_step_does(
    fault: str, temperature: float, reporter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build("llama")
    grown = sample(model, reporter, temperature=temperature)
    monkeypatch.setattr(environment, "GPU_TYPES", ("cuda", "cpu"))
    record = FakeRecord(fault)
    monkeypatch.setattr(decoding, "_record", record)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: None)
    assert sample(model, reporter, temperature=temperature) == grown
    notes, reason = reporter.meters[-1].notes, REASONS[fault]
    if reason is None:
        assert notes == []
        assert record.replayed > 30, "three batches of up to 18 steps each"
    else:
        assert all(note.startswith(f"step by step, since {reason}") for note in notes)
        assert record.replayed == (fault != "no record"), "it is tried once for a model"


@pytest.mark.parametrize("waits", [False, True])
def test_a_step_that_waits_for_the_device_is_not_recorded(
    waits: bool, reporter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found before a record is begun, and the step that was cut short is taken again."""
    model = build("llama")
    grown = sample(model, reporter)
    monkeypatch.setattr(environment, "GPU_TYPES", ("cuda", "cpu"))
    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    records: list[Any] = []
    monkeypatch.setattr(decoding, "_record", lambda step: records.append(step) or "it cannot be recorded (no)")
    take = decoding._Run._take

    def spoiled(run: Any, logits_RV: torch.Tensor) -> None:
        if waits and modes[-1:] == ["error"]:
            raise RuntimeError("called a synchronizing CUDA operation")
        take(run, logits_RV)

    monkeypatch.setattr(decoding._Run, "_take", spoiled)
    assert sample(model, reporter) == grown
    assert modes == ["error", "default"]
    assert len(records) == (not waits)
    why = "called a synchronizing CUDA operation" if waits else "no"
    assert reporter.meters[-1].notes[0] == f"step by step, since it cannot be recorded ({why})"


@pytest.mark.parametrize("is_ended", [False, True])
def test_a_record_that_failed_is_over_for_the_allocator(is_ended: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch up to 2.12 leaves it open, and empty_cache is an error from then on; later ones have ended it."""
    ended: list[Any] = []

    def end(device: int, pool: Any) -> None:
        ended.append((device, pool))
        if is_ended:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")

    @contextmanager
    def recording(graph: Any, pool: Any) -> Iterator[None]:
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 7))
    monkeypatch.setattr(torch.cuda, "graph", recording)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end, raising=False)

    def fail(error: Exception) -> Any:
        raise error

    assert decoding._record(lambda: fail(ValueError("no"))) == "it cannot be recorded (no)"
    with pytest.raises(torch.OutOfMemoryError):
        decoding._record(lambda: fail(torch.OutOfMemoryError()))
    assert ended == [(1, (0, 7))] * 2


def test_few_new_tokens_are_not_worth_a_record(on_gpu: None, reporter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "_record", None)
    sample(build("llama"), reporter, max_new_tokens=15)


def test_memory_that_runs_out_is_for_the_budget_to_see(
    on_gpu: None, reporter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a model is tried, and while a step is recorded: batches become smaller, the answers stay."""
    model = build("llama")
    expected = sample(model, reporter)
    sizes: list[int] = []
    begin = decoding._Run.begin

    def small(run: Any) -> None:
        sizes.append(len(run.token_R1))
        if len(run.token_R1) > 3:
            raise torch.OutOfMemoryError
        begin(run)

    monkeypatch.setattr(decoding._Run, "begin", small)
    assert sample(model, reporter) == expected
    assert max(sizes) > 3 >= sizes[-1]
    assert any("out of memory" in line for line in reporter.warned)


def test_packed_weights_get_no_more_rows_than_are_multiplied_without_unpacking(
    on_gpu: None, reporter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    begin = decoding._Run.begin
    monkeypatch.setattr(decoding._Run, "begin", lambda run: (sizes.append(len(run.token_R1)), begin(run))[1])
    prompts = [PromptTokens(f"{number}", (5, 7, 3)) for number in range(150)]
    for is_packed, expected in ((False, [150]), (True, [64, 64, 22])):
        model = build("llama")
        if is_packed:
            model.model.layers[0].mlp.up_proj.weight.quant_state = object()
        sample(model, reporter, prompts, 4096, max_new_tokens=2)
        assert sizes[1:] == expected, "the first is the model's trial"
        sizes.clear()
