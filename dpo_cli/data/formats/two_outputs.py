"""Two outputs with a verdict: a label, several votes, or a score for each.

``{"input", "output_1", "output_2", "label": 2}`` and its like. Which output a label means is
told by the outputs' names (``output_1`` and ``output_2``; ``conversation_a`` and ``conversation_b``:
a and b), or by ``labels`` in params.yaml. A number alone says nothing: it may count from 0 or from 1,
and may be a tie. Only in columns of a known data set it does (:mod:`dpo_cli.data.formats.labels`).
Of several votes the most frequent one counts, and their numbers are the scores where there are no others; a draw
between them is a tie, and a missing vote is none. Ties make no pair and are counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from dpo_cli.data.formats.base import Format, Reading, number, optional_number
from dpo_cli.data.formats.content import refuse_python, with_list, with_turns
from dpo_cli.data.formats.labels import TIES, WORDS, is_soft, label_number, label_text, side_of, suggest, what_to_say
from dpo_cli.data.formats.pairs import read_implicit
from dpo_cli.data.formats.prompts import (
    PROMPT_ALTERNATIVES,
    PROMPT_NAMES,
    PROMPT_NEEDS,
    read_answer,
    read_prompt,
    split_turns,
    with_context,
)
from dpo_cli.data.problem import RowProblem, kind_of
from dpo_cli.data.schema import Messages, PreferenceExample, RawRow, assistant, user

_SIDES = ("first", "second")


def _side(value: Any, labels: dict[str, str]) -> str:
    """``first``, ``second`` or ``tie``."""
    if isinstance(value, list | dict):
        raise RowProblem("unknown_label", f"'label' must be one value, got {kind_of(value)}")
    name = label_text(value)
    side = side_of(name, labels)
    if side is None:
        known = ", ".join(f"{label} ({side})" for label, side in labels.items() if side != "tie")
        raise RowProblem(
            "unknown_label",
            f"has the label {name[:40]!r}; known are {known}; say in labels which side it means"
            + (', or where to cut: {"<1.5": first, ">1.5": second}' if is_soft([name]) else ""),
        )
    return side


def _count_votes(row: RawRow, labels: dict[str, str]) -> Counter[str]:
    """How often each side, or a tie, was voted for; empty where there are no votes, or a label decides."""
    if row.get("label") is not None or "won" in row or "votes" not in row:
        return Counter()
    votes = row["votes"] if isinstance(row["votes"], list) else [row["votes"]]
    return Counter(_side(vote, labels) for vote in votes if vote is not None and vote != "")


def _with_scores(row: RawRow, labels: dict[str, str]) -> RawRow:
    """A row with the numbers of votes as scores, where it has votes and no scores of its own."""
    counts = _count_votes(row, labels)
    if not counts or any(row.get(f"{side}_score") is not None for side in _SIDES):
        return row
    return {**row, **{f"{side}_score": counts[side] for side in _SIDES}}


def _winner(row: RawRow, labels: dict[str, str]) -> str:
    if row.get("label") is not None or ("label" in row and "votes" not in row):
        if row["label"] is None or row["label"] == "":
            raise RowProblem("no_label", "has nothing in 'label'")
        return _side(row["label"], labels)
    if "won" in row:
        return _winner_of(row["won"])
    if "votes" in row:
        counts = _count_votes(row, labels)
        if not counts:
            raise RowProblem("no_label", "has nothing in 'votes'")
        (best, count), *others = counts.most_common()
        return "tie" if others and others[0][1] == count else best
    first, second = (optional_number(row, f"{side}_score") for side in _SIDES)
    if first is None or second is None:
        raise RowProblem("no_label", "has neither 'label', 'votes', 'won' nor two scores")
    return "tie" if first == second else "first" if first > second else "second"


def _winner_of(won: Any) -> str:
    """The side whose column is 1; further columns are ties."""
    flags = won if isinstance(won, list) else [won]
    marked = [at for at, flag in enumerate(flags) if flag is not None and number(flag, f"won[{at}]")]
    if len(flags) < 2 or len(marked) != 1:
        raise RowProblem("no_label", f"says in {len(marked)} of the columns of 'won' which side won; one must")
    return (*_SIDES, "tie")[min(marked[0], 2)]


def _dialogs(row: RawRow) -> tuple[Messages, Messages] | None:
    """Two conversations, where prompt and outputs are lists of texts, perhaps as JSON: one a turn."""
    lists = [with_list(row.get(name)) for name in ("prompt", *_SIDES)]
    if not all(isinstance(texts, list) and all(isinstance(text, str) for text in texts) for texts in lists):
        return None
    asked, *answers = lists
    if not len(asked) == len(answers[0]) == len(answers[1]) > 0:
        return None
    one, other = (
        [turn for q, a in zip(asked, each, strict=True) for turn in (user(q), assistant(a))] for each in answers
    )
    return one, other


def _read(row: RawRow, reading: Reading) -> PreferenceExample:
    for name in _SIDES:
        if row.get(name) is None:
            raise RowProblem("missing_field", f"has no {name!r}")
    labels = {**TIES, **(reading.labels or WORDS)}
    winner, row = _winner(row, labels), _with_scores(row, labels)
    if winner == "tie":
        raise RowProblem("tie", "is a tie: neither side won")
    better, worse = _SIDES if winner == "first" else _SIDES[::-1]
    if row.get("prompt") is None and row.get("instruction") is None:
        if all(isinstance(with_turns(row[name]), str) for name in _SIDES):
            for name in _SIDES:
                refuse_python(row[name], name)
            raise RowProblem("missing_field", "has no 'prompt'")
        sides = {side: row[name] for side, name in (("chosen", better), ("rejected", worse))}
        scores = {f"{side}_score": row.get(f"{name}_score") for side, name in (("chosen", better), ("rejected", worse))}
        return read_implicit({**row, **sides, **scores, "margin": None}, reading)
    scores = [optional_number(row, f"{name}_score") for name in (better, worse)]
    if dialogs := _dialogs(row):
        one, other = dialogs if better == "first" else dialogs[::-1]
        return PreferenceExample(*split_turns(with_context(row, [], reading), one, other, reading), *scores)
    prompt = read_prompt(row, reading)
    chosen, rejected = (read_answer(row, name, prompt, reading) for name in (better, worse))
    return PreferenceExample(prompt, chosen, rejected, *scores)


def _values(rows: Sequence[RawRow]) -> set[str]:
    """All labels and votes of these rows."""
    found: set[str] = set()
    for row in rows:
        votes = row["votes"] if isinstance(row.get("votes"), list) else []
        found |= {label_text(value) for value in (row.get("label"), *votes) if value not in (None, "", [], {})}
    return found


def _doubt(rows: Sequence[RawRow], reading: Reading) -> str:
    values, labels = _values(rows), {**TIES, **(reading.labels or WORDS)}
    field = "'label'" if any(row.get("label") is not None for row in rows) else "'votes'"
    numbers = sorted((value for value in values if label_number(value) is not None), key=float)
    if reading.labels_found and numbers == ["0", "1"] and labels.get("0") == "tie":
        return (
            f"{field} is 0 or 1, and 0 may be a tie or the first output;"
            ' say labels: {"0": first, "1": second}, or what else they mean'
        )
    unknown = sorted(
        (value for value in values if side_of(value, labels) is None),
        key=lambda value: (label_number(value) or 0, value),
    )
    shown = ", ".join(value[:40] for value in unknown[:5])
    if not set(unknown) & set(numbers):
        if not unknown or len(unknown) < len(values):
            return ""
        return f"{field} is {shown}, which says nothing of which output is better; say {what_to_say(unknown)}"
    if is_soft(numbers if reading.labels_found else unknown):
        return (
            f"{field} is a number on a scale, such as {shown}: a probability or a strength, no verdict;"
            f" say where to cut it, such as {what_to_say(numbers)}"
        )
    if reading.labels and not reading.labels_found:
        return f"{field} is {shown} in some rows, of which labels say nothing; add it, as first, second or tie"
    return (
        f"{field} is {', '.join(numbers)}, and nothing says which output a number means: it may count from 0"
        f" or from 1, and may be a tie; say {what_to_say(numbers)}"
    )


def _note(row: RawRow, reading: Reading) -> str:
    """What the first label means, which a user can hold against the row."""
    value = next(iter(sorted(_values([row]))), None)
    side = side_of(value or "", {**TIES, **(reading.labels or WORDS)})
    if side is None:
        return ""
    return f"its first label, {value}, means " + ("a tie" if side == "tie" else f"that the {side} is better")


TWO_OUTPUTS = Format(
    name="two_outputs",
    fields="two outputs (such as output_1 and output_2) with a label, votes or scores",
    names={
        **PROMPT_NAMES,
        **dict.fromkeys(("first", "second", "label", "votes", "won", "first_score", "second_score"), ()),
    },
    needs=tuple(
        (*asked, "first", "second", *verdict)
        for asked in (*PROMPT_NEEDS, ())
        for verdict in (("label",), ("votes",), ("won",), ("first_score", "second_score"))
    ),
    read=_read,
    note=_note,
    doubt=_doubt,
    suggest=suggest,
    alternatives=(*PROMPT_ALTERNATIVES, ("label", "votes"), ("label", "won"), ("won", "votes")),
)
