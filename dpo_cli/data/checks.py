"""What makes a row unfit for training, whatever its format."""

from __future__ import annotations

from dpo_cli.data.schema import Messages, PreferenceExample, SftExample, text_of


def _is_empty(messages: Messages) -> bool:
    return not text_of(messages).strip()


def check_sft(example: SftExample) -> str | None:
    """The reason to leave an instruction row out, if there is one."""
    if _is_empty(example.prompt):
        return "empty_prompt"
    if _is_empty(example.completion):
        return "empty_completion"
    return None


def check_preference(example: PreferenceExample) -> str | None:
    """The reason to leave a pair out, if there is one."""
    if _is_empty(example.prompt):
        return "empty_prompt"
    if _is_empty(example.chosen):
        return "empty_chosen"
    if _is_empty(example.rejected):
        return "empty_rejected"
    if text_of(example.chosen).strip() == text_of(example.rejected).strip():
        return "equal_sides"
    return None
