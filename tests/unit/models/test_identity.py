"""What a model is: the digests of its files, never its path."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dpo_cli.core import paths
from dpo_cli.core.artifacts import write_text
from dpo_cli.core.errors import StaleArtifactError
from dpo_cli.core.manifest import BASE
from dpo_cli.models.identity import (
    BaseLock,
    ModelFacts,
    base_digest,
    lock_model,
    model_files,
    read_base_lock,
    read_lock,
    verify_model,
)

FILES = {
    "config.json": "{}",
    "model.safetensors": "weights",
    "tokenizer.json": "{}",
    "chat_template.jinja": "{{ x }}",
    "merges.txt": "a b",
}
OTHERS = {"README.md": "# model", "pytorch_model.bin": "pickle", "notes.txt": "", BASE.name: "{}"}


@pytest.fixture
def folder(project: Path) -> Path:
    path = project / "model"
    path.mkdir()
    for name, text in (FILES | OTHERS).items():
        (path / name).write_text(text)
    (path / "sub").mkdir()
    (path / "sub" / "config.json").write_text("{}")
    return path


def lock(folder: Path) -> dict[str, Any]:
    return lock_model(folder, "mine", "v1", lambda _: None)


def test_weights_configuration_and_tokenizer_make_a_model(folder: Path) -> None:
    assert model_files(folder) == sorted(FILES)


def test_the_same_model_elsewhere_has_the_same_lock(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "README.md").write_text("changed")
    assert lock(copy) == lock(folder)
    verify_model(copy, lock(folder))


def test_every_byte_is_reported_whether_it_is_read_or_remembered(folder: Path) -> None:
    total = sum(map(len, FILES.values()))
    for _ in range(2):
        heard: list[int] = []
        lock_model(folder, "mine", "", heard.append)
        assert sum(heard) == total


def test_a_file_that_changed_is_refused_with_its_name(folder: Path) -> None:
    name = "merges.txt"
    found = lock(folder)
    before = (folder / name).stat()
    (folder / name).write_text(FILES[name][::-1] + "!")
    with pytest.raises(StaleArtifactError, match=rf"{name} has changed since the model was locked; put the locked"):
        verify_model(folder, found)
    (folder / name).write_text("#" * len(FILES[name]))
    os.utime(folder / name, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    with pytest.raises(StaleArtifactError, match=rf"{name} has changed"):
        verify_model(folder, found)


def test_a_missing_file_and_a_new_one_are_refused(folder: Path) -> None:
    found = lock(folder)
    (folder / "merges.txt").unlink()
    with pytest.raises(StaleArtifactError, match=r"merges.txt is missing: not the model that was locked"):
        verify_model(folder, found)
    (folder / "merges.txt").write_text(FILES["merges.txt"])
    (folder / "adapter.safetensors").write_text("")
    with pytest.raises(StaleArtifactError, match=r"adapter.safetensors is new: not the model that was locked"):
        verify_model(folder, found)


def test_a_digest_that_is_remembered_is_not_of_another_file(folder: Path) -> None:
    """Weights are large, so digests are kept by path, size and time of change."""
    first = lock(folder)
    memory = json.loads((paths.scratch_root() / "digests.json").read_text())
    assert len(memory) == len(FILES)
    (folder / "config.json").write_text("[]")
    os.utime(folder / "config.json", ns=(0, 10**9))
    assert lock(folder)["files"]["config.json"] != first["files"]["config.json"]


def test_a_change_that_keeps_size_and_time_is_seen(folder: Path) -> None:
    first, stat = lock(folder), (folder / "config.json").stat()
    (folder / "config.json").write_text("[]")
    os.utime(folder / "config.json", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert lock(folder)["files"]["config.json"] != first["files"]["config.json"]


@pytest.mark.parametrize("content", ["{half", "[]"])
def test_a_damaged_memory_of_digests_is_forgotten(folder: Path, content: str) -> None:
    first = lock(folder)
    (paths.scratch_root() / "digests.json").write_text(content)
    assert lock(folder) == first
    json.loads((paths.scratch_root() / "digests.json").read_text())


def test_the_base_digest_is_of_the_lock_alone(project: Path, folder: Path) -> None:
    facts = ModelFacts(context_length=None, num_rows=7, layers=["q_proj"], tied_layers=[])
    BaseLock(lock(folder), {"chat_template": "auto"}, facts).write(paths.BASE)
    before = base_digest()
    assert read_lock() == lock(folder)
    shutil.rmtree(folder)
    assert base_digest() == before
    replace(read_base_lock(), settings={"chat_template": "plain"}).write(paths.BASE)
    assert base_digest() == before
    replace(read_base_lock(), identity=read_lock() | {"revision": "v2"}).write(paths.BASE)
    assert base_digest() != before


@pytest.mark.parametrize(
    "content",
    ["[]", "{half", '{"name": 1, "files": [], "facts": 3}'],
)
def test_a_lock_of_garbage_is_refused_with_the_remedy(project: Path, content: str) -> None:
    write_text(paths.BASE / BASE.name, content)
    with pytest.raises(StaleArtifactError, match=r"model.lock.json is damaged.*; run: dpo-cli base"):
        read_base_lock()


def test_a_lock_that_names_files_elsewhere_is_refused(project: Path, folder: Path) -> None:
    files = {"../config.json": "0" * 64}
    BaseLock(lock(folder) | {"files": files}, {}, ModelFacts(None, 7, [], [])).write(paths.BASE)
    with pytest.raises(StaleArtifactError, match="is damaged"):
        read_base_lock()


def test_before_stage_base_there_is_no_lock(project: Path) -> None:
    with pytest.raises(StaleArtifactError, match=r"model.lock.json is missing; run: dpo-cli base"):
        read_lock()
