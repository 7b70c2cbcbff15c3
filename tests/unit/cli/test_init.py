"""New projects: what the user brings is copied and named, and the settings fit it."""

from __future__ import annotations

import gzip
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dpo_cli.cli.app import app
from dpo_cli.cli.new_project import ProjectFiles, create_project
from dpo_cli.core.errors import DataError, MachineError, ParamsError
from dpo_cli.core.load_params import load_params
from dpo_cli.stages import convert_preferences, convert_sft


@pytest.fixture
def sft(tmp_path: Path) -> Path:
    path = tmp_path / "学术问题.json"
    path.write_text('[{"instruction": "a", "output": "b"}]', encoding="utf-8")
    return path


@pytest.fixture
def preferences(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"prompt": "q", "chosen": "a", "rejected": "b"}\n'))
    return path


def test_without_files_it_is_the_embedded_default(tmp_path: Path, reporter: Any) -> None:
    create_project(tmp_path / "new", ProjectFiles(), reporter)
    params = load_params(tmp_path / "new/params.yaml")
    assert params == load_params(Path(__file__).resolve().parents[3] / "params.yaml")
    for name in (".dvc/config", ".dvcignore", ".git", ".gitignore", "dvc.yaml", "data/raw/instructions.json"):
        assert (tmp_path / "new" / name).exists()
    assert "dpo_cli/" not in (tmp_path / "new/dvc.yaml").read_text(encoding="utf-8")


def test_files_are_copied_whole_and_named_in_the_settings(
    tmp_path: Path, sft: Path, preferences: Path, reporter: Any
) -> None:
    create_project(tmp_path / "new", ProjectFiles(sft, preferences), reporter)
    params = load_params(tmp_path / "new/params.yaml")
    assert params.data.sft.path == "data/raw/学术问题.json"
    assert params.data.preferences.path == "data/raw/pairs.jsonl.gz"
    assert (tmp_path / "new" / params.data.preferences.path).read_bytes() == preferences.read_bytes()
    assert params.evaluate.judge == "none", "the world's judge knows no foreign prompt"
    assert params.train.beta == 0.1


def test_a_model_takes_the_defaults_for_real_models(
    tmp_path: Path, tiny_folder: Path, preferences: Path, reporter: Any
) -> None:
    model = shutil.copytree(tiny_folder, tmp_path / "Qwen2.5-0.5B")
    create_project(tmp_path / "new", ProjectFiles(preferences=preferences, model=model), reporter)
    params = load_params(tmp_path / "new/params.yaml")
    assert params.model.name == "Qwen2.5-0.5B"
    assert params.runtime.model_path == model.as_posix()
    assert params.train.learning_rate == 1e-4
    assert (params.evaluate.num_prompts, params.runtime.threads) == (64, None)


def test_what_a_model_needs_stands_in_the_settings(tmp_path: Path, tiny_folder: Path, reporter: Any) -> None:
    model = shutil.copytree(tiny_folder, tmp_path / "base")
    (model / "chat_template.jinja").unlink()
    create_project(tmp_path / "new", ProjectFiles(model=model), reporter)
    params = load_params(tmp_path / "new/params.yaml")
    assert params.model.chat_template == "plain"
    assert (params.sft.max_length, params.reference.max_length) == (256, 256), "the model's context"
    assert "base has no chat template: model.chat_template is plain" in reporter.said
    assert reporter.warned == []


def test_a_model_that_cannot_be_tuned_makes_no_project(tmp_path: Path, tiny_folder: Path, reporter: Any) -> None:
    model = shutil.copytree(tiny_folder, tmp_path / "base")
    (model / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 1000000000}', encoding="utf-8")
    with pytest.raises(MachineError, match="num_hidden_layers is 1000000000, but the weights are 20 tensors"):
        create_project(tmp_path / "new", ProjectFiles(model=model), reporter)
    assert not (tmp_path / "new").exists()


def test_a_tilde_behind_an_equals_sign_is_the_home_folder(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tiny_folder.parent))
    made = CliRunner().invoke(app, ["init", str(tmp_path / "new"), f"--model=~/{tiny_folder.name}"])
    assert made.exit_code == 0, made.output
    assert load_params(tmp_path / "new/params.yaml").runtime.model_path == tiny_folder.resolve().as_posix()


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    path = tmp_path / "odd.csv"
    path.write_text("prompt,good,bad\n" + "".join(f"question {n},yes,no\n" for n in range(40)), encoding="utf-8")
    return path


def test_what_cannot_be_read_makes_no_project_until_the_named_option_is_given(tmp_path: Path, odd: Path) -> None:
    command = ["init", str(tmp_path / "new"), "--preferences", str(odd)]
    refused = CliRunner().invoke(app, command)
    assert refused.exit_code == 4
    option = "--set 'columns={chosen: good, rejected: bad}'"
    assert option in refused.output
    assert "no project was created" in refused.output.splitlines()[-1]
    assert not (tmp_path / "new").exists()
    made = CliRunner().invoke(app, [*command, *shlex.split(option)])
    assert made.exit_code == 0, made.output
    assert "is ready" in made.output.splitlines()[-1]


