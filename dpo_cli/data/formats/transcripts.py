r"""Conversations as one text, as HH has them: turns ``\n\nHuman: ...\n\nAssistant: ...``."""

from __future__ import annotations

import re

from dpo_cli.data.formats.base import RowProblem
from dpo_cli.data.schema import Messages, assistant, user

ANSWER = "\n\nAssistant:"
"""Where an answer begins."""

TURN = re.compile(r"\n\n(Human|Assistant):")
_BEGINS = re.compile(r"\s*Human:")


def is_transcript(text: str) -> bool:
    """Whether a text begins with a Human turn."""
    return _BEGINS.match(text) is not None


def is_open_transcript(text: str) -> bool:
    """Whether a text is a transcript that stops where the assistant's answer begins."""
    return text.rstrip(" ").endswith(ANSWER) and is_transcript(text)


def read_turns(text: str) -> Messages:
    """The turns of a transcript.

    Raises:
        RowProblem: Text stands before the first turn.
    """
    start, *pieces = TURN.split(text)
    if start.strip():
        raise RowProblem("bad_transcript", "text stands before the first turn")
    makers = {"Human": user, "Assistant": assistant}
    return [makers[role](content.removeprefix(" ")) for role, content in zip(pieces[::2], pieces[1::2], strict=True)]


def read_open_transcript(text: str) -> Messages:
    """The turns of a transcript before the answer that it asks for."""
    return read_turns(f"\n\n{text.strip().removesuffix(ANSWER.lstrip()).removesuffix(ANSWER[:2])}")
