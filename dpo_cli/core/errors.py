"""The errors a user can act on, each with its own exit code.

Every message says *where, what, got, what to do*, one line a problem::

    params.yaml: train.beta must be > 0, got -1

    DpoCliError
    |-- ParamsError          3   params.yaml or --set
    |-- DataError            4   an input file or a row in it
    |-- StaleArtifactError   5   something an earlier stage made is missing, damaged or of another run
    |-- MachineError         6   the model directory, the device, memory, another process
    `-- Interrupted        130   Ctrl-C or SIGTERM; work is saved

Exit code 2 is a usage error of the command line, 1 is a bug and comes with its traceback.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import ClassVar


class DpoCliError(Exception):
    """Base of all errors that are the user's to fix; never raised itself.

    Args:
        problems: One message, or several that were found in one go.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))

    def __reduce__(self) -> tuple[type[DpoCliError], tuple[list[str]]]:
        """How it comes from another process: as its problems, one by one."""
        return type(self), (self.problems,)


class ParamsError(DpoCliError):
    """A setting is unknown, out of range, or has no effect."""

    exit_code = 3


class DataError(DpoCliError):
    """An input file cannot be read, or a row in it cannot be understood."""

    exit_code = 4


class StaleArtifactError(DpoCliError):
    """An earlier stage's output is missing, damaged, or belongs to another run."""

    exit_code = 5


class MachineError(DpoCliError):
    """The machine cannot do it: model directory, device, memory, or another process."""

    exit_code = 6


class Interrupted(DpoCliError):
    """The user stopped the stage; what was done is kept for the next run."""

    exit_code = 130


def first_line(error: BaseException, most: int | None = 100) -> str:
    """The first line of what an error says, or its kind where it says nothing; at most so many characters."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:most]


DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
"""The system's numbers for a disk without room."""

_OUT_OF_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUDA driver error: out of memory",
    "HIP out of memory",
    "HIP error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",  # so cuBLAS says that its handle found no room
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED",
    "HIPBLAS_STATUS_ALLOC_FAILED",
)
"""What the libraries say when memory ran out, beside the error that PyTorch has for it."""


def says_out_of_memory(text: str) -> bool:
    """Whether a library's words are that memory ran out, of a GPU or of the machine."""
    return any(sign in text for sign in _OUT_OF_MEMORY)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, of a GPU or of the machine; torch need not be imported for it."""
    if isinstance(error, MemoryError) or any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__):
        return True
    return isinstance(error, RuntimeError) and says_out_of_memory(str(error))
