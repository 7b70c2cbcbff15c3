"""The canonical rows that every format becomes, and their identity.

A message is ``{"role": "system" | "user" | "assistant" | "tool", "content": text}``, and where
there is more to it, it has further fields, all of them text (:data:`EXTRA_FIELDS`). The first
message of a prompt may hold ``tools``: what the model may call. Prompts and completions are
lists of messages. Identities are content hashes: the same content has the same id in any file,
at any row, on any machine.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import pairwise
from typing import Any, ClassVar, final

import orjson
import pyarrow as pa

from dpo_cli.core.artifacts import digest_json

Message = dict[str, str]
Messages = list[Message]

RawRow = Mapping[str, Any]
"""One record of an input file, as the file has it."""

EXTRA_FIELDS = ("reasoning_content", "tool_calls", "name", "tool_call_id")
"""What a message may have beside role and content: the reasoning before an answer; the calls in it, as the JSON text
of OpenAI's list; of a tool's turn the name of the tool and the id of the call that it answers."""

TOOLS = "tools"
"""The field of a prompt's first message, and the column of a table, with OpenAI's list of tool schemas as JSON text."""

MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
"""The Arrow type of a message list."""
FULL_MESSAGES = pa.list_(pa.struct([(name, pa.string()) for name in ("role", "content", *EXTRA_FIELDS)]))
"""The same in tables that have tools, calls or reasoning somewhere; others have no column of nulls."""

SFT_SCHEMA = pa.schema([("id", pa.string()), ("prompt", MESSAGES), ("completion", MESSAGES), ("source", pa.string())])
PREFERENCE_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("prompt", MESSAGES),
        ("chosen", MESSAGES),
        ("rejected", MESSAGES),
        ("chosen_score", pa.float64()),
        ("rejected_score", pa.float64()),
        ("source", pa.string()),
        ("group", pa.string()),
    ]
)
RANKING_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("prompt", MESSAGES),
        ("completions", pa.list_(MESSAGES)),
        ("ranks", pa.list_(pa.int32())),
        ("scores", pa.list_(pa.float64())),
        ("source", pa.string()),
        ("group", pa.string()),
    ]
)


def full_schema(schema: pa.Schema) -> pa.Schema:
    """A schema with a place for :data:`EXTRA_FIELDS` and tools; readers of plain tables never meet them."""
    fields = [field.with_type(_full_type(field.type)) for field in schema]
    return pa.schema([*fields, pa.field(TOOLS, pa.string())], metadata=schema.metadata)


def _full_type(kind: pa.DataType) -> pa.DataType:
    if kind == MESSAGES:
        return FULL_MESSAGES
    if pa.types.is_list(kind):
        return pa.list_(_full_type(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_full_type(field.type)) for field in kind])
    return kind


def is_plain(*parts: Messages) -> bool:
    """Whether no message of these has more than role and content."""
    return all(len(message) == 2 for part in parts for message in part)


def with_tools(prompt: Messages, tools: str) -> Messages:
    """A prompt whose first message holds the tools."""
    return [{**prompt[0], TOOLS: tools}, *prompt[1:]] if prompt else prompt


def from_table(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row as a table has it, with its messages as this module has them: without nulls, the tools in the prompt."""
    if TOOLS not in row:
        return {**row}
    found = {name: _without_nulls(value) for name, value in row.items()}
    tools = found.pop(TOOLS)
    return found if tools is None else {**found, "prompt": with_tools(found["prompt"], tools)}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_nulls(inner) for inner in value]
    if isinstance(value, dict):
        return {name: _without_nulls(inner) for name, inner in value.items() if inner is not None}
    return value


def user(content: str) -> Message:
    """A user message."""
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    """An assistant message."""
    return {"role": "assistant", "content": content}


def content_id(*parts: Messages) -> str:
    """128-bit content hash of some message lists, as 32 hexadecimal digits.

    The hash of several parts is a hash of their hashes, so that it costs little where these are known.

    Raises:
        UnicodeEncodeError: A text holds half of a surrogate pair.
    """
    return part_id(parts[0]) if len(parts) == 1 else joint_id(*map(part_id, parts))


