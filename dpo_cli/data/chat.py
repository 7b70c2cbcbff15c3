"""Chat templates: from messages to the token ids of a prompt and of its completions.

Prompt and completion are rendered by the same template and joined as ids, so the boundary
between them is exact. The token that ends the model's turn belongs to the
completion and is scored.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date
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


_TODAY = date(2024, 7, 26)
"""The day that templates are told which print the date: token ids must not change overnight."""
_FIXED_CLOCK = (
    "{%- macro strftime_now(form) -%}{{ form"
    + "".join(f" | replace('%{code}', '{_TODAY.strftime(f'%{code}')}')" for code in "aAbBdHIjmMpSyY")
    + " }}{%- endmacro -%}"
)
"""Put before a template that asks for the time, it answers in place of the clock."""


class Tokenizer(Protocol):
    """What is used of a Hugging Face tokenizer."""

    chat_template: Any
    bos_token_id: Any
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
        template: The chat template in use.
        end_id: The token that ends the model's turn.
        num_rows: Rows of the model's embedding, where that is known: an id must be below it.

    Raises:
        MachineError: The tokenizer has no EOS token, or no template where ``auto`` asks for it.
    """

    def __init__(self, tokenizer: Tokenizer, template: str = "auto") -> None:
        if tokenizer.eos_token_id is None:
            raise MachineError("the model's tokenizer has no EOS token; set eos_token in its tokenizer_config.json")
        own = tokenizer.chat_template
        own = own.get("default") if isinstance(own, dict) else own  # some tokenizers have several, by name
        if template == "auto" and not own:
            raise MachineError(
                "the model has no chat template; set model.chat_template to one of " + ", ".join(NAMED_TEMPLATES)
            )
        self._tokenizer = tokenizer
        self.template = NAMED_TEMPLATES.get(template) or str(own)
        self._rendered = f"{_FIXED_CLOCK}{self.template}" if "strftime_now" in self.template else self.template
        added = getattr(tokenizer, "added_tokens_decoder", {})
        self._special_ids = frozenset(tokenizer.all_special_ids) | {
            token_id for token_id, token in added.items() if token.special
        }
        self.num_rows: int | None = None
        self.end_id: int = tokenizer.eos_token_id
        self.end_id = self._probe()
        self._end_texts = tuple(filter(None, (tokenizer.decode([token_id]).strip() for token_id in self.stop_ids)))

    @property
    def stop_ids(self) -> list[int]:
        """Tokens at which generation stops."""
        return sorted({self.end_id, int(self._tokenizer.eos_token_id)})

    def _probe(self) -> int:
        """Try the template on one short exchange; the token that ends the turn in it."""
        question, answer = [user("question")], [assistant("answer")]
        remedy = f"set model.chat_template to one of {', '.join(NAMED_TEMPLATES)}"
        try:
            text = self._render(question + answer, add_generation_prompt=False)
            end = self.encode_completion(question, answer)[-1]
        except RowProblem as problem:
            raise MachineError(f"a question and its answer: {problem}; {remedy}") from None
        if "question" not in text or "answer" not in text:
            raise MachineError(f"the model's chat template leaves out what a plain message says; {remedy}")
        return end

    def encode_prompt(self, prompt: Messages) -> list[int]:
        """Token ids of a prompt, up to where the model's turn begins.

        Raises:
            RowProblem: The template refuses these messages, or makes nothing of them.
        """
        ids = self._tokenise(self._render(prompt, add_generation_prompt=True))
        if not ids:
            raise RowProblem("empty_prompt", "the model's chat template makes no token of the prompt")
        return ids

    def encode_completion(self, prompt: Messages, completion: Messages) -> list[int]:
        """Token ids of a completion of this prompt, with the token that ends the turn.

        Where the template writes the prompt differently once an answer follows, the
        completion's bare text is taken. Where the ids of both together begin with the prompt's,
        the rest of them is the completion; else it is tokenised apart.

        Raises:
            RowProblem: The template refuses these messages.
        """
        before = self._render(prompt, add_generation_prompt=True)
        whole = self._render(prompt + completion, add_generation_prompt=False)
        if whole.startswith(before):
            prompt_ids, ids = self._tokenise(before), self._tokenise(whole)
            same = ids[: len(prompt_ids)] == prompt_ids
            ids = ids[len(prompt_ids) :] if same else self._tokenise(whole[len(before) :])
        else:
            ids = self._tokenise(text_of(completion))
        end = len(ids)  # of the text: behind it stand only special tokens and white space
        while end and (ids[end - 1] in self._special_ids or not self.decode(ids[end - 1 : end]).strip()):
            end -= 1
        closing = next((i for i in range(end, len(ids)) if ids[i] in self._special_ids), None)
        return ids[: closing + 1] if closing is not None else [*ids, self.end_id]

    def check_tokens(
        self, prompt_ids: Sequence[int], completions: Sequence[Messages], completions_ids: Sequence[Sequence[int]]
    ) -> list[str]:
        """Names of the checks (:class:`dpo_cli.core.params.TokenChecks`) that a row's tokens fail, but for the length.

        Args:
            prompt_ids: Token ids of the prompt.
            completions: Its answers.
            completions_ids: Token ids of each answer.
        """
        found = []
        bos = self._tokenizer.bos_token_id
        if bos is not None and list(prompt_ids[:2]) == [bos, bos]:
            found.append("double_bos")
        if any(text_of(completion).rstrip().endswith(self._end_texts) for completion in completions):
            found.append("double_eos")
        stop_ids = self.stop_ids
        if any(not ids or ids[-1] not in stop_ids for ids in completions_ids):
            found.append("lost_eos")
        return found

    def decode(self, token_ids: list[int]) -> str:
        """The text of token ids, special tokens left out."""
        return self._tokenizer.decode(token_ids, skip_special_tokens=True)

    def _render(self, messages: Messages, *, add_generation_prompt: bool) -> str:
        try:
            return self._tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                chat_template=self._rendered,
                date_string=_TODAY.strftime("%d %b %Y"),
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise RowProblem("template_refused", f"the model's chat template refuses it: {error}") from None

    def _tokenise(self, text: str) -> list[int]:
        ids = list(self._tokenizer(text, add_special_tokens=False)["input_ids"])
        if self.num_rows is not None and ids and max(ids) >= self.num_rows:
            token = self._tokenizer.decode([max(ids)])
            raise RowProblem(
                "unknown_token", f"holds {token!r}, token {max(ids)}: the model's embedding has {self.num_rows} rows"
            )
        return ids
