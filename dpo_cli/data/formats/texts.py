r"""Texts that hold a prompt: transcripts, and two texts that begin alike.

A transcript, as HH has it, is a text of turns ``\n\nHuman: ...\n\nAssistant: ...``. What stands before the first Human
turn, perhaps behind ``System:``, is the system message. Where no empty line stands before an Assistant turn, turns
begin on new lines.

Two texts are cut between tokens. A token here is a word with the white space before it, a single mark, or a single
character of a script that puts no space between words, always with the signs that belong to it.
"""

from __future__ import annotations

import re

import regex

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


def shared_start(one: str, other: str) -> str:
    """All characters with which both texts begin."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return one[:low]


# --- tokens -------------------------------------------------------------------------------------

_SPACELESS = (
    r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u3100-\u312f\u31a0-\u31ff\u3400-\u4dbf"
    r"\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
)
"""Thai, Lao, Burmese, Khmer, Kana, Bopomofo and Han."""
_JOINERS = r"[\u200d\u1039\u17d2]"
"""Signs that draw in the character behind them: the joiner, and what stacks Burmese and Khmer letters."""
_SIGNS = r"[\p{M}\u200c\u200d\u00ad\U0001f3fb-\U0001f3ff\U000e0020-\U000e007f]*+"
"""Signs that belong to the character before them: accents and variants, joiners, skin tones, tags of flags."""
_LETTER = rf"[[\p{{L}}\p{{N}}_]--[{_SPACELESS}]]"
_SIGN = rf"[+\-−]{_SIGNS}(?=[\p{{nt=De}}\p{{nt=Di}}])"
_INNER = rf"['’.,:\-‐‑·@/\\](?={_LETTER})"
_WORD = rf"(?:{_SIGN})?{_LETTER}{_SIGNS}(?:(?:{_INNER})?{_LETTER}{_SIGNS})*+"
"""A word or number, with marks within it, and the sign before a number."""
_FLAG = r"[\U0001f1e6-\U0001f1ff]{1,2}"
_PIECE = rf"\s*+(?:{_WORD}|(?:{_FLAG}|.){_SIGNS})"
_TOKEN = regex.compile(rf"{_PIECE}(?:(?<={_JOINERS}){_PIECE})*+|\s++", regex.DOTALL | regex.VERSION1)


def shared_tokens(one: str, other: str) -> int:
    """How many characters at the start of two texts are whole tokens that both share."""
    end = len(shared_start(one, other))
    start = len(one[: max(one.rfind(" ", 0, end), 0)].rstrip())  # white space begins a token
    if start and regex.match(_JOINERS, one, pos=start - 1):
        start = 0
    return max(_ends(one, start, end) & _ends(other, start, end), default=start)


def _ends(text: str, start: int, last: int) -> set[int]:
    """Where tokens end, from a place on at which one begins, up to a last one."""
    ends: set[int] = set()
    for token in _TOKEN.finditer(text, start):
        if token.end() > last:
            break
        ends.add(token.end())
    return ends
