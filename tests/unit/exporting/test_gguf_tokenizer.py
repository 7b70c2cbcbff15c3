"""What a GGUF file says of a tokenizer."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from tokenizers import Tokenizer, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from dpo_cli.core.errors import MachineError
from dpo_cli.data.chat import ChatEncoder
from dpo_cli.exporting.gguf_tokenizer import vocabulary_of
from dpo_cli.models.embedded import END, PAD

PROMPT = "<|pad|>What comes after 12?<|end|>"


def with_words(tokenizer: Any, words: Any) -> Any:
    """The embedded tokenizer with another rule of words."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.pre_tokenizer = words
    other = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=PAD, eos_token=END, bos_token=PAD)
    other.chat_template = tokenizer.chat_template
    return other


def read(tokenizer: Any, texts: list[str], num_rows: int | None = None) -> Any:
    return vocabulary_of(tokenizer, ChatEncoder(tokenizer), num_rows or len(tokenizer), texts)


def test_the_rule_of_words_is_found(tokenizer: Any) -> None:
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False)
    for name, words in (
        ("gpt-2", bytes_),
        ("smollm", pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), bytes_])),
    ):
        found = read(with_words(tokenizer, words), [PROMPT])
        assert (found.rule, found.notes) == (name, ())


def test_one_that_differs_on_odd_texts_is_told_and_one_that_differs_on_prompts_refused(tokenizer: Any) -> None:
    halves = with_words(
        tokenizer,
        pre_tokenizers.Sequence(
            [pre_tokenizers.Split("e", "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        ),
    )
    (note,) = read(halves, ["no"]).notes
    assert "but not on" in note
    with pytest.raises(MachineError, match="no rule among those known"):
        read(halves, [PROMPT])


def test_only_byte_level_bpe_is_written(tokenizer: Any) -> None:
    with pytest.raises(MachineError, match="no byte-level BPE"):
        read(with_words(tokenizer, pre_tokenizers.Metaspace()), [PROMPT])


def test_bos_is_put_before_every_text_where_the_tokenizer_does_it_and_prompts_begin_so(tokenizer: Any) -> None:
    plain = with_words(tokenizer, copy.copy(tokenizer.backend_tokenizer.pre_tokenizer))
    assert not read(plain, [PROMPT]).begins
    plain.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{PAD} $A", special_tokens=[(PAD, 0)]
    )
    assert read(plain, [PROMPT]).begins
    assert not read(plain, [PROMPT.removeprefix(PAD)]).begins


def test_tokens_have_their_types_and_ends_their_ids(tokenizer: Any) -> None:
    found = read(tokenizer, [PROMPT], len(tokenizer) + 2)
    assert found.tokens[:2] == [PAD, END]
    assert found.types[:6] == [3, 3, 3, 3, 3, 1]
    assert found.types[-2:] == [5, 5]
    assert found.ids == {"eos": 1, "padding": 0}
    assert len(found.merges) == len(json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"])
