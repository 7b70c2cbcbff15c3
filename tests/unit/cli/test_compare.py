"""`dpo-cli compare` on a git repository with experiments laid out as DVC lays them out."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from dpo_cli.cli.app import app
from dpo_cli.cli.compare import print_comparison
from dpo_cli.core.errors import ParamsError, StaleArtifactError
from dpo_cli.evaluation import compare as command
from dpo_cli.evaluation import experiments

NUM_PROMPTS = 40


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], check=True, capture_output=True, text=True).stdout.strip()


def write(path: str, text: str) -> None:
    place = Path(path)
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(text, encoding="utf-8")


def write_run(beta: float, wins: list[float], *, loss: str = "sigmoid", pairs: bool = True, first: int = 0) -> None:
    """The files of a run in the working directory: one prompt a win, one pair a prompt."""
    write("params.yaml", f"train:\n  loss: {loss}\n  beta: {beta}\nruntime:\n  threads: {int(beta * 10) + 1}\n")
    count = len(wins)
    margins = [beta * (number % 5 - 1) for number in range(count)]
    means = {
        "win_rate": sum(wins) / count,
        "win_rate_ci": [0.0, 1.0],
        "margin": sum(margins) / count,
        "finished_dpo": 1.0,
    }
    write("reports/evaluate/metrics.json", json.dumps({"evaluate": means}))
    write("reports/train/metrics.json", json.dumps({"train": {"loss": beta, "layout": "shared"}}))
    answer = {"text": "an answer", "num_tokens": 3, "finished": True}
    samples = [
        {"id": f"p{first + number}", "prompt": [], "sft": answer, "dpo": answer, "win": win}
        for number, win in enumerate(wins)
    ]
    write("reports/evaluate/samples.json", json.dumps(samples))
    lines = [f"r{first + i},p{first + i},0,0,{margin!r},0.5" for i, margin in enumerate(margins)]
    header = "id,prompt,chosen_reward,rejected_reward,margin,loss"
    Path("reports/evaluate/pairs.csv").unlink(missing_ok=True)
    if pairs:
        write("reports/evaluate/pairs.csv", "\n".join([header, *lines]) + "\n")


def commit(message: str) -> str:
    git("add", "--all")
    git("commit", "-qm", message)
    return git("rev-parse", "HEAD")


def keep_as_experiment(name: str, baseline: str) -> str:
    """The working directory as an experiment on a baseline; HEAD and the files go back to the baseline."""
    made = commit(name)
    git("update-ref", f"refs/exps/{baseline[:2]}/{baseline[2:]}/{name}", made)
    git("reset", "-q", "--hard", baseline)
    return made


@pytest.fixture
def repository(project: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A repository with a first run and the experiments half-wins and all-wins; gives its HEAD."""
    for role in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{role}_NAME", "test")
        monkeypatch.setenv(f"GIT_{role}_EMAIL", "test@example.org")
    git("init", "-q", "-b", "main")
    write_run(0.1, [0.0, 0.5] * (NUM_PROMPTS // 2))
    head = commit("first")
    for name, beta, win in (("half-wins", 0.5, 0.5), ("all-wins", 1.0, 1.0)):
        write_run(beta, [win] * NUM_PROMPTS)
        keep_as_experiment(name, head)
    # what else DVC keeps under refs/exps
    git("update-ref", "refs/exps/celery/stash", head)
    git("update-ref", "refs/exps/exec/EXEC_BASELINE", head)
    git("update-ref", "refs/exps/stash", head)
    return head


def compare(*names: str, baseline: str | None = None, metrics: tuple[str, ...] = (), every: bool = False) -> Any:
    return command.compare(names, baseline, metrics, every=every)


def names_of(found: command.ExperimentComparison) -> list[str]:
    return [experiment.name for experiment in found.experiments]


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["compare", *arguments])


def page(found: command.ExperimentComparison, width: int = 80) -> str:
    stream = io.StringIO()
    print_comparison(found, Console(file=stream, width=width, highlight=False))
    return stream.getvalue()


# --- which experiments ----------------------------------------------------------------------


@pytest.mark.usefixtures("repository")
def test_the_workspace_and_all_experiments_on_head_are_the_default() -> None:
    found = compare()
    assert sorted(names_of(found)) == ["all-wins", "half-wins", "workspace"]
    assert names_of(found)[0] == "workspace"
    assert found.params == ["train.beta"], "runtime changes no result and is no setting to compare"
    assert found.metrics == ["evaluate.win_rate", "evaluate.margin"]


@pytest.mark.usefixtures("repository")
def test_the_baseline_goes_first() -> None:
    assert names_of(compare(baseline="all-wins")) == ["all-wins", "half-wins"]
    assert names_of(compare("HEAD", "half-wins", baseline="all-wins")) == ["all-wins", "HEAD", "half-wins"]
    assert names_of(compare("HEAD", "half-wins", baseline="half-wins")) == ["half-wins", "HEAD"]


def test_any_revision_will_do(repository: str) -> None:
    git("tag", "v1")
    write_run(3.0, [1.0] * NUM_PROMPTS)
    commit("second")
    found = compare("main~1", "v1", repository[:8], "HEAD", "half-wins")
    assert [experiment.params["train.beta"] for experiment in found.experiments] == [0.1, 0.1, 0.1, 3.0, 0.5]


def test_a_name_on_two_commits(repository: str) -> None:
    old = compare("half-wins", "all-wins").experiments[0].revision
    write_run(3.0, [1.0] * NUM_PROMPTS)
    second = commit("second")
    write_run(4.0, [1.0] * NUM_PROMPTS)
    new = keep_as_experiment("half-wins", second)
    assert compare("half-wins", "all-wins").experiments[0].revision == new, "the one on HEAD goes first"
    git("commit", "-q", "--allow-empty", "-m", "third")
    with pytest.raises(ParamsError, match="half-wins names 2 experiments") as error:
        compare("half-wins", "all-wins")
    assert old[:10] in str(error.value)
    assert f"{new[:10]} (on {second[:10]})" in str(error.value)
    assert repository[:10] in str(error.value)


@pytest.mark.usefixtures("repository")
@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["half-win", "HEAD"], "half-win is neither an experiment nor a git revision; did you mean half-wins"),
        (["zzz", "HEAD"], "zzz is neither an experiment nor a git revision; dvc exp list --all"),
        (["--", "-x", "HEAD"], "-x is neither"),
        (["HEAD"], "two experiments are needed, got HEAD alone; name another, as in: dpo-cli compare workspace HEAD"),
        (["HEAD", "HEAD"], "two experiments are needed"),
        (["HEAD", "half-wins", "--metric", "win_rat"], "--metric win_rat: no experiment has it; did you mean win_rate"),
        (["HEAD", "half-wins", "--all", "--metric", "kl"], "--metric has no effect with --all"),
    ],
)
def test_a_mistake_is_one_line(names: list[str], words: str) -> None:
    result = run(*names)
    assert result.exit_code == 3
    [line] = result.stderr.splitlines()
    assert words in line


