"""`dpo-cli agreement`: a table for people, JSON and CSV for machines, one line for what is wrong."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dpo_cli.cli.app import app
from dpo_cli.core.errors import DataError
from dpo_cli.judging.votes import COLUMNS

ROWS = [
    *(f"{i},p{i // 2},DPO,PPO-0,S,{'A' if i % 3 else 'B'},{'DPO' if i % 2 else 'PPO-0'}" for i in range(30)),
    *(f"{i},p{i // 2},DPO,PPO-0,human:x,{'A' if i % 4 else 'tie'},DPO" for i in range(30)),
    *(f"{i},p{i // 2},DPO,PPO-0,human:y,{'A' if i % 5 else 'B'},DPO" for i in range(20)),
    *(f"{i},p{i},SFT,PPO-0,S,B,SFT" for i in range(9)),
    *(f"{i},p{i},SFT,PPO-0,human:x,B,SFT" for i in range(9)),
]


@pytest.fixture
def votes(tmp_path: Path) -> Path:
    return write(tmp_path, ROWS)


def write(folder: Path, rows: list[str], name: str = "votes.csv") -> Path:
    file = folder / name
    file.write_text("\n".join([",".join(COLUMNS), *rows]) + "\n", encoding="utf-8")
    return file


def test_the_table(votes: Path) -> None:
    result = CliRunner().invoke(app, ["agreement", str(votes)])
    assert result.exit_code == 0, result.output
    for words in ("win %, S", "agree %, S - human", "agree %, human - human", "Cohen's kappa", "Krippendorff's alpha"):
        assert words in result.output
    assert "95% intervals by prompt (2000 draws)" in " ".join(result.output.split())
    assert "undefined" in result.output


def test_json_and_csv_have_the_same_figures(votes: Path, tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    options = ["--draws", "200", "--confidence", "0.9", "--seed", "3", "--json", "--csv", str(table)]
    result = CliRunner().invoke(app, ["agreement", str(votes), *options])
    figures = json.loads(result.stdout)
    assert (figures["draws"], figures["confidence"], figures["seed"]) == (200, 0.9, 3)
    dpo, sft = figures["methods"]
    assert dpo["win_rates"]["human"]["num_votes"] == 50
    assert dpo["win_rates"]["human"]["num_ties"] == 8
    pairs = {(pair["first"], pair["second"]): pair for pair in dpo["pairs"]}
    assert list(pairs) == [("S", "human"), ("human", "human")]
    assert pairs["S", "human"]["num_pairs"] == 50
    assert "cohen_kappa" in pairs["S", "human"]
    assert "krippendorff_alpha" in pairs["human", "human"]
    assert sft["pairs"][0]["cohen_kappa"] == {"value": None, "low": None, "high": None}
    with table.open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    [line] = [
        each for each in lines if [each[key] for key in ("method", "figure", "first")] == ["DPO", "agreement", "S"]
    ]
    assert float(line["value"]) == pairs["S", "human"]["agreement"]["value"]
    assert [each["value"] for each in lines if each["method"] == "SFT" and each["figure"] == "cohen_kappa"] == [""]


def test_saving_writes_what_json_prints_and_nothing_is_written_unasked(votes: Path, project: Path) -> None:
    (project / "params.yaml").touch()
    printed = json.loads(CliRunner().invoke(app, ["agreement", str(votes), "--json"]).stdout)
    assert [path.name for path in project.rglob("*")] == ["params.yaml"]
    result = CliRunner().invoke(app, ["agreement", str(votes), "--save"])
    assert result.exit_code == 0, result.output
    assert "win %, S" in result.stdout
    saved = json.loads((project / "reports/agreement/metrics.json").read_text(encoding="utf-8"))
    assert saved == {"agreement": printed}


def test_saving_outside_a_project_is_refused(votes: Path, project: Path) -> None:
    result = CliRunner().invoke(app, ["agreement", str(votes), "--save"])
    assert result.exit_code == 3
    assert "--save writes into a project, and there is no params.yaml here" in result.stderr
    assert not list(project.iterdir())


def test_raters_without_shared_items(tmp_path: Path) -> None:
    votes = write(tmp_path, ["1,p,DPO,SFT,a,A,DPO", "2,q,DPO,SFT,b,A,DPO"])
    result = CliRunner().invoke(app, ["agreement", str(votes)])
    assert result.exit_code == 4
    assert "no item has votes of two raters" in result.stderr
    assert "the same item_id" in result.stderr


@pytest.mark.parametrize("value", ["0.5", "1", "95"])
def test_a_confidence_out_of_range(votes: Path, value: str) -> None:
    result = CliRunner().invoke(app, ["agreement", str(votes), "--confidence", value])
    assert result.exit_code == 3
    assert "--confidence must be > 0.5 and < 1" in result.stderr


def test_several_files_are_one(tmp_path: Path) -> None:
    """A sheet a rater and the judge's own votes; a vote that is there twice is refused."""
    anna, judge = (
        write(tmp_path, [f"i{n},p{n},dpo,sft,{rater},{vote if n % 2 else 'A'},dpo" for n in range(8)], f"{vote}.csv")
        for rater, vote in (("human:anna", "A"), ("hf:judge", "B"))
    )
    found = CliRunner().invoke(app, ["agreement", str(anna), str(judge), "--json"])
    assert found.exit_code == 0, found.output
    [method] = json.loads(found.stdout)["methods"]
    assert {kind: rate["value"] for kind, rate in method["win_rates"].items()} == {"human": 1.0, "hf": 0.5}
    copy = write(tmp_path, anna.read_text(encoding="utf-8").splitlines()[1:], "again.csv")
    for again, words in ((copy, "again.csv, line 2: human:anna voted on item i0"), (anna, "named twice")):
        twice = CliRunner().invoke(app, ["agreement", *map(str, (anna, again, judge))])
        assert twice.exit_code == DataError.exit_code
        assert words in twice.output


def test_a_file_a_method_is_the_same_as_one_file(tmp_path: Path) -> None:
    """Items of two methods may go by the same ids."""
    parts = [
        write(tmp_path, [row for row in ROWS if row.split(",")[2] == method], f"{method}.csv")
        for method in ("DPO", "SFT")
    ]
    files = ([write(tmp_path, ROWS)], parts)
    one, two = (CliRunner().invoke(app, ["agreement", *map(str, some), "--json"]) for some in files)
    assert one.exit_code == 0
    assert one.stdout == two.stdout
