"""The judges: what each decides by, which settings it reads and which one it needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

RuleName = Literal["one_sentence", "json_object"]


@dataclass(frozen=True)
class JudgeKind:
    """What is known of a judge before it is opened.

    Attributes:
        words: What it is, as the report says it.
        section: Its own settings, ``evaluate.<section>``; None where it has none.
        needs: A setting below ``evaluate`` that must not be empty, and what to say where it is.
        names_itself: Whether what it calls itself says more than its words.
        judges_any: Whether it can judge any answers, and not only those that it was made for.
    """

    words: str
    section: str | None = None
    needs: tuple[str, str] | None = None
    names_itself: bool = False
    judges_any: bool = True

    @property
    def settings(self) -> tuple[str, ...]:
        """Where settings that it alone reads begin."""
        own = () if self.section is None else (f"evaluate.{self.section}.",)
        return own if self.needs is None or "." in self.needs[0] else (*own, f"evaluate.{self.needs[0]}")


JUDGES: Mapping[str, JudgeKind] = {
    "world": JudgeKind("the embedded world's known reward"),
    "rule": JudgeKind(
        "a rule that is checked exactly",
        needs=("rule", "evaluate.judge rule checks one of one_sentence, json_object"),
        names_itself=True,
    ),
    "reward-model": JudgeKind("the reward model of stage reward"),
    "hf": JudgeKind("a language model on this machine", section="hf", names_itself=True),
    "openai": JudgeKind(
        "a language model behind a server",
        section="openai",
        needs=("openai.url", "give the server's address, such as http://127.0.0.1:8080/v1"),
        names_itself=True,
    ),
    "votes": JudgeKind(
        "people's votes",
        section="votes",
        needs=("votes.file", "dpo-cli rating-sheet makes a file to be filled in"),
        judges_any=False,
    ),
}
"""All that there are; ``none`` is no judge."""
