"""The next round: a new project that goes on from what an earlier one tuned, or one line that says why not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dpo_cli.cli.app import app
from dpo_cli.cli.next_round import create_round
from dpo_cli.core import paths
from dpo_cli.core.artifacts import digest_json, write_json
from dpo_cli.core.errors import DataError, DpoCliError, ParamsError, StaleArtifactError
from dpo_cli.core.load_params import load_params
from dpo_cli.core.manifest import BASE, DPO, SFT, Manifest
from dpo_cli.core.params_text import params_yaml
from dpo_cli.models.folder import ADAPTER_FILES
from dpo_cli.models.identity import base_digest, read_base_lock, read_lock
from dpo_cli.models.rounds import figures_behind, rounds_behind

SETTINGS = {
    "data.preferences.path": "data/raw/votes",
    "data.preferences.also": [{"path": "data/raw/held.jsonl", "split": "eval"}, {"path": "data/raw/more.jsonl"}],
    "sft.method": "none",
    "train.lora": {"r": 4},
    "train.beta": 0.3,
}


def write_files(folder: Path, *names: str) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_text(f"{name}\n", encoding="utf-8")
    return list(names)


def make_project(folder: Path, settings: dict[str, Any]) -> None:
    """A project as its stages leave it, as far as the next round looks at it."""
    write_files(folder / "data/raw", "held.jsonl", "more.jsonl", "instructions.json")
    write_files(folder / "data/raw/votes", "anna.jsonl")
    (folder / "params.yaml").write_text(params_yaml(SETTINGS | settings), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        model = load_params(paths.PARAMS).model.model_dump()
        facts = {"context_length": 64, "num_rows": 9, "layers": [], "tied_layers": []}
        base_files = write_files(paths.BASE, "config.json", "model.safetensors")
        BASE.write(paths.BASE, Manifest(settings={"model": model}, facts=facts), base_files)
        method = load_params(paths.PARAMS).sft.method
        files = write_files(paths.SFT_MODEL, "config.json", "model.safetensors") if method == "full" else []
        SFT.write(paths.SFT_MODEL, Manifest({"base": base_digest()}, settings={"sft": {"method": method}}), files)
        sft = digest_json({"method": method, "base": base_digest(), "files": digest_json(SFT.read().files)})
        graph = {"base": base_digest(), "sft": sft, "compute_dtype": "float32"}
        DPO.write(
            paths.DPO_MODEL,
            Manifest({"base": read_lock(), "graph": graph}, settings={"train": {"beta": 0.3}}),
            write_files(paths.DPO_MODEL, *ADAPTER_FILES),
        )
        write_json(paths.metrics_file("evaluate"), {"evaluate": {"win_rate": 0.7, "win_rate_ci": [0.6, 0.8], "kl": 2}})
        write_json(paths.metrics_file("train"), {"train": {"num_pairs": 90}})


@pytest.fixture
def round1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    make_project(Path("round1"), {})
    return Path("round1")


def test_settings_and_data_are_carried_over(round1: Path, reporter: Any) -> None:
    create_round(Path("round2"), round1, reporter, reuse=False, settings=["train.beta=0.2"])
    params = load_params(Path("round2/params.yaml"))
    assert (params.sft.method, params.train.lora, params.train.beta) == ("adapter", None, 0.2)
    assert params.runtime.adapter_path == (round1 / "models/dpo").resolve().as_posix()
    assert params.data.preferences.path == "data/raw/votes-2"
    assert [(each.path, each.split) for each in params.data.preferences.also] == [("data/raw/held.jsonl", "eval")]
    for name in ("votes/anna.jsonl", "held.jsonl", "more.jsonl", "instructions.json"):
        assert (Path("round2/data/raw") / name).read_bytes() == (round1 / "data/raw" / name).read_bytes()
    assert not reporter.warned
    assert "dpo-cli label data/samples/FILE --out data/raw/votes-2" in reporter.said[-1]
    assert "earlier preferences are not trained on again" in reporter.said[0]


def test_the_embedded_model_is_not_built_again(round1: Path, reporter: Any) -> None:
    create_round(Path("round2"), round1, reporter, reuse=False, settings=[])
    for file in (round1 / paths.BASE).iterdir():
        assert (Path("round2") / paths.BASE / file.name).read_bytes() == file.read_bytes()


def test_earlier_preferences_are_used_again_where_that_is_asked_for(round1: Path, reporter: Any) -> None:
    create_round(Path("round2"), round1, reporter, reuse=True, settings=[])
    sources = load_params(Path("round2/params.yaml")).data.preference_sources
    assert [each.path for each in sources] == [
        "data/raw/votes-2", "data/raw/votes", "data/raw/held.jsonl", "data/raw/more.jsonl",
    ]  # fmt: skip


def test_preferred_answers_of_before_stay_the_instructions(round1: Path, reporter: Any) -> None:
    """Stage sft comes before the new votes, so it cannot wait for them."""
    make_project(Path("mine"), {"data.sft.path": "preferences"})
    create_round(Path("round2"), Path("mine"), reporter, reuse=False, settings=[])
    sources = load_params(Path("round2/params.yaml")).data.sft_sources
    assert [(each.path, each.split) for each in sources] == [
        ("data/raw/votes", "auto"), ("data/raw/held.jsonl", "eval"), ("data/raw/more.jsonl", "auto"),
    ]  # fmt: skip


def test_prompts_of_stage_sample_are_carried_over(round1: Path, reporter: Any) -> None:
    write_files(Path("mine/data/raw"), "prompts.jsonl")
    make_project(Path("mine"), {"sample.prompts": ["data/raw/prompts.jsonl"]})
    create_round(Path("round2"), Path("mine"), reporter, reuse=False, settings=[])
    assert load_params(Path("round2/params.yaml")).sample.prompts == ["data/raw/prompts.jsonl"]
    assert Path("round2/data/raw/prompts.jsonl").is_file()
    assert "dpo-cli repro sample" in reporter.said[-1]


def test_paths_outside_stay_what_they_were(round1: Path, reporter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    make_project(Path("mine"), {"model.name": "tiny", "runtime.model_path": "../tiny", "evaluate.judge": "none"})
    create_round(Path("deep/er/round2"), Path("mine"), reporter, reuse=False, settings=[])
    params = load_params(Path("deep/er/round2/params.yaml"))
    assert Path(params.runtime.model_path or "").resolve() == Path("tiny").resolve()
    assert not Path("deep/er/round2/models").exists()


def test_a_whole_model_of_sft_is_the_next_base(round1: Path, reporter: Any) -> None:
    """There the tuned adapter stands on models/sft, and not on the base."""
    make_project(Path("mine"), {"sft.method": "full", "train.lora": {"r": 4}})
    create_round(Path("round2"), Path("mine"), reporter, reuse=False, settings=[])
    params = load_params(Path("round2/params.yaml"))
    assert params.model.name == "mine-sft"
    assert params.runtime.model_path == Path("mine/models/sft").resolve().as_posix()
    assert not Path("round2/models").exists()


def damage(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text("else", encoding="utf-8")


@pytest.mark.parametrize(
    ("spoil", "kind", "problem"),
    [
        (lambda folder: (folder / "params.yaml").unlink(), DataError, "round1 is no project: it has no params.yaml"),
        (
            lambda folder: (folder / "models/dpo/provenance.json").unlink(),
            StaleArtifactError,
            "round1: models/dpo/provenance.json is missing; run: dpo-cli train",
        ),
        (
            damage("models/dpo/adapter_model.safetensors"),
            StaleArtifactError,
            "round1: models/dpo/adapter_model.safetensors has changed since it was made; run: dpo-cli train",
        ),
        (
            lambda folder: write_json(folder / "models/sft/sft.json", other_sft(folder)),
            StaleArtifactError,
            "round1: models/dpo/provenance.json: made of another graph: sft is .* now, was .*; run: dpo-cli train",
        ),
        (damage("data/preference"), StaleArtifactError, ""),
    ],
    ids=["no project", "no model", "damaged", "stale", "other data"],
)
def test_a_project_that_has_no_sound_model_makes_none(
    round1: Path, reporter: Any, spoil: Callable[[Path], object], kind: type[DpoCliError], problem: str
) -> None:
    if not problem:
        write_files(round1 / paths.PREFERENCE_DATA, "train.parquet", "eval.parquet")
        problem = "round1: models/dpo/provenance.json: made of another data/preference"
    else:
        spoil(round1)
    with pytest.raises(kind, match=f"^{problem}"):
        create_round(Path("round2"), round1, reporter, reuse=False, settings=[])
    assert not Path("round2").exists()


def other_sft(folder: Path) -> Any:
    found = json.loads((folder / "models/sft/sft.json").read_text("utf-8"))
    found["settings"]["sft"]["method"] = "qlora"
    return found


@pytest.mark.parametrize("option", ["--sft", "--preferences", "--model"])
def test_options_without_a_place_are_refused(round1: Path, option: str) -> None:
    done = CliRunner().invoke(app, ["init", "round2", "--from", "round1", option, "x"])
    assert done.exit_code == ParamsError.exit_code
    assert f"{option} has no place beside --from" in done.stderr
    alone = CliRunner().invoke(app, ["init", "round2", "--reuse"])
    assert "--reuse has no effect without --from" in alone.stderr


# --- what is known of the rounds before -----------------------------------------------------


def test_an_adapter_says_which_rounds_made_it(round1: Path, reporter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = (round1 / paths.DPO_MODEL).resolve()
    monkeypatch.chdir(round1)
    rounds = rounds_behind(adapter, read_base_lock(), reporter)
    assert [(each["project"], each["model"]) for each in rounds] == [("round1", "models/dpo")]
    [figures] = figures_behind(adapter, rounds)
    assert figures["project"] == "round1"
    assert (figures["win_rate"], figures["win_rate_ci"], figures["num_pairs"]) == (0.7, [0.6, 0.8], 90)
    # the round after that one names both, the older one first
    manifest = DPO.read()
    DPO.write(paths.DPO_MODEL, Manifest({**manifest.made_of, "rounds": rounds}, manifest.files, manifest.settings))
    write_json(paths.metrics_file("sft"), {"sft": {"rounds": [figures]}})
    both = rounds_behind(adapter, read_base_lock(), reporter)
    assert both[0] == rounds[0]
    assert [each.get("win_rate") for each in figures_behind(adapter, both)] == [0.7, 0.7]


def test_an_adapter_of_another_base_is_refused(round1: Path, reporter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    make_project(Path("mine"), {"sft.method": "full"})
    whole, adapter = Path("mine").resolve(), (round1 / paths.DPO_MODEL).resolve()
    monkeypatch.chdir(round1)
    write_files(paths.BASE, "config.json")
    BASE.write(
        paths.BASE,
        Manifest({}, settings=BASE.read().settings, facts=BASE.read().facts),
        write_files(paths.BASE, "tokenizer.json"),
    )
    with pytest.raises(StaleArtifactError, match="provenance.json: trained on another model than embedded"):
        rounds_behind(adapter, read_base_lock(), reporter)
    # one that stands on a whole SFT model is that model's
    files = SFT.read(whole / paths.SFT_MODEL).files
    BASE.write(paths.BASE, Manifest({}, files, settings=BASE.read().settings, facts=BASE.read().facts))
    assert len(rounds_behind(whole / paths.DPO_MODEL, read_base_lock(), reporter)) == 1


def test_of_an_adapter_from_elsewhere_nothing_is_said(
    round1: Path, reporter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_files(Path("elsewhere"), *ADAPTER_FILES)
    monkeypatch.chdir(round1)
    assert rounds_behind(Path("../elsewhere").resolve(), read_base_lock(), reporter) == []
    assert figures_behind(Path("../elsewhere").resolve(), []) == []
