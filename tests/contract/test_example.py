"""examples/smollm2: its prompts, and that its settings go with them."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from pathlib import Path
from types import ModuleType

import pytest

from dpo_cli.core.load_params import load_params
from dpo_cli.judging.known_reward import RULES

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "smollm2"
SPLITS = ("train", "unseen")


@pytest.fixture(scope="module")
def prompts() -> ModuleType:
    spec = importlib.util.spec_from_file_location("smollm2_prompts", EXAMPLE / "prompts.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_no_subject_is_in_two_files(prompts: ModuleType) -> None:
    """So that what is unseen is unseen: neither a prompt nor what it asks about was trained on."""
    for kind in prompts.KINDS:
        known = [subject for subject, *_ in prompts._known(kind.known)]
        subjects = [*known, *prompts._names(kind.train), *prompts._names(kind.unseen)]
        assert len(set(subjects)) == len(subjects) == 14 + 20 + 10
    asked = [{row["prompt"] for row in rows} for rows in (prompts.instructions(), *map(prompts.prompts, SPLITS))]
    assert [len(rows) for rows in asked] == [252, 360, 180]
    assert not any(a & b for a, b in itertools.combinations(asked, 2))


def test_instructions_are_answered_in_two_manners(prompts: ModuleType) -> None:
    """The short one keeps the rule that preferences are made by, the other one breaks it."""
    answers = [row["completion"] for row in prompts.instructions()]
    kept = [RULES["one_sentence"].holds(answer) for answer in answers]
    assert sum(kept) / len(kept) == pytest.approx(prompts.SHORT, abs=0.08)
    assert all(
        holds or any(opener in answer for opener in prompts._OPENERS)
        for holds, answer in zip(kept, answers, strict=True)
    )
    assert all(answer[0].isupper() and "{" not in answer for answer in answers)


def test_the_files_are_the_same_every_time_and_where_the_settings_look(prompts: ModuleType, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        prompts.write(tmp_path / folder)
    for name in ("raw/instructions.jsonl", "prompts/train.jsonl", "prompts/unseen.jsonl"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    data = load_params(EXAMPLE / "params.yaml").data
    assert data.sft.path == "data/raw/instructions.jsonl"
    sources = [data.preferences, *data.preferences.also]
    assert [(source.path, source.split) for source in sources] == [
        ("data/raw/train.parquet", "train"),
        ("data/raw/unseen.parquet", "eval"),
    ]
