"""What can be wrong with an example, whatever its format; what becomes of it is up to the policy.

Each check has a setting of its name in data.checks (:class:`dpo_cli.core.data_params.DataChecks`).
The checks of a single example are here; those that compare rows with each other (duplicate,
contradiction, repeated and shared prompts) are in :mod:`dpo_cli.data.repeats`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import pairwise

from dpo_cli.data.schema import Messages, PreferenceExample, SftExample, text_of

FORMAT_CHECK = "malformed"
"""The check that rows fail which do not fit their format, whatever the reason."""

ROW_REASONS = ("tie", "empty_prompt")
"""Reasons for which a format refuses a row that are checks of their own."""

_OF_BOTH = ("malformed", "empty_prompt", "duplicate", "shared_prompt", "repeated_prompt", "turn_order", "no_input")
_OF_TEXTS = ("chat_markers", "placeholders", "replacement_characters")
CHECKS_OF: Mapping[str, tuple[str, ...]] = {
    "sft": (*_OF_BOTH, "empty_completion", *_OF_TEXTS),
    "preference": (
        *_OF_BOTH, "empty_chosen", "empty_rejected", "equal_sides", "tie", "contradiction", "score_conflict",
        "prefix_sides", "longer_chosen", *_OF_TEXTS,
    ),
}  # fmt: skip
"""The checks that instruction data and preference data can fail."""

_MARKERS = re.compile(
    r"<\|[^|<>\s]{1,40}\|>|<｜[^｜<>\s]{1,40}｜>|</?s>|\[/?INST\]|<(?:start|end)_of_turn>"
    r"|(?:^|\n)(?:Human|Assistant|User):|\b(?:USER|ASSISTANT):"
    r"|###\s?(?:Instruction|Response|Human|Assistant|User|System)\b"
)
_PLACEHOLDER = re.compile(r"\{\{\s*[\w.-]{1,60}\s*\}\}")


def has_chat_markers(text: str) -> bool:
    """Whether a text holds marks by which some chat template ends or begins a turn."""
    # Most texts hold none of these signs, and to look for a single character costs next to nothing.
    if (
        ("<" in text and ("<|" in text or "<｜" in text or "s>" in text or "_of_turn>" in text))
        or ("#" in text and "###" in text)
        or ("]" in text and "INST]" in text)
        or ("H" in text and "Human:" in text)
        or ("A" in text and ("Assistant:" in text or "ASSISTANT:" in text))
        or ("U" in text and ("User:" in text or "USER:" in text))
    ):
        return _MARKERS.search(text) is not None
    return False


def has_placeholders(text: str) -> bool:
    """Whether a text holds ``{{placeholders}}``."""
    return "{" in text and "{{" in text and _PLACEHOLDER.search(text) is not None


def _find_in_text(text: str, found: list[str]) -> None:
    if has_chat_markers(text):
        found.append("chat_markers")
    if has_placeholders(text):
        found.append("placeholders")
    if "\ufffd" in text:
        found.append("replacement_characters")


_NO_INPUT = re.compile(r"\n\W{0,4}no[ _-]?input\W{0,4}\Z", re.IGNORECASE)


def _find_in_prompt(prompt: Messages, found: list[str]) -> None:
    if len(prompt) > 1:
        roles = [message["role"] for message in prompt]
        if "system" in roles[1:] or any(one == other != "tool" for one, other in pairwise(roles)):
            found.append("turn_order")
    if "nput" in (content := prompt[-1]["content"])[-10:] and _NO_INPUT.search(content, max(len(content) - 20, 0)):
        found.append("no_input")


def is_empty(messages: Messages) -> bool:
    """Whether there is nothing but white space: no text and no call, for reasoning alone is no answer."""
    for message in messages:
        text = message["content"]
        if (text and not text.isspace()) or "tool_calls" in message:
            return False
    return True


def check_sft(example: SftExample) -> list[str]:
    """Names of the checks that an instruction fails."""
    found: list[str] = []
    _find_in_text(f"{text_of(example.prompt)}\n{text_of(example.completion)}", found)
    _find_in_prompt(example.prompt, found)
    if is_empty(example.prompt):
        found.append("empty_prompt")
    if is_empty(example.completion):
        found.append("empty_completion")
    return found


def check_preference(example: PreferenceExample) -> list[str]:
    """Names of the checks that a pair fails."""
    prompt, chosen, rejected = text_of(example.prompt), text_of(example.chosen), text_of(example.rejected)
    found: list[str] = []
    _find_in_text(f"{prompt}\n{chosen}\n{rejected}", found)
    _find_in_prompt(example.prompt, found)
    if is_empty(example.prompt):
        found.append("empty_prompt")
    if is_empty(example.chosen):
        found.append("empty_chosen")
    if is_empty(example.rejected):
        found.append("empty_rejected")
    if chosen == rejected or chosen.strip() == rejected.strip():
        found.append("equal_sides")
    elif chosen and rejected and (chosen.startswith(rejected) or rejected.startswith(chosen)):
        found.append("prefix_sides")
    scores = example.chosen_score, example.rejected_score
    if scores[0] is not None and scores[1] is not None and scores[0] <= scores[1]:
        found.append("score_conflict")
    if len(chosen) > len(rejected):
        found.append("longer_chosen")
    return found


def reason_to_drop(found: list[str], policies: Mapping[str, str]) -> str | None:
    """The check by which an example is left out, if one of them says so."""
    reasons = [name for name in found if policies[name] != "keep"]
    return min(reasons, key=_ORDER.index) if reasons else None


_ORDER = (
    "empty_prompt", "empty_completion", "empty_chosen", "empty_rejected", "equal_sides", "score_conflict",
    "prefix_sides", "chat_markers", "placeholders", "replacement_characters", "turn_order", "no_input",
    "longer_chosen",
)  # fmt: skip
"""The one that is named where an example fails several."""

DESCRIPTIONS: Mapping[str, str] = {
    "empty_prompt": "has no prompt",
    "empty_completion": "has an empty answer",
    "empty_chosen": "has an empty preferred answer",
    "empty_rejected": "has an empty rejected answer",
    "equal_sides": "has two equal answers",
    "score_conflict": "has a preferred answer whose score is not the higher one",
    "prefix_sides": "has an answer that is the beginning of the other",
    "chat_markers": "holds marks of chat templates",
    "placeholders": "holds {{placeholders}}",
    "replacement_characters": "holds U+FFFD",
    "turn_order": "has two turns of one role in a row, or a system turn behind the first",
    "no_input": "ends with a word such as <noinput> in place of an input",
    "longer_chosen": "has a longer preferred answer",
}
"""What a check says of an example that fails it."""
