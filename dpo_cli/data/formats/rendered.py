"""Conversations as one text, as chat templates render them, taken apart into messages.

A model's own template is put around every text, so a text that some template made already would
be given to the model in two. ``unwrap: true`` makes messages of such texts.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from itertools import pairwise
from typing import Any, NamedTuple

from dpo_cli.data.formats.content import ANSWER_KEYS, CONTENT_KEYS, ROLE_NAMES, is_turn, key_in, role_in
from dpo_cli.data.formats.texts import begins_with_turn, gap_of, is_open_transcript, is_transcript, read_turns
from dpo_cli.data.schema import Messages, RawRow, assistant

_BEGIN = re.compile(r"\s*(?:(?:<s>|<bos>|<\|begin_of_text\|>|<\|startoftext\|>|<｜begin▁of▁sentence｜>)\s*)*")
_OVER = re.compile(r"(?:\s|<s>|</s>|<eos>|<\|endoftext\|>|<\|end_of_text\|>|<｜end▁of▁sentence｜>)*")
_SYSTEM = re.compile(r"\s*(?:<<SYS>>(.*?)<</SYS>>|\[SYSTEM_PROMPT\](.*?)\[/SYSTEM_PROMPT\])(.*)", re.DOTALL)
_INPUT = "input"
_ROLES = {
    **ROLE_NAMES,
    "instruction": "user",
    "response": "assistant",
    "[inst]": "user",
    "[/inst]": "assistant",
    _INPUT: _INPUT,
}


class Template(NamedTuple):
    """How a chat template writes turns, which begin with tokens that no text has by itself.

    Where they begin with words, text may stand before the first one, and only questions with their answers in turn, or
    the place for the last one, are a conversation.
    """

    name: str  # for messages
    turn: re.Pattern[str]  # what a turn begins with; its group, or all of it, says whose it is
    end: re.Pattern[str]  # what a turn ends with
    by_tokens: bool = True

    def role_of(self, begin: re.Match[str]) -> str | None:
        """Whose the turn is that begins so."""
        return _ROLES.get((begin[1] if begin.re.groups else begin[0]).strip().lower())


_ALPACA = (
    r"(?:(?:^|\n|(?<=</s>))\s*|\s*(?=### ?(?:Human|Assistant):))"  # Guanaco's turns begin within a line, too
    r"### ?(Instruction|Input|Response|System|User|Human|Assistant){}"
)
_END_OF_TEXT = re.compile(r"</s>|<\|endoftext\|>|<\|end_of_text\|>|<eos>")
TEMPLATES = (
    Template("ChatML", re.compile(r"<\|im_start\|>(\w+)\n?"), re.compile(r"<\|im_end\|>")),
    Template(
        "Llama 3",
        re.compile(r"<\|(?:start_header_id|header_start)\|>(\w+)<\|(?:end_header_id|header_end)\|>\n{0,2}"),
        re.compile(r"<\|(?:eot_id|eot|eom_id|end_of_text)\|>"),
    ),
    Template("Gemma", re.compile(r"<start_of_turn>(\w+)\n?"), re.compile(r"<end_of_turn>")),
    Template("DeepSeek", re.compile(r"<｜(User|Assistant)｜>"), re.compile(r"<｜end▁of▁sentence｜>")),
    Template(
        "Zephyr",
        re.compile(r"<\|(system|user|assistant|tool)\|>\n?"),
        re.compile(rf"<\|end\|>|<\|eot_id\|>|{_END_OF_TEXT.pattern}"),
    ),
    Template("Llama 2", re.compile(r"\[INST\] ?|\[/INST\] ?"), _END_OF_TEXT),
    Template("Alpaca", re.compile(_ALPACA.format(r":[ \n]?")), _END_OF_TEXT, by_tokens=False),
    Template("Alpaca without colons", re.compile(_ALPACA.format(r"(?::[ \n]?|[ ]*(?:\n|$))")), _END_OF_TEXT,
             by_tokens=False),
    Template("Vicuna", re.compile(r"(?:^|\s|(?<=</s>))\s*(USER|ASSISTANT): ?"), _END_OF_TEXT, by_tokens=False),
    Template("plain", re.compile(r"(?:^|\n)\s*(User|Assistant|System): ?"), _END_OF_TEXT, by_tokens=False),
)  # fmt: skip


class Conversation(NamedTuple):
    """A text that was taken apart."""

    template: str  # what made the text
    turns: Messages
    is_open: bool  # whether it stops where an answer begins


def unwrap(text: str) -> Conversation | None:
    """The conversation that a text is from its beginning to its end; None where it is none, or holds more."""
    if is_transcript(text) and (begins_with_turn(text) or "Assistant:" in text):
        return _transcript(text)
    begin = _BEGIN.match(text)
    text = text[begin.end() :] if begin else text
    for template in TEMPLATES:
        if template.turn.search(text) and (found := _parsed(template, text)):
            return found
    return None


def _transcript(text: str) -> Conversation:
    turns = read_turns(text, gap_of(text))
    is_open = is_open_transcript(text)
    return Conversation("HH", turns[:-1] if is_open else turns, is_open)


def _parsed(template: Template, text: str) -> Conversation | None:
    begins = list(template.turn.finditer(text))
    before = text[: begins[0].start()]
    system = _SYSTEM.match(before) if before.strip() else None
    if before.strip() and template.by_tokens and template.name != "DeepSeek" and system is None:
        return None
    turns: Messages = []
    if before.strip():
        turns.append({"role": "system", "content": ((system[1] or system[2]) if system else before).strip()})
    is_open = ended = False
    for index, begin in enumerate(begins):
        is_last = index == len(begins) - 1
        content = text[begin.end() :] if is_last else text[begin.end() : begins[index + 1].start()]
        role = template.role_of(begin)
        if role == "user" and index and template.name == "Vicuna" and "\n" not in begin[0] and not ended:
            return None  # a sentence goes on
        end = template.end.search(content)
        ended = end is not None
        if role is None or (end and not _OVER.fullmatch(content, end.end())):
            return None
        content = content[: end.start()] if end else content if is_last else content.rstrip("\n")
        if template.name == "Llama 2":
            content = content.strip(" ")
        is_open = is_last and role == "assistant" and not end and not content.strip()
        if is_open:
            break
        if role == _INPUT:
            if not turns or turns[-1]["role"] != "user":
                return None
            turns[-1]["content"] += f"\n{content}"
        else:
            turns.append({"role": role, "content": content})
    turns = _with_system(turns)
    roles = [turn["role"] for turn in turns]
    if not template.by_tokens and (
        "user" not in roles
        or not (is_open or roles[-1] == "assistant")
        or any(one == other for one, other in pairwise([*roles, *(["assistant"] if is_open else [])]))
    ):
        return None  # such a word may stand in a sentence, and no text must be lost
    return Conversation(template.name, turns, is_open) if turns else None


def _with_system(turns: Messages) -> Messages:
    """Turns with the system prompt that Llama 2 writes into the first question as a turn of its own."""
    if turns and turns[0]["role"] == "user" and (found := _SYSTEM.match(turns[0]["content"])):
        system = {"role": "system", "content": (found[1] or found[2] or "").strip()}
        return [system, {"role": "user", "content": found[3].lstrip()}, *turns[1:]]
    return turns


def _without_marks(text: str, made_by: str) -> str:
    """An answer without the marks that the template puts around it."""
    template = next((template for template in TEMPLATES if template.name == made_by), None)
    if template is None:
        return text
    begin = template.turn.match(text)
    if begin and template.role_of(begin) == "assistant":
        text = text[begin.end() :]
    end = template.end.search(text)
    return text[: end.start()] if end and _OVER.fullmatch(text, end.end()) else text


_WHOLE = ("prompt", "messages", "conversations", "chosen", "rejected", "completion", "first", "second")
_ANSWERS = ("chosen", "rejected", "completion", "output", "first", "second")
_ASKED = ("prompt", "instruction")
_BY_WORDS = frozenset(template.name for template in TEMPLATES if not template.by_tokens)


def unwrap_row(row: RawRow, names: Collection[str]) -> tuple[RawRow, str]:
    """A row with messages in place of texts that are conversations, and what made them; else the row and nothing.

    Such a text may also be what a user's turn says, in a list of messages.

    Args:
        row: The row, with its fields under their own names.
        names: The fields that its format reads.
    """
    found: dict[str, Conversation] = {}
    spliced: dict[str, Any] = {}
    made_by = ""
    for name in (*_WHOLE, "instruction"):
        value = row.get(name) if name in names else None
        if type(value) is str and (conversation := unwrap(value)):
            if conversation.is_open or name not in _ASKED or conversation.template not in _BY_WORDS:
                found[name] = conversation
                made_by = made_by or conversation.template
        elif type(value) in (list, dict) and (turns := _spliced(value)):
            spliced[name], template = turns
            made_by = made_by or template
    value = row.get("completions") if "completions" in names else None
    completions = value if type(value) is list else []
    listed = [unwrap(text) if type(text) is str else None for text in completions]
    made_by = made_by or next((conversation.template for conversation in filter(None, listed)), "")
    if not made_by:
        return row, ""
    unwrapped: dict[str, Any] = {**row, **spliced}
    for name, conversation in found.items():
        unwrapped |= _fields_of(name, conversation, row)
    if listed:
        unwrapped["completions"] = [_answer(one, text, made_by) for one, text in zip(listed, completions, strict=True)]
    for name in _ANSWERS:
        if name in names and name in row and name not in found and name not in spliced:
            unwrapped[name] = _bare(row[name], made_by)
    return unwrapped, made_by


def _spliced(value: Any) -> tuple[Any, str] | None:
    """Messages whose user turns say conversations, with the turns of these in their place, and what made them."""
    if isinstance(value, dict) and isinstance(value.get("messages"), list):
        inner = _spliced(value["messages"])
        return inner and ({**value, "messages": inner[0]}, inner[1])
    turns = [value] if isinstance(value, dict) else value
    if not all(is_turn(turn) for turn in turns):
        return None
    places = [place for place, turn in enumerate(turns) if role_in(turn) == "user"]
    texts = {place: turns[place].get(key_in(turns[place])) for place in places}
    asked = {place: unwrap(text) if type(text) is str else None for place, text in texts.items()}
    made_by = next((found.template for found in asked.values() if found), "")
    told: list[Any] = []
    for place, turn in enumerate(turns):
        if place not in asked:
            told.append(_bare(turn, made_by))
            continue
        found = asked[place]
        roles = [each["role"] for each in found.turns] if found else []
        # of several questions each must be one, or what was said before would be said again
        if not found or roles[-1:] != ["user"] or (len(places) > 1 and roles.count("user") > 1):
            return None
        if told and roles[0] == "system":
            return None
        told += found.turns
    return (told, made_by) if places else None


def _bare(value: Any, made_by: str) -> Any:
    """An answer, as text, turns or an object, without the marks that the template puts around it."""
    if type(value) is str:
        return _without_marks(value, made_by)
    if type(value) is list:
        return [_bare(turn, made_by) for turn in value]
    if type(value) is dict and (not is_turn(value) or role_in(value) == "assistant"):
        key = key_in(value, CONTENT_KEYS if is_turn(value) else ANSWER_KEYS)
        return {**value, key: _without_marks(value[key], made_by)} if type(value.get(key)) is str else value
    return value


def _answer(found: Conversation | None, value: Any, made_by: str) -> Any:
    if found is None:
        return _bare(value, made_by)
    return [*found.turns, assistant("")] if found.is_open else found.turns


def _fields_of(name: str, found: Conversation, row: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that a conversation makes of the one that held it."""
    if name == "instruction":
        before = {"history": found.turns[:-1]} if len(found.turns) > 1 else {}
        return {} if before and row.get("history") else {name: found.turns[-1]["content"], **before}
    return {name: found.turns if name == "prompt" else _answer(found, None, found.template)}
