"""docs/data.md: every format is there, and every example in it is read as the section says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, get_args

import pytest
from ruamel.yaml import YAML

from dpo_cli.core.data_params import DataChecks, PreferenceFormat, SftFormat
from dpo_cli.core.load_params import parse_params
from dpo_cli.core.params import PairTokenChecks
from dpo_cli.data.formats import PREFERENCE_FORMATS, SFT_FORMATS
from dpo_cli.data.formats.base import Format, Reading
from dpo_cli.data.formats.detect import RowReader
from dpo_cli.data.problem import RowProblem
from dpo_cli.data.schema import PreferenceExample, RankingExample, SftExample

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
SECTIONS = {
    part.split("\n", 1)[0].strip(): part.split("\n", 1)[1] for part in re.split(r"^### ", TEXT, flags=re.MULTILINE)[1:]
}


def blocks(language: str, text: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def formats_of(name: str) -> tuple[Format[Any], ...]:
    return SFT_FORMATS if name in ("alpaca", "prompt_completion", "messages") else PREFERENCE_FORMATS


EXAMPLES = [
    (name, json.loads(line))
    for name, text in SECTIONS.items()
    for block in blocks("json", text)
    for line in block.splitlines()
]


def test_every_format_has_a_section_and_a_setting() -> None:
    documented = set(SECTIONS)
    assert documented == {fmt.name for fmt in (*SFT_FORMATS, *PREFERENCE_FORMATS)}
    assert set(get_args(SftFormat)) == {"auto", *(fmt.name for fmt in SFT_FORMATS)}
    assert set(get_args(PreferenceFormat)) == {"auto", *(fmt.name for fmt in PREFERENCE_FORMATS)}
    assert {name for name, _ in EXAMPLES} == documented


@pytest.mark.parametrize(("name", "row"), EXAMPLES)
def test_every_example_is_read_by_auto_as_its_section_says(name: str, row: dict[str, Any]) -> None:
    fmt, found = RowReader(formats_of(name), "unpaired" if name == "unpaired" else "auto", {}, Reading()).read(row)
    assert fmt.name == name
    examples = [found] if isinstance(found, SftExample | PreferenceExample | RankingExample) else [e for _, e in found]
    assert examples
    assert not any(isinstance(example, RowProblem) for example in examples)
    for example in examples:  # the examples ask simple questions, whose right answer is preferred
        if name == "unpaired":
            assert bool(example.chosen) == (example.answers[0][0]["content"] == "5")
        elif isinstance(example, PreferenceExample):
            assert example.chosen[0]["content"].strip() in ("5", "6 cats", "Hello!", "ugly.")
        if isinstance(example, RankingExample):
            assert example.completions[0][0]["content"] in ("5", "Hello!")


def test_the_settings_in_it_are_valid() -> None:
    found = [YAML(typ="safe").load(block) for block in blocks("yaml", TEXT)]
    assert len(found) >= 3
    for settings in found:
        tree = settings if "data" in settings else {"data": {"preferences": settings}}
        parse_params(tree)


def test_every_check_is_explained_with_its_default() -> None:
    rows = re.findall(r"^\| ([a-z_, ]+) \|.*\| (drop|keep) \|$", TEXT, flags=re.MULTILINE)
    documented = {name: policy for names, policy in rows for name in names.split(", ")}
    assert documented == DataChecks().model_dump()
    assert all(f"`{name}`" in TEXT for name in PairTokenChecks.model_fields)


def test_other_names_of_fields_are_those_of_the_code() -> None:
    pairs = next(fmt for fmt in PREFERENCE_FORMATS if fmt.name == "pairs")
    names = [name for field in ("chosen", "rejected", "prompt") for name in pairs.names[field]]
    assert [name for name in names if f"`{name}`" not in SECTIONS["pairs"]] == []
