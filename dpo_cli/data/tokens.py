"""Prompts with their completions as token ids: in hand, or in memory-mapped arrays on disk.

A store is a folder for one table and one way to tokenize it::

    tokens.i32      int32 [T], each group's prompt and completions one after another
    ends.npy        int64 [S], where each of these sequences ends among the tokens
    firsts.npy      int64 [G + 1], the sequence with which each group begins, then S
    ids.npy         bytes [G, 2], the ids of each row and of its prompt
    keys.npy        uint8 [S - G, 16], the key of each completion
    others.json     what became of the table's other rows (:mod:`dpo_cli.data.tokenize`); written last

Legend: G groups, S sequences, T tokens.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from dpo_cli.core.artifacts import digest_bytes

_TOKENS = "tokens.i32"
_WRITTEN_AT_ONCE = 1 << 20


@dataclass(frozen=True, eq=False)
class TokenGroup:
    """A prompt with K completions, as token ids.

    Attributes:
        id: The row's content id.
        group: The prompt's content id.
        prompt: Token ids of the prompt.
        completions: Token ids of each completion; its last one ends the turn.
    """

    id: str
    group: str
    prompt: tuple[int, ...]
    completions: tuple[tuple[int, ...], ...]

    def __eq__(self, other: object) -> bool:
        """Whether both hold the same, read already or not."""
        return isinstance(other, TokenGroup) and self._content == other._content

    def __hash__(self) -> int:
        return hash(self.id)

    @property
    def _content(self) -> tuple[Any, ...]:
        return self.id, self.group, self.prompt, self.completions

    @property
    def sizes(self) -> tuple[int, ...]:
        """Tokens of the prompt, then of each completion."""
        return len(self.prompt), *map(len, self.completions)

    @property
    def longest(self) -> int:
        """Tokens of the prompt with its longest completion."""
        prompt, *completions = self.sizes
        return prompt + max(completions)

    @property
    def num_logical_tokens(self) -> int:
        """Tokens of all texts, the prompt counted once for each completion."""
        prompt, *completions = self.sizes
        return prompt * len(completions) + sum(completions)

    @property
    def keys(self) -> list[str]:
        """The keys of the completions (:func:`completion_key`)."""
        return [completion_key(self.prompt, completion) for completion in self.completions]


def completion_key(prompt: Sequence[int], completion: Sequence[int]) -> str:
    """128-bit hash of the token ids of prompt and completion, as 32 hexadecimal digits."""
    return digest_bytes(array("i", prompt).tobytes(), array("i", completion).tobytes())


class LazyGroup(TokenGroup):
    """A group that is read when it is asked for; a million of them take 64 MB, whatever their length.

    Args:
        read: Gives a field, the sizes or the keys, by the name that they have in :class:`TokenGroup`.
        source: What it reads from.
    """

    __slots__ = ("_read", "_source")

    def __init__(self, read: Callable[[Any, str], Any], source: Any) -> None:
        self._read, self._source = read, source

    def __getattr__(self, name: str) -> Any:
        if name not in TokenGroup.__dataclass_fields__:
            raise AttributeError(name)
        return self._read(self._source, name)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Tokens of the prompt, then of each completion."""
        return self._read(self._source, "sizes")

    @property
    def keys(self) -> list[str]:
        """The keys of the completions."""
        return self._read(self._source, "keys")


def joined_group(parts: Sequence[tuple[TokenGroup, int]]) -> TokenGroup:
    """A group of completions that other groups with the same prompt have; its ids are a hash of their keys.

    Args:
        parts: Groups, each with the place of one of its completions.
    """
    return LazyGroup(_read_parts, parts)


def _read_parts(parts: Sequence[tuple[TokenGroup, int]], name: str) -> Any:
    if name == "prompt":
        return parts[0][0].prompt
    if name == "completions":
        return tuple(group.completions[at] for group, at in parts)
    if name == "sizes":
        return parts[0][0].sizes[0], *(group.sizes[1 + at] for group, at in parts)
    keys = [group.keys[at] for group, at in parts]
    return keys if name == "keys" else digest_bytes("".join(keys).encode())


