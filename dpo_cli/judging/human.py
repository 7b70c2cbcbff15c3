"""A judge that is a file of human votes on these very answers.

The file is that of :mod:`dpo_cli.judging.votes`, its ``item_id`` that of :func:`item_id`: a hash of the prompt and
both answers. So a vote on other answers than today's counts for nothing: that item is invalid, and counted as such.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

from dpo_cli.core.artifacts import digest_bytes
from dpo_cli.judging.judge import INVALID, Judgment, Question, from_half
from dpo_cli.statistics.agreement import LOSS, WIN, Vote

_LEADS = {WIN: 0.5, LOSS: -0.5}


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
