"""What can be wrong with an example, by its text or by its tokens; what becomes of it is up to the policy.

Each check of texts has a setting of its name in data.checks (:class:`dpo_cli.core.data_params.DataChecks`), each one of
tokens in sft.checks and reference.checks (:class:`dpo_cli.core.params.TokenChecks`). Those that compare rows with each
other (duplicate, contradiction, repeated and shared prompts) are in :mod:`dpo_cli.data.repeats`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

from dpo_cli.data.problem import RowProblem
from dpo_cli.data.schema import TOOLS, Messages, PreferenceExample, SftExample, is_plain, text_of

if TYPE_CHECKING:
    from dpo_cli.data.chat import ChatEncoder, Encoding

FORMAT_CHECK = "malformed"
"""The check that rows fail which do not fit their format, whatever the reason."""

ROW_REASONS: Mapping[str, str] = {
    "tie": "tie", "both_bad": "tie", "empty_prompt": "empty_prompt", "contradiction": "contradiction",
}  # fmt: skip
"""The checks of which a row fails one where a format refuses it for these reasons."""

SAMPLED_OUT = "sampled_out"
"""The reason for which a source's weight leaves a row out."""
NO_FAULTS = frozenset((SAMPLED_OUT, "skipped", "undone", "taken_back", "repeat", "counted_together"))
"""Reasons to leave a row out that say nothing against it: the weight of its source, and those of votes."""

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
_NO_INPUT = re.compile(r"\n\W{0,4}no[ _-]?input\W{0,4}\Z", re.IGNORECASE)


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


def is_empty(messages: Messages) -> bool:
    """Whether there is nothing but white space: no text and no call, for reasoning alone is no answer."""
    for message in messages:
        text = message["content"]
        if (text and not text.isspace()) or "tool_calls" in message:
            return False
    return True


def check_example(example: SftExample | PreferenceExample) -> list[str]:
    """Names of the checks that an instruction or a pair fails."""
    prompt = example.prompt
    found: list[str] = []
    chosen = rejected = ""
    if isinstance(example, SftExample):
        text = f"{text_of(prompt)}\n{text_of(example.completion)}"
    else:
        chosen, rejected = text_of(example.chosen), text_of(example.rejected)
        text = f"{text_of(prompt)}\n{chosen}\n{rejected}"
    if has_chat_markers(text):
        found.append("chat_markers")
    if has_placeholders(text):
        found.append("placeholders")
    if "\ufffd" in text:
        found.append("replacement_characters")
    if len(prompt) > 1:
        roles = [message["role"] for message in prompt]
        if "system" in roles[1:] or any(one == other != "tool" for one, other in pairwise(roles)):
            found.append("turn_order")
    if "nput" in (last := prompt[-1]["content"])[-10:] and _NO_INPUT.search(last, max(len(last) - 20, 0)):
        found.append("no_input")
    if is_empty(prompt):
        found.append("empty_prompt")
    if isinstance(example, SftExample):
        if is_empty(example.completion):
            found.append("empty_completion")
        return found
    if example.chosen and is_empty(example.chosen):
        found.append("empty_chosen")
    if example.rejected and is_empty(example.rejected):
        found.append("empty_rejected")
    if not (example.chosen and example.rejected):  # a single answer, good or bad
        return found
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
    "turn_order": "has two turns of one role in a row, or a system turn after the first",
    "no_input": "ends with a word such as <noinput> in place of an input",
    "longer_chosen": "has a longer preferred answer",
}
"""What a check of texts says of an example that fails it; where it fails several, the first one here is named."""


def reason_to_drop(found: Sequence[str], policies: Mapping[str, str]) -> str | None:
    """The check by which an example is left out, if one of them says so."""
    reasons = [name for name in found if policies[name] != "keep"]
    return next((name for name in DESCRIPTIONS if name in reasons), None)


def without_stops(policies: Mapping[str, str]) -> dict[str, str]:
    """Policies for a look at the data: what would stop a stage is left out."""
    return {name: "drop" if policy == "error" else policy for name, policy in policies.items()}


# --- by tokens -----------------------------------------------------------------------------------

TOKEN_DETAILS: Mapping[str, str] = {
    "lost_eos": "has an answer that does not end with a token that ends the turn",
    "lost_text": (
        "has text that is not among its tokens: the model's chat template leaves it out, as many do with reasoning"
        " between <think> and </think>, or its tokenizer has no token for it; give reasoning as reasoning_content, or"
        " set model.chat_template"
    ),
    "equal_sides": "has two answers that are the same token by token",
    "doubled_opener": (
        "has an answer that begins with what the chat template opens before it, such as <think>; take it out of the"
        " answer's text"
    ),
    "tools_not_shown": (
        "has tools or calls that the model's chat template does not show: without them it writes the same; take a"
        " model whose template knows tools, or set the check to keep to train without them"
    ),
    "reasoning_not_shown": (
        "has reasoning that the model's chat template does not show; take a model whose template does, or"
        " set the check to keep to train on the answer alone"
    ),
    "double_bos": "has a prompt that begins with two BOS tokens",
    "double_eos": "has an answer whose text ends with an end token of its own",
}
"""What a check of tokens says of a row that fails it, and what helps."""

_TAG_AT_END = re.compile(r"(<[^<>\s]{1,40}>)\s*$")


