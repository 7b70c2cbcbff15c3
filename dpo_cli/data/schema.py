"""The canonical rows that every format becomes, and their identity.

A message is ``{"role": "system" | "user" | "assistant", "content": text}``. Prompts and
completions are lists of messages. Identities are content hashes: the same content has the
same id in any file, at any row, on any machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import polars as pl

from dpo_cli.core.artifacts import digest_json

Message = dict[str, str]
Messages = list[Message]

ROLES = ("system", "user", "assistant")

_MESSAGES = pl.List(pl.Struct({"role": pl.String, "content": pl.String}))

SFT_SCHEMA: dict[str, Any] = {
    "id": pl.String,
    "prompt": _MESSAGES,
    "completion": _MESSAGES,
    "source": pl.String,
}
PREFERENCE_SCHEMA: dict[str, Any] = {
    "id": pl.String,
    "prompt": _MESSAGES,
    "chosen": _MESSAGES,
    "rejected": _MESSAGES,
    "chosen_score": pl.Float64,
    "rejected_score": pl.Float64,
    "source": pl.String,
    "group": pl.String,
}


def user(content: str) -> Message:
    """A user message."""
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    """An assistant message."""
    return {"role": "assistant", "content": content}


def content_id(*parts: Messages) -> str:
    """128-bit content hash of some message lists, as 32 hexadecimal digits."""
    return digest_json([[[message["role"], message["content"]] for message in part] for part in parts])


def text_of(messages: Messages) -> str:
    """All contents of a message list as one text."""
    return "\n".join(message["content"] for message in messages)


@dataclass(frozen=True)
class SftExample:
    """An instruction and its answer."""

    prompt: Messages
    completion: Messages

    def row(self, source: str) -> dict[str, Any]:
        """The canonical row (:data:`SFT_SCHEMA`)."""
        return {
            "id": content_id(self.prompt, self.completion),
            "prompt": self.prompt,
            "completion": self.completion,
            "source": source,
        }


@dataclass(frozen=True)
class PreferenceExample:
    """A prompt with the answer that was preferred and the one that was not."""

    prompt: Messages
    chosen: Messages
    rejected: Messages
    chosen_score: float | None = None
    rejected_score: float | None = None

    def row(self, source: str) -> dict[str, Any]:
        """The canonical row (:data:`PREFERENCE_SCHEMA`)."""
        return {
            "id": content_id(self.prompt, self.chosen, self.rejected),
            "prompt": self.prompt,
            "chosen": self.chosen,
            "rejected": self.rejected,
            "chosen_score": self.chosen_score,
            "rejected_score": self.rejected_score,
            "source": source,
            "group": content_id(self.prompt),
        }


RawRow = Mapping[str, Any]
"""One record of an input file, as the file has it."""
