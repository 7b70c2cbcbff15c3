r"""HH transcripts (Bai et al. 2022): ``{"chosen", "rejected"}``, both whole conversations.

Each is a text of turns ``\n\nHuman: ...\n\nAssistant: ...``. The prompt is what both have in
common up to their last common Assistant turn; what that says is the answer.
"""

from __future__ import annotations

import os.path

from dpo_cli.data.formats.base import Format, Reading, RowProblem, text_field
from dpo_cli.data.formats.content import check_prompt
from dpo_cli.data.formats.transcripts import begins_with_turn, gap_of, has_turns, is_transcript, last_answer, read_turns
from dpo_cli.data.schema import PreferenceExample, RawRow, assistant


def _read(row: RawRow, reading: Reading) -> PreferenceExample:
    chosen, rejected = (f"\n\n{text_field(row, name).lstrip()}" for name in ("chosen", "rejected"))
    gap = gap_of(chosen, rejected)
    cut, begin = last_answer(_shared(chosen, rejected), gap)
    if cut < 0:
        raise RowProblem("bad_transcript", "the two sides share no opening up to an Assistant turn")
    answers = [text[begin:] for text in (chosen, rejected)]
    if any(has_turns(answer, gap) for answer in answers):
        raise RowProblem("diverges_early", "the two sides part before the last answer")
    chosen_answer, rejected_answer = (answer.removeprefix(" ") for answer in answers)
    prompt = check_prompt(read_turns(chosen[:cut], gap)) if chosen[:cut].strip() else check_prompt([])
    return PreferenceExample(prompt, [assistant(chosen_answer)], [assistant(rejected_answer)])


def _shared(one: str, other: str) -> str:
    return os.path.commonprefix([one, other])  # noqa: RUF071 (texts, not paths)


def are_transcripts(row: RawRow) -> bool:
    """Whether both sides are texts that begin with a Human turn, or share one with an Assistant turn behind it."""
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if not (
        isinstance(chosen, str) and isinstance(rejected, str) and is_transcript(chosen) and is_transcript(rejected)
    ):
        return False
    return (begins_with_turn(chosen) and begins_with_turn(rejected)) or is_transcript(_shared(chosen, rejected))


HH = Format(
    name="hh",
    fields="chosen and rejected transcripts",
    names={"chosen": (), "rejected": ()},
    needs=(("chosen", "rejected"),),
    read=_read,
    matches=are_transcripts,
)
