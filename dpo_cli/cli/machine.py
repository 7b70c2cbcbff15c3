"""What the machine lacks, where that is what went wrong, in whatever words a library says so."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterable
from pathlib import Path

from dpo_cli.core.errors import MachineError, is_out_of_memory
from dpo_cli.core.text import shown

_FULL = (errno.ENOSPC, errno.EDQUOT)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
_NOT_A_NAME = (errno.ENAMETOOLONG,)
_SAYS_FULL = (
    "no space left on device",
    "disk quota exceeded",
    "os error 28",  # what is written in Rust: safetensors, tokenizers, polars
    "os error 122",
    "storagefull",
    "pytorchstreamwriter failed writing",
)
_SAYS_CUT_OFF = re.compile(r"\d+ requested and \d+ written|unexpected pos \d+ vs \d+")  # numpy's and torch's words
_SAYS_FORBIDDEN = ("os error 13", "os error 30", "permission denied")


def machine_problem(error: BaseException) -> str | None:
    """What the machine lacks: memory, room on the disk, a right; or a path that none can have; None for a bug.

    Args:
        error: What was raised, with what it came from.
    """
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    for each in chain:
        if is_out_of_memory(each):
            return "out of memory; lower runtime.max_tokens_per_microbatch in params.yaml, then run it again to go on"
        if (problem := _problem_of_a_file(each)) is not None:
            return problem
    return None


def refuse_unwritable(places: Iterable[Path]) -> None:
    """Refuse to begin what could not be published: hours later, nobody would be glad to hear of it.

    Args:
        places: Files and folders that will be written or replaced; those above them may be missing, too.

    Raises:
        MachineError: One of them cannot be.
    """
    for place in places:
        there = next((parent for parent in place.absolute().parents if parent.exists()), Path("/"))
        if not there.is_dir():
            raise MachineError(f"{place} cannot be written: {there} is no folder; move it away")
        if not os.access(there, os.W_OK | os.X_OK):
            raise MachineError(f"{place} cannot be written: {there} forbids it; mend its rights (chmod u+rwx)")


def _problem_of_a_file(error: BaseException) -> str | None:
    said = str(error).lower()
    number = error.errno if isinstance(error, OSError) else None
    name = (error.filename if isinstance(error, OSError) else None) or "a file"
    if number in _FULL or any(words in said for words in _SAYS_FULL) or _SAYS_CUT_OFF.search(said):
        return f"{name} cannot be written: the disk is full; free room, then run it again to go on"
    if number in _FORBIDDEN or any(words in said for words in _SAYS_FORBIDDEN):
        why = error.strerror if isinstance(error, OSError) and error.strerror else "permission denied"
        return f"{name} cannot be written or read: {why}; mend the rights"
    if number in _NOT_A_NAME:
        return f"{shown(str(name))} is no name of a file: it is too long ({len(str(name))} characters)"
    if isinstance(error, ValueError) and "null byte" in said:
        return "a path holds a NUL byte, which no name of a file can have"
    return None
