"""Rules: rewards of answers that can be checked exactly, by name.

A rule holds or it does not, so its reward is 1 or 0; it reads the answer alone, and is a pure function of the text. No
torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from dpo_cli.core.params import RuleName

MAX_SENTENCE_CHARACTERS = 160
"""What a short sentence may have."""

_PREAMBLE = re.compile(
    r"(sure|certainly|of course|absolutely|definitely|okay|ok|great|good question|hello|hi|thank you|thanks"
    r"|here (is|are)|here['’]s|as an ai|i['’]d be happy|i would be happy|i['’]m glad|i am glad|let me|let['’]s)\b",
    re.IGNORECASE,
)
_ABBREVIATIONS = re.compile(r"\b(?:(?:[A-Z]\.)*[A-Z]|Mr|Mrs|Ms|Dr|Prof|St|vs|etc|e\.g|i\.e|a\.m|p\.m)\.(?=\s)")
_END = re.compile(r"[.!?…][\"')\]”’]*\s|[。！？][”』」）]?(?=.)")
_LAST = re.compile(r"[.!?。！？][\"')\]”’』」）]*\Z")
_LIST = re.compile(r"[-*•#]\s|\d+[.)]\s")


@dataclass(frozen=True)
class Rule:
    """What an answer is to be like.

    Attributes:
        meaning: In a sentence, as the report and the docs say it.
        holds: Whether a text is like that.
    """

    meaning: str
    holds: Callable[[str], bool]

    def reward(self, prompt: str, answer: str) -> float:
        """1 where the answer is like that, else 0."""
        return float(self.holds(answer))


def is_one_sentence(answer: str) -> bool:
    """Whether a text is one short sentence that answers at once.

    It is a single line of at most :data:`MAX_SENTENCE_CHARACTERS` characters that ends with a full stop, an exclamation
    mark or a question mark, has no other sentence end within, and begins neither with a list's mark nor with a preamble
    such as *Sure* or *Here is*. The dots of initials and usual abbreviations end no sentence.
    """
    text = answer.strip()
    if not text or len(text) > MAX_SENTENCE_CHARACTERS or "\n" in text:
        return False
    if _PREAMBLE.match(text) or _LIST.match(text):
        return False
    plain = _ABBREVIATIONS.sub("", text)
    return _LAST.search(plain) is not None and _END.search(plain) is None


def is_json_object(answer: str) -> bool:
    """Whether a text is one JSON object (RFC 8259) with at least one member, and nothing around it."""
    try:
        value = json.loads(answer, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and bool(value)


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


RULES: Mapping[RuleName, Rule] = {
    "one_sentence": Rule("one short sentence without a preamble", is_one_sentence),
    "json_object": Rule("a JSON object and nothing else", is_json_object),
}
