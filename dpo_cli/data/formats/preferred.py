"""Preference data as instruction data: the prompt with the answer that was preferred.

Where no instructions are at hand, the paper fine-tunes on the preferred completions (Rafailov
et al. 2023, section 4), so that the reference model is near what the preferences are about.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from dpo_cli.data.formats.base import Format, Reading
from dpo_cli.data.problem import RowProblem
from dpo_cli.data.schema import PreferenceExample, RankingExample, RawRow, SftExample


def preferred_of(source: Format[Any]) -> Format[Any]:
    """The format that reads the same rows as instructions."""

    def read(row: RawRow, reading: Reading) -> SftExample:
        example = source.read(row, reading)
        if isinstance(example, PreferenceExample):
            return SftExample(example.prompt, example.chosen)
        assert isinstance(example, RankingExample)
        if example.ranks[0] == example.ranks[-1]:
            raise RowProblem("tie", f"is a tie: none of its {len(example.ranks)} answers is preferred")
        return SftExample(example.prompt, example.completions[0])

    def note(row: RawRow, reading: Reading) -> str:
        own = source.note(row, reading)
        return "preference data: the preferred answer is the completion" + (f"; {own}" if own else "")

    def matches(row: RawRow) -> bool:
        # a field of that name that holds no answer, such as a truth value, makes no preference of a row
        return (
            "rejected" not in source.names or isinstance(row.get("rejected"), str | list | dict)
        ) and source.matches(row)

    return replace(source, read=read, note=note, matches=matches)
