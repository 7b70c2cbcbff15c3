"""`dvc repro` on a shrunken world, through the real nf4 path: what runs again, what is restored, and equal bytes."""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from dpo_cli.cli.app import app
from dpo_cli.evaluation.experiments import flatten
from tests.commands import module, run, stages_run, succeed
from tests.e2e.conftest import NUM_ROWS

CHANGES = {"beta": 0.05, "loss": "ipo"}


def metrics(folder: Path, stage: str) -> dict[str, Any]:
    return json.loads((folder / f"reports/{stage}/metrics.json").read_text(encoding="utf-8"))[stage]


@pytest.fixture(scope="module")
def project(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project after its first run, which the tests change one after the other."""
    return Path(shutil.copytree(finished, tmp_path_factory.mktemp("repro") / "project"))


@pytest.fixture
def copy(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the project as its first run left it, which is the working directory."""
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder, ignore=shutil.ignore_patterns(".git", ".scratch"))
    monkeypatch.chdir(folder)
    return folder


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def test_the_pipeline_runs_without_a_network(project: Path, no_network: tuple[str, ...]) -> None:
    if not no_network:
        pytest.skip("this system makes no network namespace")
    assert (project / "reports/report.html").is_file()


def test_step_zero_is_the_reference(project: Path) -> None:
    train = metrics(project, "train")
    assert train["step0_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert train["step0_max_abs_margin"] <= 1e-4
    assert train["eval_loss"] < train["eval_loss_start"]


def test_every_row_is_accounted_for(project: Path) -> None:
    for stage in ("convert_sft", "convert_preferences"):
        account = metrics(project, stage)
        rejects = (project / f"reports/{stage}/rejects.jsonl").read_text(encoding="utf-8").splitlines()
        assert len(rejects) == account["num_rejected"] > 0
        assert account["num_read"] == NUM_ROWS == account["num_train"] + account["num_eval"] + len(rejects)


def test_no_held_out_prompt_was_trained_on(project: Path) -> None:
    assert metrics(project, "evaluate")["num_leaked_prompts"] == 0


def test_a_second_run_does_nothing(project: Path) -> None:
    before = (project / "dvc.lock").read_bytes()
    assert stages_run(succeed(project, "dpo_cli", "repro")) == ["base"], (
        "which looks at the model, and writes nothing where it is as it was"
    )
    assert (project / "dvc.lock").read_bytes() == before


# --- an experiment of another beta and loss through DVC's queue -----------------------------


@pytest.fixture(scope="module")
def experiment(project: Path) -> str:
    """What DVC printed."""
    changes = [word for key, value in CHANGES.items() for word in ("-S", f"train.{key}={value}")]
    succeed(project, "dvc", "exp", "run", "--queue", *changes)
    return succeed(project, "dvc", "exp", "run", "--run-all")


def test_an_experiment_trains_and_evaluates_and_nothing_else(project: Path, experiment: str) -> None:
    """Against the cache of the first run, which alone computed rows."""
    assert stages_run(experiment) == ["base", "train", "evaluate", "report"]
    refs = run(project, "git", "for-each-ref", "--format=%(refname)", "refs/exps").stdout.split()
    [ref] = [ref for ref in refs if ref.count("/") == 4]
    first = (project / "reports/precompute_ref/metrics.json").read_text(encoding="utf-8")
    computed = json.loads(first)["precompute_ref"]
    assert computed["num_computed"] == computed["num_completions"] > 0
    assert run(project, "git", "show", f"{ref}:reports/precompute_ref/metrics.json").stdout == first


def test_compare_prints_it_with_intervals(project: Path, experiment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    done = invoke("compare", "--baseline", "HEAD", "--json")
    assert done.exit_code == 0, done.output
    figures = json.loads(done.stdout)
    base, other = figures["experiments"]
    assert base["name"] == "HEAD"
    assert {key: other["params"][f"train.{key}"] for key in CHANGES} == CHANGES
    for name in ("evaluate.margin", "evaluate.kl"):
        metric = other["metrics"][name]
        assert metric["low"] <= metric["difference"] <= metric["high"]
        assert metric["difference"] == pytest.approx(metric["value"] - base["metrics"][name]["value"], abs=1e-6)
        assert metric["num_left_out"] == 0
        assert metric["num_prompts"] > 2
    assert not any("no interval" in note or "dvc.lock" in note for note in figures["notes"])
    table = succeed(project, "dpo_cli", "compare")
    assert max(map(len, table.splitlines())) <= 80
    assert other["name"] in table
    assert "paired 95% interval" in table


def test_what_ran_before_is_restored(project: Path, experiment: str) -> None:
    """Settings of the experiment, and an output deleted: DVC has both in its cache of runs."""
    params = project / "params.yaml"
    text = params.read_text(encoding="utf-8")
    for before, key in (("  beta: 2.0\n", "beta"), ("  loss: sigmoid\n", "loss")):
        assert text.count(before) == 1, before
        text = text.replace(before, f"  {key}: {CHANGES[key]}\n")
    params.write_text(text, encoding="utf-8")
    taken = succeed(project, "dpo_cli", "repro")
    assert stages_run(taken) == ["base", "report"]
    assert "Stage 'train' is cached" in taken
    assert "eval_margin" in succeed(project, "dvc", "metrics", "diff")
    plots = module(project, "dvc", "plots", "show")
    assert plots.returncode == 0, plots.stderr
    assert "failed" not in plots.stderr
    shutil.rmtree(project / "models/sft")
    deleted = succeed(project, "dpo_cli", "repro", "sft")
    assert stages_run(deleted) == ["base"]
    assert "Stage 'sft' is cached" in deleted
    verdict = "reports/report.html"
    assert verdict not in deleted
    assert verdict in succeed(project, "dpo_cli", "repro", "report")


def test_a_stage_run_by_hand_is_not_run_again_and_the_cache_knows_what_it_holds(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project)
    for stage in ("precompute-ref", "train"):
        done = invoke(stage, "--json")
        assert f"{stage}: recorded in dvc.lock" in done.stderr
        if stage == "precompute-ref":
            again = json.loads(done.stdout)["precompute_ref"]
            assert again["num_computed"] == 0
            assert again["num_reused"] == again["num_completions"]
    assert stages_run(succeed(project, "dpo_cli", "repro")) == ["base", "report"], "the page has other timings to show"


# --- what is refused, and what no batch changes ---------------------------------------------


def test_a_cache_of_another_adapter_is_refused_and_nothing_is_touched(copy: Path) -> None:
    manifest = copy / "data/reference/manifest.json"
    content = json.loads(manifest.read_text(encoding="utf-8"))
    assert content["made_of"]["graph"]["sft"]
    content["made_of"]["graph"]["sft"] = "0" * 32
    manifest.chmod(0o644)
    manifest.write_text(json.dumps(content), encoding="utf-8")
    before = (copy / "models/dpo/adapter_model.safetensors").read_bytes()
    refused = invoke("train")
    assert refused.exit_code == 5, refused.stderr
    assert "sft is " in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    assert (copy / "models/dpo/adapter_model.safetensors").read_bytes() == before


@pytest.fixture
def small_budget(copy: Path) -> Callable[[str], dict[str, Any]]:
    """Run one stage of a copy of the project in micro-batches of 256 tokens; gives its metrics."""

    def run_stage(stage: str) -> dict[str, Any]:
        result = invoke(stage, "--json", "--set", "runtime.max_tokens_per_microbatch=256")
        assert result.exit_code == 0, result.stderr
        return json.loads(result.stdout)[stage]

    return run_stage


def test_evaluation_does_not_depend_on_the_batch(
    finished: Path, copy: Path, small_budget: Callable[[str], dict[str, Any]]
) -> None:
    found, expected = small_budget("evaluate"), metrics(finished, "evaluate")
    samples = "reports/evaluate/samples.json"
    ours, theirs = (json.loads((folder / samples).read_text(encoding="utf-8")) for folder in (copy, finished))
    for one, other in zip(ours, theirs, strict=True):  # what is a float32 sum is rounded by the batch
        assert one.pop("kl") == pytest.approx(other.pop("kl"), rel=1e-4, abs=1e-5)
        for (text, ratio), (same, expected_ratio) in zip(one["dpo"].pop("heat"), other["dpo"].pop("heat"), strict=True):
            assert text == same
            assert ratio == pytest.approx(expected_ratio, abs=2e-3)
    assert ours == theirs
    found, expected = flatten({"evaluate": found}), flatten({"evaluate": expected})
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, float) and "peak_mem_gib" not in name:
            assert found[name] == pytest.approx(value, rel=1e-4, abs=1e-4), name


def test_training_does_not_depend_on_the_micro_batch(
    finished: Path, small_budget: Callable[[str], dict[str, Any]]
) -> None:
    found, expected = small_budget("train"), metrics(finished, "train")
    for name in ("step0_loss", "loss", "eval_loss_start", "eval_loss", "eval_margin"):
        assert found[name] == pytest.approx(expected[name], rel=1e-4), name


_ALL_STAGES = """\
import importlib
from pathlib import Path
from dpo_cli.core.environment import prepare_environment
from dpo_cli.core.load_params import load_params
from dpo_cli.core.pipeline import STAGES
from dpo_cli.core.progress import SilentReporter
prepare_environment()
for stage in STAGES:
    if stage.name not in ("evaluate", "report"):
        importlib.import_module(stage.module).run(load_params(Path("params.yaml")), SilentReporter())
"""


def test_two_projects_make_the_same_bytes(finished: Path, new_project: Callable[[Path], Path], tmp_path: Path) -> None:
    """The other one in a single process, whose sets have another order."""
    other = new_project(tmp_path / "two")
    done = run(other, sys.executable, "-c", _ALL_STAGES, PYTHONHASHSEED="7")
    assert done.returncode == 0, done.stderr
    expected = made_files(finished)
    assert {path.parent.as_posix() for path in expected} >= {"models/sft", "models/dpo", "data/reference"}
    found = made_files(other)
    assert found.keys() == expected.keys()
    assert [path for path in expected if found[path] != expected[path]] == []


def made_files(project: Path) -> dict[Path, bytes]:
    """What stages made but for reports."""
    return {
        path.relative_to(project): path.read_bytes()
        for folder in ("models", "data")
        for path in (project / folder).rglob("*")
        if path.is_file() and path.name != ".gitignore"
    }


@pytest.mark.parametrize(
    ("command", "folder", "stage"),
    [("precompute-ref", "sft", "sft"), ("evaluate", "sft", "sft"), ("evaluate", "preference", "train")],
)
def test_a_model_that_was_trained_on_another_split_is_refused(
    copy: Path, command: str, folder: str, stage: str
) -> None:
    table = copy / f"data/{folder}/train.parquet"
    table.chmod(0o644)
    table.write_bytes((copy / f"data/{folder}/eval.parquet").read_bytes())
    refused = invoke(command)
    assert refused.exit_code == 5, refused.stderr
    assert re.search(f"made of another data/{folder}: train is .*; run: dpo-cli {stage}", refused.stderr)
