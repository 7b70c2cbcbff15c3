"""What a tool's process measures of itself: time, peak memory, losses."""

from __future__ import annotations

import ctypes
import gc
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.comparison.cases import Case, Logps


@dataclass(frozen=True)
class Outcome:
    """What a tool's process measured.

    Attributes:
        reference_s: CPU seconds of the reference pass over the timed pairs.
        reference_mib: Its peak memory above what model and data held.
        logps: What it found.
        step_s: CPU seconds of the timed optimizer steps.
        step_mib: Peak memory of all steps above what model and data held.
        losses: The loss of every step.
        process_mib: Peak memory of the whole process.
        cpu_share: CPU time by the time that passed, from model and data being loaded to the end.
    """

    reference_s: float
    reference_mib: float
    logps: list[Logps]
    step_s: float
    step_mib: float
    losses: list[float]
    process_mib: float
    cpu_share: float


def memory_mib(field: str) -> float:
    """A field of this process's status: VmRSS, what is resident now, or VmHWM, the most since the last reset."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def give_back_memory() -> None:
    """Collect garbage and give what the allocator keeps back to the system."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


class Meter:
    """Peak memory and CPU share of a process; made when model and data are loaded."""

    def __init__(self, case: Case) -> None:
        self._on_gpu = case.on_gpu
        give_back_memory()
        self._held_mib = self._memory_mib("VmRSS")
        self._begun = time.perf_counter(), time.process_time()
        self.process_mib = self._memory_mib("VmHWM")

    def _memory_mib(self, field: str) -> float:
        if not self._on_gpu:
            return memory_mib(field)
        import torch

        of_gpu = torch.cuda.memory_allocated if field == "VmRSS" else torch.cuda.max_memory_allocated
        return of_gpu() / 2**20

    def reset(self) -> None:
        """Forget the peak so far, but for the process's."""
        give_back_memory()
        self.process_mib = max(self.process_mib, self._memory_mib("VmHWM"))
        if not self._on_gpu:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
            return
        import torch

        torch.cuda.reset_peak_memory_stats()

    def peak_mib(self) -> float:
        """The peak since the last reset, above what model and data held."""
        peak = self._memory_mib("VmHWM")
        self.process_mib = max(self.process_mib, peak)
        return peak - self._held_mib

    def cpu_share(self) -> float:
        """CPU time by the time that passed."""
        return (time.process_time() - self._begun[1]) / (time.perf_counter() - self._begun[0])


@dataclass
class Steps:
    """What a training went through.

    Attributes:
        losses: What each call of training_step returned, or the loss of each step.
        ends: The time after each optimizer step.
        mib: Peak memory above what model and data held.
    """

    losses: list[Any]
    ends: list[float]
    mib: float = 0.0

    @property
    def seconds(self) -> float:
        """From the end of the first step to the end of the last."""
        return self.ends[-1] - self.ends[0]

    def step_losses(self, num_steps: int) -> list[float]:
        """The loss of every step, a sum over its calls of training_step."""
        assert len(self.ends) == num_steps
        calls = len(self.losses) // num_steps
        return [sum(float(loss) for loss in self.losses[step * calls :][:calls]) for step in range(num_steps)]


def tell(text: str) -> None:
    """Show progress."""
    print(text, file=sys.stderr, flush=True)
