"""What ``dpo-cli doctor`` finds without torch: a planted fault is one line, with what to do about it."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import time
from collections import namedtuple
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest

from dpo_cli.core import checkup, environment
from dpo_cli.core.checkup import Finding
from dpo_cli.core.errors import ParamsError


def faults(findings: Any) -> list[Finding]:
    """Those that are faults; each is one line, and so is its remedy."""
    found = [finding for finding in findings if finding.status == "bad"]
    for fault in found:
        assert fault.found
        assert fault.remedy
        assert "\n" not in fault.found + fault.remedy
    return found


def test_packages_as_required_are_all_well() -> None:
    (finding,) = checkup.packages()
    assert finding.status == "good"
    assert "bitsandbytes" in finding.found


@pytest.mark.parametrize(
    ("name", "installed", "words"),
    [
        ("bitsandbytes", None, "bitsandbytes is missing"),
        ("torch", "2.5.1+cu121", "torch 2.5.1+cu121, and >=2.11 is needed"),
        ("dvc", "4.0.0", "dvc 4.0.0, and <4,>=3.67.1 is needed"),
    ],
)
def test_a_package_that_is_missing_or_wrong_is_one_fault_with_what_installs_it(
    name: str, installed: str | None, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = checkup.version

    def version(asked: str) -> str:
        if asked == name and installed is None:
            raise PackageNotFoundError(name)
        return installed if asked == name and installed else real(asked)

    monkeypatch.setattr(checkup, "version", version)
    (fault,) = faults(checkup.packages())
    assert fault.found == words
    assert fault.remedy.startswith(f"run: {sys.executable} -m pip install ")
    assert f"'{name}" in fault.remedy
    assert fault.exit_code == 6


def test_a_package_whose_files_are_gone_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkup, "find_spec", lambda name: None if name == "bitsandbytes" else sys)
    (fault,) = faults(checkup.packages())
    assert "bitsandbytes" in fault.found
    assert "--force-reinstall" in fault.remedy


# --- disks, memory, clock -------------------------------------------------------------------

Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize(
    ("error", "words", "remedy"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "0.0 GiB left for project", "dvc gc"),
        (OSError(errno.EACCES, "Permission denied"), "(DVC's cache) cannot be written: Permission denied", "chmod"),
        (OSError(errno.EROFS, "Read-only file system"), "(DVC's cache) cannot be written: Read-only", "dvc cache dir"),
    ],
)
def test_a_disk_that_is_full_or_a_cache_that_cannot_be_written(
    error: OSError, words: str, remedy: str, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = project / ".dvc/cache"
    cache.mkdir(parents=True)
    is_full = error.errno == errno.ENOSPC
    monkeypatch.setattr(checkup, "_try_to_write", lambda where: error if is_full or where == cache else None)
    (fault,) = faults(checkup.disks(in_project=True))
    assert words in fault.found
    assert remedy in fault.remedy


def test_little_room_is_a_warning(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda where: Usage(0, 0, 2 * 2**30))
    (finding,) = checkup.disks(in_project=False)
    assert (finding.status, finding.found) == ("warn", "2.0 GiB left for temporary files")


def test_writing_is_tried_and_leaves_nothing(project: Path) -> None:
    (finding,) = checkup.disks(in_project=True)
    assert finding.status in ("good", "warn")
    assert "project, half-done work, DVC's cache" in finding.found
    assert list(project.iterdir()) == []


@pytest.mark.parametrize(("free", "status"), [(8.0, "good"), (1.5, "warn"), (0.5, "bad")])
def test_free_memory(free: float, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkup, "available_memory_bytes", lambda: int(free * 2**30))
    finding = checkup.memory()
    assert finding.status == status
    assert f"{free:.1f} GiB free of " in finding.found


def test_a_container_has_what_its_limit_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_CGROUP", tmp_path)
    unlimited = environment.available_memory_bytes()
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("900\n")
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 300\n")
    assert environment.available_memory_bytes() > unlimited / 2
    (tmp_path / "memory.max").write_text("1000\n")
    assert environment.available_memory_bytes() == 400


def test_a_clock_behind_the_projects_files_is_a_fault(project: Path) -> None:
    assert checkup.clock().status == "good"
    (project / "params.yaml").touch()
    os.utime(project / "params.yaml", (time.time() + 7200,) * 2)
    (fault,) = faults([checkup.clock()])
    assert "params.yaml" in fault.found
    assert "timedatectl" in fault.remedy


def test_what_windows_does_is_said_there_alone(monkeypatch: pytest.MonkeyPatch, project: Path) -> None:
    assert list(checkup.windows(has_gpu=True)) == []
    monkeypatch.setattr(checkup, "is_wsl", lambda: True)
    (spill,) = checkup.windows(has_gpu=True)
    assert (spill.name, spill.status) == ("spill", "warn")
    assert "runtime.max_gpu_gib" in spill.remedy
    monkeypatch.setattr(Path, "cwd", lambda: Path("/mnt/c/work"))
    (files,) = checkup.windows(has_gpu=False)
    assert "/mnt/c/work lies on a disk of Windows" in files.found


# --- git and DVC ----------------------------------------------------------------------------


def run_git(*arguments: str) -> None:
    subprocess.run(["git", "-c", "user.name=x", "-c", "user.email=x@y", *arguments], check=True, capture_output=True)


def test_git_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    (fault,) = faults([checkup.git(in_project=True)])
    assert fault.found == "git is not installed; DVC needs it"


def test_git_says_how_the_project_stands(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(project.parent))
    (fault,) = faults([checkup.git(in_project=True)])
    assert "git init" in fault.remedy
    run_git("init", "-q")
    assert checkup.git(in_project=True).status == "warn"
    (project / "file").touch()
    run_git("add", "file")
    run_git("commit", "-qm", "x")
    assert "all is committed" in checkup.git(in_project=True).found
    (project / "file").write_text("changed")
    assert "1 files changed" in checkup.git(in_project=True).found


def test_dvc_that_is_missing_is_said_once_by_the_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkup, "find_spec", lambda name: None)
    process = checkup.start_dvc(in_project=True)
    assert process is None
    assert checkup.dvc(process, 1.0, in_project=True).status == "plain"


@pytest.mark.parametrize(
    ("code", "status", "words"),
    [
        ('print(\'{"train": [{}], "base": ["always changed"]}\')', "plain", "dpo-cli repro would run train"),
        ("print('{}')", "good", "all stages are up to date"),
        ("import sys; sys.exit('ERROR: Unable to acquire lock')", "bad", "Unable to acquire lock"),
        ("import time; time.sleep(9)", "warn", "took longer"),
    ],
    ids=["changed", "nothing changed", "locked", "slow"],
)
def test_what_dvc_says_of_the_stages(code: str, status: str, words: str) -> None:
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    finding = checkup.dvc(process, 1.5, in_project=True)
    assert finding.status == status
    assert words in finding.found
    faults([finding])


def test_how_dvc_links_is_tried(project: Path) -> None:
    (project / ".dvc").mkdir()
    config = project / ".dvc/config"
    config.write_text("[core]\n    analytics = false\n[cache]\n    type = hardlink,copy\n")
    assert checkup.links().found == "hardlinks, no copies"
    (project / "elsewhere").mkdir()
    config.write_text('[\'remote "x"\']\n    url = y\n[cache]\n    type = "copy"\n    dir = ../elsewhere\n')
    assert checkup.dvc_cache() == project / "elsewhere"
    assert checkup.links().found.startswith("copies")
    config.write_text("[cache]\n    type = magic\n")
    (fault,) = faults([checkup.links()])
    assert "cache.type magic" in fault.found
    assert sorted(path.name for path in project.iterdir()) == [".dvc", "elsewhere"]


def test_messages_of_errors_become_faults_with_the_errors_code() -> None:
    (fault,) = faults(checkup.faults_of("settings", ParamsError("a; b is wrong; set it to c")))
    assert (fault.found, fault.remedy, fault.exit_code) == ("a; b is wrong", "set it to c", 3)
