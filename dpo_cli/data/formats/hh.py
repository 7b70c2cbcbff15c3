r"""HH transcripts (Bai et al. 2022): ``{"chosen", "rejected"}``, both whole conversations.

Each is a text of turns ``\n\nHuman: ...\n\nAssistant: ...``. The prompt is what both have in
common up to their last common ``\n\nAssistant:``; what follows is the answer.
"""

from __future__ import annotations

import os.path

from dpo_cli.data.formats.base import Format, Reading, RowProblem, text_field
from dpo_cli.data.formats.content import check_prompt
from dpo_cli.data.formats.prompts import split_turns
from dpo_cli.data.formats.transcripts import ANSWER, is_transcript, read_turns
from dpo_cli.data.schema import PreferenceExample, RawRow


def _read(row: RawRow, reading: Reading) -> PreferenceExample:
    chosen, rejected = (f"\n\n{text_field(row, name).lstrip()}" for name in ("chosen", "rejected"))
    cut = os.path.commonprefix([chosen, rejected]).rfind(ANSWER)  # noqa: RUF071 (texts, not paths)
    if cut < 0:
        raise RowProblem("bad_transcript", "the two sides share no opening up to an Assistant turn")
    answers = [text[cut + len(ANSWER) :] for text in (chosen, rejected)]
    one, other = (read_turns(f"{ANSWER}{answer}") for answer in answers)
    return PreferenceExample(*split_turns(check_prompt(read_turns(chosen[:cut])), one, other, reading))


def are_transcripts(row: RawRow) -> bool:
    """Whether both sides are texts that begin with a Human turn."""
    chosen, rejected = row.get("chosen"), row.get("rejected")
    return isinstance(chosen, str) and isinstance(rejected, str) and is_transcript(chosen) and is_transcript(rejected)


HH = Format(
    name="hh",
    fields="chosen and rejected transcripts",
    names={"chosen": (), "rejected": ()},
    needs=(("chosen", "rejected"),),
    read=_read,
    matches=are_transcripts,
)