def stored_groups(folder: Path) -> list[TokenGroup]:
    """The groups of a store on disk, whose arrays are mapped into memory.

    Raises:
        OSError: It is not there.
        ValueError: It is not whole.
    """
    store = _Store(folder)
    read = store.read
    return [LazyGroup(read, place) for place in range(store.num_groups)]


class _Store:
    """The arrays of a store."""

    def __init__(self, folder: Path) -> None:
        self._ends, self._firsts = (_mapped(folder, name, "i8", None) for name in ("ends", "firsts"))
        self._ids, self._keys = _mapped(folder, "ids", "S", 2), _mapped(folder, "keys", "u1", 16)
        self.num_groups, num_sequences = len(self._ids), len(self._ends)
        num_tokens = int(self._ends[-1]) if num_sequences else 0
        size = (folder / _TOKENS).stat().st_size
        if (
            (size, len(self._keys)) != (4 * num_tokens, num_sequences - self.num_groups)
            or len(self._firsts) != self.num_groups + 1
            or self._firsts[-1] != num_sequences
        ):
            raise ValueError("its arrays do not belong together")
        self._tokens = np.memmap(folder / _TOKENS, np.int32, "r").view(np.ndarray) if size else np.empty(0, np.int32)

    def read(self, place: int, name: str) -> Any:
        """A field or property of a group."""
        if name in ("id", "group"):
            return self._ids[place, int(name == "group")].decode()
        first, end = self._firsts[place : place + 2].tolist()
        if name == "keys":
            return [key.tobytes().hex() for key in self._keys[first - place : end - place - 1]]
        cuts = [int(self._ends[first - 1]) if first else 0, *self._ends[first:end].tolist()]
        if name == "sizes":
            return tuple(after - before for before, after in pairwise(cuts))
        if name == "prompt":
            return tuple(self._tokens[cuts[0] : cuts[1]].tolist())
        tokens = self._tokens[cuts[1] : cuts[-1]].tolist()
        return tuple(tuple(tokens[a - cuts[1] : b - cuts[1]]) for a, b in pairwise(cuts[1:]))


def _mapped(folder: Path, name: str, kind: str, width: int | None) -> np.ndarray:
    """An array of a store, of this type, with so many columns."""
    try:
        found = np.load(folder / f"{name}.npy", mmap_mode="r")
    except EOFError as error:
        raise ValueError(f"{name}.npy: {error}") from None
    row = () if width is None else (width,)
    if not (isinstance(found, np.ndarray) and found.ndim == 1 + len(row) and found.shape[1:] == row):
        raise ValueError(f"{name}.npy has another shape")
    if not found.dtype.str[1:].startswith(kind):
        raise ValueError(f"{name}.npy has another type")
    return found.view(np.ndarray)


class TokenWriter:
    """Writes a store into an empty folder, group by group."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file = (folder / _TOKENS).open("wb")  # closed by close()
        self._tokens = array("i")
        self._num_written = 0
        self._ends, self._firsts = array("q"), array("q", [0])
        self._ids: list[tuple[bytes, bytes]] = []
        self._keys = bytearray()

    def add(self, group: TokenGroup) -> None:
        """Add a group."""
        for sequence in (group.prompt, *group.completions):
            self._tokens.extend(sequence)
            self._ends.append(self._num_written + len(self._tokens))
        self._firsts.append(len(self._ends))
        self._ids.append((group.id.encode(), group.group.encode()))
        self._keys += bytes.fromhex("".join(group.keys))
        if len(self._tokens) >= _WRITTEN_AT_ONCE:
            self._flush()

    def close(self) -> None:
        """Write what is left, and the arrays beside the tokens."""
        self._flush()
        self._file.close()
        arrays = {
            "ends": np.frombuffer(self._ends, np.int64) if self._ends else np.empty(0, np.int64),
            "firsts": np.frombuffer(self._firsts, np.int64),
            "ids": np.array(self._ids, "S").reshape(-1, 2),
            "keys": np.frombuffer(bytes(self._keys), np.uint8).reshape(-1, 16),
        }
        for name, values in arrays.items():
            np.save(self._folder / f"{name}.npy", values)

    def _flush(self) -> None:
        self._tokens.tofile(self._file)
        self._num_written += len(self._tokens)
        del self._tokens[:]


# --- as text ------------------------------------------------------------------------------------

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
