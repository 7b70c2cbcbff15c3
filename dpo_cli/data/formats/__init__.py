"""One reader a format: what its rows look like, and how one becomes a canonical example.

A reader is a module-level :class:`~dpo_cli.data.formats.base.Format`; the registry below is the only list of them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from dpo_cli.data.formats.base import Format, Reading
from dpo_cli.data.formats.instructions import ALPACA, MESSAGES, PROMPT_COMPLETION
from dpo_cli.data.formats.pairs import HH, IMPLICIT, PAIRS, SHAREGPT
from dpo_cli.data.formats.rankings import KWISE, OASST, OASST_SFT
from dpo_cli.data.formats.two_outputs import TWO_OUTPUTS
from dpo_cli.data.formats.unpaired import UNPAIRED
from dpo_cli.data.formats.votes import VOTES
from dpo_cli.data.problem import RowProblem
from dpo_cli.data.schema import PreferenceExample, RankingExample, RawRow, SftExample


def preferred_of(source: Format[Any]) -> Format[Any]:
    """A format of preferences as one of instructions: the prompt with the answer that was preferred.

    Where no instructions are at hand, the paper fine-tunes on the preferred completions (Rafailov
    et al. 2023, section 4), so that the reference model is near what the preferences are about.
    """

    def read(row: RawRow, reading: Reading) -> SftExample:
        example = source.read(row, reading)
        if isinstance(example, PreferenceExample):
            if not example.chosen:
                raise RowProblem("bad_answer", "is a bad answer: it is not to be learned")
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
        has_answer = "rejected" not in source.names or isinstance(row.get("rejected"), str | list | dict)
        return has_answer and source.fits(row)

    return replace(source, read=read, note=note, matches=matches)


PREFERENCE_FORMATS: tuple[Format[Any], ...] = (
    VOTES, SHAREGPT, PAIRS, HH, IMPLICIT, TWO_OUTPUTS, KWISE, OASST, UNPAIRED,
)  # fmt: skip
SFT_FORMATS: tuple[Format[Any], ...] = (
    *map(preferred_of, (VOTES, SHAREGPT, PAIRS, HH, IMPLICIT)),
    ALPACA,
    PROMPT_COMPLETION,
    MESSAGES,
    OASST_SFT,
    *map(preferred_of, (TWO_OUTPUTS, KWISE, UNPAIRED)),
)
"""In the order in which they are tried; the earlier one reads a row that fits both. A row that says which answer was
rejected may have that answer under another name, too, so the preferred one comes before any other."""
