"""Potato: items as JSON lines with a configuration; user_state.json of each annotator, or exports as JSON lines or CSV.

https://potatoannotator.readthedocs.io. Its results name items and no texts, so they are read with the folder that was
exported.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from dpo_cli.core.artifacts import write_json_lines, write_text
from dpo_cli.data.problem import RowProblem
from dpo_cli.data.votes import SKIPPED
from dpo_cli.judging.templates import transcript
from dpo_cli.labeling.items import Mode
from dpo_cli.labeling.tools.base import (
    ASKED,
    KEYS,
    LETTERS,
    OTHER,
    VOTE,
    WORDS,
    Annotation,
    Task,
    Tool,
    text_in,
)

_RANKS = "rank_order"
"""What Potato calls a ranking's answer: names with commas between, the best first."""


def _write(tasks: Iterator[Task], mode: Mode, most: int, folder: Path) -> None:
    blank = dict.fromkeys(LETTERS[:most], "")
    rows = ({"id": task.item_id, "prompt": transcript(task.prompt), **blank, **task.answers} for task in tasks)
    write_json_lines(folder / "items.jsonl", rows)
    write_text(folder / "config.yaml", yaml.safe_dump(_config(mode, most), sort_keys=False))


def _config(mode: Mode, most: int) -> dict[str, Any]:
    scheme: dict[str, Any] = {"name": VOTE, "description": ASKED[mode]}
    if mode == "ranking":
        scheme |= {"annotation_type": "ranking", "labels": list(LETTERS[:most])}
    else:
        words = (*WORDS[mode], SKIPPED)
        scheme |= {
            "annotation_type": "radio",
            "labels": [{"name": word, "key_value": KEYS[word]} for word in words],
            "label_requirement": {"required": True},
        }
    shown = {"prompt": "Prompt", **{letter: letter for letter in LETTERS[:most]}}
    return {
        "annotation_task_name": ASKED[mode],
        "task_dir": ".",
        "data_files": ["items.jsonl"],
        "item_properties": {"id_key": "id", "text_key": "A"},
        "output_annotation_dir": "annotation_output",
        "user_config": {"allow_all_users": True, "users": []},
        "instance_display": {"fields": [{"key": key, "type": "text", "label": shown[key]} for key in shown]},
        "annotation_schemes": [scheme],
    }


def _read(row: dict[str, Any]) -> Iterator[Annotation]:
    if isinstance(states := row.get("instance_id_to_label_to_value"), dict):
        histories = row.get("instance_id_to_behavioral_data") or {}
        for item_id, labels in states.items():
            said = [(key.get("schema"), key.get("name"), value) for key, value in labels]
            yield from _annotation(text_in(row, "user_id"), item_id, said, histories.get(item_id) or {})
        return
    if "instance_id" not in row:
        raise RowProblem("bad_row", "is neither a user_state.json of Potato nor a row of its export: no instance_id")
    if isinstance(row.get("labels"), dict):
        said = [(scheme, name, value) for scheme, some in row["labels"].items() for name, value in some.items()]
    else:  # a table has a column for each label of a scheme
        named = [(*name.partition("."), value) for name, value in row.items()]
        said = [(scheme, name, value) for scheme, _, name, value in named if name]
    yield from _annotation(text_in(row, "user_id"), text_in(row, "instance_id"), said, {})


def _annotation(
    user: str, item_id: str, said: list[tuple[Any, Any, Any]], history: Mapping[str, Any]
) -> Iterator[Annotation]:
    """What an annotator said on an item, if anything."""
    chosen = [
        (name, value) for scheme, name, value in said if scheme == VOTE and value not in (None, "", False, "false")
    ]
    if not said:
        return
    if len(chosen) > 1:
        raise RowProblem("bad_vote", f"on {item_id} {user} says {chosen[0][0]} and {chosen[1][0]}")
    vote: Any = None
    if chosen:
        name, value = chosen[0]
        words = (*WORDS["pair"], *WORDS["thumbs"], SKIPPED)
        vote = str(value).split(",") if name == _RANKS else name if name in words else None
    changes = [each["timestamp"] for each in history.get("annotation_changes") or () if each.get("timestamp")]
    at = max(changes, default=history.get("session_end"))  # seconds since 1970
    took = history.get("total_time_ms")
    yield Annotation(
        user,
        vote,
        item_id,
        at=None if at is None else datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds"),
        seconds=took / 1000 if took else None,
        left_out="" if vote is not None else OTHER,
    )


POTATO = Tool(
    "potato",
    _write,
    _read,
    False,
    "run `potato start config.yaml` in it; the votes are in annotation_output/*/user_state.json",
)
