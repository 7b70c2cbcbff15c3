"""Chat templates: from messages to the token ids of a prompt and of its completions.

Prompt and completion are rendered by the same template and joined as ids, so the boundary
between them is exact. What the template writes before every answer belongs to the prompt; the
token that ends the model's turn belongs to the completion and is scored.
"""

from __future__ import annotations

import os.path
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import pairwise
from typing import Any
from uuid import uuid4

import orjson
from jinja2 import TemplateError

from dpo_cli.core.errors import MachineError
from dpo_cli.data.problem import RowProblem
from dpo_cli.data.schema import TOOLS, Messages, assistant, is_plain, user
from dpo_cli.data.templates import (
    NAMED_TEMPLATES,
    as_openai,
    before_block,
    behind,
    fold_system,
    today,
    with_fixed_clock,
    with_options,
)

_STAND_INS = ("alpha", "omega")
"""Two answers without a common beginning: what a template writes for both before them, it writes before any."""
_MARK = re.compile(r"<[^<>\s]{1,40}>")
_RARE_LETTERS = "\U00012000 \U00013000 \U00016800"
"""Of Sumer, Egypt and Bamum: a tokenizer that knows letters alone, and no bytes, lacks one of them."""


@dataclass(frozen=True)
class Encoding:
    """A prompt with some of its completions, as the model sees them.

    Attributes:
        prompt: Token ids of the prompt, up to where what is scored begins.
        completions: Token ids of each completion; the last one ends the turn.
        prompt_text: The prompt as the template writes it.
        texts: What the template writes behind the prompt for each completion.
    """

    prompt: list[int]
    completions: list[list[int]]
    prompt_text: str
    texts: list[str]

    def only(self, places: Sequence[int]) -> Encoding:
        """The same with some of the completions, by their places."""
        return Encoding(
            self.prompt,
            [self.completions[place] for place in places],
            self.prompt_text,
            [self.texts[place] for place in places],
        )


