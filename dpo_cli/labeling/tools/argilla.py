"""Argilla: a dataset on disk for ``rg.Dataset.from_disk``; its exports are records, nested or flat.

https://docs.argilla.io/latest/how_to_guides/import_export. Others' datasets are read where their fields have the names
of ``Settings.for_ranking``: ``instruction`` or ``prompt``, and ``response1``, ``response2`` and so on, with a ranking
of these, or a label that names one of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dpo_cli.core.artifacts import write_json, write_json_array
from dpo_cli.data.problem import RowProblem
from dpo_cli.data.votes import SKIPPED
from dpo_cli.labeling.items import Mode
from dpo_cli.labeling.tools.base import (
    ASKED,
    DRAFT,
    LETTERS,
    OTHER,
    VOTE,
    WORDS,
    Annotation,
    Task,
    Tool,
    parsed,
    ranks_of,
    task_in,
    text_in,
    word_of,
)

_NAMES = tuple(f"response{number}" for number in range(1, len(LETTERS) + 1))
"""Fields are called so, since Argilla allows no capitals in their names."""
_NO_STATUS = "of which the export does not say whether they were submitted (drafts and discarded ones are among them)"


def _write(tasks: Iterator[Task], mode: Mode, most: int, folder: Path) -> None:
    settings = folder / ".argilla"
    settings.mkdir()
    write_json(settings / "dataset.json", {"name": folder.name, "allow_extra_metadata": True})
    write_json(settings / "settings.json", _settings(mode, most))
    write_json_array(folder / "records.json", map(_record, tasks))


def _record(task: Task) -> dict[str, Any]:
    answers = dict(zip(_NAMES, task.answers.values(), strict=False))
    return {
        "id": task.item_id,
        "fields": {"prompt": task.turns, **answers},
        "metadata": {"item_id": task.item_id},
        "suggestions": {},
        "responses": {},
        "vectors": {},
    }


def _settings(mode: Mode, most: int) -> dict[str, Any]:
    titles = dict(zip(_NAMES[:most], LETTERS, strict=False))
    if mode == "ranking":
        kind = {"type": "ranking", "options": [{"value": name, "text": title} for name, title in titles.items()]}
    else:
        kind = {"type": "label_selection", "options": [{"value": word, "text": word} for word in WORDS[mode]]}
    fields = [_property("prompt", "Prompt", {"type": "chat", "use_markdown": True})]
    fields += [
        _property(name, title, {"type": "text", "use_markdown": True}, is_required=False)
        for name, title in titles.items()
    ]
    return {
        "guidelines": ASKED[mode],
        "questions": [_property(VOTE, ASKED[mode], kind)],
        "fields": fields,
        "vectors": [],
        "metadata": [],
        "allow_extra_metadata": True,
        "distribution": {"strategy": "overlap", "min_submitted": 1},
        "mapping": None,
    }


def _property(name: str, title: str, settings: dict[str, Any], *, is_required: bool = True) -> dict[str, Any]:
    return {"name": name, "title": title, "required": is_required, "settings": settings, "type": settings["type"]}


class _Response(NamedTuple):
    question: str
    user: str
    value: Any
    status: str | None
    at: str | None = None


def _read(row: dict[str, Any]) -> Iterator[Annotation]:
    nested = row.get("fields")
    fields = nested if isinstance(nested, dict) else row
    metadata = row.get("metadata") if isinstance(row.get("metadata"), dict) else row
    item_id = text_in(metadata or {}, "item_id")
    task, names = task_in({**fields, "prompt": parsed(fields.get("prompt"))}, item_id)
    for each in _responses(row):
        if each.status == "draft":
            yield Annotation(each.user, None, left_out=DRAFT)
            continue
        vote = SKIPPED if each.status == "discarded" else _vote_of(each.value, names)
        left_out = OTHER if vote is None else ""
        doubt = "" if each.status or left_out else _NO_STATUS
        yield Annotation(each.user, vote, item_id, task, at=each.at, left_out=left_out, doubt=doubt)


def _responses(row: Mapping[str, Any]) -> Iterator[_Response]:
    """What all raters said, of any of the forms: nested by question, by rater as in the API, or flat."""
    responses = row.get("responses")
    if isinstance(responses, dict):
        for question, each in ((question, each) for question, some in responses.items() for each in some or ()):
            yield _Response(question, text_in(each, "user_id"), each.get("value"), each.get("status"))
    elif isinstance(responses, list):
        for each in responses:
            by = text_in(each, "user_id"), each.get("status"), each.get("updated_at") or each.get("inserted_at")
            values = each.get("values") or ({VOTE: {}} if by[1] == "discarded" else {})
            for question, said in values.items():
                yield _Response(question, by[0], said.get("value"), *by[1:])
    else:
        questions = [name.removesuffix(".responses") for name in row if name.endswith(".responses")]
        if not questions and not isinstance(row.get("fields"), dict):
            raise RowProblem("bad_row", "is no record of Argilla: it needs responses")
        for question in questions:
            lists = (parsed(row.get(f"{question}.responses{more}")) or [] for more in ("", ".users", ".status"))
            for value, user, status in zip(*lists, strict=True):
                yield _Response(question, user, value, status)


def _vote_of(value: Any, names: list[str]) -> Any:
    if isinstance(value, str):
        return word_of(value, names)
    if not isinstance(value, list) or not value:
        return None
    groups: dict[int, list[str]] = {}
    for place, each in enumerate(value, start=1):  # with ranks in the API, and only in their order in the SDK's exports
        rank, name = (each.get("rank") or place, each.get("value")) if isinstance(each, dict) else (place, each)
        groups.setdefault(int(rank), []).append(str(name))
    if not names or not {name for group in groups.values() for name in group} & set(names):
        return None
    return ranks_of([groups[rank] for rank in sorted(groups)], names)


ARGILLA = Tool(
    "argilla",
    _write,
    _read,
    True,
    "load it with rg.Dataset.from_disk(DIR, workspace=...) and export with dataset.records.to_datasets().to_json(FILE)",
)