def part_id(part: Messages) -> str:
    """Content hash of one message list: the digest of its [role, content] pairs, in a list of one part, as JSON.

    A message that has more is [role, content, the other fields in alphabetical order]. It is
    :func:`~dpo_cli.core.artifacts.digest_json`, made faster.

    Raises:
        UnicodeEncodeError: A text holds half of a surrogate pair.
    """
    if len(part) == 1 and len(message := part[0]) == 2:  # mostly
        value = [[[message["role"], message["content"]]]]
    else:
        value = [[_identity(message) for message in part]]
    try:
        data = orjson.dumps(value)
    except TypeError:  # half of a surrogate pair, or text of a class of its own
        return digest_json(value)
    digest = blake2b(len(data).to_bytes(8, "little"), digest_size=16)
    digest.update(data)
    return digest.hexdigest()


def _identity(message: Message) -> list[Any]:
    plain: list[Any] = [message["role"], message["content"]]
    if len(message) == 2:
        return plain
    return [*plain, {name: message[name] for name in sorted(message) if name not in ("role", "content")}]


def joint_id(*ids: str) -> str:
    """Content hash of several parts, given theirs; their order matters."""
    return blake2b("".join(ids).encode(), digest_size=16).hexdigest()


# --- the split, which a prompt's content alone decides, so that it falls on the same side in every file --------------


def deciding_part(prompt: Messages, split_by: str = "opening") -> Messages:
    """What of a prompt decides its split: the whole ``prompt``, or its ``opening``, all up to the first user turn.

    The opening is that part whatever tools there are, and the prompt itself, where nothing is left out of it. So a
    longer conversation falls where the shorter one falls that it goes on from.
    """
    if split_by == "prompt":
        return prompt
    if prompt and TOOLS in prompt[0]:
        prompt = [{name: text for name, text in prompt[0].items() if name != TOOLS}, *prompt[1:]]
    if len(prompt) == 1:
        return prompt
    first = next((index for index, message in enumerate(prompt) if message["role"] == "user"), len(prompt) - 1)
    return prompt if first == len(prompt) - 1 else prompt[: first + 1]


def position_of(digest: str) -> float:
    """A number in [0, 1) by the first 64 bits of a content id."""
    return int(digest[:16], 16) / 2.0**64


def split_position(prompt: Messages, split_by: str = "opening") -> float:
    """A number in [0, 1) that is uniform over deciding parts and fixed for each; below the held-out share is eval."""
    return position_of(content_id(deciding_part(prompt, split_by)))


# --- examples ------------------------------------------------------------------------------------


def text_of(messages: Messages) -> str:
    """All that a message list says as one text, reasoning and calls included."""
    if len(messages) == 1 and len(message := messages[0]) == 2:  # mostly
        return message["content"]
    return "\n".join(map(_said, messages))


def _said(message: Message) -> str:
    if len(message) == 2:
        return message["content"]
    said = (message.get(name) for name in ("reasoning_content", "content", "tool_calls"))
    return "\n".join(filter(None, said))


@dataclass(slots=True)
class Example:
    """Base of what a row may hold: a prompt with some answers. No abstract class, of which isinstance is slow."""

    schema: ClassVar[pa.Schema]
    prompt: Messages

    @property
    def answers(self) -> list[Messages]:
        """Its answers, the best one first."""
        raise NotImplementedError

    def row(self, source: str) -> dict[str, Any]:
        """The canonical row, as its schema has it.

        Raises:
            UnicodeEncodeError: A text holds half of a surrogate pair.
        """
        group = content_id(self.prompt)
        known = {"id": joint_id(group, *map(part_id, self.answers)), "group": group, "source": source}
        return {name: known[name] if name in known else getattr(self, name) for name in self.schema.names}


@final
@dataclass(slots=True)
class SftExample(Example):
    """An instruction and its answer."""

    schema: ClassVar[pa.Schema] = SFT_SCHEMA
    completion: Messages

    @property
    def answers(self) -> list[Messages]:
        """The answer."""
        return [self.completion]


