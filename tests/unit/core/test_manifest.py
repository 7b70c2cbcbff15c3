"""One manifest beside every artifact, and one refusal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dpo_cli.core.errors import StaleArtifactError
from dpo_cli.core.manifest import DPO, SFT, Manifest, all_files

MADE_OF = {"graph": {"base": "b", "torch": "2"}, "data/preference": {"train": "1"}}


@pytest.fixture
def folder(project: Path) -> Path:
    DPO.folder.mkdir(parents=True)
    for name in ("weights", "config", "README.md"):
        (DPO.folder / name).write_text(name)
    DPO.write(DPO.folder, Manifest(MADE_OF, settings={"train": {"beta": 0.1}}), all_files(DPO.folder))
    return DPO.folder


def test_what_is_written_is_read_and_holds(folder: Path) -> None:
    assert DPO.check(MADE_OF).settings["train"] == {"beta": 0.1}
    assert sorted(DPO.read().files) == ["config", "weights"], "the card is the reader's to edit"
    assert json.loads((folder / DPO.name).read_text()).keys() >= {"kind", "made_of", "files", "settings", "versions"}
    before = (folder / DPO.name).read_bytes()
    DPO.write(folder, DPO.read())
    assert (folder / DPO.name).read_bytes() == before


def test_what_it_was_made_of_is_compared_field_by_field(folder: Path) -> None:
    with pytest.raises(StaleArtifactError) as caught:
        DPO.check({"graph": {"base": "c", "torch": "2", "new": 1}, "data/preference": {"train": "1"}})
    where = "models/dpo/provenance.json: made of another graph"
    assert caught.value.problems == [
        f"{where}: base is 'c' now, was 'b'; run: dpo-cli train",
        f"{where}: new is 1 now, was None; run: dpo-cli train",
    ]


@pytest.mark.parametrize("name", ["weights", "config"])
def test_a_file_that_changed_or_is_gone_is_refused(folder: Path, name: str) -> None:
    (folder / name).write_text("Weights")
    with pytest.raises(StaleArtifactError, match=f"models/dpo/{name} has changed since it was made; run: dpo-cli tra"):
        DPO.check(MADE_OF)
    (folder / name).unlink()
    with pytest.raises(StaleArtifactError, match=f"models/dpo/{name} is missing; run: dpo-cli train"):
        DPO.check(MADE_OF)


@pytest.mark.parametrize(
    "change", [{"kind": "sft"}, {"files": {"../x": "0"}}, {"files": 3}, {"made_of": None}, {"settings": {"train": {}}}]
)
def test_a_manifest_of_another_form_is_refused(folder: Path, change: dict[str, Any]) -> None:
    path = folder / DPO.name
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(StaleArtifactError, match=r"provenance.json is damaged, or of another version .*dpo-cli train"):
        DPO.read()


def test_of_another_folder_it_says_what_to_name(folder: Path, project: Path) -> None:
    with pytest.raises(StaleArtifactError, match=r"mine/provenance.json is missing; name a folder that dpo-cli train"):
        DPO.read(Path("mine"))
    with pytest.raises(StaleArtifactError, match="sft.json is missing; run: dpo-cli sft"):
        SFT.read()
