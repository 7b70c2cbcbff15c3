"""People's and judges' votes on pairs of answers: the table that agreement is computed from, and a judge made of it.

A vote is known by the hash of the prompt and both answers (:func:`item_id`). So a vote on other answers than today's
counts for nothing: that item is invalid, and counted as such.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from dpo_cli.core.artifacts import digest_bytes
from dpo_cli.core.errors import DataError
from dpo_cli.data.reading.files import read_records
from dpo_cli.judging.judge import INVALID, Judgment, Question, from_half
from dpo_cli.statistics.agreement import LOSS, TIE, WIN, Vote

COLUMNS = ("item_id", "prompt_id", "method", "baseline", "rater", "vote", "a_is")

_VOTES = ("A", "B", "tie")
_NAMED = 8
_LEADS = {WIN: 0.5, LOSS: -0.5}


def read_votes(*paths: Path) -> list[Vote]:
    """The votes of files: CSV, TSV, parquet or JSON.

    Raises:
        DataError: It cannot be read, a column is missing, a value is none of those allowed, a rater voted twice on an
            item, or an item has two prompts, be it in one file or in two. All problems in one go, each with file, row
            and remedy.
    """
    for path in paths:
        if not path.exists():
            raise DataError(f"{path} is missing; name a file with the columns {', '.join(COLUMNS)}")
        if paths.count(path) > 1:
            raise DataError(f"{path} is named twice; its votes would count twice")
    named = ", ".join(path.as_posix() for path in paths)
    votes: list[Vote] = []
    problems: list[str] = []
    voted: dict[tuple[str, str, str, str], str] = {}
    prompts: dict[tuple[str, str, str], tuple[str, str]] = {}
    for file, record in ((path.as_posix(), record) for path in paths for record in read_records(path)):
        row = record.value
        here = f"row {record.row}" if record.line is None else f"line {record.line}"
        place = f"{file}, {here}"
        if not isinstance(row, dict):
            raise DataError(f"{place}: not a row of a table; it must have the columns {', '.join(COLUMNS)}")
        if missing := [name for name in COLUMNS if name not in row]:
            raise DataError(_missing(file, missing, row))
        found = _vote(row)
        if isinstance(found, str):
            problems.append(f"{place}: {found}")
            continue
        item = (found.method, found.baseline, found.item)
        if (first := voted.setdefault((*item, found.rater), place)) is not place:
            problems.append(
                f"{place}: {found.rater} voted on item {found.item} of {found.method} already, in"
                f" {first.removeprefix(f'{file}, ')};"
                " keep one of the two, or give the raters names of their own, as in human:anna and human:bo"
            )
        prompt, first = prompts.setdefault(item, (found.prompt, place))
        if prompt != found.prompt:
            problems.append(
                f"{place}: item {found.item} of {found.method} has prompt {found.prompt}, but {prompt} in"
                f" {first.removeprefix(f'{file}, ')}; an item is two answers to one prompt: fix prompt_id or item_id"
            )
        votes.append(found)
    if problems:
        rest = len(problems) - _NAMED
        raise DataError([*problems[:_NAMED], *([f"{named}: {rest} more such problems"] if rest > 0 else [])])
    if not votes:
        raise DataError(f"{named} has no rows; it must hold a vote a row: {', '.join(COLUMNS)}")
    return votes


def _missing(file: str, missing: list[str], row: Mapping[str, Any]) -> str:
    near = [name for each in missing for name in difflib.get_close_matches(each, [*row], n=1)]
    hint = f"rename {' and '.join(near)}" if near else f"a votes file has {', '.join(COLUMNS)}"
    return f"{file}: no column {' and no '.join(missing)}, got {', '.join(map(str, row))}; {hint}"


def _vote(row: Mapping[str, Any]) -> Vote | str:
    """A row as a vote, or what is wrong with it."""
    texts = {name: "" if row[name] is None else str(row[name]).strip() for name in COLUMNS}
    if empty := [name for name, text in texts.items() if not text]:
        return f"{' and '.join(empty)} {'is' if len(empty) == 1 else 'are'} empty; fill in, or leave the row out"
    method, baseline, rater, vote, first = (texts[name] for name in COLUMNS[2:])
    if vote not in _VOTES:
        return f"vote must be A, B or tie, got {vote[:40]}; write it so, or leave the row out"
    if method == baseline:
        return f"method and baseline are both {method}; name the two models that wrote the answers"
    if first not in (method, baseline):
        return f"a_is must be {method} or {baseline}, got {first[:40]}; name the model whose answer was shown as A"
    if not rater.partition(":")[0]:
        return f"rater must be a kind or kind:name, got {rater[:40]}; write human:anna, for one"
    result = TIE if vote == "tie" else WIN if (vote == "A") == (first == method) else LOSS
    return Vote(texts["item_id"], texts["prompt_id"], method, baseline, rater, result)


def item_id(prompt: str, of_method: str, of_baseline: str) -> str:
    """The id of an item: a hash of the prompt as a judge reads it, the method's answer and the baseline's."""
    return digest_bytes(prompt.encode(), of_method.encode(), of_baseline.encode())


class VotesJudge:
    """Answers from votes, whatever the order it is asked in: raters saw one order, so no consistency comes of it.

    Args:
        votes: All of them.
        rule: ``share``: p is the share of the votes, ties as one half; ``majority``: 1, 0 or a tie.
        method: Only votes on this method.
        baseline: Only votes against this baseline.
        kind: Only votes of raters of this kind, such as ``human``; None: of all.
    """

    remedy = "collect votes on these answers (their item_id is in the rating sheet), or use another judge"

    def __init__(
        self,
        votes: Sequence[Vote],
        rule: Literal["share", "majority"],
        method: str,
        baseline: str,
        kind: str | None = None,
    ) -> None:
        found: dict[str, list[float]] = {}
        for vote in votes:
            if (vote.method, vote.baseline) == (method, baseline) and kind in (None, vote.kind):
                found.setdefault(vote.item, []).append(_LEADS.get(vote.result, 0.0))
        self._leads = {item: sum(leads) / len(leads) for item, leads in found.items()}
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
    rows: Sequence[tuple[str, str, str, str]], method: str, baseline: str, rater: str
) -> list[dict[str, str]]:
    """What raters are given, as rows of a votes file with the texts beside them and ``vote`` to be filled in.

    Which answer is A is drawn from the item's hash, so that raters cannot tell the models apart by their place;
    hide ``a_is`` from them. A zero byte, which no table can hold, is shown as U+FFFD.

    Args:
        rows: Id of the prompt, the prompt as a judge reads it, the method's answer and the baseline's; identical
            answers are left out.
        method: Name of the model that is judged.
        baseline: Name of the other one.
        rater: Who gets the sheet, such as ``human:anna``.
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
                "a_is": method if method_first else baseline,
                **{name: text.replace("\0", "\ufffd") for name, text in (("prompt", prompt), ("a", a), ("b", b))},
            }
        )
    return sheet
