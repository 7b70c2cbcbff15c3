"""A model directory that changes is seen by every repro, and by no run of DVC's cache undone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

STAGES = ("convert_sft", "sft")
"""With method none the latter writes a marker, so all of this takes seconds."""


def run(folder: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("DVC_")}
    clean["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{clean['PATH']}"
    return subprocess.run(
        [sys.executable, "-m", *command],
        cwd=folder,
        env=clean | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def ran(done: subprocess.CompletedProcess[str]) -> list[str]:
    """The stages that DVC ran."""
    assert done.returncode == 0, done.stdout + done.stderr
    return [line.split("'")[1] for line in done.stdout.splitlines() if line.startswith("Running stage")]


@pytest.fixture
def model(tiny_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_folder, tmp_path / "model")


@pytest.fixture
def own(model: Path, tmp_path: Path) -> Path:
    """A project with a model of its own, named by a relative path; SFT is off."""
    rows = [{"prompt": f"What is {number}?", "chosen": f"It is {number}.", "rejected": "No."} for number in range(40)]
    (tmp_path / "pairs.json").write_text(json.dumps(rows), encoding="utf-8")
    folder = tmp_path / "own"
    made = run(
        tmp_path, "dpo_cli", "init", "own", "--preferences", "pairs.json", "--model", "model",
        GIT_AUTHOR_NAME="test", GIT_AUTHOR_EMAIL="test@example.org",
        GIT_COMMITTER_NAME="test", GIT_COMMITTER_EMAIL="test@example.org",
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    params = folder / "params.yaml"
    text = params.read_text(encoding="utf-8")
    for before, after in (("method: qlora", "method: none"), (str(model), "../model")):
        assert before in text
        text = text.replace(before, after)
    params.write_text(text, encoding="utf-8")
    return folder


def test_a_changed_template_is_seen_and_no_circle_follows(own: Path, model: Path) -> None:
    repro = ("dpo_cli", "repro", "sft")
    assert sorted(ran(run(own, *repro))) == ["base", *STAGES]
    lock = (own / "dvc.lock").read_bytes()
    assert ran(run(own, *repro)) == ["base"]
    assert (own / "dvc.lock").read_bytes() == lock
    template = model / "chat_template.jinja"
    text = template.read_text(encoding="utf-8")
    template.write_text(text + "\n", encoding="utf-8")
    seen = run(own, *repro)
    assert ran(seen) == ["base", "sft"]
    assert f"{template} changed since the model was locked" in seen.stdout + seen.stderr
    assert ran(run(own, "dvc", "repro", "sft")) == ["base"]
    template.write_text(text, encoding="utf-8")
    by_hand = run(own, "dpo_cli", "base")
    assert by_hand.returncode == 0, by_hand.stderr
    again = run(own, *repro)
    assert ran(again)[0] == "base"
    assert "Stage 'sft' is cached" in again.stdout, "the run with the first template is in DVC's cache"
    assert ran(run(own, *repro)) == ["base"]
    assert (own / "dvc.lock").read_bytes() == lock


def test_a_relative_model_path_serves_experiments_in_temporary_folders(own: Path) -> None:
    assert ran(run(own, "dpo_cli", "repro", "sft"))
    for command in (("add", "-A"), ("-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "-qm", "one")):
        subprocess.run(["git", *command], cwd=own, check=True, capture_output=True)
    experiment = run(own, "dvc", "exp", "run", "--temp", "-S", "model.revision=two", "sft")
    assert experiment.returncode == 0, experiment.stdout + experiment.stderr


def test_a_model_that_cannot_be_tuned_ends_repro_with_its_line(own: Path, model: Path) -> None:
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    (model / "config.json").write_text(json.dumps(config | {"num_attention_heads": 0}), encoding="utf-8")
    done = run(own, "dpo_cli", "repro")
    assert done.returncode == 6
    assert f"error: {model / 'config.json'}: num_attention_heads must be a whole number > 0, got 0" in done.stderr
    assert not (own / "data/sft").exists(), "nothing was converted"
