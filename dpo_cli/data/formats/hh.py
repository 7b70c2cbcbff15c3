r"""HH transcripts (Bai et al. 2022): ``{"chosen", "rejected"}``, both whole conversations.

Each is a text of turns ``\n\nHuman: ...\n\nAssistant: ...``. The prompt is what both have in
common up to their last common Assistant turn; what that says is the answer.
"""

from __future__ import annotations

import os.path

from dpo_cli.data.formats.base import Format, Reading, text_field
from dpo_cli.data.formats.content import check_prompt
from dpo_cli.data.formats.prompts import split_turns
from dpo_cli.data.formats.transcripts import begins_with_turn, gap_of, is_transcript, last_answer, read_turns
from dpo_cli.data.problem import RowProblem
from dpo_cli.data.schema import PreferenceExample, RawRow


def _read(row: RawRow, reading: Reading) -> PreferenceExample:
    chosen, rejected = (f"\n\n{text_field(row, name).lstrip()}" for name in ("chosen", "rejected"))
    gap = gap_of(chosen, rejected)
    cut = last_answer(_shared(chosen, rejected), gap)
    if cut < 0:
        raise RowProblem("bad_transcript", "the two sides share no opening up to an Assistant turn")
    one, other = (read_turns(text[cut:], gap) for text in (chosen, rejected))
    prompt = check_prompt(read_turns(chosen[:cut], gap) if chosen[:cut].strip() else [])
    return PreferenceExample(*split_turns(prompt, one, other, reading))


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
