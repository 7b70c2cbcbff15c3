"""A judge that is a file of human votes on these very answers.

Columns: ``item_id`` (:func:`item_id` of the prompt and both answers), ``prompt_id``, ``method``, ``baseline`` (names
of the models whose answers were compared), ``rater``, ``vote`` (``A``, ``B`` or ``tie``) and ``a_is`` (which of the two
the rater saw as A: ``method``, ``baseline``, or the name of either). Since an item is known by its answers, a vote on
other answers than today's counts for nothing: that item is invalid, and counted as such.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from dpo_cli.core.artifacts import digest_bytes
from dpo_cli.core.errors import DataError
from dpo_cli.data.reading.files import read_records
from dpo_cli.evaluation.judges.base import INVALID, Judgment, Question, from_half

_MAX_PROBLEMS = 20
_CHOICES: dict[str, Literal["A", "B", "tie"]] = {"a": "A", "b": "B", "tie": "tie"}


@dataclass(frozen=True)
class Vote:
    """One rater's vote on one item.

    Attributes:
        item_id: The comparison.
        prompt_id: Its prompt.
        method: Name of the model that is judged.
        baseline: Name of the one that it is compared with.
        rater: Who voted.
        vote: What they chose.
        a_is: The name of the model whose answer they saw as A.
    """

    item_id: str
    prompt_id: str
    method: str
    baseline: str
    rater: str
    vote: Literal["A", "B", "tie"]
    a_is: str

    @property
    def for_method(self) -> float:
        """1 for the method's answer, 0 for the baseline's, 0.5 for a tie."""
        if self.vote == "tie":
            return 0.5
        return float((self.vote == "A") == (self.a_is == self.method))


def item_id(prompt: str, of_method: str, of_baseline: str) -> str:
    """The id of an item: a hash of the prompt as a judge reads it, the method's answer and the baseline's."""
    return digest_bytes(prompt.encode(), of_method.encode(), of_baseline.encode())


def read_votes(path: Path) -> list[Vote]:
    """The votes of a file: CSV, TSV, parquet, or JSON.

    Raises:
        DataError: It is missing or unreadable, or a row lacks a column, has another vote than A, B or tie, names
            neither model in ``a_is``, or repeats a rater's vote on an item; with one line for every problem.
    """
    if not path.is_file():
        raise DataError(f"{path} is missing; it must be a file of votes")
    votes, problems = [], []
    seen: dict[tuple[str, str, str, str], int] = {}
    for record in read_records(path):
        where = f"{path}, row {record.row}" if record.line is None else f"{path}, line {record.line}"
        vote = _vote(record.value)
        if isinstance(vote, str):
            problems.append(f"{where}: {vote}")
            continue
        key = (vote.item_id, vote.method, vote.baseline, vote.rater)
        if key in seen:
            problems.append(f"{where}: {vote.rater!r} has voted on {vote.item_id!r} already; keep one of the votes")
        seen[key] = record.row
        votes.append(vote)
    if len(problems) > _MAX_PROBLEMS:
        problems = [*problems[:_MAX_PROBLEMS], f"{path}: {len(problems) - _MAX_PROBLEMS} more rows like these"]
    if problems:
        raise DataError(problems)
    if not votes:
        raise DataError(f"{path} holds no votes")
    return votes


def _vote(row: Any) -> Vote | str:
    """A row's vote, or what is wrong with it."""
    names = [field.name for field in fields(Vote)]
    if not isinstance(row, Mapping):
        return f"must have the columns {', '.join(names)}"
    texts = {name: str(row[name]).strip() for name in names if row.get(name) is not None}
    missing = [name for name in names if not texts.get(name)]
    if missing:
        return f"{', '.join(missing)} must not be empty"
    if texts["method"] == texts["baseline"]:
        return f"method and baseline must differ, got {texts['method']!r} twice"
    vote = _CHOICES.get(texts["vote"].lower())
    if vote is None:
        return f"vote must be A, B or tie, got {texts['vote']!r}"
    names_of = {"method": texts["method"], "baseline": texts["baseline"]}
    a_is = texts["a_is"] if texts["a_is"] in names_of.values() else names_of.get(texts["a_is"].lower())
    if a_is is None:
        return f"a_is must be method, baseline, {' or '.join(names_of.values())}, got {texts['a_is']!r}"
    texts = {name: texts[name] for name in names if name not in ("vote", "a_is")}
    return Vote(**texts, vote=vote, a_is=a_is)


class VotesJudge:
    """Answers from votes, whatever the order it is asked in: raters saw one order, so no consistency comes of it.

    Args:
        votes: All of them.
        rule: ``share``: p is the share of the votes, ties as one half; ``majority``: 1, 0 or a tie.
        method: Only votes on this method.
        baseline: Only votes against this baseline.
    """

    remedy = "collect votes on these answers (their item_id is in the rating sheet), or use another judge"

    def __init__(self, votes: Sequence[Vote], rule: Literal["share", "majority"], method: str, baseline: str) -> None:
        found: dict[str, list[float]] = {}
        for vote in votes:
            if (vote.method, vote.baseline) == (method, baseline):
                found.setdefault(vote.item_id, []).append(vote.for_method)
        self._leads = {item: sum(each) / len(each) - 0.5 for item, each in found.items()}
        if rule == "majority":
            self._leads = {item: 0.5 * ((lead > 0) - (lead < 0)) for item, lead in self._leads.items()}

    def judge(self, questions: Sequence[Question]) -> Iterator[tuple[int, Judgment]]:
        """Judge questions; those without a vote are invalid."""
        for index, question in enumerate(questions):
            yield index, self._judge(question)

    def _judge(self, question: Question) -> Judgment:
        prompt, a, b = question.prompt, question.a, question.b
        lead = self._leads.get(item_id(prompt, a, b))
        if lead is None and (lead := self._leads.get(item_id(prompt, b, a))) is not None:
            lead = -lead
        return INVALID if lead is None else Judgment.of(from_half(lead))


def rating_sheet(
    rows: Sequence[tuple[str, str, str, str]], method: str, baseline: str, rater: str = ""
) -> list[dict[str, str]]:
    """What raters are given, as rows of a votes file with the texts beside them and ``vote`` to be filled in.

    Which answer is A is drawn from the item's hash, so that raters cannot tell the models apart by their place;
    hide ``a_is`` from them.

    Args:
        rows: Id of the prompt, the prompt as a judge reads it, the method's answer and the baseline's; identical
            answers are left out.
        method: Name of the model that is judged.
        baseline: Name of the other one.
        rater: Who gets the sheet.
    """
    sheet = []
    for prompt_id, prompt, of_method, of_baseline in rows:
        if of_method == of_baseline:
            continue
        item = item_id(prompt, of_method, of_baseline)
        method_first = int(item[-1], 16) % 2 == 0
        a, b = (of_method, of_baseline) if method_first else (of_baseline, of_method)
        sheet.append(
            {
                "item_id": item,
                "prompt_id": prompt_id,
                "method": method,
                "baseline": baseline,
                "rater": rater,
                "vote": "",
                "a_is": "method" if method_first else "baseline",
                "prompt": prompt,
                "a": a,
                "b": b,
            }
        )
    return sheet
