"""Sides of a preference that are lists of answers: each chosen one is better than each rejected one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dpo_cli.data.formats.base import Reading, number, says_something
from dpo_cli.data.formats.content import is_conversation
from dpo_cli.data.formats.prompts import margin_in, read_answer
from dpo_cli.data.problem import RowProblem, kind_of
from dpo_cli.data.schema import Messages, PreferenceExample, RankingExample, RawRow

_SIDES = ("chosen", "rejected")


def are_lists(row: RawRow) -> bool:
    """Whether a side is a list of answers: of texts, or of whole conversations."""
    return any(_is_list(row.get(name)) for name in _SIDES)


def _is_list(value: Any) -> bool:
    if not isinstance(value, list) or not value:
        return False
    return all(isinstance(answer, str) for answer in value) or all(is_conversation(answer) for answer in value)


def lists_note(row: RawRow, reading: Reading) -> str:
    """What is made of lists, for the account."""
    return "sides that are lists: each chosen answer is better than each rejected one" if are_lists(row) else ""


def unread_margin(row: RawRow) -> list[tuple[str, str]]:
    """The margin, where it says something and is no number, or a side is a list."""
    if not says_something(row.get("margin")) or (margin_in(row) is not None and not are_lists(row)):
        return []
    return [("margin", "")]


def read_lists(row: RawRow, prompt: Messages, reading: Reading) -> PreferenceExample | RankingExample:
    """The ranking of all answers, in which those of a side are tied; a pair, where each side has one.

    Raises:
        RowProblem: A side holds no answer, or scores do not fit its list.
    """
    chosen, rejected = (_read_list(row, name, prompt, reading) for name in _SIDES)
    scores = [_scores(row, name, len(side)) for name, side in zip(_SIDES, (chosen, rejected), strict=True)]
    if len([side for side in scores if side is None]) == 1:
        raise RowProblem("bad_scores", "has scores for one side alone")
    ranking = RankingExample(
        prompt,
        [*chosen, *rejected],
        [1] * len(chosen) + [2] * len(rejected),
        None if scores[0] is None or scores[1] is None else [*scores[0], *scores[1]],
    )
    return ranking.pair(0, 1) if len(ranking.ranks) == len(_SIDES) else ranking


def _read_list(row: RawRow, name: str, prompt: Messages, reading: Reading) -> Sequence[Messages]:
    value: Any = row.get(name)
    if value == []:
        raise RowProblem("too_few_completions", f"has no answer in {name!r}")
    if not _is_list(value):
        return [read_answer(row, name, prompt, reading)]
    places = [f"{name}[{index}]" for index in range(len(value))]
    answers = {"prompt": row.get("prompt"), **dict(zip(places, value, strict=True))}
    return [read_answer(answers, place, prompt, reading) for place in places]


def _scores(row: RawRow, name: str, num: int) -> list[float] | None:
    field = f"{name}_score"
    value = row.get(field)
    if value is None or value == "":
        return None
    values = value if isinstance(value, list) else [value]
    if len(values) != num:
        raise RowProblem("bad_scores", f"{field!r} must have a number for each of {num} answers, got {kind_of(value)}")
    return [number(score, f"{field}[{index}]") for index, score in enumerate(values)]
