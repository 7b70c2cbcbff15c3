"""What a format is, and the small checks that readers share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from dpo_cli.data.schema import Message, Messages, PreferenceExample, RawRow, SftExample

Example = TypeVar("Example", SftExample, PreferenceExample)


class RowProblem(Exception):
    """This row does not fit its format.

    Args:
        reason: A short name, counted in the table, such as ``missing_field``.
        detail: What is wrong in this row, without its content.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class Format(Generic[Example]):
    """A format of input rows.

    Attributes:
        name: Its name in params.yaml.
        fields: What its rows are known by, for messages.
        matches: Whether a row looks like this format.
        read: The canonical example in a row; raises :class:`RowProblem`.
    """

    name: str
    fields: str
    matches: Callable[[RawRow], bool]
    read: Callable[[RawRow], Example]


def text_field(row: RawRow, name: str) -> str:
    """A field that must hold text."""
    if name not in row:
        raise RowProblem("missing_field", f"has no {name!r}")
    value = row[name]
    if not isinstance(value, str):
        raise RowProblem("not_text", f"{name!r} must be text, got {type(value).__name__}")
    return value


def optional_text(row: RawRow, name: str) -> str:
    """A field that holds text where it is there; missing and null are empty."""
    return "" if row.get(name) is None else text_field(row, name)


_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
}


def read_message(value: Any, where: str) -> Message:
    """A turn in the form ``{"from", "value"}`` or ``{"role", "content"}``."""
    if not isinstance(value, dict):
        raise RowProblem("bad_message", f"{where} must be a message, got {type(value).__name__}")
    name, content = value.get("role", value.get("from")), value.get("content", value.get("value"))
    role = _ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        raise RowProblem("unknown_role", f"{where} has the role {name!r}; known are {', '.join(_ROLES)}")
    if not isinstance(content, str):
        raise RowProblem("not_text", f"{where} must have text content, got {type(content).__name__}")
    return {"role": role, "content": content}


def read_messages(values: Any, where: str) -> Messages:
    """A list of turns, or a single one."""
    if isinstance(values, dict):
        return [read_message(values, where)]
    if not isinstance(values, list):
        raise RowProblem("bad_message", f"{where} must be a list of messages, got {type(values).__name__}")
    return [read_message(value, f"{where}[{index}]") for index, value in enumerate(values)]


def check_prompt(prompt: Messages) -> Messages:
    """A prompt begins with a system or user turn and ends with a user turn."""
    if not prompt:
        raise RowProblem("empty_prompt", "has no prompt")
    if prompt[-1]["role"] != "user":
        raise RowProblem("prompt_not_ending_with_user", f"the prompt ends with a {prompt[-1]['role']} turn")
    return prompt


def check_answer(answer: Messages, where: str) -> Messages:
    """An answer is one assistant turn."""
    if [message["role"] for message in answer] != ["assistant"]:
        roles = ", ".join(message["role"] for message in answer) or "nothing"
        raise RowProblem("not_one_answer", f"{where} must be one assistant turn, got {roles}")
    return answer


def has_all(row: RawRow, names: Iterable[str]) -> bool:
    """Whether the row has all of these fields."""
    return all(name in row for name in names)
