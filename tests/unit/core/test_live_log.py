"""The log for those who watch: a line a step, whoever reads it while it is written."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import orjson

from dpo_cli.core.live_log import LIVE_LOG, LiveLog, read_live_log


def test_a_run_that_goes_on_begins_with_what_is_in_its_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "new" / LIVE_LOG
    assert read_live_log(path) is None
    log = LiveLog(path.parent, 9, [])
    for step in (1, 2):
        log.add({"step": step, "loss": float("nan") if step == 2 else 0.5})
    found = read_live_log(path)
    assert found is not None
    assert (found.num_steps, found.is_running) == (9, True)
    assert [(entry["step"], entry["loss"]) for entry in found.entries] == [(1, 0.5), (2, None)]
    LiveLog(path.parent, 9, [{"step": 1, "loss": 0.5}]).add({"step": 2, "loss": 0.25})
    resumed = read_live_log(path)
    assert resumed is not None
    assert [(entry["step"], entry["loss"], "time" in entry) for entry in resumed.entries] == [
        (1, 0.5, False),
        (2, 0.25, True),
    ]


def test_a_line_that_is_being_written_is_left_out(tmp_path: Path) -> None:
    LiveLog(tmp_path, 9, [{"step": 1}])
    whole = (tmp_path / LIVE_LOG).read_bytes()
    for end in range(len(whole)):
        (tmp_path / LIVE_LOG).write_bytes(whole[:end])
        found = read_live_log(tmp_path / LIVE_LOG)
        assert found is None or found.entries == []


def test_it_runs_as_long_as_its_process(tmp_path: Path) -> None:
    code = "from pathlib import Path; from dpo_cli.core.live_log import LiveLog; LiveLog(Path(), 9, [])"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    found = read_live_log(tmp_path / LIVE_LOG)
    assert found is not None
    assert not found.is_running
    head = orjson.loads((tmp_path / LIVE_LOG).read_bytes())
    for change, is_running in (
        ({"pid": 1, "begun": 0.0}, False),  # the number is another process's by now
        ({"host": f"not-{platform.node()}"}, True),  # nothing is known of it
    ):
        (tmp_path / LIVE_LOG).write_bytes(orjson.dumps({**head, **change}) + b"\n")
        found = read_live_log(tmp_path / LIVE_LOG)
        assert found is not None
        assert found.is_running is is_running
