"""The one form of an answer: a token group with its text. What a judge and the report need of it are its columns."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from dpo_cli.data.schema import Messages
from dpo_cli.data.tokens import TokenGroup
from dpo_cli.judging.templates import transcript


@dataclass(frozen=True)
class Answer(TokenGroup):
    """An answer to a prompt, sampled or the data's.

    Attributes:
        messages: The prompt.
        text: The answer.
        finished: Whether it ended within the limit of its tokens.
    """

    messages: Messages
    text: str
    finished: bool = True

    @property
    def tokens(self) -> tuple[int, ...]:
        """Token ids of the answer, as it was sampled."""
        return self.completions[0]

    @property
    def num_tokens(self) -> int:
        """Tokens of the answer."""
        return len(self.completions[0])

    @cached_property
    def asked(self) -> str:
        """The prompt as a judge reads it."""
        return transcript(self.messages)

    @classmethod
    def of_text(cls, prompt: str, messages: Messages, text: str) -> Answer:
        """An answer of which only the text is known, to a prompt with this id."""
        return cls(prompt, prompt, (), ((),), messages, text)
