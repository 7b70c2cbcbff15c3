"""Prompts with their completions as token ids: in hand, or in an Arrow file that is mapped into memory.

A store is a folder for one table and one way to tokenize it, with the groups in groups.arrow and what became of the
table's other rows in others.json (:mod:`dpo_cli.data.tokenize`), which is written last.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa

from dpo_cli.core.artifacts import digest_bytes

_GROUPS = "groups.arrow"
_GROUPS_A_BATCH = 1000
_TOKENS = pa.list_(pa.int32())
_SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "group": pa.string(),
        "prompt": _TOKENS,
        "completions": pa.list_(_TOKENS),
        "keys": pa.list_(pa.binary(16)),
    }
)


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


# --- on disk ------------------------------------------------------------------------------------


def stored_groups(folder: Path) -> list[TokenGroup]:
    """The groups of a store, whose tokens are mapped into memory.

    Raises:
        OSError: It is not there.
        ValueError: It is not whole.
    """
    found: list[TokenGroup] = []
    with pa.memory_map(str(folder / _GROUPS)) as file, pa.ipc.open_file(file) as reader:
        for number in range(reader.num_record_batches):
            batch = reader.get_batch(number)
            read = _StoredGroups(batch).read
            found += [LazyGroup(read, place) for place in range(batch.num_rows)]
    return found


class _StoredGroups:
    """Some groups of a store."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        self._columns = {name: batch[name] for name in ("id", "group", "keys")}
        prompts, completions = batch["prompt"], batch["completions"]
        self._firsts = completions.offsets.to_numpy()  # the completion with which each group begins
        # where each prompt and each completion begins, and its tokens
        self._prompts = prompts.offsets.to_numpy(), prompts.values.to_numpy()
        self._completions = completions.values.offsets.to_numpy(), completions.values.values.to_numpy()

    def read(self, place: int, name: str) -> Any:
        """A field or property of a group."""
        if name in ("id", "group"):
            return self._columns[name][place].as_py()
        if name == "keys":
            return [key.hex() for key in self._columns["keys"][place].as_py()]
        begins, tokens = self._prompts
        begin, end = begins[place : place + 2]
        if name == "prompt":
            return tuple(tokens[begin:end].tolist())
        begins, tokens = self._completions
        first, last = self._firsts[place : place + 2]
        cuts = begins[first : last + 1].tolist()
        if name == "sizes":
            return int(end - begin), *(after - before for before, after in pairwise(cuts))
        flat = tokens[cuts[0] : cuts[-1]].tolist()
        return tuple(tuple(flat[before - cuts[0] : after - cuts[0]]) for before, after in pairwise(cuts))


class TokenWriter:
    """Writes a store into an empty folder, group by group."""

    def __init__(self, folder: Path) -> None:
        self._writer = pa.ipc.new_file(str(folder / _GROUPS), _SCHEMA)  # closed by close()
        self._groups: list[TokenGroup] = []

    def add(self, group: TokenGroup) -> None:
        """Add a group."""
        self._groups.append(group)
        if len(self._groups) == _GROUPS_A_BATCH:
            self._flush()

    def close(self) -> None:
        """Write what is left."""
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        columns = {name: [getattr(group, name) for group in self._groups] for name in _SCHEMA.names}
        columns["keys"] = [[bytes.fromhex(key) for key in keys] for keys in columns["keys"]]
        self._writer.write_batch(pa.RecordBatch.from_pydict(columns, _SCHEMA))
        self._groups = []


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
