"""Text that is not ours, made safe to print: names of files, keys, labels, models, and what libraries say."""

from __future__ import annotations

import re
import reprlib
from typing import Any

_CONTROL = re.compile(
    # C0 but for tab and line feed, DEL and C1; marks that turn the direction of writing; line and paragraph
    # separators; halves of surrogate pairs, of which file names that are not UTF-8 are made
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
_MARKDOWN = re.compile(r"[\\`*_{}\[\]<>|#~&]")
_LONGEST_VALUE = 80
_LONGEST_LINE = 2000


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


def _escaped(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _LONGEST_VALUE
_SHORT.maxlong = 40
_SHORT.maxlevel = 3
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = 6
