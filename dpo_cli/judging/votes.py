"""People's and judges' votes: their one format, its one reader, and a judge made of votes on pairs.

A vote is a row with ``item_id``, ``prompt_id``, ``rater`` and ``vote``; on a pair also with ``method``, ``baseline``
and ``a_is``: who wrote the two answers, and which of them was shown as A. It may be filled in by hand, in any kind of
table. ``dpo-cli label`` writes JSON lines with more in them (:mod:`dpo_cli.labeling.votes`): ``mode`` (a pair, where
there is none), what ``supersedes`` what, and whether a pair was only shown again. Of each rater and item one vote is
read, and an adjudication. A ranking is read as votes on all its pairs, and a thumb as one for up against down.

A vote on a pair is known by the hash of the prompt and both answers (:func:`item_id`). So a vote on other answers than
today's counts for nothing: that item is invalid, and counted as such.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from dpo_cli.core.artifacts import digest_bytes
from dpo_cli.core.errors import DataError
from dpo_cli.data.schema import text_of
from dpo_cli.data.votes import ADJUDICATED, BOTH_BAD, DOWN, REPEATED, SKIPPED, TIED, UP, A, B, with_standing
from dpo_cli.judging.judge import INVALID, Judgment, Question, from_half
from dpo_cli.judging.templates import transcript
from dpo_cli.statistics.agreement import LOSS, TIE, WIN, Vote
from dpo_cli.statistics.raters import ShownVote

COLUMNS = ("item_id", "prompt_id", "method", "baseline", "rater", "vote", "a_is")

FIRST, SECOND = "first", "second"
"""Method and baseline where nobody is compared, such as two answers of one model: their texts in alphabetical order."""

_RESULTS = (A, B, TIED, BOTH_BAD)
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
    voted: dict[tuple[str, str, str, str, bool], str] = {}
    prompts: dict[tuple[str, str, str], tuple[str, str]] = {}
    for file, place, row in ((path.as_posix(), place, row) for path in paths for place, row in read_rows(path)):
        if row.get("drawn") == REPEATED:
            continue
        if missing := [name for name in COLUMNS if name not in row and row.get("mode", "pair") == "pair"]:
            raise DataError(_missing(file, missing, row))
        found = votes_in(row)
        is_adjudication = row.get("drawn") == ADJUDICATED
        if isinstance(found, str):
            problems.append(f"{place}: {found}")
            continue
        for each in found:
            item = (each.method, each.baseline, each.item)
            if (first := voted.setdefault((*item, each.rater, is_adjudication), place)) is not place:
                problems.append(
                    f"{place}: {each.rater} voted on item {each.item} of {each.method} already, in"
                    f" {first.removeprefix(f'{file}, ')};"
                    " keep one of the two, or give the raters names of their own, as in human:anna and human:bo"
                )
            prompt, first = prompts.setdefault(item, (each.prompt, place))
            if prompt != each.prompt:
                problems.append(
                    f"{place}: item {each.item} of {each.method} has prompt {each.prompt}, but {prompt} in"
                    f" {first.removeprefix(f'{file}, ')}; an item is two answers to one prompt: fix prompt_id or"
                    " item_id"
                )
            votes.append(replace(each, is_adjudication=is_adjudication))
    if problems:
        rest = len(problems) - _NAMED
        raise DataError([*problems[:_NAMED], *([f"{named}: {rest} more such problems"] if rest > 0 else [])])
    if not votes:
        raise DataError(f"{named} has no votes; it must hold a vote a row: {', '.join(COLUMNS)}")
    return votes


def read_shown(*paths: Path) -> list[ShownVote]:
    """The votes that ``dpo-cli label`` wrote into files, repeats among them, and on pairs with where the answers stood.

    Raises:
        DataError: A file cannot be read.
    """
    found = []
    for row in (row for path in paths for _, row in read_rows(path)):
        votes = votes_in(row) if "number" in row else []
        if isinstance(votes, str):  # which read_votes says
            continue
        for vote in votes:
            first = row["vote"] == A if row["vote"] in (A, B) else None
            drawn = row.get("drawn")
            # whoever adjudicates, on his own earlier votes, too, is not compared with himself
            rater = f"{vote.rater}, adjudicating" if drawn == ADJUDICATED else vote.rater
            found.append(ShownVote(rater, vote.item, vote.prompt, vote.result, first, drawn == REPEATED))
    return found


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a votes file that stand, each with its place: those that no later one supersedes.

    A last line that a kill tore is no row.

    Raises:
        DataError: The file cannot be read, or a row is no object.
    """
    for record, stands in with_standing(path):
        here = f"row {record.row}" if record.line is None else f"line {record.line}"
        place = f"{path.as_posix()}, {here}"
        if not isinstance(record.value, dict):
            raise DataError(f"{place}: not a row of a table; it must have the columns {', '.join(COLUMNS)}")
        if stands:
            yield place, record.value


