"""What is known of GPUs before torch is imported: which devices are GPUs, and how their memory is given out."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path
from typing import Protocol

GPU_TYPES = ("cuda",)
"""Types of torch devices that are computed on as GPUs are; ROCm's call themselves cuda, too."""
_ALLOCATORS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
"""The variable that PyTorch's allocator reads, and what it was called before, on ROCm, too."""
_WSL_GPU = Path("/dev/dxg")
"""Where WSL2 has its GPU, whatever the kernel is called."""


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
    is_wsl = "microsoft" in platform.uname().release.lower() or _WSL_GPU.exists()
    if sys.platform == "linux" and not is_wsl and not any(name in os.environ for name in _ALLOCATORS):
        os.environ[_ALLOCATORS[0]] = "expandable_segments:True"
