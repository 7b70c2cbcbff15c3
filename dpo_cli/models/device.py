"""Which device, in which precision, and how much memory it took."""

from __future__ import annotations

import os
import resource
import sys
from dataclasses import dataclass

import torch

from dpo_cli.core.errors import MachineError
from dpo_cli.core.params import RuntimeParams


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
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    if num_processes > 1:
        raise MachineError(f"{num_processes} processes were started (WORLD_SIZE); a stage runs as one, on one device")
    torch.set_num_threads(runtime.threads)
    available = torch.cuda.is_available()
    if runtime.device == "cuda" and not available:
        raise MachineError("runtime.device is cuda but torch sees no CUDA device; set it to auto or cpu")
    if available and runtime.device != "cpu":
        return Machine(torch.device("cuda", torch.cuda.current_device()), torch.bfloat16)
    return Machine(torch.device("cpu"), torch.float32)


def peak_memory_gib(machine: Machine) -> float:
    """Most memory held so far, GiB: of the GPU on CUDA, resident in the process on the CPU."""
    if machine.device.type == "cuda":
        return torch.cuda.max_memory_allocated(machine.device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
