"""What can be wrong with the tokens that a model's chat template and tokenizer make of a row."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from dpo_cli.data.chat import ChatEncoder, Encoding
from dpo_cli.data.problem import RowProblem
from dpo_cli.data.schema import TOOLS, Messages, is_plain, text_of

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


def check_tokens(
    encoder: ChatEncoder, prompt: Messages, completions: Sequence[Messages], encoding: Encoding
) -> list[str]:
    """Names of the checks (:class:`dpo_cli.core.params.TokenChecks`) that a row's tokens fail, but for the length.

    Args:
        encoder: The model's chat encoder.
        prompt: The prompt.
        completions: Its answers.
        encoding: What the encoder makes of them.
    """
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
