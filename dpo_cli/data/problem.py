"""A row that does not fit, and how messages name columns and kinds of values."""

from __future__ import annotations

from typing import Any

_LONGEST_NAME = 40


class RowProblem(Exception):
    """This row, or a part of it, does not fit its format.

    Args:
        reason: A short name, counted in the table, such as ``missing_field``.
        detail: What is wrong in this row, without its content. Fields are named as ``'prompt'`` or
            ``prompt[0]``, so that :mod:`dpo_cli.data.formats.columns` can put the file's names in.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


def shown_name(key: str) -> str:
    """A column's name for messages: quoted where it would be misread, and cut where it is long."""
    name = key if len(key) <= _LONGEST_NAME else f"{key[: _LONGEST_NAME - 3]}..."
    plain = name.isprintable() and name == name.strip() and not set(name) & set(",;()\"'")
    return name if plain and name else repr(name)


def kind_of(value: Any) -> str:
    """What a value is, in the words of JSON, without its content."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a truth value"
    if isinstance(value, int | float):
        return "a number"
    if isinstance(value, str):
        return "text" if value else "empty text"
    if isinstance(value, list):
        return f"a list of {len(value)}" if value else "an empty list"
    if isinstance(value, dict):
        keys = [str(key)[:40] for key in value]
        return f"an object with {', '.join(keys[:5])}{', ...' if len(keys) > 5 else ''}" if keys else "an empty object"
    return f"a {type(value).__name__}"
