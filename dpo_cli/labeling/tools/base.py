"""What all annotation tools share: one form of a task and of an annotation, and the names by which answers go."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from dpo_cli.data.formats.base import Reading
from dpo_cli.data.formats.prompts import read_prompt
from dpo_cli.data.formats.rankings import read_completions
from dpo_cli.data.problem import RowProblem
from dpo_cli.data.schema import Messages, text_of
from dpo_cli.data.votes import BOTH_BAD, DOWN, SKIPPED, TIED, UP, A, B
from dpo_cli.labeling.items import Mode

LETTERS = "ABCDEFGHI"
"""Names of the answers in the order in which they are shown, as many as are ranked at a time."""
VOTE = "vote"
"""The name of the question in every tool."""
WORDS: dict[Mode, tuple[str, ...]] = {"pair": (A, B, TIED, BOTH_BAD), "thumbs": (UP, DOWN)}
"""What may be chosen where nothing is ranked."""
KEYS = {A: "f", B: "j", TIED: "t", BOTH_BAD: "b", UP: "j", DOWN: "f", SKIPPED: "s"}
"""The same as on our own page."""
ASKED: dict[Mode, str] = {
    "pair": "Which answer is better?",
    "ranking": "Rank the answers, the best one first.",
    "thumbs": "Is the answer good?",
}
DRAFT = "drafts"
OTHER = "answers to other questions"

_ANSWER_NAMES = (LETTERS, "answer", "response", "response-", "text")
"""What answers are called in tasks: by letters in ours; in others' by one of these with a number behind it."""


class Task(NamedTuple):
    """What raters are shown: the order of the answers is drawn, and nothing says who wrote them."""

    item_id: str
    prompt: Messages
    completions: list[Messages]

    @property
    def turns(self) -> list[dict[str, str]]:
        """The prompt as plain messages."""
        return [{"role": message["role"], "content": text_of([message])} for message in self.prompt]

    @property
    def answers(self) -> dict[str, str]:
        """The answers' texts, by letter."""
        return {letter: text_of(each) for letter, each in zip(LETTERS, self.completions, strict=False)}


@dataclass(frozen=True)
class Annotation:
    """One thing that a rater said, as an export has it.

    Attributes:
        rater: What the tool calls him.
        vote: As in a votes file, or a ranking as letters, the best one's first; None: it says nothing of the answers.
        item_id: Of ours; empty if the task was not exported by us.
        task: Prompt and answers, if the export has them.
        id: The tool's own for it.
        at: When it was given, as the tool says.
        seconds: It took.
        left_out: Why it is no vote; empty if it is one.
        doubt: What the export does not say of it.
    """

    rater: str
    vote: Any
    item_id: str = ""
    task: Task | None = None
    id: str = ""
    at: str | None = None
    seconds: float | None = None
    left_out: str = ""
    doubt: str = ""


class Tool(NamedTuple):
    """An annotation tool.

    Attributes:
        name: On the command line.
        write: Writes tasks, and what else the tool needs to ask them, into a folder: tasks, mode, most answers of one.
        read: The annotations in a row of its exports; a RowProblem if it is malformed.
        has_texts: Whether its exports have prompt and answers.
        next_step: What the user does with the folder.
    """

    name: str
    write: Callable[[Iterator[Task], Mode, int, Path], None]
    read: Callable[[dict[str, Any]], Iterator[Annotation]]
    has_texts: bool
    next_step: str


def task_in(row: Mapping[str, Any], item_id: str) -> tuple[Task | None, list[str]]:
    """The task in the fields that raters were shown, and what its answers are called; None: no known field holds them.

    Raises:
        RowProblem: The prompt or an answer is malformed.
    """
    names: list[str] = []
    for each in _ANSWER_NAMES:
        known = list(each) if each == LETTERS else [f"{each}{number}" for number in range(1, len(LETTERS) + 1)]
        if names := [name for name in known if row.get(name) is not None]:
            break
    asked = next((row[name] for name in ("prompt", "instruction", "question") if row.get(name)), None)
    if asked is None or not names:
        return None, names
    return task_of(asked, [row[name] for name in names], item_id), names


def task_of(prompt: Any, answers: Sequence[Any], item_id: str) -> Task:
    """A task of values in an export.

    Raises:
        RowProblem: One is malformed.
    """
    row = {"prompt": prompt, "completions": list(answers)}
    read = read_prompt(row, Reading())
    return Task(item_id, read, read_completions(row, read, Reading(), fewest=1))


def ranks_of(best_first: Sequence[Sequence[str]], names: Sequence[str]) -> list[int]:
    """The rank of each answer out of groups of their names, the best group first; others may be named between.

    Raises:
        RowProblem: An answer is in no group, or in two.
    """
    rank, ranks = 0, dict[str, int]()
    for group in ([name for name in group if name in names] for group in best_first):
        rank += bool(group)
        for name in group:
            if ranks.setdefault(name, rank) != rank or group.count(name) > 1:
                raise RowProblem("bad_ranking", f"ranks {name} twice")
    if missing := [name for name in names if name not in ranks]:
        raise RowProblem("bad_ranking", f"does not rank {', '.join(missing)}")
    return [ranks[name] for name in names]


def word_of(said: Any, names: Sequence[str]) -> str | None:
    """A chosen label as a vote: one of ours, or the name of one of two answers; None: something else."""
    if said in (*WORDS["pair"], *WORDS["thumbs"], SKIPPED):
        return said
    return (A, B)[list(names).index(said)] if len(names) == 2 and said in names else None


def parsed(value: Any) -> Any:
    """A value that a table has as JSON text; any other as it is.

    Raises:
        RowProblem: It begins like JSON, and is none.
    """
    if not isinstance(value, str) or value[:1] not in ("[", "{"):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise RowProblem("bad_json", f"holds {value[:40]!r}, which is no JSON: {error}") from None


def text_in(row: Mapping[str, Any], name: str) -> str:
    """A field of a row as a text: empty where there is none."""
    return "" if row.get(name) is None else str(row[name])
