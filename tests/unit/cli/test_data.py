"""``dpo-cli data check``: what it finds, how it says so, and that it writes nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from dpo_cli.cli.app import app

Check = Callable[..., Result]


@pytest.fixture
def check(project: Path) -> Check:
    """Run the command with some arguments."""
    return lambda *arguments: CliRunner().invoke(app, ["data", "check", *arguments])


def pairs(*rows: dict[str, Any]) -> list[dict[str, Any]]:
    return [*({"prompt": f"q {n}", "chosen": "yes", "rejected": "no"} for n in range(20)), *rows]


def write(name: str, rows: list[Any]) -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return name


def figures(result: Result) -> dict[str, Any]:
    return json.loads(result.stdout.splitlines()[-1])


def test_data_that_is_all_taken_ends_with_0(check: Check) -> None:
    result = check(write("pairs.jsonl", pairs()))
    assert result.exit_code == 0, result.output
    assert "rows read" in result.stdout
    assert "longer_chosen" in result.stdout
    assert [path.name for path in Path().iterdir()] == ["pairs.jsonl"]


def test_a_row_that_is_left_out_ends_with_4_and_is_named(check: Check) -> None:
    result = check(write("pairs.jsonl", pairs({"prompt": "x", "chosen": "", "rejected": "no"})), "--json")
    assert result.exit_code == 4
    found = figures(result)["preferences"]
    assert found["rejected"] == {"empty_chosen": 1}
    assert found["checks"]["empty_chosen"] == {
        "policy": "drop",
        "count": 1,
        "rate": pytest.approx(1 / 21),
        "first_rows": [{"file": "pairs.jsonl", "row": 20}],
    }
    assert "pairs.jsonl, row 20 (line 21): has an empty preferred answer" in " ".join(
        check("pairs.jsonl").stdout.split()
    )


def test_columns_that_nobody_reads_are_named(check: Check) -> None:
    name = write("pairs.jsonl", pairs({"prompt": "x", "chosen": "yes", "rejected": "no", "judge": "Ann"}))
    found = figures(check(name, "--json"))["preferences"]
    assert found["unread_columns"] == [{"file": "pairs.jsonl", "columns": {"judge": 1}}]
    assert "not read           judge (1 row)" in check(name).stdout


def test_rows_that_cannot_be_split_end_with_4_and_the_remedy(check: Check) -> None:
    rows = [{"prompt": "Review:", "chosen": f"fine {n}", "rejected": f"poor {n}"} for n in range(50)]
    result = check(write("reviews.jsonl", rows))
    assert result.exit_code == 4
    assert "all 50 examples have the same prompt, and the prompt decides the split" in " ".join(result.output.split())
    few = check(write("few.jsonl", rows[:3]))  # too few rows for two splits: one is told so
    assert few.exit_code == 0
    assert "no row fell into the eval split (3 read, 0 left out)" in " ".join(few.output.split())


def test_a_file_that_cannot_be_read_is_one_line_and_4(check: Check) -> None:
    Path("pairs.jsonl").write_text('{"prompt": "q", "chos')
    result = check("pairs.jsonl")
    assert result.exit_code == 4
    assert result.stderr.startswith("dpo-cli: error: pairs.jsonl, line 1, column ")
    assert check("nothing.jsonl").exit_code == 4


def test_all_rows_of_a_check_can_be_listed(check: Check) -> None:
    write("pairs.jsonl", pairs())
    result = check("pairs.jsonl", "--list", "longer_chosen", "--json")
    assert [place["row"] for place in figures(result)["preferences"]["checks"]["longer_chosen"]["first_rows"]] == [
        *range(20)
    ]
    assert len(figures(check("pairs.jsonl", "--json"))["preferences"]["checks"]["longer_chosen"]["first_rows"]) == 5
    assert check("pairs.jsonl", "--list", "longr").exit_code == 3


def test_instructions_and_preferences_are_told_apart(check: Check) -> None:
    write("pairs.jsonl", pairs())
    write("instructions.jsonl", [{"instruction": f"q {n}", "output": "a"} for n in range(20)])
    found = figures(check("pairs.jsonl", "instructions.jsonl", "--json"))
    assert {kind: found[kind]["num_read"] for kind in found} == {"sft": 20, "preferences": 20}
    assert list(figures(check("pairs.jsonl", "--as", "sft", "--json"))) == ["sft"]
    assert check("pairs.jsonl", "--as", "stf").exit_code == 3


def test_settings_of_the_source_can_be_given(check: Check) -> None:
    write("odd.jsonl", [{"q": f"q {n}", "good": "yes", "bad": "no"} for n in range(20)])
    assert check("odd.jsonl").exit_code == 4
    assert check("odd.jsonl", "--set", "columns={prompt: q, chosen: good, rejected: bad}").exit_code == 0
    result = check("odd.jsonl", "--set", "colums={}")
    assert result.exit_code == 3
    assert "colums is not a setting; did you mean columns?" in result.stderr


def test_without_a_file_the_projects_sources_are_checked_with_its_policies(check: Check) -> None:
    assert check().exit_code == 3
    write("data/raw/pairs.jsonl", pairs({"prompt": "x", "chosen": "same", "rejected": "same"}))
    write("data/raw/instructions.jsonl", [{"instruction": f"q {n}", "output": "a"} for n in range(20)])
    Path("params.yaml").write_text(
        "data:\n  sft: {path: data/raw/instructions.jsonl}\n  preferences: {path: data/raw/pairs.jsonl}\n"
        "  checks: {equal_sides: keep}\n"
    )
    result = check("--json")
    assert result.exit_code == 0
    found = figures(result)["preferences"]["checks"]["equal_sides"]
    assert (found["policy"], found["count"]) == ("keep", 1)
    assert figures(result)["sft"]["num_read"] == 20


def test_a_models_tokens_are_checked_where_a_model_is_named(check: Check) -> None:
    long = {"prompt": "x", "chosen": "yes " * 40, "rejected": "no"}
    write("pairs.jsonl", pairs(long))
    result = check("pairs.jsonl", "--model", "embedded", "--max-length", "30", "--json")
    assert result.exit_code == 4
    found = figures(result)["preferences"]["tokens"]
    assert (found["over_long"]["count"], found["over_long"]["rows"]) == (1, [["pairs.jsonl", 20]])
    assert found["lost_eos"]["count"] == found["double_bos"]["count"] == found["double_eos"]["count"] == 0
    assert check("pairs.jsonl", "--model", "embedded").exit_code == 0
    assert check("pairs.jsonl", "--max-length", "30").exit_code == 3


@pytest.mark.parametrize("option", ["check", "show", "stats"])
def test_every_command_has_help_with_examples(option: str) -> None:
    result = CliRunner().invoke(app, ["data", option, "--help"])
    assert result.exit_code == 0
    assert "Examples" in result.stdout


def test_all_broken_lines_are_named_and_rows_before_them_are_shown(check: Check) -> None:
    lines = [json.dumps(row) for row in pairs()]
    lines[9] = '{"prompt": "q" "chosen": "a", "rejected": "b"}'
    lines[15] = lines[15].replace('"rejected"', "'rejected'")
    Path("dirty.jsonl").write_text("\n".join(lines), encoding="utf-8")
    result = check("dirty.jsonl")
    assert result.exit_code == 4
    said = [line for line in result.output.splitlines() if "broken JSON" in line]
    assert ["line 10," in said[0], "line 16," in said[1], len(said)] == [True, True, 2]
    show = ["data", "show", "dirty.jsonl", "--row"]
    shown = CliRunner().invoke(app, [*show, "5"])
    assert shown.exit_code == 0, shown.output
    assert "q 5" in shown.output
    assert CliRunner().invoke(app, [*show, "12"]).exit_code == 4
    Path("dirty.jsonl").write_text("\n".join([lines[0], *lines[9:10] * 30]), encoding="utf-8")
    assert check("dirty.jsonl").output.splitlines()[-1].endswith("dirty.jsonl: and more lines, from line 12 on")
