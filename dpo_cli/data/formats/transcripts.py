r"""Conversations as one text, as HH has them: turns ``\n\nHuman: ...\n\nAssistant: ...``.

What stands before the first Human turn, perhaps behind ``System:``, is the system message. Where
no empty line stands before an Assistant turn, turns begin on new lines.
"""

from __future__ import annotations

import re

from dpo_cli.data.problem import RowProblem
from dpo_cli.data.schema import Messages, assistant, user

_HUMAN = re.compile(r"\s*Human:")
_SYSTEM = re.compile(r"System:\s*")
_ASSISTANT = "Assistant:"
_TURNS = {"\n\n": re.compile(r"\n\n(Human|Assistant):"), "\n": re.compile(r"\n{1,2}(Human|Assistant):")}


def gap_of(*texts: str) -> str:
    """What stands before a turn of these texts: an empty line, or where one has none, a line end."""
    return "\n\n" if all(f"\n\n{_ASSISTANT}" in text for text in texts) else "\n"


def begins_with_turn(text: str) -> bool:
    """Whether a text begins with a Human turn."""
    return _HUMAN.match(text) is not None


def is_transcript(text: str) -> bool:
    """Whether a text begins with a Human turn, or holds one with an Assistant turn behind it."""
    if begins_with_turn(text):
        return True
    gap = gap_of(text)
    human = text.find(f"{gap}Human:")
    return human >= 0 and text.find(f"{gap}{_ASSISTANT}", human) >= 0


def is_open_transcript(text: str) -> bool:
    """Whether a text is a transcript that stops where the assistant's answer begins."""
    return text.rstrip(" ").endswith(f"\n{_ASSISTANT}") and is_transcript(text)


def ends_like_open(text: str) -> bool:
    """Whether a text may be an open transcript; asking this costs next to nothing."""
    return _ASSISTANT in text[-len(_ASSISTANT) - 4 :]


def last_answer(text: str, gap: str) -> int:
    """Where the last Assistant turn of a text begins; -1 where there is none."""
    return text.rfind(f"{gap}{_ASSISTANT}")


def read_turns(text: str, gap: str) -> Messages:
    """The turns of a transcript.

    Raises:
        RowProblem: It has none.
    """
    start, *pieces = _TURNS[gap].split(f"{gap}{text.lstrip()}")
    if not pieces:
        raise RowProblem("bad_transcript", "has no Human turn")
    makers = {"Human": user, "Assistant": assistant}
    turns = [makers[role](content.removeprefix(" ")) for role, content in zip(pieces[::2], pieces[1::2], strict=True)]
    system = _SYSTEM.sub("", start.strip(), count=1) if _SYSTEM.match(start.strip()) else start.strip()
    return [{"role": "system", "content": system}, *turns] if system else turns


def read_open_transcript(text: str) -> Messages:
    """The turns of a transcript before the answer that it asks for."""
    gap = gap_of(text)
    return read_turns(text[: last_answer(text, gap)], gap)
