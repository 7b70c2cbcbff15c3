"""Chat templates: from messages to the token ids of a prompt and of its completions.

Prompt and completion are rendered by the same template, tokenised apart and joined as ids,
so the boundary between them is exact. The token that ends the model's turn belongs to the
completion and is scored.
"""

from __future__ import annotations

from typing import Any, Protocol

from jinja2 import TemplateError

from dpo_cli.core.errors import MachineError
from dpo_cli.data.formats.base import RowProblem
from dpo_cli.data.schema import Messages, assistant, text_of, user

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


class Tokenizer(Protocol):
    """What is used of a Hugging Face tokenizer."""

    chat_template: Any
    eos_token_id: Any
    all_special_ids: Any

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any:
        """Render messages as text."""
        ...

    def __call__(self, text: str, **kwargs: Any) -> Any:
        """Tokenise a text."""
        ...

    def decode(self, token_ids: Any, **kwargs: Any) -> Any:
        """The text of token ids."""
        ...


class ChatEncoder:
    """Encodes messages with one tokenizer and one chat template.

    Args:
        tokenizer: The model's tokenizer.
        template: ``auto`` for the tokenizer's own template, or a name in NAMED_TEMPLATES.

    Attributes:
        end_id: The token that ends the model's turn.

    Raises:
        MachineError: The tokenizer has no EOS token, or no template where ``auto`` asks for it.
    """

    def __init__(self, tokenizer: Tokenizer, template: str = "auto") -> None:
        if tokenizer.eos_token_id is None:
            raise MachineError("the model's tokenizer has no EOS token; set eos_token in its tokenizer_config.json")
        if template == "auto" and not tokenizer.chat_template:
            raise MachineError(
                "the model has no chat template; set model.chat_template to one of " + ", ".join(NAMED_TEMPLATES)
            )
        self._tokenizer = tokenizer
        self._template = NAMED_TEMPLATES.get(template)
        self._special_ids = frozenset(tokenizer.all_special_ids)
        self.end_id: int = tokenizer.eos_token_id
        self.end_id = self.encode_completion([user("a")], [assistant("b")])[-1]

    @property
    def stop_ids(self) -> list[int]:
        """Tokens at which generation stops."""
        return sorted({self.end_id, int(self._tokenizer.eos_token_id)})

    def encode_prompt(self, prompt: Messages) -> list[int]:
        """Token ids of a prompt, up to where the model's turn begins.

        Raises:
            RowProblem: The template refuses these messages.
        """
        return self._tokenise(self._render(prompt, add_generation_prompt=True))

    def encode_completion(self, prompt: Messages, completion: Messages) -> list[int]:
        """Token ids of a completion of this prompt, with the token that ends the turn.

        Where the template writes the prompt differently once an answer follows, the
        completion's bare text is taken.

        Raises:
            RowProblem: The template refuses these messages.
        """
        before = self._render(prompt, add_generation_prompt=True)
        whole = self._render(prompt + completion, add_generation_prompt=False)
        ids = self._tokenise(whole[len(before) :] if whole.startswith(before) else text_of(completion))
        last_special = max((i for i, token in enumerate(ids) if token in self._special_ids), default=None)
        if last_special is not None and not self.decode(ids[last_special + 1 :]).strip():
            return ids[: last_special + 1]
        return [*ids, self.end_id]

    def decode(self, token_ids: list[int]) -> str:
        """The text of token ids, special tokens left out."""
        return self._tokenizer.decode(token_ids, skip_special_tokens=True)

    def _render(self, messages: Messages, *, add_generation_prompt: bool) -> str:
        try:
            return self._tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                chat_template=self._template,
            )
        except TemplateError as error:
            raise RowProblem("template_refused", f"the model's chat template refuses it: {error}") from None

    def _tokenise(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])
