"""Which device, in which precision, and how much of its memory."""

from __future__ import annotations

import builtins
import importlib.util
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from dpo_cli.core.errors import MachineError
from dpo_cli.core.params import RuntimeParams
from dpo_cli.models import device
from dpo_cli.models.device import Machine, free_memory_bytes, memory_in_words, memory_metrics, prepare_machine

CPU, GIB = torch.device("cpu"), 2**30


@pytest.fixture
def no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


class Card:
    """A GPU as torch.cuda speaks of it: 24 GiB, 2 of them in use elsewhere."""

    capability = (8, 9)
    free, total = 22 * GIB, 24 * GIB
    allocated = reserved = 0
    fraction = 1.0

    def limit(self, fraction: float, _: Any) -> None:
        self.fraction = fraction


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    """A card that is there."""
    card = Card()
    for name, answer in {
        "is_available": lambda: True,
        "current_device": lambda: 0,
        "get_device_capability": lambda _: card.capability,
        "mem_get_info": lambda _: (card.free, card.total),
        "memory_allocated": lambda _: card.allocated,
        "memory_reserved": lambda _: card.reserved,
        "max_memory_allocated": lambda _: 5 * GIB,
        "max_memory_reserved": lambda _: 6 * GIB,
        "get_per_process_memory_fraction": lambda _: card.fraction,
        "set_per_process_memory_fraction": card.limit,
    }.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    return card


def prepare(*, embedded: bool = False, **runtime: Any) -> Machine:
    return prepare_machine(RuntimeParams(**runtime), embedded=embedded)


# --- which --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["auto", "cpu"])
def test_without_cuda_the_cpu_computes_in_float32(no_cuda: None, name: str) -> None:
    machine = prepare(device=name)
    assert machine == Machine(CPU, torch.float32)
    assert machine.dtype_name == "float32"


def test_cuda_that_is_there_is_taken_unless_the_cpu_is_asked_for(card: Card) -> None:
    assert prepare() == Machine(torch.device("cuda", 0), torch.bfloat16)
    assert prepare(device="cuda").dtype_name == "bfloat16"
    assert prepare(device="cpu") == Machine(CPU, torch.float32)
    assert prepare(compute_dtype="float16") == Machine(torch.device("cuda", 0), torch.float16)
    assert prepare(compute_dtype="bfloat16", device="cpu") == Machine(CPU, torch.bfloat16)


def test_the_embedded_model_computes_on_the_cpu_unless_cuda_is_named(card: Card) -> None:
    assert prepare(embedded=True) == Machine(CPU, torch.float32)
    assert prepare(embedded=True, device="cuda").device.type == "cuda"


@pytest.mark.parametrize(
    ("capability", "dtype"), [((7, 5), "float16"), ((7, 0), "float16"), ((8, 0), "bfloat16"), ((12, 0), "bfloat16")]
)
def test_a_card_without_bfloat16_computes_in_float16(
    capability: tuple[int, int], dtype: str, card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)  # as torch says of any card: it is emulated
    card.capability = capability
    assert prepare().dtype_name == dtype


def test_sums_of_products_stay_float32(no_cuda: None) -> None:
    matmul = torch.backends.cuda.matmul
    matmul.allow_bf16_reduced_precision_reduction = matmul.allow_fp16_reduced_precision_reduction = True
    prepare_machine(RuntimeParams(), embedded=False)
    assert not matmul.allow_bf16_reduced_precision_reduction
    assert not matmul.allow_fp16_reduced_precision_reduction


def test_cuda_that_is_not_there_is_no_cpu(no_cuda: None) -> None:
    with pytest.raises(MachineError, match="torch sees no CUDA device; set it to auto or cpu"):
        prepare(device="cuda")


def test_the_number_of_threads_is_set(no_cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(threads=2)
    assert torch.get_num_threads() == 2
    monkeypatch.setattr("dpo_cli.models.device.usable_threads", lambda: 3)
    prepare()
    assert torch.get_num_threads() == 3


def test_a_second_process_is_refused(no_cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(MachineError, match="2 processes were started"):
        prepare()
    monkeypatch.setenv("WORLD_SIZE", "1")
    prepare()


# --- how much memory ----------------------------------------------------------------------


def test_pytorch_may_hold_less_than_what_is_free(card: Card) -> None:
    """So it says that memory ran out, and neither a library ends the process nor a driver goes on in the system's."""
    for held in (0, 3 * GIB):  # a second look counts what this process holds as free
        card.reserved, card.free = held, 22 * GIB - held
        prepare()
        assert card.fraction * card.total == pytest.approx(0.92 * 22 * GIB)


def test_a_bound_that_is_named_is_kept(card: Card) -> None:
    prepare(max_gpu_gib=12)
    assert card.fraction == 0.5
    with pytest.raises(MachineError, match=r"runtime.max_gpu_gib must be <= 24.0, the memory of cuda:0, got 25"):
        prepare(max_gpu_gib=25)


def test_free_memory_is_that_within_the_bound(card: Card) -> None:
    gpu = torch.device("cuda", 0)
    card.allocated, card.reserved, card.free = 2 * GIB, 5 * GIB, 17 * GIB
    card.fraction = 1.0
    assert free_memory_bytes(gpu) == 20 * GIB
    card.fraction = 0.5
    assert free_memory_bytes(gpu) == 10 * GIB
    assert 0 < free_memory_bytes(CPU) < 2**50


def test_of_a_gpu_both_peaks_are_reported(card: Card) -> None:
    found = memory_metrics(Machine(torch.device("cuda", 0), torch.bfloat16))
    assert found == {"peak_mem_gib": 5.0, "peak_mem_reserved_gib": 6.0}
    assert memory_in_words(found) == "5.00 GiB in tensors, 6.00 GiB taken for them"


def test_native_windows_has_no_module_resource(monkeypatch: pytest.MonkeyPatch) -> None:
    real: Callable[..., Any] = builtins.__import__

    def without_resource(name: str, *rest: Any) -> Any:
        if name == "resource":
            raise ModuleNotFoundError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_resource)
    monkeypatch.delitem(sys.modules, "resource", raising=False)
    anew = importlib.util.spec_from_file_location("anew", device.__file__)
    assert anew is not None
    assert anew.loader is not None
    module = importlib.util.module_from_spec(anew)
    monkeypatch.setitem(sys.modules, "anew", module)
    anew.loader.exec_module(module)
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(
        psutil, "Process", lambda: SimpleNamespace(memory_info=lambda: SimpleNamespace(peak_wset=3 * GIB))
    )
    assert module.memory_metrics(Machine(CPU, torch.float32)) == {"peak_mem_gib": 3.0}
