"""`dvc repro` on a shrunken world, through the real nf4 path: invariants 1, 3, 6, 7, 8, 9 and 11 of the design."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dpo_cli.data import world
from dpo_cli.evaluation.differences import flatten

pytestmark = pytest.mark.slow

_SMALL = {
    "pretrain_steps: 1800": "pretrain_steps: 100",
    "epochs: 3.0": "epochs: 1.0",
    "num_prompts: 0": "num_prompts: 16",
    "max_new_tokens: 48": "max_new_tokens: 12",
    "temperatures: [0.0, 0.25, 0.5, 0.75, 1.0]": "temperatures: [0.0]",
    "scales: [0.25, 0.5, 0.75, 1.5]": "scales: [0.5]",
}


def run(folder: Path, *command: str, prefix: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DVC_")}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    environment |= {
        f"GIT_{role}_{key}": value
        for role in ("AUTHOR", "COMMITTER")
        for key, value in (("NAME", "test"), ("EMAIL", "test@example.org"))
    }
    return subprocess.run([*prefix, *command], cwd=folder, env=environment, capture_output=True, text=True, check=False)


def repro(folder: Path, prefix: tuple[str, ...] = (), targets: tuple[str, ...] = ()) -> str:
    result = run(folder, sys.executable, "-m", "dpo_cli", "repro", *targets, prefix=prefix)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def stages_run(output: str) -> list[str]:
    """The stages that DVC ran, and did not restore or skip."""
    return [line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage")]


def new_project(folder: Path) -> Path:
    assert run(folder.parent, sys.executable, "-m", "dpo_cli", "init", str(folder)).returncode == 0
    params = folder / "params.yaml"
    text = params.read_text(encoding="utf-8")
    for before, after in _SMALL.items():
        assert before in text, before
        text = text.replace(before, after)
    params.write_text(text, encoding="utf-8")
    for name, rows in (
        ("instructions", world.instruction_rows(0, 160)),
        ("preferences", world.preference_rows(0, 160)),
    ):
        (folder / f"data/raw/{name}.json").write_text(json.dumps(rows), encoding="utf-8")
    return folder


def metrics(folder: Path, stage: str) -> dict[str, Any]:
    return json.loads((folder / f"reports/{stage}/metrics.json").read_text(encoding="utf-8"))[stage]


@pytest.fixture(scope="module")
def no_network() -> tuple[str, ...]:
    """A command that runs another in a network namespace without a network, where the system allows it."""
    command = ("unshare", "-rn") if os.geteuid() else ("unshare", "-n")
    if shutil.which("unshare") is None or subprocess.run([*command, "true"], check=False).returncode:
        return ()
    return command


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, no_network: tuple[str, ...]) -> Path:
    folder = new_project(tmp_path_factory.mktemp("e2e") / "one")
    repro(folder, no_network)
    run(folder, "git", "add", "-A")
    run(folder, "git", "commit", "-qm", "first")
    return folder


@pytest.fixture
def copy(project: Path, tmp_path: Path) -> Path:
    """A copy of the project that a test may change."""
    folder = tmp_path / "copy"
    shutil.copytree(project, folder, ignore=shutil.ignore_patterns(".git", ".scratch"))
    return folder


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
        assert account["num_read"] == 160 == account["num_train"] + account["num_eval"] + len(rejects)


def test_no_held_out_prompt_was_trained_on(project: Path) -> None:
    assert metrics(project, "evaluate")["num_leaked_prompts"] == 0


def test_a_second_run_does_nothing_then_beta_runs_train_and_evaluate_alone(project: Path) -> None:
    before = (project / "dvc.lock").read_bytes()
    assert stages_run(repro(project)) == ["base"], "which looks at the model, and writes nothing where it is as it was"
    assert (project / "dvc.lock").read_bytes() == before
    experiment = run(project, sys.executable, "-m", "dvc", "exp", "run", "-S", "train.beta=0.5")
    assert experiment.returncode == 0, experiment.stdout + experiment.stderr
    assert stages_run(experiment.stdout) == ["base", "train", "evaluate", "report"]
    diff = run(project, sys.executable, "-m", "dvc", "metrics", "diff")
    assert "train.eval_margin" in diff.stdout or "eval_margin" in diff.stdout
    plots = run(project, sys.executable, "-m", "dvc", "plots", "show")
    assert plots.returncode == 0, plots.stderr
    assert "failed" not in plots.stderr


def test_what_ran_before_is_restored(project: Path) -> None:
    """A setting put back, and an output deleted: DVC has both in its cache of runs."""
    assert run(project, "git", "checkout", "params.yaml").returncode == 0
    put_back = repro(project)
    assert stages_run(put_back) == ["base", "report"]
    assert "Stage 'train' is cached" in put_back
    shutil.rmtree(project / "models/sft")
    deleted = repro(project, targets=("sft",))
    assert stages_run(deleted) == ["base"]
    assert "Stage 'sft' is cached" in deleted
    verdict = "reports/report.html"
    assert verdict not in deleted
    assert verdict in repro(project, targets=("report",))


def test_a_stage_run_by_hand_is_not_run_again(project: Path) -> None:
    for stage in ("precompute-ref", "train"):
        done = run(project, sys.executable, "-m", "dpo_cli", stage)
        assert f"{stage}: recorded in dvc.lock" in done.stderr
    assert stages_run(repro(project)) == ["base", "report"], "only the page has other timings to show"


def test_the_cache_knows_what_it_holds(project: Path) -> None:
    result = run(project, sys.executable, "-m", "dpo_cli", "precompute-ref", "--json")
    again = json.loads(result.stdout)["precompute_ref"]
    assert again["num_computed"] == 0
    assert again["num_reused"] == again["num_completions"]


def test_a_cache_of_another_adapter_is_refused_and_nothing_is_touched(copy: Path) -> None:
    manifest = copy / "data/reference/manifest.json"
    content = json.loads(manifest.read_text(encoding="utf-8"))
    assert content["identity"]["sft"]
    content["identity"]["sft"] = "0" * 32
    manifest.chmod(0o644)
    manifest.write_text(json.dumps(content), encoding="utf-8")
    before = (copy / "models/dpo/adapter_model.safetensors").read_bytes()
    refused = run(copy, sys.executable, "-m", "dpo_cli", "train")
    assert refused.returncode == 5, refused.stderr
    assert "sft is " in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    assert (copy / "models/dpo/adapter_model.safetensors").read_bytes() == before


@pytest.fixture
def small_budget(copy: Path) -> Callable[[str], dict[str, Any]]:
    """Run one stage of a copy of the project in micro-batches of 256 tokens; gives its metrics."""

    def run_stage(stage: str) -> dict[str, Any]:
        budget = ("--set", "runtime.max_tokens_per_microbatch=256")
        result = run(copy, sys.executable, "-m", "dpo_cli", stage, "--json", *budget)
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout)[stage]

    return run_stage


def test_evaluation_does_not_depend_on_the_batch(
    project: Path, copy: Path, small_budget: Callable[[str], dict[str, Any]]
) -> None:
    found, expected = small_budget("evaluate"), metrics(project, "evaluate")
    samples = "reports/evaluate/samples.json"
    ours, theirs = (json.loads((folder / samples).read_text(encoding="utf-8")) for folder in (copy, project))
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
    project: Path, small_budget: Callable[[str], dict[str, Any]]
) -> None:
    found, expected = small_budget("train"), metrics(project, "train")
    for name in ("step0_loss", "loss", "eval_loss_start", "eval_loss", "eval_margin"):
        assert found[name] == pytest.approx(expected[name], rel=1e-4), name


def test_two_projects_make_the_same_bytes(project: Path, tmp_path: Path) -> None:
    other = new_project(tmp_path / "two")
    repro(other)
    first = run(project, "git", "show", "HEAD:dvc.lock").stdout
    assert models(first) == models((other / "dvc.lock").read_text(encoding="utf-8"))


def models(lock: str) -> dict[str, str]:
    from ruamel.yaml import YAML

    stages = YAML(typ="safe").load(lock)["stages"]
    return {
        out["path"]: out["md5"]
        for stage in stages.values()
        for out in stage["outs"]
        if out["path"].startswith(("models/", "data/"))
    }


@pytest.mark.parametrize(("folder", "stage"), [("sft", "sft"), ("preference", "train")])
def test_evaluation_refuses_a_model_that_was_trained_on_another_split(copy: Path, folder: str, stage: str) -> None:
    table = copy / f"data/{folder}/train.parquet"
    table.chmod(0o644)
    table.write_bytes((copy / f"data/{folder}/eval.parquet").read_bytes())
    refused = run(copy, sys.executable, "-m", "dpo_cli", "evaluate")
    assert refused.returncode == 5, refused.stderr
    assert f"made of another data/{folder}: train is " in refused.stderr
