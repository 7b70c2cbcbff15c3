"""Label Studio: tasks as JSON with a labeling configuration; its exports JSON, JSON_MIN, CSV and TSV.

https://labelstud.io/guide/task_format, https://labelstud.io/guide/export, and the tags Choices, Ranker and Pairwise.
Others' projects are read where their data has the names of the documented templates: ``prompt``, and ``answer1`` and
``answer2`` (human preferences), or ``items`` with id and body (ranking).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dpo_cli.core.artifacts import write_json_array, write_text
from dpo_cli.data.formats.base import optional_number
from dpo_cli.data.problem import RowProblem
from dpo_cli.data.votes import SKIPPED, A, B
from dpo_cli.labeling.items import Mode
from dpo_cli.labeling.tools.base import (
    ASKED,
    DRAFT,
    KEYS,
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
    task_of,
    text_in,
    word_of,
)


def _write(tasks: Iterator[Task], mode: Mode, most: int, folder: Path) -> None:
    write_json_array(folder / "tasks.json", ({"data": _data(task, mode)} for task in tasks))
    write_text(folder / "labeling.xml", _config(mode, most))


def _data(task: Task, mode: Mode) -> dict[str, Any]:
    answers: dict[str, Any] = task.answers
    if mode == "ranking":
        answers = {"items": [{"id": name, "title": name, "body": text} for name, text in answers.items()]}
    return {"item_id": task.item_id, "prompt": task.turns, **answers}


def _config(mode: Mode, most: int) -> str:
    shown = "".join(
        f'    <View><Header value="{name}"/><Text name="{name}" value="${name}"/></View>\n' for name in LETTERS[:most]
    )
    if mode == "ranking":
        shown = '    <List name="answers" value="$items" title="Answers"/>\n'
        control = f'  <Ranker name="{VOTE}" toName="answers"/>\n'
    else:
        choices = "".join(f'    <Choice value="{word}" hotkey="{KEYS[word]}"/>\n' for word in WORDS[mode])
        control = f'  <Choices name="{VOTE}" toName="A" choice="single-radio" required="true">\n{choices}  </Choices>\n'
    return (
        f'<View style="white-space: pre-wrap">\n  <Header value="{ASKED[mode]}"/>\n'
        '  <Paragraphs name="prompt" value="$prompt" layout="dialogue" nameKey="role" textKey="content"/>\n'
        '  <View style="display: grid; grid-auto-flow: column; grid-auto-columns: 1fr; gap: 1em">\n'
        f"{shown}  </View>\n{control}</View>\n"
    )


def _read(row: dict[str, Any]) -> Iterator[Annotation]:
    if "annotation_id" in row:  # JSON_MIN, CSV and TSV: a row an annotation, beside the fields of its task
        yield _annotation(row, {**row, "id": row["annotation_id"], "completed_by": row.get("annotator")})
        return
    data, annotations = row.get("data"), row.get("annotations", row.get("completions"))
    if not isinstance(data, dict) or not isinstance(annotations, list):
        raise RowProblem("bad_row", "is no task of Label Studio's JSON export: it needs data and annotations")
    for each in (*annotations, *({"draft": True} for _ in row.get("drafts") or ())):
        yield Annotation("", None, left_out=DRAFT) if each.get("draft") else _annotation(data, each)


def _annotation(data: Mapping[str, Any], said: Mapping[str, Any]) -> Annotation:
    by, item_id = said.get("completed_by"), text_in(data, "item_id")
    if isinstance(by, dict):
        by = by.get("email") or by.get("id")
    if isinstance(items := parsed(data.get("items")), list):
        answers = {str(each["id"]): each["body"] for each in items}
        names = list(answers)
        task = task_of(data["prompt"], list(answers.values()), item_id) if data.get("prompt") else None
    else:
        task, names = task_in(data, item_id)
    is_skipped = said.get("was_cancelled") or said.get("skipped")
    vote = SKIPPED if is_skipped else _vote(said, names)
    return Annotation(
        "" if by is None else str(by),
        vote,
        item_id,
        task,
        id=text_in(said, "id"),
        at=text_in(said, "updated_at") or text_in(said, "created_at") or None,
        seconds=optional_number(dict(said), "lead_time"),
        left_out="" if vote is not None else OTHER,
    )


def _vote(said: Mapping[str, Any], names: list[str]) -> Any:
    """What an annotation says; None: nothing of the answers."""
    if "result" not in said:
        value = parsed(said.get(VOTE))
        results = value if isinstance(value, list) else [value]
    else:
        results = [each.get("value") for each in said["result"] or []]
    votes = [vote for value in results if (vote := _vote_of(value, names)) is not None]
    if len(votes) > 1:
        raise RowProblem("bad_vote", f"one annotation says {votes[0]} and {votes[1]}")
    return votes[0] if votes else None


def _vote_of(value: Any, names: list[str]) -> Any:
    if isinstance(value, str):
        return word_of(value, names)
    if not isinstance(value, dict):
        return None
    if (side := value.get("selected")) in ("left", "right"):
        return A if side == "left" else B
    if isinstance(choices := value.get("choices"), list):
        return word_of(choices[0], names) if len(choices) == 1 else None
    ranked = value.get("ranker")
    if isinstance(ranked, dict) and len(ranked) == 1:
        ranked = next(iter(ranked.values()))
    if not isinstance(ranked, list):
        return None
    return ranks_of([[str(name)] for name in ranked], names)


LABEL_STUDIO = Tool(
    "label-studio",
    _write,
    _read,
    True,
    "paste labeling.xml as the project's labeling interface (Code), import tasks.json, and export as JSON",
)
