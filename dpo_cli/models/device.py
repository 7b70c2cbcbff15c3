"""Which device, in which precision, and how much memory it took."""

from __future__ import annotations

import contextlib
import resource
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from dpo_cli.core.cores import usable_threads
from dpo_cli.core.environment import refuse_several_processes
from dpo_cli.core.errors import MachineError
from dpo_cli.core.params import RuntimeParams

if TYPE_CHECKING:  # torch takes a second to import: functions do it that use it
    import torch


@dataclass(frozen=True)
class Machine:
    """Where a stage computes.

    Attributes:
        device: The torch device.
        compute_dtype: bfloat16 on CUDA, float32 on the CPU.
    """

    device: torch.device
    compute_dtype: torch.dtype

    @property
    def dtype_name(self) -> str:
        """The compute dtype as manifests name it, such as ``float32``."""
        return str(self.compute_dtype).removeprefix("torch.")


def prepare_machine(runtime: RuntimeParams) -> Machine:
    """Set the number of threads and choose the device.

    Raises:
        MachineError: runtime.device is cuda and there is none, or several processes were started.
    """
    import torch

    refuse_several_processes()
    torch.set_num_threads(runtime.threads or usable_threads())
    available = torch.cuda.is_available()
    if runtime.device == "cuda" and not available:
        raise MachineError("runtime.device is cuda but torch sees no CUDA device; set it to auto or cpu")
    if available and runtime.device != "cpu":
        return Machine(torch.device("cuda", torch.cuda.current_device()), torch.bfloat16)
    return Machine(torch.device("cpu"), torch.float32)


_TOKENS_ON_GPU = 4096
_TOKENS_ON_CPU = 1024


def token_budget(runtime: RuntimeParams, device: torch.device) -> int:
    """Tokens that go through the model at once: what the user says, or what suits the device."""
    if runtime.max_tokens_per_microbatch is not None:
        return runtime.max_tokens_per_microbatch
    return _TOKENS_ON_GPU if device.type == "cuda" else _TOKENS_ON_CPU


def peak_memory_gib(machine: Machine) -> float:
    """Most memory held so far, GiB: of the GPU on CUDA, resident in the process on the CPU."""
    if machine.device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(machine.device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def forget_peak_memory(device: torch.device) -> None:
    """Count the peak of memory from here on; where the system cannot, it stays that of the whole process."""
    if device.type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory held since :func:`forget_peak_memory`: of the GPU on CUDA, resident in the process on the CPU."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError, ValueError):
        return int(peak_memory_gib(Machine(device, torch.float32)) * 2**30)


def free_memory_bytes(device: torch.device) -> int:
    """Memory that is still to be had: of the GPU, its allocator's unused share included, or of the machine."""
    if device.type == "cuda":
        import torch

        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return psutil.virtual_memory().available
