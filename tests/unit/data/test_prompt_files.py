"""Prompts of data in any format: each once, whatever stands beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dpo_cli.core.errors import DataError
from dpo_cli.data.prompt_files import read_prompts

ASKED, ANSWER, OTHER = {"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hi."}, "Go away."
SYSTEM = {"role": "system", "content": "Be kind."}
VOTE = {"item_id": "1", "rater": "a", "prompt": [ASKED], "completions": [[ANSWER], [ANSWER]], "mode": "pair"}


def write(path: Path, *rows: Any) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hello?"},
        {"instruction": "Hello?", "output": "Hi."},
        {"prompt": "Hello?", "chosen": "Hi.", "rejected": OTHER},
        {"prompt": "Hello?", "completion": "Hi.", "label": False},
        {"prompt": "Hello?", "completions": ["Hi.", OTHER], "scores": [1, 0]},
        {"question": "Hello?", "response_j": "Hi.", "response_k": OTHER},
        {"chosen": "\n\nHuman: Hello?\n\nAssistant: Hi.", "rejected": f"\n\nHuman: Hello?\n\nAssistant: {OTHER}"},
        {"chosen": [ASKED, ANSWER], "rejected": [ASKED, {**ANSWER, "content": OTHER}]},
        {"messages": [ASKED]},
        {"messages": [ASKED, ANSWER]},
        {"conversations": [{"from": "human", "value": "Hello?"}, {"from": "gpt", "value": "Hi."}]},
        {**VOTE, "vote": "tie"},
    ],
    ids=lambda row: ",".join(row),
)
def test_the_prompt_is_found(tmp_path: Path, row: dict[str, Any]) -> None:
    found = read_prompts(write(tmp_path / "rows.jsonl", row, row))
    assert list(found.prompts.values()) == [[ASKED]]
    assert found.num_read == 2


def test_all_turns_of_a_prompt_are_kept(tmp_path: Path) -> None:
    talk = [SYSTEM, ASKED, ANSWER, {"role": "user", "content": "Really?"}]
    found = read_prompts(write(tmp_path / "rows.jsonl", {"messages": [*talk, ANSWER]}, {"messages": talk}))
    assert list(found.prompts.values()) == [talk]


def test_a_folder_of_votes_stands_for_its_files(tmp_path: Path) -> None:
    write(tmp_path / "votes/anna.jsonl", {**VOTE, "vote": "A"}, {"item_id": "1", "rater": "a", "vote": "undone"})
    write(tmp_path / "votes/ben.jsonl", {**VOTE, "vote": "B"}, {**VOTE, "prompt": [SYSTEM, ASKED], "vote": "skip"})
    assert list(read_prompts(tmp_path / "votes").prompts.values()) == [[ASKED], [SYSTEM, ASKED]]


def test_rows_of_data_that_hold_none_are_counted(tmp_path: Path) -> None:
    """What a conversion would leave out is no reason to stop, unless nothing else is there."""
    good = {"chosen": "\n\nHuman: Hello?\n\nAssistant: Hi.", "rejected": f"\n\nHuman: Hello?\n\nAssistant: {OTHER}"}
    bad = {**good, "rejected": "\n\nHuman: Hm.\n\nAssistant: Hi."}
    found = read_prompts(write(tmp_path / "rows.jsonl", good, bad))
    assert list(found.prompts.values()) == [[ASKED]]
    [(path, row, _)] = found.left_out
    assert (path.name, row) == ("rows.jsonl", 1)
    with pytest.raises(DataError, match=r"rows.jsonl, row 0 .*; correct the row, or take it out"):
        read_prompts(write(tmp_path / "rows.jsonl", bad))
