"""Ollama's Modelfile against the chat template that it is made of."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from dpo_cli.core.errors import MachineError
from dpo_cli.data.chat import ChatEncoder
from dpo_cli.data.schema import Messages, assistant, user
from dpo_cli.exporting.modelfile import modelfile, problems_of_modelfile, render, turns_of
from tests.unit.data.test_chat_templates import GEMMA2, LLAMA3, MISTRAL, QWEN3, SPECIAL

CHATML = (
    "{% for message in messages %}{% if loop.first and message.role != 'system' %}<|system|>You help.<|end|>\n"
    "{% endif %}{{ '<|' + message.role + '|>\n' + message.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
NO_SYSTEM = (
    "{% for message in messages %}{% if message.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{{ '<|' + message.role + '|>' + message.content + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CONVERSATIONS: list[Messages] = [
    [user("Hi {{ .System }}")],
    [user("a"), assistant("b"), user("c")],
]
WITH_SYSTEM: list[Messages] = [[{"role": "system", "content": "Be brief."}, *each] for each in CONVERSATIONS]


def encoder_of(tokenizer: Any, template: str, options: dict[str, Any] | None = None) -> ChatEncoder:
    other = copy.deepcopy(tokenizer)
    other.add_special_tokens({"additional_special_tokens": SPECIAL})
    other.chat_template = template
    return ChatEncoder(other, options=options)


@pytest.mark.parametrize(
    ("template", "takes_system", "options"),
    [
        (CHATML, True, {}),
        (NO_SYSTEM, False, {}),
        (LLAMA3, True, {}),
        (QWEN3, True, {"enable_thinking": False}),
        (MISTRAL, False, {}),
        (GEMMA2, False, {}),
    ],
    ids=["a default system message", "no system message", "Llama 3", "Qwen 3", "Mistral", "Gemma 2"],
)
def test_it_makes_the_tokenizers_own_tokens(
    template: str, takes_system: bool, options: dict[str, Any], tokenizer: Any
) -> None:
    encoder = encoder_of(tokenizer, template, options)
    turns = turns_of(encoder, "")
    assert (turns.system is not None) == takes_system
    text = modelfile("model.gguf", turns, encoder.end_texts)
    assert problems_of_modelfile(text, encoder, CONVERSATIONS + WITH_SYSTEM * takes_system, "") == []
    assert text.startswith("FROM ./model.gguf\n")
    assert all(f'PARAMETER stop "{stop}"' in text for stop in encoder.end_texts)


def test_what_the_server_puts_before_every_text_is_left_out(tokenizer: Any) -> None:
    encoder = encoder_of(tokenizer, "<|pad|>" + CHATML)
    turns = turns_of(encoder, "<|pad|>")
    assert "<|pad|>" not in turns.go()
    text = modelfile("model.gguf", turns, encoder.end_texts)
    assert problems_of_modelfile(text, encoder, CONVERSATIONS + WITH_SYSTEM, "<|pad|>") == []
    assert "makes other tokens" in problems_of_modelfile(text, encoder, CONVERSATIONS, "")[0]


def test_a_template_that_is_no_chain_of_turns_is_refused(tokenizer: Any) -> None:
    counting = CHATML.replace("message.content", "loop.index|string + message.content")
    with pytest.raises(MachineError, match="no chain of turns"):
        turns_of(encoder_of(tokenizer, counting), "")


def test_templates_of_other_hands_are_read() -> None:
    """As Ollama's library writes them: white space trimmed, fields of the root, an else."""
    asked, answered = '{{- if eq .Role "user" }}U:{{ .Content }}', "{{ else }}A:{{ .Content }};{{ end -}}"
    go = f"{{{{- range .Messages }}}}\n{asked}{answered}\n{{{{ end }}}}"
    assert render(go, [user("a"), assistant("b"), user("c")]) == "U:aA:b;U:c"
    assert render("{{ if .System }}{{ .System }}{{ else }}none{{ end }}", [user("a")]) == "none"
    for wrong in ("{{ if .System }}", "{{ end }}", "{{ .Prompt }}", "{{ slice .Messages 1 }}"):
        with pytest.raises(ValueError, match="{{"):
            render(wrong, [user("a")])
