"""Token ids as pieces of text that can be read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_SPACES = " ▁Ġ"
"""How tokenizers write a space in the names of tokens."""


@dataclass(frozen=True)
class Piece:
    """Tokens that are shown together: one, or the several that a character is split over.

    Attributes:
        text: Their text, or the name of a special token; empty where a token stands for a space that is not shown.
        ids: Their ids.
        special: Whether it is a special token, such as the one that ends a turn.
    """

    text: str
    ids: tuple[int, ...]
    special: bool = False


def pieces_of(tokenizer: Any, ids: Sequence[int]) -> list[Piece]:
    """Token ids as texts that can be read; special tokens by their names.

    A character that is split over several tokens is one piece, so that no half of it is shown.
    """
    special = {*tokenizer.all_special_ids, *(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)}
    real = tuple(
        tokenizer("\ufffd", add_special_tokens=False)["input_ids"]
    )  # this character itself, which halves look like
    pieces: list[Piece] = []
    before: tuple[int, ...] = ()  # some decoders leave out the space at the very start
    waiting: tuple[int, ...] = ()
    for token_id in ids:
        if token_id in special:
            if waiting:
                pieces.append(_piece(tokenizer, before, waiting))
            pieces.append(Piece(str(tokenizer.convert_ids_to_tokens(token_id)), (token_id,), special=True))
            before, waiting = (token_id,), ()
            continue
        waiting = (*waiting, token_id)
        piece = _piece(tokenizer, before, waiting)
        is_space = not piece.text and not str(tokenizer.convert_ids_to_tokens(token_id)).strip(_SPACES)
        if is_space or (piece.text and (not piece.text.endswith("\ufffd") or waiting[-len(real) :] == real)):
            pieces.append(piece)
            before, waiting = waiting, ()
    if waiting:
        pieces.append(_piece(tokenizer, before, waiting))
    return pieces


def _piece(tokenizer: Any, before: tuple[int, ...], ids: tuple[int, ...]) -> Piece:
    """Some tokens as a piece, decoded behind those that stand before them."""
    start, whole = _decode(tokenizer, before), _decode(tokenizer, before + ids)
    return Piece(whole[len(start) :] if whole.startswith(start) else _decode(tokenizer, ids), ids)


def _decode(tokenizer: Any, ids: tuple[int, ...]) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False) if ids else ""
