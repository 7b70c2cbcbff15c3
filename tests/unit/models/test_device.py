"""Which device, in which precision."""

from __future__ import annotations

import pytest
import torch

from dpo_cli.core.errors import MachineError
from dpo_cli.core.params import RuntimeParams
from dpo_cli.models.device import Machine, peak_memory_gib, prepare_machine


@pytest.fixture
def no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_without_cuda_the_cpu_computes_in_float32(no_cuda: None, device: str) -> None:
    machine = prepare_machine(RuntimeParams(device=device))  # type: ignore[arg-type]
    assert machine == Machine(torch.device("cpu"), torch.float32)
    assert machine.dtype_name == "float32"


def test_with_cuda_it_is_taken_in_bfloat16_unless_the_cpu_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert prepare_machine(RuntimeParams()) == Machine(torch.device("cuda", 0), torch.bfloat16)
    assert prepare_machine(RuntimeParams(device="cuda")).dtype_name == "bfloat16"
    assert prepare_machine(RuntimeParams(device="cpu")).device.type == "cpu"


def test_cuda_that_is_not_there_is_no_cpu(no_cuda: None) -> None:
    with pytest.raises(MachineError, match="torch sees no CUDA device; set it to auto or cpu"):
        prepare_machine(RuntimeParams(device="cuda"))


def test_the_number_of_threads_is_set(no_cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare_machine(RuntimeParams(threads=2))
    assert torch.get_num_threads() == 2
    monkeypatch.setattr("dpo_cli.models.device.usable_threads", lambda: 3)
    prepare_machine(RuntimeParams())
    assert torch.get_num_threads() == 3


def test_a_second_process_is_refused(no_cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(MachineError, match="2 processes were started"):
        prepare_machine(RuntimeParams())
    monkeypatch.setenv("WORLD_SIZE", "1")
    prepare_machine(RuntimeParams())


def test_peak_memory_is_that_of_this_process() -> None:
    assert 0.05 < peak_memory_gib(Machine(torch.device("cpu"), torch.float32)) < 64
