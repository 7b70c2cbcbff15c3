"""Stage base: whatever changed about the model is seen, nothing is made of a model that cannot be tuned."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dpo_cli.core import paths
from dpo_cli.core.errors import MachineError, ParamsError
from dpo_cli.core.load_params import parse_params
from dpo_cli.core.manifest import BASE
from dpo_cli.core.params import Params
from dpo_cli.models.identity import base_digest, read_base_lock
from dpo_cli.stages import base

LOCK = paths.BASE / BASE.name


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may change."""
    return shutil.copytree(tiny_folder, tmp_path / "model")


def params_of(folder: Path | str, **sections: dict[str, Any]) -> Params:
    short = {"sft": {"max_length": 64}, "reference": {"max_length": 64}}
    tree = short | sections | {"runtime": {"model_path": str(folder)}}
    return parse_params({**tree, "model": {"name": "tiny"} | sections.get("model", {})})


def test_a_second_run_writes_nothing(project: Path, folder: Path, reporter: Any) -> None:
    metrics = base.run(params_of(folder), reporter)
    before = LOCK.stat().st_mtime_ns
    assert base.run(params_of(folder), reporter) == metrics
    assert LOCK.stat().st_mtime_ns == before
    assert reporter.warned == []


def test_a_run_that_finds_all_as_it_was_imports_no_torch(project: Path, folder: Path, reporter: Any) -> None:
    base.run(params_of(folder), reporter)
    Path("params.yaml").write_text(json.dumps(params_of(folder).model_dump(exclude_unset=True)), encoding="utf-8")
    code = (
        "import sys; from dpo_cli.cli.app import app; sys.argv = ['dpo-cli', 'base']\n"
        "try: app()\nexcept SystemExit as end: assert not end.code, end.code\n"
        "assert not {'torch', 'transformers', 'peft'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer_config.json", "config.json"])
def test_an_edited_file_is_seen_and_named(project: Path, folder: Path, reporter: Any, name: str) -> None:
    base.run(params_of(folder), reporter)
    before = base_digest()
    path = folder / name
    path.write_text(path.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    base.run(params_of(folder), reporter)
    assert base_digest() != before
    (warning,) = reporter.warned
    assert f"{path} changed since the model was locked" in warning


def test_another_template_is_verified_and_is_the_same_model(project: Path, folder: Path, reporter: Any) -> None:
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(MachineError, match="has no chat template; set model.chat_template"):
        base.run(params_of(folder), reporter)
    assert not LOCK.exists()
    base.run(params_of(folder, model={"chat_template": "plain"}), reporter)
    before = base_digest()
    base.run(params_of(folder, model={"chat_template": "alpaca"}), reporter)
    assert base_digest() == before
    assert read_base_lock().settings["chat_template"] == "alpaca"


def test_a_model_with_nan_is_not_locked(project: Path, folder: Path, reporter: Any) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][3] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MachineError, match="model.norm.weight holds NaN or infinity"):
        base.run(params_of(folder), reporter)
    assert not LOCK.exists()


def test_a_length_beyond_the_context_is_refused_before_anything_is_converted(
    project: Path, folder: Path, reporter: Any
) -> None:
    for _ in range(2):  # where the model is known, too
        with pytest.raises(ParamsError, match=r"reference.max_length must be <= 256, the model's context, got 512"):
            base.run(params_of(folder, reference={"max_length": 512}), reporter)
    base.run(params_of(folder, sft={"max_length": 512, "method": "none"}), reporter)


def test_a_relative_path_is_meant_from_the_project(
    project: Path, folder: Path, tmp_path: Path, reporter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An experiment of DVC runs in a copy of the project, with DVC_ROOT at the place of the project."""
    base.run(params_of("../model"), reporter)
    before = base_digest()
    copy = project / ".dvc/tmp/exps/one"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    monkeypatch.setenv("DVC_ROOT", str(project))
    base.run(params_of("../model"), reporter)
    assert base_digest() == before
    with pytest.raises(MachineError, match=f"model directory {tmp_path / 'nowhere'} is missing"):
        base.run(params_of("../nowhere"), reporter)


def test_an_embedded_model_that_changed_is_built_again(project: Path, reporter: Any) -> None:
    params = parse_params({"model": {"pretrain_steps": 1}})
    base.run(params, reporter)
    before, weights = base_digest(), paths.BASE / "model.safetensors"
    base.run(params, reporter)
    assert reporter.warned == []
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    base.run(params, reporter)
    assert base_digest() == before
    (warning,) = reporter.warned
    assert warning == "base: models/base/model.safetensors has changed since the model was locked; it is built again"