def test_what_is_said_of_preferences_serves_the_instructions_made_of_them(
    tmp_path: Path, odd: Path, reporter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    create_project(
        tmp_path / "new", ProjectFiles(preferences=odd), reporter, ["columns.chosen=good", "columns.rejected=bad"]
    )
    monkeypatch.chdir(tmp_path / "new")
    params = load_params(Path("params.yaml"))
    assert (params.data.sft.path, params.data.sft.columns) == ("preferences", {})
    assert convert_sft.run(params, reporter)["num_train"] == convert_preferences.run(params, reporter)["num_train"] > 0
    with pytest.raises(ParamsError, match=r"data\.sft\.columns has no effect with data\.sft\.path preferences"):
        load_params(Path("params.yaml"), ["data.sft.columns={completion: good}"])


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (["columns={chosen: good}"], r"--set columns: of which file\? say data\.sft\.columns or data\.preferences"),
        (["data.preferences.columns={chosn: good}"], r"columns\.chosn is not a field; did you mean chosen\?"),
        (["colums={}"], r"--set colums is not a setting; did you mean columns\?"),
        (["beta=1"], r"got 'beta=1'; did you mean train\.beta=1\?"),
        (["sft.method=non"], r"--set: sft\.method must be one of 'none'"),
        (["data.sft.path=a"], r"files are given with --sft, --preferences and --model"),
    ],
)
def test_a_setting_that_is_wrong_makes_no_project(
    tmp_path: Path, sft: Path, odd: Path, reporter: Any, settings: list[str], problem: str
) -> None:
    with pytest.raises(ParamsError, match=problem):
        create_project(tmp_path / "new", ProjectFiles(sft, odd), reporter, settings)
    assert not (tmp_path / "new").exists()


def test_swapped_files_are_told(tmp_path: Path, sft: Path, preferences: Path, reporter: Any) -> None:
    with pytest.raises(DataError, match=r"--sft and --preferences look swapped: pairs\.jsonl\.gz contains preferences"):
        create_project(tmp_path / "new", ProjectFiles(preferences, sft), reporter)
    with pytest.raises(DataError, match="as instructions it can be read: then give it with --sft"):
        create_project(tmp_path / "new", ProjectFiles(None, sft), reporter)


def test_options_name_the_section_where_two_files_are_given(tmp_path: Path, sft: Path, reporter: Any) -> None:
    votes = tmp_path / "votes.jsonl"
    votes.write_text('{"prompt": "q", "answer_1": "a", "answer_2": "b", "label": 1}\n', encoding="utf-8")
    for files, section in ((ProjectFiles(None, votes), ""), (ProjectFiles(sft, votes), "data.preferences.")):
        with pytest.raises(DataError) as refused:
            create_project(tmp_path / "new", files, reporter)
        assert f"""say --set '{section}labels={{"1": first}}'""" in str(refused.value)


def test_what_is_missing_is_named_and_nothing_is_made(tmp_path: Path, sft: Path, reporter: Any) -> None:
    for files, error in (
        (ProjectFiles(sft=tmp_path / "no.json"), DataError),
        (ProjectFiles(sft=sft, preferences=sft), DataError),
        (ProjectFiles(model=tmp_path / "no"), MachineError),
        (ProjectFiles(model=tmp_path), MachineError),
    ):
        with pytest.raises(error):
            create_project(tmp_path / "new", files, reporter)
        assert not (tmp_path / "new").exists()


def test_a_name_that_is_almost_right_is_told(tmp_path: Path, sft: Path, odd: Path, reporter: Any) -> None:
    with pytest.raises(DataError, match=r"ood\.csv is missing; did you mean .*/odd\.csv\?"):
        create_project(tmp_path / "new", ProjectFiles(sft, tmp_path / "ood.csv"), reporter)
    with pytest.raises(MachineError, match=r"nothing is fetched by a name on the Hub; .*: hf download NAME"):
        create_project(tmp_path / "new", ProjectFiles(model=Path("HuggingFaceTB/SmolLM2-135M-Instruct")), reporter)


def test_a_gitignore_that_is_there_is_kept(tmp_path: Path, reporter: Any) -> None:
    folder = tmp_path / "new"
    folder.mkdir()
    (folder / ".gitignore").write_text("mine\n", encoding="utf-8")
    create_project(folder, ProjectFiles(), reporter)
    assert (folder / ".gitignore").read_text(encoding="utf-8") == "mine\n"
    assert any(".gitignore is kept" in text for text in reporter.warned)


def test_data_that_lies_there_is_used_and_never_overwritten(tmp_path: Path, reporter: Any) -> None:
    folder = tmp_path / "new"
    raw = folder / "data/raw"
    raw.mkdir(parents=True)
    mine, theirs = '[{"instruction": "q", "output": "a"}]', '[{"prompt": "q", "chosen": "a", "rejected": "b"}]'
    (raw / "mine.json").write_text(mine, encoding="utf-8")
    (raw / "preferences.json").write_text(theirs, encoding="utf-8")
    with pytest.raises(DataError, match=r"preferences\.json exists already"):
        create_project(folder, ProjectFiles(sft=raw / "mine.json"), reporter)
    create_project(folder, ProjectFiles(sft=raw / "mine.json", preferences=raw / "preferences.json"), reporter)
    assert (raw / "mine.json").read_text(encoding="utf-8") == mine
    assert (raw / "preferences.json").read_text(encoding="utf-8") == theirs
    assert load_params(folder / "params.yaml").data.sft.path == "data/raw/mine.json"
