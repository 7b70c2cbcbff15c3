"""The check of a GPU runs small on the CPU: all parts, what is missing again, and what failed is said."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu_check import __main__ as check
from benchmarks.gpu_check.bench import Bench
from benchmarks.gpu_check.parts import PARTS, describe, perform


@pytest.fixture(autouse=True)
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where results go; this machine is seen by this process."""
    monkeypatch.setattr(check, "look", describe)
    return tmp_path / "found.json"


def parts_in(out: Path) -> dict[str, Any]:
    return json.loads(out.read_text(encoding="utf-8"))["parts"]


def test_all_parts_run_small_and_only_what_is_missing_runs_again(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[str] = []

    def run_part(name: str, extra: Sequence[str], folder: Path, limit_s: float) -> dict[str, Any]:
        """Carry it out in this process."""
        assert extra == ["--small"]
        ran.append(name)
        perform(name, True, folder, into := folder / "part.json")
        return {"status": "done", **json.loads(into.read_text(encoding="utf-8"))}

    monkeypatch.setattr(check, "run_part", run_part)
    assert check.main(["--out", str(out)]) == 0
    found = json.loads(out.read_text(encoding="utf-8"))
    assert ran == [*found["parts"]] == [*PARTS]
    answers = [each for part in found["parts"].values() for each in part["answers"]]
    assert {each["verdict"] for each in answers} == {"needs a GPU"}, "nothing on a CPU is right or wrong of a GPU"
    assert all(part["answers"] for part in found["parts"].values())
    assert out.with_suffix(".md").read_text(encoding="utf-8").count("| needs a GPU |") == len(answers)

    ran.clear()
    del found["parts"]["kernels"]
    found["parts"]["load"] |= {"status": "failed", "reason": "exit code 1"}
    out.write_text(json.dumps(found), encoding="utf-8")
    assert check.main(["--out", str(out)]) == 0
    assert ran == ["kernels", "load"]

    ran.clear()
    monkeypatch.setattr(check, "look", lambda: describe() | {"code": "changed since"})
    assert check.main(["--out", str(out), "--parts", "trl"]) == 0
    assert ran == ["trl"], "results of other code do not count"
    assert "it is" in capsys.readouterr().err
    assert out.with_suffix(".before.json").is_file()


def test_a_part_whose_process_ends_is_reported_and_the_rest_goes_on(
    out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check.main(["--out", str(out), "--parts", "kernels,trl", "--plant", "kernels"]) == 1
    parts = parts_in(out)
    assert parts["kernels"]["status"] == "failed"
    assert parts["kernels"]["reason"].startswith("exit code 1")
    assert len(parts["kernels"]["answers"]) == 1, "what was known before it ended is kept"
    assert parts["trl"]["status"] == "done"
    assert "| kernels | does it come to its end? | yes | exit code 1" in capsys.readouterr().out


def test_a_part_that_takes_too_long_is_ended(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(check.PARTS, "stages", replace(PARTS["stages"], limit_s=0.5))
    assert check.main(["--out", str(out), "--parts", "stages"]) == 1
    part = parts_in(out)["stages"]
    assert (part["status"], part["reason"]) == ("out of time", "ended after 0.5 s")


@pytest.mark.parametrize("text", ["{", "[]", '{"parts": {"trl": "done"}, "machine": {}}', '{"machine": {}}'])
def test_a_file_that_is_no_result_is_put_aside(
    text: str, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(check, "run_part", lambda *_: {"status": "done", "answers": [], "figures": {}})
    out.write_text(text, encoding="utf-8")
    assert check.main(["--out", str(out), "--parts", "trl"]) == 0
    assert out.with_suffix(".before.json").read_text(encoding="utf-8") == text
    assert "was no result of this check" in capsys.readouterr().err


@pytest.mark.parametrize("part", [{"answers": None}, {"answers": ["a"]}, {"answers": [{}]}, {"status": "failed"}])
def test_parts_of_another_form_are_no_result(part: dict[str, Any], out: Path) -> None:
    machine = describe() | {"models": "tiny"}
    out.write_text(json.dumps({"machine": machine, "parts": {"trl": {"status": "done"} | part}}), encoding="utf-8")
    assert check.recall(out, machine) == {}
    assert not out.exists(), "it is put aside"


def test_a_place_that_cannot_be_written_to_is_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(check, "run_part", None)
    (file := tmp_path / "file").touch()
    (folder := tmp_path / "folder.json").mkdir()
    for out in (file / "found.json", folder):
        with pytest.raises(SystemExit, match=r"name a file that can be written: --out FILE\.json"):
            check.main(["--out", str(out), "--parts", "trl"])
    with pytest.raises(SystemExit, match="2"):
        check.main(["--out", str(tmp_path / "found.md")])
    assert "found.md: must end with .json" in capsys.readouterr().err, "the table would be written over it"


def test_a_part_ends_with_the_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C reaches a process group, kill -INT the check alone."""
    ended: list[int] = []

    class Process:
        pid = 17

        def __init__(self, *_: Any, **__: Any) -> None: ...

        def wait(self, _: float) -> int:
            raise KeyboardInterrupt

    monkeypatch.setattr(check.subprocess, "Popen", Process)
    monkeypatch.setattr(check, "_end", ended.append)
    with pytest.raises(KeyboardInterrupt):
        check.run_part("trl", [], tmp_path, 1.0)
    assert ended == [17]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_is_said_and_keeps_what_ended(
    signum: int, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_part(name: str, *_: Any) -> dict[str, Any]:
        if name == "trl":
            os.kill(os.getpid(), signum)
        return {"status": "done", "answers": [], "figures": {}}

    monkeypatch.setattr(check, "run_part", run_part)
    monkeypatch.setattr("sys.argv", ["gpu_check", "--out", str(out), "--parts", "waits,trl"])
    assert check.main_until_stopped() == 130
    assert "stopped: the parts that ended are kept" in capsys.readouterr().err
    assert [*parts_in(out)] == ["waits"]


@pytest.mark.parametrize(("verdict", "code"), [("ok", 0), ("noted", 0), ("not possible here", 0), ("differs", 1)])
def test_what_differs_is_an_exit_code(verdict: str, code: int, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = {"question": "?", "expected": "a", "seen": "b", "verdict": verdict}
    monkeypatch.setattr(check, "look", lambda: describe() | {"has_gpu": True, "memory_gib": 24, "driver": "1"})
    monkeypatch.setattr(check, "run_part", lambda *_: {"status": "done", "answers": [answer], "figures": {}})
    assert check.main(["--out", str(out), "--parts", "trl"]) == code


def test_what_is_seen_on_a_gpu_is_held_against_what_was_expected(tmp_path: Path) -> None:
    bench = Bench(False, tmp_path, into := tmp_path / "answers.json")
    bench.on_gpu = True
    bench.check("?", "a", "a", True)
    bench.check("?", "a", "b", False)
    bench.check("?", "open", "b", None)
    bench.check("?", "a", "b", False, refused="no memory")
    answers = json.loads(into.read_text(encoding="utf-8"))["answers"]
    assert [each["verdict"] for each in answers] == ["ok", "differs", "noted", "not possible here"]
    assert answers[-1]["seen"] == "no memory"
