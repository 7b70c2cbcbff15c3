"""Chat templates: those that have a name, what they are told beside messages, and messages as they take them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import date
from typing import Any

import orjson

from dpo_cli.core.errors import ParamsError
from dpo_cli.data.schema import TOOLS, Message, Messages, user, with_tools

NAMED_TEMPLATES = {
    "plain": (
        "{{ bos_token or '' }}"
        "{% for m in messages %}"
        "{% if m.role == 'assistant' %}{{ 'Assistant: ' + m.content + eos_token + '\\n\\n' }}"
        "{% elif m.role == 'user' %}{{ 'User: ' + m.content + '\\n\\n' }}"
        "{% else %}{{ m.content + '\\n\\n' }}{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
    ),
    "chatml": (
        "{{ bos_token or '' }}"
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "alpaca": (
        "{{ bos_token or '' }}"
        "{% for m in messages %}"
        "{% if m.role == 'assistant' %}{{ '### Response:\\n' + m.content + eos_token + '\\n\\n' }}"
        "{% elif m.role == 'user' %}{{ '### Instruction:\\n' + m.content + '\\n\\n' }}"
        "{% else %}{{ m.content + '\\n\\n' }}{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"
    ),
}
"""Chat templates for models that bring none, by their name in model.chat_template."""


_TODAY = date(2024, 7, 26)
"""The day that templates are told which print the date: token ids must not change overnight."""
_FIXED_CLOCK = (
    "{%- macro strftime_now(form) -%}{{ form"
    + "".join(f" | replace('%{code}', '{_TODAY.strftime(f'%{code}')}')" for code in "aAbBdHIjmMpSyY")
    + " }}{%- endmacro -%}"
)
"""Put before a template that asks for the time, it answers in place of the clock."""
_OPENED_AT_END = re.compile(r"([<\[])([^<>\[\]\s]{1,40})([>\]])\s*$")
_CUT_MARK_AT_END = re.compile(r"[<\[][^<>\[\]\s]{0,40}$")


def with_fixed_clock(template: str) -> str:
    """A template that takes the time from no clock."""
    return f"{_FIXED_CLOCK}{template}" if "strftime_now" in template else template


def today(options: Mapping[str, Any]) -> dict[str, str]:
    """The day as a template is told it, where the user says none."""
    return {} if "date_string" in options else {"date_string": _TODAY.strftime("%d %b %Y")}


def with_options(template: str, options: Mapping[str, Any]) -> str:
    """A template that takes these values where it is told nothing else."""
    for name in options:
        if not re.search(rf"\b{re.escape(name)}\b", template):
            raise ParamsError(
                f"params.yaml: model.template_options.{name} has no effect: the model's chat template does not read it"
            )
    defaults = "".join(
        f"{{%- if {name} is not defined -%}}{{%- set {name} = {value!r} -%}}{{%- endif -%}}"
        for name, value in options.items()
    )
    return defaults + template


def fold_system(messages: Messages) -> Messages:
    """Messages without system turns: their texts stand before the next user turn, with a blank line between."""
    folded: Messages = []
    waiting: list[Message] = []
    for message in messages:
        if message["role"] == "system":
            waiting.append(message)
        elif message["role"] == "user" and waiting:
            said = "\n\n".join(each["content"] for each in [*waiting, message])
            folded.append({**message, "content": said})
            waiting = []
        else:
            folded.append(message)
    folded += [user(message["content"]) for message in waiting]
    return with_tools(folded, messages[0][TOOLS]) if messages and TOOLS in messages[0] else folded


def as_openai(message: Message) -> dict[str, Any]:
    """A message as templates take it: calls as objects, and no tools."""
    told: dict[str, Any] = {name: text for name, text in message.items() if name != TOOLS}
    return {**told, "tool_calls": orjson.loads(message["tool_calls"])} if "tool_calls" in message else told


def before_block(shared: str, head: str) -> str:
    """The part of a common beginning that stands before the block, such as ``<think>``, in which it stops.

    Args:
        shared: What a template's beginning of bare answers has in common with other answers.
        head: All of that beginning, in which the block is closed.
    """
    outside = _CUT_MARK_AT_END.sub("", shared)
    opened = _OPENED_AT_END.search(shared)
    if opened and f"{opened[1]}/{opened[2]}{opened[3]}" in head[len(shared) :]:
        return shared[: opened.start()]
    return outside


def behind(content: str, opener: str) -> str:
    """What an answer says behind an opener that stands before it already."""
    return content.removeprefix(opener) if content.startswith(opener) else content.removeprefix(opener.strip())