def test_without_experiments_on_head(repository: str) -> None:
    write_run(3.0, [1.0] * NUM_PROMPTS)
    commit("second")
    with pytest.raises(ParamsError, match="no experiment is based on HEAD; there are some on other commits"):
        compare()
    assert repository


def test_a_revision_without_reports(repository: str) -> None:
    git("rm", "-rq", "reports")
    write("params.yaml", "train: {beta: 7}\n")
    bare = keep_as_experiment("no-reports", repository)
    with pytest.raises(StaleArtifactError, match=r"no-reports: reports/evaluate/metrics.json is missing"):
        compare("HEAD", "no-reports")
    with pytest.raises(StaleArtifactError, match=bare[:8]):
        compare("HEAD", bare[:8])
    found = compare()
    assert "no-reports" not in names_of(found), "unnamed, it is left out, and this is said"
    assert any(note.startswith("left out: no-reports: reports/evaluate/metrics.json") for note in found.notes)


def test_outside_of_a_repository(project: Path) -> None:
    result = run("a", "b")
    assert result.exit_code == 6
    assert "git" in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.usefixtures("repository")
def test_a_project_in_a_folder_of_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("inner").mkdir()
    monkeypatch.chdir("inner")
    write_run(0.7, [0.5] * NUM_PROMPTS)
    commit("inner")
    write_run(0.8, [1.0] * NUM_PROMPTS)
    found = compare("HEAD", "workspace")
    assert [experiment.params["train.beta"] for experiment in found.experiments] == [0.7, 0.8]


