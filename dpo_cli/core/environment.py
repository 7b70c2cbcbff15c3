"""Offline, quiet and modest: set before any library that might open a socket or print is imported; cores and GPUs."""

from __future__ import annotations

import gc
import logging
import math
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from dpo_cli.core.errors import MachineError

_SWITCHES = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "DVC_NO_ANALYTICS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
_given: dict[str, str | None] = {}
_CGROUP = Path("/sys/fs/cgroup")


def is_first_process() -> bool:
    """Whether this process speaks for those that torchrun started with it; by itself it does."""
    return os.environ.get("RANK", "0") == "0"


def refuse_several_processes() -> None:
    """Refuse to run as several processes.

    Raises:
        MachineError: torchrun started more than this one.
    """
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    if num_processes > 1:
        raise MachineError(
            f"{num_processes} processes were started (WORLD_SIZE); all but sft and train, outside DVC, run as one,"
            " on one device"
        )


def claim_gpu() -> None:
    """Of several processes that torchrun started, let each see the GPU of its own number alone.

    So every library takes the right one by itself. To be called once, before CUDA is looked for.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "LOCAL_RANK" not in os.environ:
        return
    number = os.environ["LOCAL_RANK"]
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        number = dict(enumerate(given.split(","))).get(int(number), "")
    os.environ["CUDA_VISIBLE_DEVICES"] = number


def prepare_environment() -> None:
    """Turn off downloads and telemetry for this process and its children, and notes at import.

    Threads of torch that wait sleep instead of spinning: on cores that are shared, two that spin take twice as long as
    one alone. Torch compiles nothing: bitsandbytes asks for it as it is imported, and loads the compiler, which takes a
    sixth of a stage's start.
    """
    if not _given:
        _given.update((name, os.environ.get(name)) for name in _SWITCHES)
    os.environ.update(_SWITCHES)
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    let_segments_grow()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def users_environment() -> dict[str, str]:
    """This process's environment with the switches as the user's shell has them."""
    return {name: value for name, value in (os.environ | _given).items() if value is not None}


@contextmanager
def importing() -> Iterator[None]:
    """Import large libraries without looking for garbage among their millions of objects, then or ever after.

    That look takes a quarter of the time in which torch, transformers and peft are imported, and most of a second at
    each full collection later on. To be used before a model is in memory, which would never be collected, either.
    """
    was_on, num_known = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > num_known:
            gc.freeze()
        if was_on:
            gc.enable()


# --- cores ----------------------------------------------------------------------------------


def usable_cores() -> int:
    """Physical cores that this process may use: by its affinity and its cgroup's quota."""
    import psutil  # here: what starts a command imports this file

    logical = psutil.cpu_count() or 1
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else logical
    physical = psutil.cpu_count(logical=False) or logical
    return max(1, int(min(allowed, physical, _quota(_CGROUP))))


def usable_threads() -> int:
    """Threads for one process's products: OMP_NUM_THREADS, or else one a core."""
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    return int(asked) if asked.isdecimal() and int(asked) > 0 else usable_cores()


def _quota(cgroup: Path) -> float:
    """Cores' worth of time that a cgroup, version 2 or 1, allows; infinity where it sets no limit."""
    try:
        quota, period = (cgroup / "cpu.max").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        try:
            quota, period = (
                (cgroup / "cpu" / f"cpu.cfs_{name}_us").read_text(encoding="ascii").strip()
                for name in ("quota", "period")
            )
        except OSError:
            return math.inf
    unlimited = quota in ("max", "-1") or not quota.isdecimal() or not period.isdecimal()
    return math.inf if unlimited else int(quota) / int(period)


def available_memory_bytes() -> int:
    """Memory that this process can still take without swapping: of the machine, or within its cgroup's limit."""
    import psutil  # here: what starts a command imports this file

    return min(psutil.virtual_memory().available, _left_in_cgroup(_CGROUP))


def _left_in_cgroup(cgroup: Path) -> int:
    """Bytes below the limit of a cgroup, version 2 or 1; caches of files count as free, as they give way."""
    for folder, limit, usage in (
        (cgroup, "memory.max", "memory.current"),
        (cgroup / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        try:
            most, used = (int((folder / name).read_text(encoding="ascii")) for name in (limit, usage))
            lines = (folder / "memory.stat").read_text(encoding="ascii").splitlines()
        except (OSError, ValueError):  # no such file, or no limit, which version 2 calls max
            continue
        cached = {name: int(value) for name, value in (line.split() for line in lines)}
        return max(0, most - used + cached.get("inactive_file", 0))
    return sys.maxsize


# --- GPUs, before torch is imported ------------------------------------------------------------

GPU_TYPES = ("cuda",)
"""Types of torch devices that are computed on as GPUs are; ROCm's call themselves cuda, too."""
_ALLOCATORS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
"""The variable that PyTorch's allocator reads, and what it was called before, on ROCm, too."""
_WSL_GPU = Path("/dev/dxg")
"""Where WSL2 has its GPU, whatever the kernel is called."""


def is_wsl() -> bool:
    """Whether this Linux runs within Windows."""
    return "microsoft" in platform.uname().release.lower() or _WSL_GPU.exists()


class HasType(Protocol):
    """A torch device, or what looks like one."""

    @property
    def type(self) -> str:
        """Such as ``cuda`` or ``cpu``."""
        ...


def is_gpu(device: HasType) -> bool:
    """Whether what is done on GPUs alone is done on this device."""
    return device.type in GPU_TYPES


def let_segments_grow() -> None:
    """Let PyTorch's segments of GPU memory grow, unless the user set something of its allocator.

    Every micro-batch has another length, which breaks segments of fixed size into pieces that serve nothing any more.
    Not under WSL, where some drivers fail at it, and not on Windows, which has no such segments. It is read when
    torch is imported.
    """
    if sys.platform == "linux" and not is_wsl() and not any(name in os.environ for name in _ALLOCATORS):
        os.environ[_ALLOCATORS[0]] = "expandable_segments:True"
