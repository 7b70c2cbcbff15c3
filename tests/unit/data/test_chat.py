"""From messages to token ids: an exact boundary, and an end of turn that is scored."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from dpo_cli.core.errors import MachineError
from dpo_cli.data.chat import ChatEncoder
from dpo_cli.data.schema import Messages, assistant, user

PROMPT: Messages = [{"role": "system", "content": "Be kind."}, user("Hi"), assistant("Hello"), user("Add 1: 5 cats")]
ANSWER: Messages = [assistant("6 cats")]


@pytest.fixture
def own(tokenizer: Any) -> Any:
    """A copy of the tokenizer that a test may change."""
    return copy.deepcopy(tokenizer)


def encoded(encoder: ChatEncoder, tokenizer: Any, prompt: Messages, answer: Messages) -> tuple[str, str]:
    """Prompt and completion as the model sees them, special tokens shown."""
    return (
        tokenizer.decode(encoder.encode_prompt(prompt)),
        tokenizer.decode(encoder.encode_completion(prompt, answer)),
    )


@pytest.mark.parametrize(
    ("name", "prompt", "completion"),
    [
        (
            "auto",
            "<|system|>Be kind.<|end|><|user|>Hi<|end|><|assistant|>Hello<|end|><|user|>Add 1: 5 cats<|end|>"
            "<|assistant|>",
            "6 cats<|end|>",
        ),
        (
            "plain",
            "Be kind.\n\nUser: Hi\n\nAssistant: Hello<|end|>\n\nUser: Add 1: 5 cats\n\nAssistant:",
            " 6 cats<|end|>",
        ),
        (
            "alpaca",
            "Be kind.\n\n### Instruction:\nHi\n\n### Response:\nHello<|end|>\n\n"
            "### Instruction:\nAdd 1: 5 cats\n\n### Response:\n",
            "6 cats<|end|>",
        ),
    ],
)
def test_the_template_is_the_models_or_a_named_one(tokenizer: Any, name: str, prompt: str, completion: str) -> None:
    assert encoded(ChatEncoder(tokenizer, name), tokenizer, PROMPT, ANSWER) == (prompt, completion)


def test_chatml_ends_the_turn_with_its_own_token_where_the_model_has_one(own: Any) -> None:
    own.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    encoder = ChatEncoder(own, "chatml")
    assert encoded(encoder, own, PROMPT, ANSWER)[1] == "6 cats<|im_end|>"
    assert encoder.end_id == own.convert_tokens_to_ids("<|im_end|>")
    assert encoder.stop_ids == sorted([own.eos_token_id, encoder.end_id])


@pytest.mark.parametrize("name", ["auto", "plain", "alpaca"])
@pytest.mark.parametrize("text", ["6 cats", "", " leading", "trailing \n", "两只猫。😀", "<|user|>odd", "a<|end|>b"])
def test_a_completion_ends_its_turn_exactly_once_and_keeps_its_text(tokenizer: Any, name: str, text: str) -> None:
    encoder = ChatEncoder(tokenizer, name)
    ids = encoder.encode_completion(PROMPT, [assistant(text)])
    assert ids[-1] == encoder.end_id
    assert len(ids) < 2 or ids[-2] != encoder.end_id
    if "<|" not in text:
        assert ids.count(encoder.end_id) == 1
        shown = encoder.decode(ids)
        assert shown == (f" {text}" if name == "plain" else text)


def test_prompt_and_completion_are_tokenized_apart(tokenizer: Any) -> None:
    """Joined text would merge tokens across the boundary and move it."""
    encoder = ChatEncoder(tokenizer, "plain")
    ids = encoder.encode_prompt([user("x")])
    joined = tokenizer("User: x\n\nAssistant: 6", add_special_tokens=False)["input_ids"]
    completion = encoder.encode_completion([user("x")], [assistant("6")])
    assert tokenizer.decode(ids) == "User: x\n\nAssistant:"
    assert tokenizer.decode([*ids, *completion[:-1]]) == tokenizer.decode(joined)


def test_the_bos_token_stands_once_before_the_prompt(own: Any) -> None:
    own.bos_token = "<|system|>"
    own.add_bos_token = True
    encoder = ChatEncoder(own, "plain")
    assert own.decode(encoder.encode_prompt([user("x")])) == "<|system|>User: x\n\nAssistant:"
    assert "<|system|>" not in own.decode(encoder.encode_completion([user("x")], [assistant("6")]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chat_template": None}, "set model.chat_template to one of plain, chatml, alpaca"),
        ({"eos_token": None}, "no EOS token"),
        ({"chat_template": "{{ raise_exception('a system turn is needed') }}"}, "set model.chat_template"),
        ({"chat_template": "{% for m in messages %}{{ m.content[0].text }}{% endfor %}"}, "set model.chat_template"),
    ],
)
def test_a_model_that_cannot_chat_is_refused(own: Any, changes: dict[str, Any], message: str) -> None:
    for name, value in changes.items():
        setattr(own, name, value)
    with pytest.raises(MachineError, match=message):
        ChatEncoder(own)
    if own.eos_token:
        assert ChatEncoder(own, "plain").end_id == own.eos_token_id


def test_a_template_that_prints_the_date_prints_the_same_one_every_day(own: Any) -> None:
    own.chat_template = (
        "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
        "{{ date_string }} {{ strftime_now('%Y') }}{% for m in messages %}{{ m.content + '<|end|>' }}{% endfor %}"
    )
    assert own.decode(ChatEncoder(own).encode_prompt([user("Hi")])) == "26 Jul 2024 2024Hi<|end|>"


def test_the_turn_ends_at_the_first_special_token_behind_the_text(own: Any) -> None:
    """Phi-3 writes <|end|>, a line end and <|endoftext|>; Gemma-3's <end_of_turn> is in no map of special tokens."""
    from tokenizers import AddedToken

    own.add_tokens([AddedToken("<|turn_end|>", special=True)])
    own.chat_template = (
        "{% for m in messages %}{{ '<|user|>' if m.role == 'user' else '<|assistant|>' }}"
        "{{ m.content + '<|turn_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"
    )
    encoder = ChatEncoder(own)
    assert encoded(encoder, own, [user("Hi")], [assistant("yo \n")])[1] == "yo \n<|turn_end|>"
    assert own.decode([encoder.end_id]) == "<|turn_end|>"
    assert set(own.convert_ids_to_tokens(encoder.stop_ids)) == {"<|turn_end|>", "<|end|>"}


def test_an_answer_has_the_tokens_that_the_model_sees_in_the_whole_text() -> None:
    """A SentencePiece tokenizer puts a space before a text of its own, which the answer is not."""

    class Piece:
        chat_template = "{{ bos }}"
        eos_token_id = 0
        all_special_ids = (0,)

        def apply_chat_template(self, conversation: Any, **kwargs: Any) -> str:
            text = "".join(f"[{message['content']}]" for message in conversation)
            return text if kwargs["add_generation_prompt"] else f"{text}\0"

        def __call__(self, text: str, **kwargs: Any) -> dict[str, list[int]]:
            return {"input_ids": [ord(character) for character in f" {text}"]}

        def decode(self, token_ids: list[int], **kwargs: Any) -> str:
            return "".join(map(chr, token_ids))

    tokenizer = Piece()
    encoder = ChatEncoder(tokenizer)
    prompt, completion = encoder.encode_prompt([user("q")]), encoder.encode_completion([user("q")], [assistant("a")])
    assert tokenizer.decode([*prompt, *completion]) == " [q][a]\0"