# --- figures --------------------------------------------------------------------------------


@pytest.mark.usefixtures("repository")
def test_differences_are_paired_by_prompt() -> None:
    """The first run wins 0, 0.5, 0, 0.5 ...; half-wins 0.5 everywhere: apart by 0.5 on every other prompt."""
    found = compare("HEAD", "half-wins", metrics=("win_rate",))
    [difference] = found.differences["evaluate.win_rate"]
    assert difference.value == pytest.approx(0.25)
    assert (difference.num_prompts, difference.num_left_out) == (NUM_PROMPTS, 0)
    assert difference.low == pytest.approx(0.25 - 1.96 * 0.25 / NUM_PROMPTS**0.5, abs=0.03)
    assert found.sampling.draws == 2000
    text = page(found)
    assert "0.5 (+0.250)" in text
    assert f"answers: {NUM_PROMPTS} prompts are shared with HEAD, none are left out" in text


def test_prompts_that_one_lacks_are_left_out_and_counted(repository: str) -> None:
    write_run(0.5, [1.0] * NUM_PROMPTS, first=10)
    keep_as_experiment("shifted", repository)
    found = compare("HEAD", "shifted", "all-wins", metrics=("win_rate",))
    shifted, _ = found.differences["evaluate.win_rate"]
    assert (shifted.num_prompts, shifted.num_left_out) == (NUM_PROMPTS - 10, 20)
    assert f"answers (shifted): {NUM_PROMPTS - 10} prompts are shared with HEAD, 20 are left out" in found.notes


def test_without_rows_there_is_a_value_and_a_reason(repository: str) -> None:
    write_run(0.5, [1.0] * NUM_PROMPTS, pairs=False)
    keep_as_experiment("old", repository)
    found = compare("HEAD", "old")
    [difference] = found.differences["evaluate.margin"]
    assert difference.low is None
    assert difference.value == pytest.approx(0.4)
    assert "no interval for evaluate.margin: old has no reports/evaluate/pairs.csv; evaluate it again" in found.notes


@pytest.mark.usefixtures("repository")
def test_all_metrics() -> None:
    found = compare(every=True)
    assert found.metrics == [
        "evaluate.win_rate",
        "evaluate.margin",
        "train.loss",
        "train.layout",
        "evaluate.finished_dpo",
    ]
    assert any(note.startswith("no interval for train.loss: no mean") for note in found.notes)


@pytest.mark.usefixtures("repository")
def test_settings_of_another_run_are_noticed() -> None:
    lock = {
        "stages": {
            "train": {"params": {"params.yaml": {"train": {"loss": "sigmoid", "beta": 0.3}}}, "outs": []},
            "evaluate": {"outs": [{"path": "reports/evaluate/metrics.json", "md5": "0" * 32}]},
        }
    }
    write("dvc.lock", json.dumps(lock))
    notes = compare("workspace", "half-wins").notes
    assert any("workspace: params.yaml says train.beta = 0.1, but its last run had 0.3" in note for note in notes)
    assert any("workspace: reports/evaluate/metrics.json is not what dvc.lock recorded" in note for note in notes)
    lock["stages"]["train"]["params"]["params.yaml"]["train"]["beta"] = 0.1
    content = Path("reports/evaluate/metrics.json").read_bytes()
    lock["stages"]["evaluate"]["outs"][0]["md5"] = hashlib.md5(content).hexdigest()
    write("dvc.lock", json.dumps(lock))
    assert not any("dvc.lock" in note or "last run" in note for note in compare("workspace", "half-wins").notes)


