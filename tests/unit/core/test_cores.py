"""How many cores this process may use."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

from dpo_cli.core import cores


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine of 8 cores with two threads each, without a limit; its cgroup's folder."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: 16 if logical else 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)
    monkeypatch.setattr(cores, "_CGROUP", tmp_path)
    return tmp_path


def test_all_physical_cores_are_used(machine: Path) -> None:
    assert cores.usable_cores() == 8


def test_affinity_bounds_them(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 5, 7})
    assert cores.usable_cores() == 3


@pytest.mark.parametrize(
    ("limit", "expected"), [("max 100000", 8), ("250000 100000", 2), ("50000 100000", 1), ("3200000 100000", 8)]
)
def test_a_quota_bounds_them(machine: Path, limit: str, expected: int) -> None:
    (machine / "cpu.max").write_text(f"{limit}\n")
    assert cores.usable_cores() == expected


def test_a_quota_of_the_older_kind_bounds_them(machine: Path) -> None:
    (machine / "cpu").mkdir()
    (machine / "cpu/cpu.cfs_quota_us").write_text("-1\n")
    (machine / "cpu/cpu.cfs_period_us").write_text("100000\n")
    assert cores.usable_cores() == 8
    (machine / "cpu/cpu.cfs_quota_us").write_text("400000\n")
    assert cores.usable_cores() == 4


@pytest.mark.parametrize(("value", "expected"), [("1", 1), ("6,2", 6), ("0", 8), ("many", 8)])
def test_the_environment_goes_first(machine: Path, monkeypatch: pytest.MonkeyPatch, value: str, expected: int) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert cores.usable_threads() == expected
    assert cores.usable_cores() == 8


def test_this_machine_has_one() -> None:
    assert cores.usable_cores() >= 1
