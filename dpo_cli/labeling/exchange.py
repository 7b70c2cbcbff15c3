"""Items out to other annotation tools, and votes back from them.

A folder of tasks holds what the tool needs and ``key.jsonl``, which no rater sees: for each item who wrote its answers,
and prompt and answers as messages, in the order in which they are shown. That order is drawn from the stored seed and
the item, the same for all raters, since a tool shows all of them the same task.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dpo_cli.core.artifacts import digest_bytes, digest_json, read_json, write_json_lines
from dpo_cli.core.errors import DataError, ParamsError, first_line
from dpo_cli.data.problem import RowProblem, kind_of
from dpo_cli.data.reading.files import read_records
from dpo_cli.data.schema import content_id, text_of
from dpo_cli.data.votes import TIED, UNDONE, A, B
from dpo_cli.judging.templates import transcript
from dpo_cli.judging.votes import FIRST, SECOND
from dpo_cli.labeling.items import ItemStore
from dpo_cli.labeling.order import item_order, shown_order
from dpo_cli.labeling.settings import SETTINGS_FILE, Settings
from dpo_cli.labeling.tools.base import LETTERS, Annotation, Task, Tool, ranks_of
from dpo_cli.labeling.votes import VoteFile, file_of, is_choice, lines_of, person

KEY_FILE = "key.jsonl"
_MOST_PROBLEMS = 5
_MALFORMED = (AttributeError, KeyError, TypeError, ValueError)
"""What reading raises where an export has no list, object or number, and the tool has one."""


def export_tasks(items: ItemStore, settings: Settings, tool: Tool, folder: Path) -> None:
    """Write items as tasks, in random order, so that the first ones stand for all of them."""
    order, _ = item_order(items, replace(settings, uncertain=0))
    rows = (_question(items, int(index), settings) for index in order)
    write_json_lines(folder / KEY_FILE, rows)
    tool.write(
        (Task(_shown_id(row), row["prompt"], row["completions"]) for row in _rows(folder / KEY_FILE)),
        settings.mode,
        int(items.sizes.max(initial=0)),
        folder,
    )


def _question(items: ItemStore, index: int, settings: Settings) -> dict[str, Any]:
    """What the votes on an item have in common, as their file has it."""
    item = items[index]
    order = shown_order(settings.seed, "", item.id, len(item.completions), is_flipped=False)
    row: dict[str, Any] = {"mode": settings.mode, "item_id": item.id, "prompt_id": item.prompt_id}
    if settings.mode == "pair":
        row |= {"method": item.authors[0], "baseline": item.authors[1], "a_is": item.authors[order[0]]}
    return row | {"prompt": item.prompt, "completions": [item.completions[place] for place in order]}


def _shown_id(row: Mapping[str, Any]) -> str:
    """What an item is called in a tool: not by its own id, whose hash says in which order its models come."""
    id = _id_of(Task("", row["prompt"], row["completions"]))
    return id if row.get("method") in (None, FIRST) else digest_bytes(b"compared", id.encode())


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    return (record.value for record in read_records(path))


@dataclass
class Imported:
    """What became of the annotations of exports.

    Attributes:
        num_annotations: Of all.
        num_votes: New ones, by the rater's name.
        left_out: Why the others are none.
        doubts: What the exports do not say of votes.
    """

    num_annotations: int = 0
    num_votes: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    doubts: Counter[str] = field(default_factory=Counter)


def import_votes(
    paths: Sequence[Path], tool: Tool, tasks: Path | None, names: Mapping[str, str], folder: Path
) -> Imported:
    """Add the votes in a tool's exports to the files of their raters; what is there already is not added again.

    Args:
        paths: The exports.
        tool: Whose they are.
        tasks: The folder that was exported to it; None: prompt and answers are taken from the exports.
        names: Raters' names, by what the tool calls them; others keep the tool's.
        folder: Of the votes.

    Raises:
        DataError: An export cannot be read, or one of its annotations is malformed or on an unknown item; it names the
            first of them, and nothing is written.
        ParamsError: A name cannot be a rater's, or is of nobody in the exports.
        MachineError: A rater's file is written by another process.
    """
    key = None if tasks is None else _key_in(tasks)
    if key is None and not tool.has_texts:
        raise DataError(
            f"exports of {tool.name} name items and no texts; name the folder that you exported: --tasks DIR"
        )
    account = Imported()
    problems: list[str] = []
    votes: dict[str, list[dict[str, Any]]] = {}
    raters: dict[str, str] = {}
    unread = set(names)
    for path, record in ((each, record) for each in paths for record in read_records(each)):
        try:
            if not isinstance(record.value, dict):
                raise RowProblem("bad_row", f"must be an object, got {kind_of(record.value)}")
            for each in tool.read(record.value):
                account.num_annotations += 1
                if each.left_out:
                    account.left_out[each.left_out] += 1
                    continue
                rater = _rater(each.rater, names)
                if raters.setdefault(rater, each.rater) != each.rater and each.rater not in names:
                    raise RowProblem("bad_rater", f"{rater} is both {raters[rater]} and {each.rater}; use --rater")
                unread.discard(each.rater)
                votes.setdefault(rater, []).append(_vote(each, key))
                account.doubts.update([each.doubt] if each.doubt else [])
        except RowProblem as problem:
            problems.append(f"{path}, row {record.row} {problem}")
        except _MALFORMED as error:
            what = f"{type(error).__name__}: {first_line(error)}"
            problems.append(f"{path}, row {record.row} is not as {tool.name} writes it: {what}")
    if problems:
        more = len(problems) - _MOST_PROBLEMS
        raise DataError([*problems[:_MOST_PROBLEMS], *([f"{more} more such rows"] if more > 0 else [])])
    if not account.num_annotations:
        raise DataError(f"{', '.join(map(str, paths))}: nobody has annotated anything in it")
    if unread:
        raise ParamsError(
            f"--rater {', '.join(sorted(unread))}: there is no such annotator, only {', '.join(raters.values())}"
        )
    _refuse_other_modes(folder, votes)
    for rater, rows in votes.items():
        account.num_votes[rater] = _append(folder, rater, rows, account.left_out)
    return account


def _key_in(tasks: Path) -> dict[str, dict[str, Any]]:
    path = tasks / KEY_FILE
    if not path.is_file():
        raise DataError(f"{path} is missing; --tasks names the folder that `dpo-cli votes export` made")
    try:
        return {_shown_id(row): row for row in _rows(path)}
    except _MALFORMED as error:
        raise DataError(
            f"{path} is damaged ({type(error).__name__}: {first_line(error)}); restore it as `dpo-cli votes export`"
            " made it"
        ) from None


def _rater(said: str, names: Mapping[str, str]) -> str:
    if not said:
        raise RowProblem("no_rater", "has an annotation that names no annotator; export it with user details")
    name = names.get(said) or "".join(sign if sign.isalnum() or sign in "_.-" else "-" for sign in said)
    return person(name.lstrip(".-")[:40])


def _vote(said: Annotation, key: Mapping[str, dict[str, Any]] | None) -> dict[str, Any]:
    """An annotation as a row of a votes file, but for its number.

    Raises:
        RowProblem: Its item is unknown, or it is no vote on it.
    """
    if key is None:
        question = _own_question(said)
    elif (question := key.get(said.item_id or (_id_of(said.task) if said.task else ""))) is None:
        raise RowProblem(
            "unknown_item", f"is on item {said.item_id[:16] or 'without item_id'}, which --tasks does not have"
        )
    vote, size = said.vote, len(question["completions"])
    if isinstance(vote, list) and all(isinstance(each, str) for each in vote):
        vote = ranks_of([[letter] for letter in vote], LETTERS[:size])
    if isinstance(vote, list) and question["mode"] == "pair" and size == 2:
        vote = TIED if vote[0] == vote[1] else A if vote[0] < vote[1] else B
    if not is_choice(question["mode"], vote, size):
        raise RowProblem("bad_vote", f"says {vote!r}, which is no vote on {size} answers ({question['mode']})")
    texts = {name: question[name] for name in ("prompt", "completions")}
    return {
        "key": digest_json([said.id, question["item_id"], vote, said.at])[:16],
        **{name: value for name, value in question.items() if name not in texts},
        "vote": vote,
        "strength": None,
        "seconds": None if said.seconds is None else round(said.seconds, 3),
        "guideline": None,
        "drawn": None,
        "supersedes": None,
        "at": said.at,
        **texts,
    }


def _own_question(said: Annotation) -> dict[str, Any]:
    """What a vote is on, by the export's own texts."""
    if said.task is None:
        raise RowProblem(
            "no_texts",
            "has no prompt and answers in fields of known names; name the folder that you exported: --tasks DIR",
        )
    item_id, texts = _id_of(said.task), [text_of(each) for each in said.task.completions]
    if said.item_id not in ("", item_id):
        raise RowProblem(
            "other_texts",
            "has other texts than its item, or models are compared; name the folder that you exported: --tasks DIR",
        )
    row: dict[str, Any] = {"mode": {1: "thumbs", 2: "pair"}.get(len(texts), "ranking"), "item_id": item_id}
    row["prompt_id"] = content_id(said.task.prompt)
    if row["mode"] == "pair":
        row |= {"method": FIRST, "baseline": SECOND, "a_is": FIRST if texts[0] <= texts[1] else SECOND}
    return row | {"prompt": said.task.prompt, "completions": said.task.completions}


