r"""HH transcripts (Bai et al. 2022): ``{"chosen", "rejected"}``, both whole conversations.

Each is a text of turns ``\n\nHuman: ...\n\nAssistant: ...``. The prompt is what both have in
common up to their last common ``\n\nAssistant:``; what follows is the answer.
"""

from __future__ import annotations

import os.path
import re

from dpo_cli.data.formats.base import Format, RowProblem, check_prompt, text_field
from dpo_cli.data.schema import Messages, PreferenceExample, RawRow, assistant, user

_ANSWER = "\n\nAssistant:"
_TURN = re.compile(r"\n\n(Human|Assistant):")


def _read_turns(text: str) -> Messages:
    start, *pieces = _TURN.split(text)
    if start.strip():
        raise RowProblem("bad_transcript", "text stands before the first turn")
    makers = {"Human": user, "Assistant": assistant}
    return [makers[role](content.removeprefix(" ")) for role, content in zip(pieces[::2], pieces[1::2], strict=True)]


def _read(row: RawRow) -> PreferenceExample:
    chosen, rejected = (f"\n\n{text_field(row, name).lstrip()}" for name in ("chosen", "rejected"))
    cut = os.path.commonprefix([chosen, rejected]).rfind(_ANSWER)  # noqa: RUF071 (texts, not paths)
    if cut < 0:
        raise RowProblem("bad_transcript", "chosen and rejected share no opening up to an Assistant turn")
    answers = [text[cut + len(_ANSWER) :] for text in (chosen, rejected)]
    if any(_TURN.search(answer) for answer in answers):
        raise RowProblem("diverges_early", "chosen and rejected part before the last answer")
    chosen_answer, rejected_answer = (answer.removeprefix(" ") for answer in answers)
    return PreferenceExample(
        check_prompt(_read_turns(chosen[:cut])), [assistant(chosen_answer)], [assistant(rejected_answer)]
    )


def _matches(row: RawRow) -> bool:
    return "prompt" not in row and all(
        isinstance(row.get(name), str) and row[name].lstrip().startswith("Human:") for name in ("chosen", "rejected")
    )


HH = Format(name="hh", fields="chosen and rejected transcripts", matches=_matches, read=_read)
