"""Token groups, in hand and in arrays on disk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_cli.core.artifacts import digest_bytes
from dpo_cli.core.text import visible_token
from dpo_cli.data.tokens import TokenGroup, TokenWriter, completion_key, joined_group, pieces_of, stored_groups

IDS = st.lists(st.integers(0, 2**31 - 1), max_size=6).map(tuple)


def stored(folder: Path, groups: list[TokenGroup]) -> list[TokenGroup]:
    writer = TokenWriter(folder)
    for group in groups:
        writer.add(group)
    writer.close()
    return stored_groups(folder)


@given(st.lists(st.tuples(IDS, st.lists(IDS, min_size=1, max_size=4)), max_size=6))
def test_a_store_gives_back_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[tuple[int, ...], list[tuple[int, ...]]]]
) -> None:
    groups = [TokenGroup(f"row {n}", f"p{n % 2}", prompt, tuple(texts)) for n, (prompt, texts) in enumerate(rows)]
    found = stored(tmp_path_factory.mktemp("store"), groups)
    assert len(found) == len(groups)
    assert list(found) == groups
    assert found[1:] == groups[1:]
    for ours, group in zip(found, groups, strict=True):
        assert (ours.sizes, ours.keys, ours.longest) == (group.sizes, group.keys, group.longest)
        assert hash(ours) == hash(group)
        assert all(type(token) is int for token in ours.prompt)


def test_the_longest_side_counts() -> None:
    assert TokenGroup("a", "a", (1, 2), ((1,), (1, 2, 3))).longest == 5


def test_the_key_is_a_hash_of_the_ids_as_int32() -> None:
    """Written out once more: a cache of another day must be found by it."""
    prompt, completion = (np.array(ids, "<i4").tobytes() for ids in ((1, 70_000), (5,)))
    assert completion_key((1, 70_000), (5,)) == digest_bytes(prompt, completion)
    assert completion_key((1, 70_000), (5,)) == "fcba5d3b9198fb62ee0c2d13a6c2ea70"


def test_tokens_are_mapped_and_not_held(tmp_path: Path) -> None:
    (group,) = stored(tmp_path, [TokenGroup("a", "b", (1, 2), ((3,), (4, 0x1234567)))])
    file = tmp_path / "groups.arrow"
    place = file.read_bytes().index((0x1234567).to_bytes(4, "little"))
    with file.open("r+b") as opened:
        opened.seek(place)
        opened.write((7).to_bytes(4, "little"))
    assert group.completions == ((3,), (4, 7))


def test_joined_groups_are_those_completions(make_groups: Callable[..., list[TokenGroup]]) -> None:
    one, other = make_groups(2, completions=3)
    other = replace(other, prompt=one.prompt)
    found = joined_group([(one, 2), (other, 0)])
    plain = TokenGroup(found.id, found.id, one.prompt, (one.completions[2], other.completions[0]))
    assert found == plain
    assert (found.sizes, found.keys) == (plain.sizes, plain.keys)


# --- as text ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["你好，世界", "👩‍💻 🇨🇳 😀", "naïve café\r\n\tx", "\ufffd twice \ufffd\ufffd", "हिन्दी"]
)
def test_pieces_are_whole_texts_and_hold_every_token_once(text: str, tokenizer: Any) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = pieces_of(tokenizer, ids)
    assert "".join(piece.text for piece in pieces) == text
    assert [token_id for piece in pieces for token_id in piece.ids] == ids
    halves = [piece for piece in pieces if "\ufffd" in piece.text]
    assert all(piece.text == "\ufffd" for piece in halves)
    assert len(halves) == text.count("\ufffd")


def test_a_split_character_is_one_piece_and_special_tokens_keep_their_names(tokenizer: Any) -> None:
    ids = tokenizer("<|user|>😀<|end|>", add_special_tokens=False)["input_ids"]
    assert len(ids) > 3
    first, split, last = pieces_of(tokenizer, ids)
    assert (split.text, split.ids, split.special) == ("😀", tuple(ids[1:-1]), False)
    assert [(piece.text, piece.special) for piece in (first, last)] == [("<|user|>", True), ("<|end|>", True)]


def sentencepiece_like() -> Any:
    """A tokenizer that writes spaces as U+2581, drops the first one, and falls back to bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"\u2581 a b \u2581a \u2581b".split()]
    core = Tokenizer(
        models.BPE(
            {word: index for index, word in enumerate(words)},
            [("\u2581", "a"), ("\u2581", "b")],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    core.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def test_spaces_and_bytes_of_a_sentencepiece_tokenizer() -> None:
    tokenizer = sentencepiece_like()
    ids = tokenizer("<s>a b 你a</s>", add_special_tokens=False)["input_ids"]
    pieces = pieces_of(tokenizer, ids)
    assert [piece.text for piece in pieces if piece.special] == ["<s>", "</s>"]
    assert "".join(piece.text for piece in pieces[1:-1]).lstrip() == "a b 你a"
    assert [len(piece.ids) for piece in pieces if "你" in piece.text] == [3]
    assert " b" in [piece.text for piece in pieces]


def test_a_space_that_is_not_shown_is_no_half_of_the_character_behind_it() -> None:
    tokenizer = sentencepiece_like()
    ids = tokenizer("你 b", add_special_tokens=False)["input_ids"]
    assert [(piece.text, len(piece.ids)) for piece in pieces_of(tokenizer, ids)] == [("", 1), ("你", 3), (" b", 1)]
    assert visible_token("") == "∅"