@final
@dataclass(slots=True)
class PreferenceExample(Example):
    """A prompt with the answer that was preferred and the one that was not.

    A single answer that is good or bad stands on its side alone: no message is on the other one.
    """

    schema: ClassVar[pa.Schema] = PREFERENCE_SCHEMA
    chosen: Messages
    rejected: Messages
    chosen_score: float | None = None
    rejected_score: float | None = None

    @property
    def answers(self) -> list[Messages]:
        """Both answers; of a single one it alone."""
        return [side for side in (self.chosen, self.rejected) if side]


@final
@dataclass(slots=True)
class RankingExample(Example):
    """A prompt with K answers in order.

    Attributes:
        completions: K answers, best first.
        ranks: Their ranks from 1, ascending; equal is tied.
        scores: What the ranks come from, where that is scores.
        verdicts: Pairs (better, worse) of places in ``completions``, where the order comes from
            pairwise verdicts, which need not agree with each other.
    """

    schema: ClassVar[pa.Schema] = RANKING_SCHEMA
    completions: list[Messages]
    ranks: list[int]
    scores: list[float] | None = None
    verdicts: list[tuple[int, int]] | None = None

    @property
    def answers(self) -> list[Messages]:
        """All of them."""
        return self.completions

    def pairs(self, scheme: str) -> list[tuple[int, int]]:
        """Places (better, worse) of the pairs that a scheme makes.

        Args:
            scheme: ``all``: every pair that is not tied, by the verdicts where there are any;
                ``adjacent``: every pair of neighboring ranks; ``best_vs_worst``: the first of the
                best with the last of the worst. A pair that a verdict decides the other way is none.
        """
        ranks, places = self.ranks, range(len(self.ranks))
        if scheme == "all":
            if self.verdicts is not None:
                return self.verdicts
            return [(i, j) for i in places for j in places[i + 1 :] if ranks[i] < ranks[j]]
        if scheme == "adjacent":
            after = dict(pairwise(sorted(set(ranks))))
            pairs = [(i, j) for i in places for j in places if ranks[j] == after.get(ranks[i])]
        else:
            pairs = [(0, len(ranks) - 1)] if ranks[0] < ranks[-1] else []
        refuted = {(worse, better) for better, worse in self.verdicts or ()}
        return [pair for pair in pairs if pair not in refuted]

    def only(self, places: Sequence[int]) -> RankingExample:
        """The ranking of some of its answers, by their places, ascending; ranks keep their numbers."""
        at = {old: new for new, old in enumerate(places)}
        return RankingExample(
            self.prompt,
            [self.completions[place] for place in places],
            [self.ranks[place] for place in places],
            None if self.scores is None else [self.scores[place] for place in places],
            None if self.verdicts is None else [(at[i], at[j]) for i, j in self.verdicts if i in at and j in at],
        )

    def pair(self, better: int, worse: int) -> PreferenceExample:
        """One of its pairs."""
        scores = self.scores or [None] * len(self.ranks)
        return PreferenceExample(
            self.prompt, self.completions[better], self.completions[worse], scores[better], scores[worse]
        )


def table_of(rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> pa.Table:
    """Rows with messages as an Arrow table: of the schema, or of :func:`full_schema` where a message has more."""
    if all(is_plain(*_lists_in(row)) for row in rows):
        return pa.Table.from_pylist([dict(row) for row in rows], schema=schema)
    told = [{TOOLS: row["prompt"][0].get(TOOLS), **row} for row in rows]
    return pa.Table.from_pylist(told, schema=schema if TOOLS in schema.names else full_schema(schema))


def _lists_in(value: Any) -> Iterator[Messages]:
    """The message lists in a row."""
    if isinstance(value, Mapping):
        for inner in value.values():
            yield from _lists_in(inner)
    elif isinstance(value, list) and value and isinstance(value[0], Mapping) and "content" in value[0]:
        yield value
    elif isinstance(value, list) and value and isinstance(value[0], list | Mapping):
        for inner in value:
            yield from _lists_in(inner)