def _id_of(task: Task) -> str:
    """As items have it whose answers nobody compares."""
    texts = sorted(text_of(each) for each in task.completions)
    return digest_bytes(transcript(task.prompt).encode(), *(text.encode() for text in texts))


def _refuse_other_modes(folder: Path, votes: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Refuse votes of several modes in one folder."""
    modes = {row["mode"] for rows in votes.values() for row in rows}
    for path in (file_of(folder, rater) for rater in votes):
        modes |= {row["mode"] for row in itertools.islice(lines_of(path), 1)}
    if (begun := folder / SETTINGS_FILE).exists():
        modes.add(read_json(begun, "restore it, or name another folder with --out")["mode"])
    if len(modes) > 1:
        raise DataError(
            f"{folder} would have votes of the modes {' and '.join(sorted(modes))}; name another folder with --out"
        )


def _append(folder: Path, rater: str, rows: list[dict[str, Any]], left_out: Counter[str]) -> int:
    """Append a rater's votes; of two on an item, the later one takes the earlier one back."""
    path = file_of(folder, rater)
    standing: dict[str, tuple[int, str]] = {}
    known: set[str] = set()
    number = 0
    for line in lines_of(path):
        number = line["number"] + 1
        known.add(line["key"])
        if line["vote"] != UNDONE:
            standing[line["item_id"]] = line["number"], line["key"]
        else:
            standing = {item: stands for item, stands in standing.items() if stands[0] != line["supersedes"]}
    stands = {key for _, key in standing.values()}
    new = {
        row["key"]: row
        for row in rows
        # without a time, a vote that stands no more may have been given again
        if row["key"] not in known or (row["key"] not in stands and row["at"] is None)
    }
    left_out["imported before"] += len(rows) - len(new)
    by_time = sorted(new.values(), key=lambda row: row["at"] or "")
    last = {row["item_id"]: place for place, row in enumerate(by_time)}
    with VoteFile(folder, rater, "person") as file:
        for row in sorted(by_time, key=lambda row: last[row["item_id"]]):  # votes on one item behind each other
            if (before := standing.get(row["item_id"])) is not None:
                undo = {"number": number, "key": f"{row['key']}-", "mode": row["mode"], "vote": UNDONE}
                file.append(undo | {"supersedes": before[0], "at": row["at"]}, is_synced=False)
                left_out["changed later"] += 1
                number += 1
            file.append({"number": number, **row}, is_synced=False)
            standing[row["item_id"]] = number, row["key"]
            number += 1
    return len(new)