def _missing(file: str, missing: list[str], row: Mapping[str, Any]) -> str:
    near = [name for each in missing for name in difflib.get_close_matches(each, [*row], n=1)]
    hint = f"rename {' and '.join(near)}" if near else f"a votes file has {', '.join(COLUMNS)}"
    return f"{file}: no column {' and no '.join(missing)}, got {', '.join(map(str, row))}; {hint}"


def votes_in(row: Mapping[str, Any]) -> list[Vote] | str:
    """A row as votes on pairs, none where it says nothing of any, or what is wrong with it."""
    if row.get("vote") == SKIPPED:
        return []
    if row.get("mode") == "ranking":
        return _votes_of_ranking(row)
    if row.get("mode") == "thumbs":
        return _vote_of_thumb(row)
    found = _vote(row)
    return found if isinstance(found, str) else [found]


def _vote_of_thumb(row: Mapping[str, Any]) -> list[Vote] | str:
    texts = [str(row.get(name, "")) for name in ("item_id", "prompt_id", "rater", "vote")]
    if not all(texts) or texts[-1] not in (UP, DOWN):
        return "a thumb needs item_id, prompt_id, rater, and as vote up or down"
    item, prompt, rater, vote = texts
    return [Vote(item, prompt, UP, DOWN, rater, WIN if vote == UP else LOSS)]


def _votes_of_ranking(row: Mapping[str, Any]) -> list[Vote] | str:
    """Every pair of its answers; they are known by the same ids as pairs that are shown as such."""
    try:
        prompt = transcript(row["prompt"])
        ranks = {text_of(answer): int(rank) for answer, rank in zip(row["completions"], row["vote"], strict=True)}
        prompt_id, rater = str(row["prompt_id"]), str(row["rater"])
    except (KeyError, TypeError, ValueError):
        return "a ranking needs prompt, completions, prompt_id, rater, and as vote a rank for each completion"
    return [
        Vote(
            item_id(prompt, one, other),
            prompt_id,
            FIRST,
            SECOND,
            rater,
            TIE if ranks[one] == ranks[other] else WIN if ranks[one] < ranks[other] else LOSS,
        )
        for one, other in itertools.combinations(sorted(ranks), 2)
    ]


def _vote(row: Mapping[str, Any]) -> Vote | str:
    """A row on a pair as a vote, or what is wrong with it."""
    texts = {name: "" if row[name] is None else str(row[name]).strip() for name in COLUMNS}
    if empty := [name for name, text in texts.items() if not text]:
        return f"{' and '.join(empty)} {'is' if len(empty) == 1 else 'are'} empty; fill in, or leave the row out"
    method, baseline, rater, vote, first = (texts[name] for name in COLUMNS[2:])
    if vote not in _RESULTS:
        return f"vote must be A, B, tie or both bad, got {vote[:40]}; write it so, or leave the row out"
    if method == baseline:
        return f"method and baseline are both {method}; name the two models that wrote the answers"
    if first not in (method, baseline):
        return f"a_is must be {method} or {baseline}, got {first[:40]}; name the model whose answer was shown as A"
    if not rater.partition(":")[0]:
        return f"rater must be a kind or kind:name, got {rater[:40]}; write human:anna, for one"
    result = TIE if vote in (TIED, BOTH_BAD) else WIN if (vote == A) == (first == method) else LOSS
    return Vote(texts["item_id"], texts["prompt_id"], method, baseline, rater, result)


def item_id(prompt: str, of_method: str, of_baseline: str) -> str:
    """The id of an item: a hash of the prompt as a judge reads it, the method's answer and the baseline's."""
    return digest_bytes(prompt.encode(), of_method.encode(), of_baseline.encode())


class VotesJudge:
    """Answers from votes, whatever the order it is asked in: raters saw one order, so no consistency comes of it.

    An adjudication stands in place of all other votes on its item.

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
        found: dict[bool, dict[str, list[float]]] = {False: {}, True: {}}  # the adjudications are the latter
        for vote in votes:
            if (vote.method, vote.baseline) == (method, baseline) and kind in (None, vote.kind):
                found[vote.is_adjudication].setdefault(vote.item, []).append(_LEADS.get(vote.result, 0.0))
        self._leads = {item: sum(leads) / len(leads) for item, leads in (found[False] | found[True]).items()}
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