class ChatEncoder:
    """Encodes messages with one tokenizer and one chat template.

    Args:
        tokenizer: The model's tokenizer, of transformers.
        template: ``auto`` for the tokenizer's own template, or a name in NAMED_TEMPLATES.
        options: What the template is told beside the messages, such as ``{"enable_thinking": False}``.
        system: ``keep``: system turns are handed to the template; ``fold``: their text goes before
            the user turn that follows.
        end_ids: Tokens at which generation stops beside the template's and the tokenizer's.

    Attributes:
        template: The chat template in use, with the options as its defaults and, where the model's
            own had none, with a generation prompt.
        end_id: The token that ends the model's turn.
        opener: What the template writes before every answer that has no reasoning, and its
            generation prompt does not; mostly nothing.
        warnings: What is odd about template and tokenizer, in whole sentences.
        num_rows: Rows of the model's embedding, where that is known: an id must be below it.
        tokenizer: The model's tokenizer.
        end_texts: The tokens at which generation stops, as texts.
        unknown_id: The token that it writes in place of text that it does not know, where it does so.

    Raises:
        MachineError: The tokenizer has no EOS token, no template where ``auto`` asks for it, or not
            the tokens of the named one; or the template cannot take a plain exchange.
        ParamsError: The template does not read one of the options.
    """

    def __init__(
        self,
        tokenizer: Any,
        template: str = "auto",
        *,
        options: Mapping[str, Any] | None = None,
        system: str = "keep",
        end_ids: Sequence[int] = (),
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise MachineError("the model's tokenizer has no EOS token; set eos_token in its tokenizer_config.json")
        own = tokenizer.chat_template
        own = own.get("default") if isinstance(own, dict) else own  # some tokenizers have several, by name
        if template == "auto" and not own:
            raise MachineError(
                "the model has no chat template; set model.chat_template to one of " + ", ".join(NAMED_TEMPLATES)
            )
        self.tokenizer = tokenizer
        self.num_rows: int | None = None
        self._folds = system == "fold"
        self._today = today(options or {})
        self._use(with_options(NAMED_TEMPLATES.get(template) or str(own), options or {}))
        self.opener = ""
        self.warnings: list[str] = []
        if template == "chatml":
            self._refuse_letters()
        added = getattr(tokenizer, "added_tokens_decoder", {})
        self._special_ids = frozenset(tokenizer.all_special_ids) | {
            token_id for token_id, token in added.items() if token.special
        }
        self.end_id: int = tokenizer.eos_token_id
        self._stop_ids: frozenset[int] = frozenset()
        unknown = getattr(tokenizer, "unk_token_id", None)
        # a tokenizer of bytes never writes its unknown token in place of text, though it may end turns with it
        self.unknown_id: int | None = unknown if unknown in self.tokenize(_RARE_LETTERS) else None
        self.end_id = self._probe()
        self._stop_ids = frozenset({self.end_id, int(tokenizer.eos_token_id), *end_ids})
        self.end_texts = tuple(filter(None, (tokenizer.decode([token_id]).strip() for token_id in self.stop_ids)))

    @property
    def stop_ids(self) -> list[int]:
        """Tokens at which generation stops: the template's, the tokenizer's and those that the model names."""
        return sorted(self._stop_ids)

    @property
    def identity(self) -> dict[str, Any]:
        """All that decides the token ids of messages and what the checks find in them.

        A tokenizer that cannot be written as text has another one each time.
        """
        tokenizer = self.tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        return {
            "tokenizer": str(uuid4()) if backend is None else backend.to_str(),
            "class": type(tokenizer).__name__,
            "special_tokens": {name: str(text) for name, text in getattr(tokenizer, "special_tokens_map", {}).items()},
            "template": self._rendered,
            "opener": self.opener,
            "fold_system": self._folds,
            **self._today,
            "special_ids": sorted(self._special_ids),
            "stop_ids": self.stop_ids,
            "end_id": self.end_id,
            "num_rows": self.num_rows,
            "versions": {name: version(name) for name in ("jinja2", "tokenizers", "transformers")},
        }

    # --- what the template is like ------------------------------------------------------------

    def _use(self, template: str) -> None:
        self.template = template
        self._rendered = with_fixed_clock(template)

    def _refuse_letters(self) -> None:
        marks = [mark for mark in ("<|im_start|>", "<|im_end|>") if len(self.tokenize(mark)) != 1]
        if marks:
            raise MachineError(
                f"model.chat_template chatml writes {' and '.join(marks)}, which the model's tokenizer does not have as"
                " tokens: they would be read letter by letter; set it to plain or alpaca"
            )

    def _probe(self) -> int:
        """Try the template on one short exchange, learn what it writes before an answer, and what ends the turn."""
        question, answer = [user("question")], [assistant("answer")]
        remedy = f"set model.chat_template to one of {', '.join(NAMED_TEMPLATES)}"
        try:
            text = self.render(question + answer)
            if "question" not in text or "answer" not in text:
                raise MachineError(f"the model's chat template leaves out what a plain message says; {remedy}")
            self._learn_opener(question)
            return self.encode(question, [answer]).completions[0][-1]
        except RowProblem as problem:
            raise MachineError(f"a question with its answer {problem}; {remedy}") from None

    def _learn_opener(self, question: Messages) -> None:
        head, closing = self._around_answer(question)
        before = self.render(question, add_generation_prompt=True)
        # a space before an answer belongs to its first word's token
        opener = head[len(before) :].rstrip(" ") if head.startswith(before) else ""
        if opener.strip() and before == self.render(question):
            self._use(f"{self.template}{{% if add_generation_prompt %}}{{{{ {opener!r} }}}}{{% endif %}}")
            self.warnings.append(
                f"the model's chat template has no generation prompt; {opener!r}, which it writes before every answer,"
                " is taken for it, and written into the template that is saved with the model"
            )
        elif opener.strip():
            self.opener = opener
            self.warnings.append(
                f"the model's chat template writes {opener!r} before every answer without reasoning, which its"
                " generation prompt does not: it counts as part of the prompt, and whoever serves the model must write"
                " it, too; model.template_options may do that, such as {enable_thinking: false}"
            )
        elif before.startswith(head) and before[len(head) :].strip():
            self.warnings.append(
                f"the model's chat template ends its generation prompt with {before[len(head) :]!r}, with which its"
                " answers do not begin: answers that do are trained as they are generated, others begin before it"
            )
        for mark in dict.fromkeys(_MARK.findall(closing)):
            if len(self.tokenize(mark)) != 1:
                self.warnings.append(
                    f"the model's chat template ends a turn with {mark}, which its tokenizer does not have as a token:"
                    " it is read letter by letter"
                )

    def _around_answer(self, prompt: Messages) -> tuple[str, str]:
        """What the template writes before and behind any answer to a prompt."""
        one, other = (self.render([*prompt, assistant(text)]) for text in _STAND_INS)
        head = os.path.commonprefix([one, other])  # noqa: RUF071 (texts, not paths)
        return head, one[len(head) :].removeprefix(_STAND_INS[0])

    # --- encoding -----------------------------------------------------------------------------

    def encode_prompt(self, prompt: Messages) -> list[int]:
        """Token ids of a prompt, up to where an answer begins that has no reasoning.

        Raises:
            RowProblem: The template refuses these messages, or makes nothing of them.
        """
        return self._prompt_ids(self.render(prompt, add_generation_prompt=True) + self.opener)

    def encode_completion(self, prompt: Messages, completion: Messages) -> list[int]:
        """Token ids of a single completion of this prompt, as :meth:`encode` has them.

        Raises:
            RowProblem: The template refuses these messages.
        """
        return self.encode(prompt, [completion]).completions[0]

    def encode(self, prompt: Messages, completions: Sequence[Messages]) -> Encoding:
        """Token ids of a prompt and of some completions of it, which share all of the prompt.

        Where the ids of a completion together with the prompt begin with the prompt's, the rest of
        them is the completion; else it is tokenized apart.

        Raises:
            RowProblem: The template refuses these messages, or makes nothing of the prompt.
        """
        before = self.render(prompt, add_generation_prompt=True)
        wholes = [self.render(prompt + completion) for completion in completions]
        start = before + self.opener
        if self.opener and not all(whole.startswith(start) for whole in wholes):
            start = before
        if all(whole.startswith(start) for whole in wholes):
            texts = [whole[len(start) :] for whole in wholes]
        else:
            start, texts = self._part(prompt, completions, before, wholes)
        ids = self._prompt_ids(start)
        return Encoding(ids, [self._completion_ids(ids, start, text) for text in texts], start, texts)

    def _part(
        self, prompt: Messages, completions: Sequence[Messages], before: str, wholes: Sequence[str]
    ) -> tuple[str, list[str]]:
        """The prompt and what follows it, where an answer does not simply follow the generation prompt."""
        head, closing = self._around_answer(prompt)
        if not before.endswith(" "):
            head = head.rstrip(" ")  # a space before an answer belongs to its first word's token
        surplus = before[len(head) :] if before.startswith(head) else ""
        if not all(whole.startswith(head) for whole in wholes):
            # the template closes a thought before answers that have none, and one of these has
            shared = before_block(os.path.commonprefix([head, *wholes]), head)  # noqa: RUF071
            start = shared if before.startswith(shared) else before.removesuffix(head[len(shared) :])
            return start, [whole[len(shared) :] for whole in wholes]
        if surplus.strip():
            # the generation prompt opens what answers begin with, such as <think>, and the template writes no opener
            contents = [completion[-1]["content"].lstrip() for completion in completions]
            if is_plain(*completions) and all(content.startswith(surplus.strip()) for content in contents):
                return before, [behind(content, surplus) + closing for content in contents]
            start = head
        else:
            # the prompt itself is written otherwise once an answer follows
            start = before + (self.opener if self.opener and head.endswith(self.opener) else "")
        return start, [whole[len(head) :] for whole in wholes]

    def _prompt_ids(self, text: str) -> list[int]:
        ids = self.tokenize(text)
        if not ids:
            raise RowProblem("empty_prompt", "has a prompt of which the model's chat template makes no token")
        return ids

    def _completion_ids(self, prompt_ids: Sequence[int], prompt: str, text: str) -> list[int]:
        ids = self.tokenize(prompt + text)
        ids = ids[len(prompt_ids) :] if ids[: len(prompt_ids)] == prompt_ids else self.tokenize(text)
        end = len(ids)  # of the text: behind it stand only special tokens and white space
        while end and self._says_nothing(ids[end - 1]):
            end -= 1
        behind = range(end, len(ids))
        closing = next((place for place in behind if ids[place] in self._stop_ids), None)
        if closing is None:
            closing = next((place for place in behind if ids[place] in self._special_ids), None)
        return ids[: closing + 1] if closing is not None else [*ids, self.end_id]

    def _says_nothing(self, token_id: int) -> bool:
        if token_id == self.unknown_id and token_id not in self._stop_ids:
            return False  # it stands for text
        return token_id in self._special_ids or not self.decode([token_id]).strip()

    # --- text ---------------------------------------------------------------------------------

    def decode(self, token_ids: list[int]) -> str:
        """The text of token ids, special tokens left out."""
        return self.tokenizer.decode(token_ids, skip_special_tokens=True)

    def render(self, messages: Messages, *, add_generation_prompt: bool = False) -> str:
        """The text that the template makes of messages.

        Raises:
            RowProblem: It refuses them.
        """
        told = fold_system(messages) if self._folds else messages
        try:
            return self._apply(told, add_generation_prompt)
        except (TemplateError, TypeError, ValueError) as error:
            raise RowProblem(
                "template_refused", f"is refused by the model's chat template: {error}{self._way_out(told)}"
            ) from None

    def _apply(self, messages: Messages, add_generation_prompt: bool) -> str:
        tools: dict[str, Any] = {}
        if not is_plain(messages):
            if TOOLS in messages[0]:
                tools[TOOLS] = orjson.loads(messages[0][TOOLS])
            messages = [as_openai(message) for message in messages]
        return self.tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            chat_template=self._rendered,
            **self._today,
            **tools,
        )

    def _way_out(self, messages: Messages) -> str:
        """What helps where the template refuses some messages."""
        roles = [message["role"] for message in messages]
        if "system" in roles:
            try:
                self._apply(fold_system(messages), add_generation_prompt=False)
            except (TemplateError, TypeError, ValueError):
                pass
            else:
                return "; say model.system: fold to put the system turn into the user's"
        twice = next((role for role, after in pairwise(roles) if role == after), None)
        return f"; two turns of the {twice} follow each other, which can be joined in the file" if twice else ""

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text.

        Raises:
            RowProblem: One is beyond the model's embedding.
        """
        ids = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        if self.num_rows is not None and ids and max(ids) >= self.num_rows:
            token = self.tokenizer.decode([max(ids)])
            raise RowProblem(
                "unknown_token", f"holds {token!r}, token {max(ids)}: the model's embedding has {self.num_rows} rows"
            )
        return ids
