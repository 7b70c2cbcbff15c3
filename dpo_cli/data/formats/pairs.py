"""Pairs: ``{"prompt", "chosen", "rejected"}``, each a text or a list of messages.

In place of ``prompt`` a row may have ``instruction`` and ``input`` as in Alpaca. Answers may be
whole conversations: what both share is the prompt then, where it holds what ``prompt`` asks. A side may
be a list of answers: each chosen one is paired with each rejected one.
"""

from __future__ import annotations

from collections.abc import Sequence

from dpo_cli.data.formats.base import Format, Reading
from dpo_cli.data.formats.hh import are_transcripts
from dpo_cli.data.formats.implicit import split_implicit
from dpo_cli.data.formats.labels import names_in_place_of_answers
from dpo_cli.data.formats.prompts import (
    PROMPT_ALTERNATIVES,
    PROMPT_NAMES,
    PROMPT_NEEDS,
    SCORE_ALTERNATIVES,
    SIDE_NAMES,
    read_prompt,
    read_scores,
    read_sides,
)
from dpo_cli.data.formats.sides import are_lists, lists_note, read_lists, unread_margin
from dpo_cli.data.problem import RowProblem
from dpo_cli.data.schema import Messages, PreferenceExample, RankingExample, RawRow

_NUM_ECHOES = 3
_LONG_ECHO = 20


def _read(row: RawRow, reading: Reading) -> PreferenceExample | RankingExample:
    prompt = read_prompt(row, reading)
    if are_lists(row):
        return read_lists(row, prompt, reading)
    chosen_score, rejected_score = read_scores(row) if _has_scores(row) else (None, None)
    try:
        sides = read_sides(row, prompt, reading)
    except RowProblem as problem:
        if problem.reason != "not_one_answer":
            raise
        return _read_conversations(row, prompt, reading, problem, chosen_score, rejected_score)
    return PreferenceExample(*sides, chosen_score, rejected_score)


def _has_scores(row: RawRow) -> bool:
    return "margin" in row or "chosen_score" in row or "rejected_score" in row


def _read_conversations(
    row: RawRow, prompt: Messages, reading: Reading, problem: RowProblem, *scores: float | None
) -> PreferenceExample:
    """The pair in two conversations that hold more than the prompt, such as a system turn."""
    try:
        pair = split_implicit(row, reading, *scores)
    except RowProblem as other:
        raise (other if other.reason == "diverges_early" else problem) from None
    if prompt[-1] not in pair.prompt:
        raise problem
    return pair


def _doubt(rows: Sequence[RawRow], reading: Reading) -> str:
    if all(map(are_transcripts, rows)):
        return (
            "both answers are transcripts from the first Human turn in every row;"
            " say format: hh to take the prompt from them, or format: pairs if such a text is the answer"
        )
    if told := names_in_place_of_answers(rows):
        return told
    texts = [[row.get(name) for name in ("prompt", "chosen", "rejected")] for row in rows]
    asked = [(p, c, r) for p, c, r in texts if isinstance(p, str) and isinstance(c, str) and isinstance(r, str)]
    if not asked or not all(p.strip() and c.startswith(p) and r.startswith(p) for p, c, r in asked):
        return ""
    if len(asked) < _NUM_ECHOES and all(len(prompt) < _LONG_ECHO for prompt, _, _ in asked):
        return ""
    return (
        "both answers begin with the whole prompt in every row;"
        " say format: implicit to cut it off them, or format: pairs if they are to repeat it"
    )


PAIRS = Format(
    name="pairs",
    fields="prompt (or instruction), chosen and rejected",
    names={**PROMPT_NAMES, **SIDE_NAMES},
    needs=tuple((*asked, "chosen", "rejected") for asked in PROMPT_NEEDS),
    read=_read,
    note=lists_note,
    doubt=_doubt,
    alternatives=PROMPT_ALTERNATIVES + SCORE_ALTERNATIVES,
    leaves=("margin",),
    unread=unread_margin,
)
