"""Half-done work survives, and two runs of a stage stay apart."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dpo_cli.core import paths
from dpo_cli.core.scratch import die_with_parent, stage_scratch


def test_half_done_work_is_found_again_under_its_fingerprint_alone(project: Path) -> None:
    with stage_scratch("train", "one") as scratch:
        (scratch.folder / "checkpoint").write_text("1")
    with stage_scratch("train", "two") as scratch:
        assert list(scratch.folder.iterdir()) == []
    with stage_scratch("sft", "one") as scratch:
        assert list(scratch.folder.iterdir()) == []
    with stage_scratch("train", "one") as scratch:
        assert (scratch.folder / "checkpoint").read_text() == "1"
        scratch.clear()
    with stage_scratch("train", "one") as scratch:
        assert list(scratch.folder.iterdir()) == []


def test_an_error_keeps_the_work_and_frees_the_lock(project: Path) -> None:
    with pytest.raises(RuntimeError), stage_scratch("train", "one") as scratch:
        (scratch.folder / "checkpoint").write_text("1")
        raise RuntimeError
    with stage_scratch("train", "one") as scratch:
        assert (scratch.folder / "checkpoint").is_file()


def test_a_second_process_is_refused_and_another_stage_is_not(project: Path) -> None:
    code = (
        "import sys; from dpo_cli.core.scratch import stage_scratch\n"
        "with stage_scratch(sys.argv[1], 'x'): print('entered')"
    )

    def enter(stage: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", code, stage], capture_output=True, text=True, check=False)

    with stage_scratch("train", "one"):
        refused, other = enter("train"), enter("sft")
    assert "MachineError: " in refused.stderr
    assert "another train of this project is running" in refused.stderr
    assert refused.stdout == ""
    assert (other.stdout, other.returncode) == ("entered\n", 0)
    assert enter("train").returncode == 0


def test_the_build_folder_is_empty_each_time(project: Path) -> None:
    with stage_scratch("train", "one") as scratch:
        (scratch.build_folder() / "half").write_text("1")
        (scratch.folder / "kept").write_text("1")
        assert list(scratch.build_folder().iterdir()) == []
        assert (scratch.folder / "kept").is_file()


def test_under_dvc_the_work_lies_in_the_main_workspace(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert paths.scratch_root() == Path(".scratch")
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "workspace"))
    with stage_scratch("train", "one") as scratch:
        assert scratch.folder.is_relative_to(tmp_path / "workspace" / ".scratch" / "train")
    assert list(project.iterdir()) == []


# --- die with parent ----------------------------------------------------------------------

_CHILD = """
import signal, sys, threading
from dpo_cli.core.scratch import die_with_parent
stopped = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: stopped.set())
die_with_parent()
print("ready", flush=True)
while not stopped.wait(0.05):
    pass
print("stopped", flush=True)
"""
_PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]])
sys.stdin.read()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_under_dvc_a_stage_is_told_to_stop_when_its_parent_is_gone() -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", _PARENT, _CHILD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"DVC_STAGE": "train"},
    )
    assert parent.stdin is not None
    assert parent.stdout is not None
    with parent:
        assert parent.stdout.readline() == "ready\n"
        parent.send_signal(signal.SIGKILL)
        assert parent.stdout.read() == "stopped\n"


def test_without_dvc_no_parent_is_watched() -> None:
    import threading

    before = threading.active_count()
    die_with_parent()
    assert threading.active_count() == before
