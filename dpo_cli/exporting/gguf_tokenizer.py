"""What a GGUF file says of a tokenizer: its tokens, merges and ends, and by which rule it cuts a text into words.

The rule is not in the file but in llama.cpp, under a name. It is found by trying those that are known on texts: the
held-out ones, on which it must give the tokenizer's own ids, and some odd ones, of which the first that it cuts
otherwise is told. The rules: llama.cpp's src/llama-vocab.cpp.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from dpo_cli.core.errors import MachineError
from dpo_cli.data.chat import ChatEncoder

_CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_BEHIND = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _split(pattern: str) -> dict[str, Any]:
    words = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [words, _bytes(use_regex=False)]}


def _bytes(*, use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


_RULES: dict[str, tuple[dict[str, Any], bool]] = {
    "gpt-2": (_bytes(use_regex=True), False),
    "smollm": (
        {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, _bytes(use_regex=True)]},
        False,
    ),
    "qwen2": (_split(rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{_BEHIND}"), False),
    "llama-bpe": (_split(rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}{_BEHIND}"), True),
}
"""By llama.cpp's name the pre-tokenizer, and whether a word that is a token is that token whatever the merges make."""
_ODD = (
    "Hello 2024 world, 1 22 333 4444",
    "  two  leading, trailing  ",
    "a\n\n\nb\r\n\tc",
    "Stra\u00dfe \u5317\u4eac \U0001f44d\U0001f3fd na\u00efve",
    "e\u0301",
    "x**2 + 3.14159e-10 == 100,000?",
    "don't I'LL we've",
    "def f(x):\n    return  x\n",
    "\u0663\u0664\u0665 \u00bd \u00b2 \u2167",
)
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5


@dataclass(frozen=True)
class Vocabulary:
    """What a file says of the tokens.

    Attributes:
        rule: llama.cpp's name of how words are cut.
        tokens: By their ids, one for each row of the embedding.
        types: What each is: normal, control, defined by the user or unused.
        merges: Two tokens each, in their order.
        ids: Of the special tokens, by llama.cpp's names.
        begins: Whether the BOS token is put before every text: the tokenizer does so, and prompts begin with it.
        template: The chat template.
        notes: What is cut otherwise than by the tokenizer, whole sentences.
    """

    rule: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    ids: dict[str, int]
    begins: bool
    template: str
    notes: tuple[str, ...]

    def add_to(self, writer: Any) -> None:
        """Put it into a file."""
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self.rule)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        writer.add_token_merges(self.merges)
        for name, number in self.ids.items():
            writer.add_uint32(f"tokenizer.ggml.{name}_token_id", number)
        writer.add_add_bos_token(self.begins)
        writer.add_chat_template(self.template)


def vocabulary_of(tokenizer: Any, encoder: ChatEncoder, num_rows: int, texts: Sequence[str]) -> Vocabulary:
    """What a file has to say so that llama.cpp makes the ids that the model was trained on.

    Args:
        tokenizer: The model's tokenizer.
        encoder: Its chat encoder.
        num_rows: Rows of the embedding.
        texts: Whole prompts as the template writes them, on which the ids must be equal.

    Raises:
        MachineError: It is no byte-level BPE, or llama.cpp knows no rule that cuts these texts as it does.
    """
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    model = backend["model"]
    if model["type"] != "BPE" or "ByteLevel" not in json.dumps(backend["pre_tokenizer"]):
        raise MachineError(
            f"GGUF: the tokenizer is no byte-level BPE ({model['type']}), and no other kind is written; take --to"
            " merged-nf4 or merged, and convert that with llama.cpp's convert_hf_to_gguf.py"
        )
    rule, notes = _rule_of(tokenizer, backend, texts)
    known = {number: token for token, number in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    special = set(tokenizer.all_special_ids)
    types = []
    for number in range(num_rows):
        if number not in known:
            types.append(_UNUSED)
        elif number in added:
            types.append(_CONTROL if added[number].special or number in special else _USER_DEFINED)
        else:
            types.append(_CONTROL if number in special else _NORMAL)
    ids = {"eos": encoder.end_id}
    others = [number for number in encoder.stop_ids if number != encoder.end_id]
    ids |= {"eot": others[0]} if others else {}
    for name, number in (("bos", tokenizer.bos_token_id), ("padding", tokenizer.pad_token_id)):
        ids |= {} if number is None else {name: number}
    bos = [tokenizer.bos_token_id]
    adds_bos = bos != [None] and list(tokenizer("a")["input_ids"])[:1] == bos
    begins = adds_bos and all(encoder.tokenize(text)[:1] == bos for text in texts)
    merges = [each if isinstance(each, str) else " ".join(each) for each in model["merges"]]
    tokens = [known.get(number, f"[PAD{number}]") for number in range(num_rows)]
    return Vocabulary(rule, tokens, types, merges, ids, begins, encoder.template, tuple(notes))


def _rule_of(tokenizer: Any, backend: dict[str, Any], texts: Sequence[str]) -> tuple[str, list[str]]:
    """llama.cpp's name of the rule, and what it does otherwise."""

    def ids_of(one: Any, text: str) -> list[int]:
        return one.encode(text, add_special_tokens=False).ids

    own = tokenizer.backend_tokenizer
    fitting: dict[str, list[str]] = {}
    for name, (words, whole_words) in _RULES.items():
        theirs: Any = Tokenizer.from_str(
            json.dumps(
                backend
                | {"pre_tokenizer": words, "normalizer": None, "post_processor": None}
                | {"model": backend["model"] | {"ignore_merges": whole_words}}
            )
        )
        if all(ids_of(own, text) == ids_of(theirs, text) for text in texts):
            fitting[name] = [text for text in _ODD if ids_of(own, text) != ids_of(theirs, text)]
            if not fitting[name]:
                break
    if not fitting:
        raise MachineError(
            "GGUF: llama.cpp has no rule among those known here that cuts the held-out prompts into the tokenizer's own"
            f" tokens (tried: {', '.join(_RULES)}); a file would read prompts otherwise than in training"
        )
    rule = min(fitting, key=lambda name: len(fitting[name]))
    odd = fitting[rule]
    told = f"llama.cpp's rule {rule!r} gives the tokenizer's ids on all {len(texts)} held-out prompts, but not on"
    return rule, [f"{told} {odd[0]!r} and {len(odd) - 1} more of {len(_ODD)} odd texts"] if odd else []
