"""Where a text may be cut: between words, never inside one.

A token here is a word with the white space before it, a single mark, or a single character of
a script that puts no space between words, always with the signs that belong to it.
"""

from __future__ import annotations

import re
import unicodedata

_SPACELESS = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u3100-\u312f\u31a0-\u31ff\u3400-\u4dbf"
    "\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff]"
)
"""Thai, Lao, Burmese, Khmer, Kana, Bopomofo and Han."""
_LEADERS = frozenset("\u200d\u1039\u17d2")
"""Signs that draw in the character behind them: the joiner, and what stacks Burmese and Khmer letters."""
_FOLLOWERS = re.compile("[\u200c\u200d\u00ad\U0001f3fb-\U0001f3ff\U000e0020-\U000e007f]")
"""Signs that belong to the character before them, beside accents and variants: joiners, skin tones, tags of flags."""
_FLAG = re.compile("[\U0001f1e6-\U0001f1ff]")
"""Letters of which two make a flag."""
_INNER = frozenset("'’.,:-‐‑·@/\\_")
"""Marks that belong to a word or number where they stand within it."""


def shared_tokens(one: str, other: str) -> int:
    """How many characters at the start of two texts are whole tokens that both share."""
    end = _common_length(one, other)
    while end and not (is_boundary(one, end) and is_boundary(other, end)):
        end -= 1
    return end


def _common_length(one: str, other: str) -> int:
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def is_boundary(text: str, place: int) -> bool:
    """Whether no token of the text goes across this place."""
    if place in (0, len(text)):
        return True
    before, after = text[place - 1], text[place]
    if before.isspace() or before in _LEADERS or _follows(after):
        return False
    if _FLAG.match(before) and _FLAG.match(after):
        first = place
        while first and _FLAG.match(text[first - 1]):
            first -= 1
        return (place - first) % 2 == 0
    return not _within_word(text, place)


def _follows(character: str) -> bool:
    return unicodedata.category(character)[0] == "M" or _FOLLOWERS.match(character) is not None


def _within_word(text: str, place: int) -> bool:
    last = place - 1
    while last > 0 and _follows(text[last]):
        last -= 1
    before, after = text[last], text[place]
    if _is_letter(before):
        if _is_letter(after):
            return True
        return after in _INNER and place + 1 < len(text) and _is_letter(text[place + 1])
    if not _is_letter(after):
        return False
    if before in _INNER and last > 0 and _is_letter(_base_before(text, last)):
        return True
    # a sign belongs to its number
    return before in "+-−" and after.isdigit()


def _base_before(text: str, place: int) -> str:
    last = place - 1
    while last > 0 and _follows(text[last]):
        last -= 1
    return text[last]


def _is_letter(character: str) -> bool:
    return (character.isalnum() or character == "_") and not _SPACELESS.match(character)
