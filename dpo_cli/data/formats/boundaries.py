"""Where a text may be cut: between words, never inside one.

A token here is a word with the white space before it, a single mark, or a single character of
a script that puts no space between words, always with the signs that belong to it.
"""

from __future__ import annotations

import regex

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
    end = _common_length(one, other)
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


def _common_length(one: str, other: str) -> int:
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
