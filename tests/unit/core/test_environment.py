"""Offline before anything else; and how many cores this process may use."""

from __future__ import annotations

import gc
import os
import platform
import sys
import types
from pathlib import Path

import psutil
import pytest

from dpo_cli.core import environment
from dpo_cli.core.environment import claim_gpu, importing, is_first_process, prepare_environment


def test_downloads_and_telemetry_are_off_even_where_they_were_on(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "0")
    monkeypatch.delenv("HF_HUB_DISABLE_TELEMETRY", raising=False)
    prepare_environment()
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY")
    assert {os.environ[name] for name in names} == {"1"}


@pytest.mark.parametrize(
    ("given", "number", "seen"),
    [(None, "1", "1"), ("2,5", "0", "2"), ("2,5", "1", "5"), ("2", "1", ""), ("", "0", "")],
)
def test_of_several_processes_each_sees_its_own_gpu(
    given: str | None, number: str, seen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given or "")
    if given is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", number)
    claim_gpu()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == seen


def test_one_process_sees_all_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    claim_gpu()
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("LOCAL_RANK", "0")
    claim_gpu()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "2,5"


def test_one_process_speaks_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_first_process()
    monkeypatch.setenv("RANK", "1")
    assert not is_first_process()


def test_importing_puts_what_is_imported_out_of_the_collectors_sight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "this", raising=False)
    frozen = gc.get_freeze_count()
    with importing():
        assert not gc.isenabled()
    assert gc.isenabled()
    assert gc.get_freeze_count() == frozen, "nothing was imported"
    with importing():
        sys.modules["this"] = types.ModuleType("this")
    assert gc.get_freeze_count() > frozen
    gc.unfreeze()


@pytest.mark.parametrize(
    ("system", "release", "given", "expected"),
    [
        ("linux", "6.8.0-45-generic", {}, {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}),
        ("linux", "5.15.153.1-microsoft-standard-WSL2", {}, {}),
        ("win32", "10", {}, {}),
        ("linux", "6.8.0", {"PYTORCH_ALLOC_CONF": "backend:native"}, {"PYTORCH_ALLOC_CONF": "backend:native"}),
        ("linux", "6.8.0", {"PYTORCH_CUDA_ALLOC_CONF": ""}, {"PYTORCH_CUDA_ALLOC_CONF": ""}),
        ("linux", "6.8.0", {"PYTORCH_HIP_ALLOC_CONF": "x:1"}, {"PYTORCH_HIP_ALLOC_CONF": "x:1"}),
        ("linux", "6.8.0 with WSL's GPU", {}, {}),
    ],
)
def test_segments_of_gpu_memory_grow_where_that_is_safe(
    system: str,
    release: str,
    given: dict[str, str],
    expected: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
    monkeypatch.setattr(environment, "_WSL_GPU", tmp_path / "dxg")
    if "WSL's" in release:
        (tmp_path / "dxg").touch()
    for name in names:
        monkeypatch.setenv(name, given.get(name, ""))
        if name not in given:
            monkeypatch.delenv(name)
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(platform, "uname", lambda: types.SimpleNamespace(release=release))
    prepare_environment()
    assert {name: os.environ[name] for name in names if name in os.environ} == expected


# --- cores ----------------------------------------------------------------------------------


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine of 8 cores with two threads each, without a limit; its cgroup's folder."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: 16 if logical else 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)
    monkeypatch.setattr(environment, "_CGROUP", tmp_path)
    return tmp_path


def test_all_physical_cores_are_used_that_affinity_allows(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert environment.usable_cores() == 8
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 5, 7})
    assert environment.usable_cores() == 3


@pytest.mark.parametrize(
    ("limit", "expected"), [("max 100000", 8), ("250000 100000", 2), ("50000 100000", 1), ("3200000 100000", 8)]
)
def test_a_quota_bounds_them(machine: Path, limit: str, expected: int) -> None:
    (machine / "cpu.max").write_text(f"{limit}\n")
    assert environment.usable_cores() == expected


def test_a_quota_of_the_older_kind_bounds_them(machine: Path) -> None:
    (machine / "cpu").mkdir()
    (machine / "cpu/cpu.cfs_quota_us").write_text("-1\n")
    (machine / "cpu/cpu.cfs_period_us").write_text("100000\n")
    assert environment.usable_cores() == 8
    (machine / "cpu/cpu.cfs_quota_us").write_text("400000\n")
    assert environment.usable_cores() == 4


@pytest.mark.parametrize(("value", "expected"), [("1", 1), ("6,2", 6), ("0", 8), ("many", 8)])
def test_the_environment_goes_first(machine: Path, monkeypatch: pytest.MonkeyPatch, value: str, expected: int) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert environment.usable_threads() == expected
    assert environment.usable_cores() == 8
