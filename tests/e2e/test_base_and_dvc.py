"""A model directory that changes is seen by every repro, and by no run of DVC's cache undone."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dpo_cli.cli.app import app
from tests.commands import module, run, stages_run

STAGES = ("convert_sft", "sft")
"""With method none the latter writes a marker, so all of this takes seconds."""


def ran(done: subprocess.CompletedProcess[str]) -> list[str]:
    """The stages that DVC ran."""
    assert done.returncode == 0, done.stdout + done.stderr
    return stages_run(done.stdout)


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """A folder with a model and a new project that names it by a relative path; SFT is off."""
    folder = tmp_path_factory.mktemp("fresh")
    model = shutil.copytree(tiny_folder, folder / "model")
    rows = [{"prompt": f"What is {number}?", "chosen": f"It is {number}.", "rejected": "No."} for number in range(40)]
    (folder / "pairs.json").write_text(json.dumps(rows), encoding="utf-8")
    made = module(folder, "dpo_cli", "init", "own", "--preferences", "pairs.json", "--model", "model")
    assert made.returncode == 0, made.stderr
    params = folder / "own/params.yaml"
    text = params.read_text(encoding="utf-8")
    for before, after in (("method: qlora", "method: none"), (str(model), "../model")):
        assert before in text
        text = text.replace(before, after)
    params.write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def done(fresh: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of that folder in which the project has run; not to be changed."""
    folder = Path(shutil.copytree(fresh, tmp_path_factory.mktemp("done") / "copy"))
    assert sorted(ran(module(folder / "own", "dpo_cli", "repro", "sft"))) == ["base", *STAGES]
    return folder


@pytest.fixture
def own(done: Path, tmp_path: Path) -> Path:
    """The project in a copy of it."""
    return Path(shutil.copytree(done, tmp_path / "copy")) / "own"


def test_a_changed_template_is_seen_and_no_circle_follows(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repro = ("dpo_cli", "repro", "sft")
    model = own.parent / "model"
    lock = (own / "dvc.lock").read_bytes()
    assert ran(module(own, *repro)) == ["base"]
    assert (own / "dvc.lock").read_bytes() == lock
    template = model / "chat_template.jinja"
    text = template.read_text(encoding="utf-8")
    template.write_text(text + "\n", encoding="utf-8")
    seen = module(own, *repro)
    assert ran(seen) == ["base", "sft"]
    assert f"{template} changed since the model was locked" in seen.stdout + seen.stderr
    assert ran(module(own, "dvc", "repro", "sft")) == ["base"]
    template.write_text(text, encoding="utf-8")
    monkeypatch.chdir(own)
    by_hand = CliRunner().invoke(app, ["base"])
    assert by_hand.exit_code == 0, by_hand.stderr
    again = module(own, *repro)
    assert ran(again)[0] == "base"
    assert "Stage 'sft' is cached" in again.stdout, "the run with the first template is in DVC's cache"
    assert (own / "dvc.lock").read_bytes() == lock


def test_a_relative_model_path_serves_experiments_in_temporary_folders(own: Path) -> None:
    for command in (("add", "-A"), ("commit", "-qm", "one")):
        assert run(own, "git", *command).returncode == 0
    experiment = module(own, "dvc", "exp", "run", "--temp", "-S", "model.revision=two", "sft")
    assert experiment.returncode == 0, experiment.stdout + experiment.stderr


def test_a_model_that_cannot_be_tuned_ends_repro_with_its_line(fresh: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(fresh, tmp_path / "copy")) / "own"
    model = own.parent / "model"
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    (model / "config.json").write_text(json.dumps(config | {"num_attention_heads": 0}), encoding="utf-8")
    done = module(own, "dpo_cli", "repro")
    assert done.returncode == 6
    assert f"error: {model / 'config.json'}: num_attention_heads must be a whole number > 0, got 0" in done.stderr
    assert not (own / "data/sft").exists(), "nothing was converted"
