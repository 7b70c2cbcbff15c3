"""A full disk, a right that lacks, a name that none can have: one line, in whatever words a library says it."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from dpo_cli.cli.exits import machine_problem
from dpo_cli.cli.stage import refuse_unwritable
from dpo_cli.core.errors import MachineError

FULL = "the disk is full; free some space, then run it again to resume"


class SafetensorError(Exception):
    pass


class ComputeError(Exception):
    pass


@pytest.mark.parametrize(
    "error",
    [  # as each library says it, on a file system of 256 KiB
        OSError(errno.ENOSPC, "No space left on device", "models/x"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),  # torch
        RuntimeError("write(): fd 3 failed with No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        ComputeError("parquet: File out of specification: underlying IO error: No space left on device (os error 28)"),
        OSError(errno.ENOSPC, "Error writing bytes to file. Detail: [errno 28] No space left on device"),  # pyarrow
        OSError("1000000 requested and 32752 written"),  # numpy
        Exception("No space left on device (os error 28)"),  # tokenizers
    ],
)
def test_a_full_disk_is_one(error: Exception) -> None:
    problem = machine_problem(error)
    assert problem is not None
    assert FULL in problem


@pytest.mark.parametrize(
    "error",
    [MemoryError(), type("OutOfMemoryError", (RuntimeError,), {})(), RuntimeError("CUDA driver error: out of memory")],
)
def test_memory_that_ran_out_is_one(error: Exception) -> None:
    assert "lower runtime.max_tokens_per_microbatch" in (machine_problem(error) or "")


def test_the_cause_of_an_error_counts() -> None:
    try:
        try:
            raise OSError(errno.ENOSPC, "No space left on device", "x")
        except OSError as error:
            raise RuntimeError("something of a library") from error
    except RuntimeError as error:
        assert FULL in (machine_problem(error) or "")


def test_a_name_that_is_too_long_and_a_nul_byte() -> None:
    with pytest.raises(OSError, match="name too long") as long:
        Path("a" * 300).stat()
    assert "too long (300 characters)" in (machine_problem(long.value) or "")
    with pytest.raises(ValueError, match="null byte") as nul:
        Path("a\0b").stat()
    assert "NUL byte" in (machine_problem(nul.value) or "")


def test_a_bug_is_a_bug() -> None:
    assert machine_problem(KeyError("x")) is None
    assert machine_problem(RuntimeError("size mismatch, 3 requested and 4 given")) is None
    assert machine_problem(FileNotFoundError(errno.ENOENT, "No such file", "x")) is None


def test_what_cannot_be_published_is_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As root every right is there, so the system's answer is what is tried."""
    (tmp_path / "models").mkdir()
    refuse_unwritable([tmp_path / "models/dpo", tmp_path / "reports/train/metrics.json"])
    monkeypatch.setattr(os, "access", lambda path, _: Path(path).name != "models")
    with pytest.raises(MachineError, match=r"models/dpo cannot be written: .*models forbids it; fix its permissions"):
        refuse_unwritable([tmp_path / "models/dpo"])
    (tmp_path / "reports").write_text("", encoding="utf-8")
    with pytest.raises(MachineError, match="reports is not a folder; move it away"):
        refuse_unwritable([tmp_path / "reports/train/metrics.json"])
