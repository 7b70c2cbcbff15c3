"""Text that is not ours, made safe to print: names of files, keys, labels, models, and what libraries say."""

from __future__ import annotations

import re
import reprlib
import unicodedata
from typing import Any

_CONTROL = re.compile(
    # C0 but for tab and line feed, DEL and C1; marks that turn the direction of writing; line and paragraph
    # separators; halves of surrogate pairs, of which file names that are not UTF-8 are made
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
_MARKDOWN = re.compile(r"[\\`*_{}\[\]<>|#~&]")
_LONGEST_VALUE = 80
_LONGEST_LINE = 2000


NO_TEXT = "∅"
"""What stands for a token without text."""

_SHOWN = {"\n": "\n", "\t": "\t", "\x7f": "␡"}
_JOINERS = "\u200c\u200d"
"""Characters without a shape of their own that emoji and some scripts need between others."""


def printable(text: str) -> str:
    r"""Text without control characters, which stand as ``\x1b`` or ``\u202e``; tabs and line feeds stay."""
    return _CONTROL.sub(lambda match: _escaped(match[0]), text)


def in_one_line(text: str) -> str:
    """The same on one line, and not longer than a screen: what a message says of something that is not ours."""
    line = printable(text.strip()).replace("\n", "\\n")
    return line if len(line) <= _LONGEST_LINE else f"{line[:_LONGEST_LINE]} ... ({len(line)} characters)"


def shown(value: Any) -> str:
    """A value as Python writes it, shortened where it is long, deep or large."""
    return _SHORT.repr(value)


def markdown(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    return _MARKDOWN.sub(lambda match: f"\\{match[0]}", in_one_line(text))


def visible(text: str) -> str:
    """A text of which nothing is hidden and nothing steers the terminal: control characters as signs."""
    return "".join(map(_visible_character, text)) if not text.isprintable() else text


def _visible_character(character: str) -> str:
    if character in _SHOWN:
        return _SHOWN[character]
    if character < " ":
        return chr(0x2400 + ord(character))
    if unicodedata.category(character) in ("Cc", "Cf", "Cs") and character not in _JOINERS:
        return f"\\u{ord(character):04x}"
    return character


def visible_token(text: str) -> str:
    """A token's text, with all in it that has no shape of its own made visible."""
    if not text:
        return NO_TEXT
    first = unicodedata.category(text[0])
    if text[0] in _JOINERS or "\ufe00" <= text[0] <= "\ufe0f":
        text = f"\\u{ord(text[0]):04x}{text[1:]}"
    elif first.startswith("M"):
        text = f"◌{text}"  # else it would sit on the sign before it
    return visible(text.replace("\n", "⏎\n").replace("\t", "⇥"))


def duration(seconds: float) -> str:
    """A time in hours and minutes, minutes and seconds, or seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _escaped(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _LONGEST_VALUE
_SHORT.maxlong = 40
_SHORT.maxlevel = 3
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = 6
