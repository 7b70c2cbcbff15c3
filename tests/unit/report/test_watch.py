"""``dpo-cli watch``: which log is shown, how the training stands, and how it is drawn."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from pathlib import Path

import orjson
import pytest
from typer.testing import CliRunner, Result

from dpo_cli.cli import watch
from dpo_cli.cli.app import app
from dpo_cli.core import paths
from dpo_cli.core.live_log import LIVE_LOG, LiveLog
from dpo_cli.report.inputs import read_rows, steps_file
from dpo_cli.report.plot import plot
from dpo_cli.report.steps import CURVES
from dpo_cli.report.watched import find_logs, read_log
from tests.report_folder import COMMITTED, Elements

pytestmark = pytest.mark.usefixtures("project")


def write_live(stage: str = "train", num_rows: int = 30, num_steps: int = 120) -> Path:
    """The log of a stage that runs: this process."""
    folder = Path(".scratch") / stage / "fingerprint"
    log = LiveLog(folder, num_steps, [])
    for step in range(num_rows + 1):
        log.add({"step": step, "eval_loss": 0.7} if step == 0 else {"step": step, "loss": 0.7 - step / 100})
    return folder / LIVE_LOG


def spread(path: Path, seconds: float, *, pid: int | None = None) -> None:
    """Make a log's entries come so many seconds apart, the last one now."""
    head, *entries = map(orjson.loads, path.read_bytes().splitlines())
    for place, entry in enumerate(reversed(entries)):
        entry["time"] = time.time() - seconds * place
    head["pid"] = pid or head["pid"]
    path.write_bytes(b"".join(orjson.dumps(each) + b"\n" for each in (head, *entries)))


def finish(*stages: str) -> None:
    for stage in stages:
        shutil.copytree(COMMITTED / stage, paths.report_dir(stage))


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["watch", *arguments])


def test_the_newest_log_comes_first_and_a_stage_that_trained_nothing_is_none() -> None:
    finish("sft", "train", "ppo", "reward")
    for age, stage in enumerate(("train", "sft")):
        os.utime(steps_file(stage), (1e9 - age, 1e9 - age))
    assert [*find_logs().items()] == [("train", steps_file("train")), ("sft", steps_file("sft"))]
    live = write_live("sft")
    assert [*find_logs().items()] == [("sft", live), ("train", steps_file("train"))]
    os.utime(steps_file("sft"), (2e9, 2e9))  # what a killed run left is older than what came after it
    assert find_logs()["sft"] == steps_file("sft")


def test_a_running_training_has_a_speed_and_time_left() -> None:
    path = write_live()
    spread(path, 2.0)
    found = read_log("train", path)
    assert found is not None
    assert (found.state, found.step, found.num_steps) == ("running", 30, 120)
    assert found.steps_per_s == pytest.approx(0.5)
    assert found.seconds_left == pytest.approx(180, abs=5)
    assert re.fullmatch(r"train: running, step 30 of 120, 2\.0 s a step, (3 min 0|2 min 5)\d s left", found.headline)
    assert (found.steps[0]["eval_loss"], found.steps[30]["loss"]) == (0.7, pytest.approx(0.4))


def test_what_was_killed_is_stopped_and_what_is_done_finished() -> None:
    path = write_live()
    spread(path, 2.0, pid=2**30)
    found = read_log("train", path)
    assert found is not None
    assert found.headline == "train: stopped, step 30 of 120"
    finish("train")
    found = read_log("train", steps_file("train"))
    assert found is not None
    assert found.headline == "train: finished, step 380 of 380"
    paths.metrics_file("train").unlink()  # as DVC does when the stage begins anew
    assert read_log("train", steps_file("train")) is None


@pytest.mark.parametrize("width", [20, 38, 47, 120])
@pytest.mark.parametrize("stage", ["sft", "train"])
def test_a_plot_fills_its_place(stage: str, width: int) -> None:
    steps = read_rows(COMMITTED / stage / "steps.tsv", ("step", "loss"))
    for curve in CURVES[stage]:
        lines = plot(curve, steps, width, 8)
        assert [line.cell_len for line in lines] == [width] * 8
        assert lines[-1].plain.endswith("380 " if stage == "train" else "129 ")


def test_a_plot_shows_a_fall_from_the_upper_left_to_the_lower_right() -> None:
    loss = CURVES["train"][0]
    steps = [{"step": float(step), "loss": 1 - step / 40} for step in range(41)]
    rows = [line.plain[8:].rstrip("\u2800 ") for line in plot(loss, steps, 49, 12)[1:-1]]
    assert [len(row.lstrip("\u2800")) in range(3, 7) for row in rows] == [True] * 10
    assert [len(row) for row in rows] == sorted({len(row) for row in rows})
    assert plot(loss, [{"step": 1.0}], 49, 12) == []
    assert len(plot(loss, [{"step": 1.0, "loss": 0.7}], 49, 12)) == 12, "one point, one value"


# --- the command ------------------------------------------------------------------------------


def test_without_a_terminal_it_prints_how_it_stands_and_ends() -> None:
    finish("train")
    shown = run()
    assert shown.exit_code == 0
    assert "train: finished, step 380 of 380" in shown.stdout
    assert re.search(r"green +held-out loss +0\.6931 -> 0\.0351: falls", shown.stdout)
    found = json.loads(run("train", "--json").stdout)
    assert (found["state"], found["last"]["eval_loss"]) == ("finished", pytest.approx(0.0351, abs=1e-3))


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["evaluate"], 3, "evaluate does not train; dpo-cli watch shows base, sft, train, reward, ppo"),
        (["--html", "x.html", "--json"], 3, "--json has no effect with --html"),
        (["train"], 4, "train has not trained here, so there are no curves; run: dpo-cli train"),
        ([], 4, "nothing was trained here, so there are no curves; run: dpo-cli repro"),
    ],
)
def test_what_cannot_be_shown(arguments: list[str], code: int, says: str) -> None:
    shown = run(*arguments)
    assert shown.exit_code == code
    assert says in shown.output


def test_the_page_is_written_until_the_training_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpo_cli.report.figures.draw", lambda *arguments: '<svg viewBox="0 0 2 1"></svg>')
    path = write_live()
    pages: list[str] = []

    def sleep(seconds: float) -> None:
        pages.append(Path("page.html").read_text(encoding="utf-8"))
        if len(pages) == 2:
            path.unlink()
            finish("train")

    monkeypatch.setattr(watch, "sleep", sleep)
    assert run("--html", "page.html").exit_code == 0
    pages.append(Path("page.html").read_text(encoding="utf-8"))
    assert ["train: running, step 30 of 120" in page for page in pages] == [True, True, False]
    assert ['http-equiv="refresh" content="10"' in page for page in pages] == [True, True, False]
    page = Elements(pages[-1])
    assert "train: finished, step 380 of 380" in page.text
    assert page.count("figure", "chart") == 6
    assert "chosen answers are told from rejected ones" in page.text
    assert not {"script", "img", "link", "iframe"} & {tag for tag, _ in page.elements}
