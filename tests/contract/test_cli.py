"""The command line: help for every command, documents for every command, one-line errors with their exit codes."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from dpo_cli.cli.app import COMMANDS, app

ROOT = Path(__file__).resolve().parents[2]
GROUPS = {
    "data": ["data check", "data show", "data stats"],
    "model": ["model import", "model info"],
    "votes": ["votes export", "votes import"],
}
NAMED = [name for command in COMMANDS for name in GROUPS.get(command, [command])]

HEAVY = ("torch", "transformers", "peft", "bitsandbytes", "lm_eval", "datasets", "polars", "pydantic", "dvc", "textual")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new project with the embedded world; not to be changed."""
    folder = tmp_path_factory.mktemp("new") / "project"
    assert run("init", str(folder)).exit_code == 0
    return folder


@pytest.fixture
def fresh(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, which is the working directory."""
    folder = Path(shutil.copytree(made, tmp_path / "fresh"))
    monkeypatch.chdir(folder)
    return folder


def set_param(folder: Path, before: str, after: str) -> None:
    path = folder / "params.yaml"
    text = path.read_text(encoding="utf-8")
    assert before in text
    path.write_text(text.replace(before, after, 1), encoding="utf-8")


@pytest.mark.parametrize("command", NAMED)
def test_every_command_has_help_with_an_example_and_is_documented(command: str) -> None:
    shown = run(*command.split(), "--help")
    assert shown.exit_code == 0
    assert "Examples" in shown.stdout
    assert f"## `dpo-cli {command}`" in (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")


def loaded_by(code: str) -> set[str]:
    """Modules that a piece of code loads in a process of its own."""
    ending = "\nimport sys; print(*sys.modules, sep='\\n')"
    result = subprocess.run([sys.executable, "-c", code + ending], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(result.stdout.splitlines())


def shown(*arguments: str) -> str:
    """Code that runs a command line to its end."""
    return (
        f"import sys; sys.argv = ['dpo-cli', *{arguments!r}]\n"
        "from dpo_cli.cli.app import main\n"
        "try: main()\n"
        "except SystemExit: pass"
    )


def test_help_imports_neither_torch_nor_its_like() -> None:
    assert not {*HEAVY, "numpy"} & loaded_by(shown("--help"))


def test_a_command_is_loaded_when_it_is_named() -> None:
    loaded = loaded_by(shown("chat", "--help"))
    assert "dpo_cli.cli.chat" in loaded
    assert not {"dpo_cli.cli.score", "dpo_cli.cli.init", "dpo_cli.cli.data"} & loaded


@pytest.mark.parametrize(("arguments", "meant"), [(["sampl"], "sample"), (["data", "chek"], "check")])
def test_a_command_that_there_is_not_names_one_like_it(arguments: list[str], meant: str) -> None:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert f"Did you mean '{meant}'?" in result.output


@pytest.mark.parametrize(
    ("module", "allowed"),
    [
        ("evaluation.capability", ("polars", "pydantic")),
        ("evaluation.compare", ()),
        ("judging.agreement", ("polars",)),
        ("labeling.desk", ("polars", "pydantic")),
        ("labeling.terminal", ("polars", "pydantic", "textual")),
        ("stages.report", ("pydantic",)),
        ("stages.base", ("polars", "pydantic")),
        ("stages.convert_sft", ("polars", "pydantic")),
        ("stages.sft", ("polars", "pydantic")),
        ("stages.reward", ("polars", "pydantic")),
    ],
)
def test_what_computes_nothing_loads_no_model_library(module: str, allowed: tuple[str, ...]) -> None:
    assert set(HEAVY) & loaded_by(f"import dpo_cli.{module}") <= set(allowed)


def test_an_error_is_one_line_and_a_code_of_the_process(fresh: Path) -> None:
    line = [sys.executable, "-m", "dpo_cli", "-C", str(fresh), "convert-sft", "--set", "train.beta=-1"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert done.stdout == ""
    assert done.stderr == "dpo-cli: error: params.yaml: train.beta must be > 0, got -1\n"


def test_a_report_of_nothing_names_the_stage_to_run(fresh: Path) -> None:
    expect_error(run("report", "--no-open"), 5, "run: dpo-cli convert-sft")


def expect_error(result: Result, code: int, *words: str) -> None:
    assert result.exit_code == code, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("dpo-cli: error: ")]
    assert len(lines) == 1, result.stderr
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in lines[0]


def test_an_unknown_key_names_the_nearest_one(fresh: Path) -> None:
    set_param(fresh, "  beta: ", "  betta: ")
    expect_error(run("convert-sft"), 3, "train.betta", "did you mean train.beta")


def test_a_file_that_is_not_there(fresh: Path) -> None:
    (fresh / "data/raw/preferences.json").unlink()
    expect_error(run("convert-preferences"), 4, "preferences.json is missing")
    assert not (fresh / "data/preference").exists()


def test_a_file_that_cannot_be_read_publishes_nothing(fresh: Path) -> None:
    (fresh / "data/raw/preferences.json").write_bytes(b'[{"prompt": "a", "chosen": "b", "rejec')
    expect_error(run("convert-preferences"), 4, "data/raw/preferences.json", "cut off")
    assert not (fresh / "data/preference").exists()
    assert not (fresh / "reports").exists()


def test_a_directory_that_is_no_safe_model(fresh: Path, tmp_path: Path) -> None:
    for name in ("config.json", "pytorch_model.bin"):
        (tmp_path / name).write_text("{}", encoding="utf-8")
    set_param(fresh, "  name: embedded", "  name: mine")
    set_param(fresh, "model_path: null", f"model_path: {tmp_path}")
    set_param(fresh, "pretrain_steps: 1800", "pretrain_steps: 900")
    expect_error(run("base"), 6, "pickled")
    assert not (fresh / "models/base").exists()


def test_set_is_refused_under_dvc(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DVC_STAGE", "convert_sft")
    expect_error(run("convert-sft", "--set", "train.beta=1"), 3, "--set")


def test_json_goes_to_standard_output_alone(fresh: Path) -> None:
    result = run("convert-sft", "--json")
    assert result.exit_code == 0
    metrics = json.loads(result.stdout)["convert_sft"]
    assert metrics["num_read"] == metrics["num_train"] + metrics["num_eval"] + metrics["num_rejected"]


def test_an_earlier_stage_that_did_not_run_is_named(fresh: Path) -> None:
    expect_error(run("train"), 5, "run: dpo-cli base")


def test_init_overwrites_nothing(fresh: Path) -> None:
    before = (fresh / "params.yaml").read_bytes()
    expect_error(run("init", str(fresh)), 4, "exists already")
    assert (fresh / "params.yaml").read_bytes() == before


def test_repro_outside_a_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    expect_error(run("repro"), 3, "dpo-cli init")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError(), "lower runtime.max_tokens_per_microbatch"),
        (OSError(28, "No space left on device", "models/x"), "models/x"),
    ],
    ids=lambda value: str(value) or type(value).__name__,
)
def test_a_machine_that_lacks_something_is_no_traceback(
    error: Exception, words: str, fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(importlib.import_module("dpo_cli.stages.convert_sft"), "run", fail)
    expect_error(run("convert-sft"), 6, words)


def test_under_dvc_the_remedy_forces_the_stage(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else DVC's cache of runs would bring back the very output that is to be made anew."""
    monkeypatch.setenv("DVC_STAGE", "train")
    monkeypatch.setattr("dpo_cli.cli.stage.die_with_parent", lambda: None)
    expect_error(run("train"), 5, "run: dpo-cli repro base --force")


def test_a_setting_that_the_stage_does_not_read_is_refused(fresh: Path) -> None:
    result = run("convert-sft", "--set", "train.beta=0.5")
    expect_error(result, 3, "--set train.beta=0.5 has no effect on convert-sft", "data, runtime")


def test_a_new_project_is_committed_so_that_experiments_work(fresh: Path) -> None:
    log = subprocess.run(["git", "log", "--oneline"], cwd=fresh, capture_output=True, text=True, check=True)
    assert len(log.stdout.splitlines()) == 1
    status = subprocess.run(["git", "status", "--short"], cwd=fresh, capture_output=True, text=True, check=True)
    assert status.stdout == ""