@dataclass(frozen=True)
class TokenView:
    """How a model sees text, and what becomes of what it does not see as it should.

    Attributes:
        encoder: Its tokenizer with the chat template.
        max_length: Tokens a prompt with one answer may have; longer rows are left out.
        policies: What is done with what each check of tokens finds (:class:`dpo_cli.core.params.TokenChecks`).
        model: The model's folder, or ``embedded``, where it is named.
    """

    encoder: ChatEncoder
    max_length: int
    policies: Mapping[str, str]
    model: str = ""

    def without_stops(self) -> TokenView:
        """The same for a look at the data: what would stop a stage is left out."""
        return replace(self, policies=without_stops(self.policies))

    def judge(
        self, prompt: Messages, completions: Sequence[Messages], encoding: Encoding
    ) -> tuple[list[str], RowProblem | None]:
        """Names of the checks that a row's tokens fail, and why it is left out, if it is.

        Args:
            prompt: The prompt.
            completions: Its answers.
            encoding: What the encoder makes of them.
        """
        found = check_tokens(self.encoder, prompt, completions, encoding)
        longest = len(encoding.prompt) + max(map(len, encoding.completions))
        if longest > self.max_length:
            detail = f"has {longest} tokens, more than {self.max_length}"
            return ["over_long", *found], RowProblem("over_long", detail)
        dropped = next((name for name in found if self.policies[name] != "keep"), None)
        return found, None if dropped is None else RowProblem(dropped, TOKEN_DETAILS[dropped])


def check_tokens(
    encoder: ChatEncoder, prompt: Messages, completions: Sequence[Messages], encoding: Encoding
) -> list[str]:
    """Names of the checks that a row's tokens fail, but for the length; see :meth:`TokenView.judge`."""
    found = _hidden(encoder, prompt, completions, encoding) if not is_plain(prompt, *completions) else []
    tag = _TAG_AT_END.search(encoding.prompt_text[-80:])
    if tag is not None and any(text.lstrip().startswith(tag[1]) for text in encoding.texts):
        found.append("doubled_opener")
    ids = encoding.completions
    if (
        any(_lacks_a_token(encoder, *each) for each in zip(completions, ids, strict=True))
        or _loses_an_answer(completions, encoding)
        or _loses_a_turn(encoder, prompt, encoding.prompt_text)
    ):
        found.append("lost_text")
    if any(not each or each[-1] not in encoder.stop_ids for each in ids):
        found.append("lost_eos")
    if any(one == other for place, one in enumerate(ids) for other in ids[:place]):
        found.append("equal_sides")
    bos = encoder.tokenizer.bos_token_id
    if bos is not None and encoding.prompt[:2] == [bos, bos]:
        found.append("double_bos")
    if any(answer[-1]["content"].rstrip().endswith(encoder.end_texts) for answer in completions if answer):
        found.append("double_eos")
    return found


def _lacks_a_token(encoder: ChatEncoder, completion: Messages, ids: Sequence[int]) -> bool:
    """Whether the tokenizer has no token for a part of an answer."""
    if encoder.unknown_id is None or encoder.unknown_id not in ids:
        return False
    said, written = text_of(completion), encoder.tokenizer.decode([encoder.unknown_id])
    return encoder.tokenize(said).count(encoder.unknown_id) > said.count(written)


def _loses_an_answer(completions: Sequence[Messages], encoding: Encoding) -> bool:
    """Whether the template leaves out text of an answer; what it writes at the end of the prompt is not lost."""
    opened = _TAG_AT_END.search(encoding.prompt_text[-80:])
    return any(
        not _holds(f"{opened[1] if opened else ''}{text}", message["content"])
        for answer, text in zip(completions, encoding.texts, strict=True)
        for message in answer
    )


def _loses_a_turn(encoder: ChatEncoder, prompt: Messages, text: str) -> bool:
    """Whether the template leaves out a turn of the prompt; of earlier answers it may leave out the reasoning."""
    for place, message in enumerate(prompt):
        if message["role"] != "assistant" and not _holds(text, message["content"]):
            other = [*prompt[:place], {**message, "content": "?"}, *prompt[place + 1 :]]
            if _looks_alike(encoder, other, prompt, add_generation_prompt=True):
                return True
    return False


def _hidden(encoder: ChatEncoder, prompt: Messages, completions: Sequence[Messages], encoding: Encoding) -> list[str]:
    """Which of tools, calls and reasoning the template does not show: without them it writes the same."""
    found = []
    bare = _without(prompt, TOOLS)
    lists = [(prompt, True), *((prompt + completion, False) for completion in completions)]
    if (bare != prompt and _looks_alike(encoder, bare, prompt, add_generation_prompt=True)) or any(
        _looks_alike(encoder, _without(messages, "tool_calls", place), messages, add_generation_prompt=opens)
        for messages, opens in lists
        for place, message in enumerate(messages)
        if "tool_calls" in message
    ):
        found.append("tools_not_shown")
    if any(
        not _holds(text, message.get("reasoning_content", ""))
        for completion, text in zip(completions, encoding.texts, strict=True)
        for message in completion
    ):
        found.append("reasoning_not_shown")
    return found


def _looks_alike(encoder: ChatEncoder, one: Messages, other: Messages, *, add_generation_prompt: bool) -> bool:
    try:
        return encoder.render(one, add_generation_prompt=add_generation_prompt) == encoder.render(
            other, add_generation_prompt=add_generation_prompt
        )
    except RowProblem:
        return False


def _without(messages: Messages, field: str, place: int = 0) -> Messages:
    """Messages of which one lacks a field."""
    if not messages or field not in messages[place]:
        return messages
    bare = {name: text for name, text in messages[place].items() if name != field}
    return [*messages[:place], bare, *messages[place + 1 :]]


def _holds(text: str, part: str) -> bool:
    """Whether a text holds another, whatever the white space in both."""
    return part.strip() in text or "".join(part.split()) in "".join(text.split())