@pytest.mark.usefixtures("repository")
def test_a_damaged_file_is_named() -> None:
    write("reports/evaluate/samples.json", "{")
    result = run("workspace", "half-wins")
    assert result.exit_code == 4
    assert "workspace: reports/evaluate/samples.json is damaged" in result.stderr


@pytest.mark.parametrize(
    ("stderr", "words"),
    [
        (
            b"fatal: detected dubious ownership in repository at '/srv/a b'\nTo add an exception for this directory,"
            b" call:\n\n\tgit config --global --add safe.directory '/srv/a b'\n",
            "git: the repository /srv/a b belongs to another user; if you trust it, run: git config --global --add"
            " safe.directory '/srv/a b'",
        ),
        (b"warning: x\nfatal: bad config line 1\nhint: see the manual\n", "git for-each-ref: bad config line 1"),
    ],
)
def test_git_is_quoted_by_what_is_wrong(stderr: bytes, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    done = subprocess.CompletedProcess(["git"], 128, b"", stderr)
    monkeypatch.setattr(experiments.subprocess, "run", lambda *_, **__: done)
    result = run()
    assert result.exit_code == 6
    assert result.stderr.splitlines() == [f"dpo-cli: error: {words}"]


# --- what is printed ------------------------------------------------------------------------


@pytest.mark.parametrize("width", [60, 80, 200])
def test_tables_do_not_break(repository: str, width: int) -> None:
    """Columns that do not fit go into a further table: no line is folded, and every name begins one."""
    write_run(0.5, [1.0] * NUM_PROMPTS, loss="ipo")
    keep_as_experiment("another-with-a-name", repository)
    found = compare(every=True)
    tables = page(found, width).split("In brackets")[0]
    assert all(len(line.rstrip()) <= width for line in tables.splitlines())
    starts = [line.split()[0] for line in tables.splitlines() if line[:1].strip()]
    blocks = tables.count("experiment ")
    assert blocks > 1 or width == 200
    assert starts == ["experiment", *names_of(found)] * blocks
    for name in found.metrics:
        assert name.split(".")[1] in tables


@pytest.mark.usefixtures("repository")
def test_json_holds_the_figures_alone() -> None:
    result = run("HEAD", "all-wins", "--metric", "win_rate,evaluate.margin", "--json")
    assert result.exit_code == 0, result.stderr
    figures = json.loads(result.stdout)
    assert figures["baseline"] == "HEAD"
    base, other = figures["experiments"]
    assert base["metrics"]["evaluate.win_rate"] == {"value": 0.25}
    assert other["params"] == {"train.beta": 1.0}
    win_rate = other["metrics"]["evaluate.win_rate"]
    assert (win_rate["value"], win_rate["difference"], win_rate["num_left_out"]) == (1.0, 0.75, 0)
    assert 0.6 < win_rate["low"] < 0.75 < win_rate["high"] < 0.9


@pytest.mark.usefixtures("repository")
def test_csv_has_a_line_an_experiment_and_metric() -> None:
    result = run("HEAD", "all-wins", "half-wins", "--csv", "out.csv")
    assert result.exit_code == 0, result.stderr
    assert "experiment" in result.stdout
    rows = list(csv.DictReader(io.StringIO(Path("out.csv").read_text(encoding="utf-8"))))
    assert [(row["experiment"], row["metric"]) for row in rows] == [
        (name, f"evaluate.{metric}") for name in ("HEAD", "all-wins", "half-wins") for metric in ("win_rate", "margin")
    ]
    assert rows[2]["train.beta"] == "1.0"
    assert float(rows[2]["difference"]) == 0.75
    assert rows[0]["difference"] == ""
