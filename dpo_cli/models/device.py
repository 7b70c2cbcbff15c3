"""Which device, in which precision, how much memory it took, and GPUs as their data sheets describe them."""

from __future__ import annotations

import contextlib
import gc
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from dpo_cli.core.environment import available_memory_bytes, is_gpu, refuse_several_processes, usable_threads
from dpo_cli.core.errors import MachineError
from dpo_cli.core.params import RuntimeParams

if TYPE_CHECKING:  # torch takes a second to import: functions do it that use it
    import torch


@dataclass(frozen=True)
class Machine:
    """Where a stage computes.

    Attributes:
        device: The torch device.
        compute_dtype: What products are computed in: bfloat16, float16 or float32.
    """

    device: torch.device
    compute_dtype: torch.dtype

    @property
    def dtype_name(self) -> str:
        """The compute dtype as manifests name it, such as ``float32``."""
        return str(self.compute_dtype).removeprefix("torch.")


def prepare_machine(runtime: RuntimeParams, *, embedded: bool) -> Machine:
    """Set the number of threads, choose device and compute dtype, and bound what is held of a GPU's memory.

    Args:
        runtime: What the user says of it.
        embedded: Whether the model is the embedded one, which computes on the CPU unless a device is named.

    Raises:
        MachineError: runtime.device is cuda and there is none, runtime.max_gpu_gib is more than it has, or several
            processes were started that have not met.
    """
    import torch

    if not torch.distributed.is_initialized():  # those that have met share a training
        refuse_several_processes()
    torch.set_num_threads(runtime.threads or usable_threads())
    # sums of a product that is split along its inner dimension stay float32
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    available = torch.cuda.is_available()
    if runtime.device == "cuda" and not available:
        raise MachineError("runtime.device is cuda but torch sees no CUDA device; set it to auto or cpu")
    if available and (runtime.device == "cuda" or (runtime.device == "auto" and not embedded)):
        device = torch.device("cuda", torch.cuda.current_device())
    else:
        device = torch.device("cpu")
    if is_gpu(device):
        _bound_memory(device, runtime.max_gpu_gib)
    given = None if runtime.compute_dtype == "auto" else getattr(torch, runtime.compute_dtype)
    return Machine(device, given or _own_dtype(device))


BFLOAT16_SINCE = (8, 0)
"""Compute capability from which a GPU multiplies bfloat16; torch says of older ones that they do, and emulates it."""


def _own_dtype(device: torch.device) -> torch.dtype:
    import torch

    if not is_gpu(device):
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= BFLOAT16_SINCE else torch.float16


_USABLE_OF_FREE = 0.92
"""Share of the free memory that PyTorch may hold.

The rest is for kernels, which CUDA loads when they are first used, and for libraries that end the process where it
is lacking: bitsandbytes does.
"""


def _bound_memory(device: torch.device, max_gib: float | None) -> None:
    """Have PyTorch say that memory ran out before it has, so that work can go on in smaller micro-batches.

    Drivers under Windows, WSL's included, never say so: they go on in the system's memory, at a tenth of the speed.
    """
    import torch

    free, total = torch.cuda.mem_get_info(device)
    if max_gib is not None and max_gib * 2**30 > total:
        raise MachineError(
            f"params.yaml: runtime.max_gpu_gib must be <= {total / 2**30:.1f}, the memory of {device}, got {max_gib:g};"
            " set it to null"
        )
    limit = usable_of_gpu(free + torch.cuda.memory_reserved(device), max_gib)
    torch.cuda.set_per_process_memory_fraction(limit / total, device)


def usable_of_gpu(free_bytes: float, max_gib: float | None) -> float:
    """Bytes that PyTorch may hold of a GPU of which so many are free; ``max_gib`` is runtime.max_gpu_gib."""
    return _USABLE_OF_FREE * free_bytes if max_gib is None else max_gib * 2**30


_TOKENS_ON_GPU = 4096
_TOKENS_ON_CPU = 1024


def token_budget(runtime: RuntimeParams, device: torch.device) -> int:
    """Tokens that go through the model at once: what the user says, or what suits the device."""
    if runtime.max_tokens_per_microbatch is not None:
        return runtime.max_tokens_per_microbatch
    return _TOKENS_ON_GPU if is_gpu(device) else _TOKENS_ON_CPU


def memory_metrics(machine: Machine) -> dict[str, float]:
    """What metrics.json says of the memory of a stage, GiB.

    Returns:
        ``peak_mem_gib``, the most that was held so far: of the GPU, or by the process on the CPU. Of a GPU
        ``peak_mem_reserved_gib``, too: what PyTorch took for it, pieces between the tensors included. CUDA's own
        context, about half a GiB, is in neither.
    """
    if not is_gpu(machine.device):
        return {"peak_mem_gib": _peak_of_process() / 2**30}
    import torch

    return {
        "peak_mem_gib": torch.cuda.max_memory_allocated(machine.device) / 2**30,
        "peak_mem_reserved_gib": torch.cuda.max_memory_reserved(machine.device) / 2**30,
    }


def memory_in_words(metrics: Mapping[str, Any]) -> str:
    """The same for a table."""
    reserved = metrics.get("peak_mem_reserved_gib")
    more = "" if reserved is None else f" in tensors, {reserved:.2f} GiB taken for them"
    return f"{metrics['peak_mem_gib']:.2f} GiB{more}"


def _peak_of_process() -> int:
    """Bytes that were resident at the most."""
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def forget_peak_memory(device: torch.device) -> None:
    """Count the peak of memory from here on; where the system cannot, it stays that of the whole process."""
    if is_gpu(device):
        import torch

        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory held since :func:`forget_peak_memory`: of the GPU on CUDA, resident in the process on the CPU."""
    if is_gpu(device):
        import torch

        return torch.cuda.max_memory_allocated(device)
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError, ValueError):
        return _peak_of_process()


def free_memory_bytes(device: torch.device) -> int:
    """Memory that is still to be had: of the GPU, what PyTorch holds unused included, or of the machine."""
    if not is_gpu(device):
        return available_memory_bytes()
    import torch

    free, total = torch.cuda.mem_get_info(device)
    held = torch.cuda.memory_allocated(device)
    allowed = int(torch.cuda.get_per_process_memory_fraction(device) * total)
    return min(free + torch.cuda.memory_reserved(device), allowed) - held


def release_memory() -> None:
    """Give back what models that nothing refers to any more held.

    A 4-bit weight and its layer refer to each other, so only the garbage collector finds them, and PyTorch's allocator
    keeps what they held for itself until it is asked.
    """
    gc.collect()
    if "torch" in sys.modules:
        import torch

        if torch.cuda.is_available():
            torch.cuda.empty_cache()


# --- GPUs on paper --------------------------------------------------------------------------


@dataclass(frozen=True)
class Gpu:
    """A GPU on paper.

    Attributes:
        tflops: Dense products of 16-bit numbers with float32 sums, 10^12 operations a second: bfloat16, or float16
            where there is none. On GeForce cards from Ampere on it is twice the data sheet's float32 rate.
        bandwidth: Of its memory, GB/s.
        memory_gib: Its memory, GiB.
        capability: CUDA's compute capability.
        pattern: What the driver calls it, without the maker, as a regular expression.
    """

    tflops: float
    bandwidth: float
    memory_gib: int
    capability: tuple[int, int]
    pattern: str


GPUS: dict[str, Gpu] = {
    "t4": Gpu(65.0, 320, 16, (7, 5), r"(Tesla )?T4"),
    "rtx-2080-ti": Gpu(53.8, 616, 11, (7, 5), "GeForce RTX 2080 Ti"),
    "rtx-3060": Gpu(25.5, 360, 12, (8, 6), "GeForce RTX 3060"),
    "rtx-3070": Gpu(40.6, 448, 8, (8, 6), "GeForce RTX 3070"),
    "rtx-3080": Gpu(59.5, 760, 10, (8, 6), "GeForce RTX 3080"),
    "rtx-3090": Gpu(71.0, 936, 24, (8, 6), "GeForce RTX 3090"),
    "rtx-4060-ti": Gpu(44.1, 288, 16, (8, 9), "GeForce RTX 4060 Ti"),
    "rtx-4070": Gpu(58.3, 504, 12, (8, 9), "GeForce RTX 4070"),
    "rtx-4070-ti": Gpu(80.2, 504, 12, (8, 9), "GeForce RTX 4070 Ti"),
    "rtx-4080": Gpu(97.5, 717, 16, (8, 9), "GeForce RTX 4080"),
    "rtx-4090": Gpu(165.2, 1008, 24, (8, 9), "GeForce RTX 4090"),
    "rtx-5090": Gpu(209.5, 1792, 32, (12, 0), "GeForce RTX 5090"),
    "a100": Gpu(312.0, 2039, 80, (8, 0), r"A100.*80GB.*"),
    "a100-40gb": Gpu(312.0, 1555, 40, (8, 0), r"A100.*40GB.*"),
    "h100-pcie": Gpu(756.0, 2000, 80, (9, 0), r"H100 PCIe"),
    "h100-sxm": Gpu(989.4, 3350, 80, (9, 0), r"H100 80GB HBM3"),
    "h200": Gpu(989.4, 4800, 141, (9, 0), r"H200"),
}
"""By the names that ``dpo-cli bench --card`` takes. Laptops' chips are left out: the laptop sets their speed."""


def gpu_called(name: str) -> Gpu | None:
    """The GPU that the driver calls so, such as ``NVIDIA GeForce RTX 4090``; None where it is not known.

    The whole name counts: the laptop's chip, a Ti and a SUPER are other GPUs.
    """
    own = name.removeprefix("NVIDIA ").strip()
    return next((gpu for gpu in GPUS.values() if re.fullmatch(gpu.pattern, own)), None)
