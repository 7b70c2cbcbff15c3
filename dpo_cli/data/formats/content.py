"""Messages as they come: names of roles and fields, typed content parts, conversations as JSON text, tools and calls.

A turn is ``{"role", "content"}`` (OpenAI), ``{"from", "value"}`` (ShareGPT), or a question with its answer. Tools are a
list of ``{"type": "function", "function": {"name", "description", "parameters"}}``, or of what is in ``function``
alone. A call is ``{"type": "function", "function": {"name", "arguments"}}``, or ``{"name", "arguments"}``; arguments
are an object, or one as JSON text. Any of these may be JSON text as a whole. As OpenAI has them, tools and calls go on.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import orjson

from dpo_cli.data.formats.base import says_something
from dpo_cli.data.problem import RowProblem, kind_of
from dpo_cli.data.schema import Message, Messages

ROLE_NAMES: Mapping[str, str] = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "agent", "bot", "chatgpt", "ai"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "ipython", "tool_response", "function_response"), "tool"),
}
"""The canonical role behind every name it goes by, in small letters."""

_CALL_ROLES = ("function_call", "tool_call")
"""Roles of an assistant's turn whose text is a call."""
ROLE_KEYS = ("role", "from", "speaker")
CONTENT_KEYS = ("content", "value", "text")
ANSWER_KEYS = ("text", "response", "completion", "content", "answer", "output", "solution", "value")
"""What the text of an answer is called in an object that is no turn."""
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
"""What the reasoning before an answer is called."""
_CALL_KEYS = ("tool_calls", "function_call")
_OF_A_TOOL = ("name", "tool_call_id")
_MEDIA = re.compile(r"(?:images?|img|audios?|videos?|media)(?:_(?:paths?|urls?|files?|bytes|base64))?", re.IGNORECASE)
_TEXT_PARTS = ("text", "input_text", "output_text")
_PYTHON = re.compile(r"\[?\s*\{'\w+':")


# --- turns ------------------------------------------------------------------------------------


def read_message(value: Any, where: str, roles: Mapping[str, str] = ROLE_NAMES) -> Message:
    """A turn, such as ``{"from", "value"}`` or ``{"role", "content"}``."""
    try:
        role, content = roles[value["role"]], value["content"]
        if type(content) is str and len(value) == 2:
            return {"role": role, "content": content}
    except (KeyError, TypeError):
        pass  # not of the most frequent shape
    if not isinstance(value, dict):
        raise RowProblem("bad_message", f"{where} must be a message, got {kind_of(value)}")
    if not is_turn(value):
        raise RowProblem("unknown_role", f"{where} has no role: it is {kind_of(value)}")
    role, is_call = _role_of(value, roles)
    if role is None:
        name = _shown(value.get(key_in(value, ROLE_KEYS)))
        raise RowProblem(
            "unknown_role",
            f"{where} has the role {name}; known are {', '.join(roles)}; say in roles which of them it is",
        )
    refuse_media(value, media_keys(value), where)
    content = value.get(key_in(value))
    if is_call:
        return {"role": role, "content": "", **_read_reasoning(value, where), "tool_calls": read_calls(content, where)}
    extra = read_extra(value, role, where)
    return {"role": role, "content": read_content("" if content is None and extra else content, where), **extra}


def key_in(turn: Mapping[str, Any], keys: Iterable[str] = CONTENT_KEYS) -> str:
    """The first of some keys under which a turn has something, in parquet it has the keys of all turns; else empty."""
    return next((key for key in keys if turn.get(key) is not None), "")


def role_in(turn: Mapping[str, Any]) -> str | None:
    """Whose a turn is, where the name is a usual one."""
    return _role_of(turn, ROLE_NAMES)[0]


def _role_of(turn: Mapping[str, Any], roles: Mapping[str, str]) -> tuple[str | None, bool]:
    """Whose a turn is, where the name is known; and whether its text is a call."""
    name = turn.get(key_in(turn, ROLE_KEYS))
    if not isinstance(name, str):
        return None, False
    role = roles.get(name) or roles.get(name.lower())
    is_call = name not in roles and name.lower() in _CALL_ROLES
    return role or ("assistant" if is_call else None), is_call


def read_extra(value: Mapping[str, Any], role: str, where: str) -> Message:
    """What a turn has beside its text: reasoning and calls of an answer, of a tool's turn what it answers."""
    if role == "tool":
        return {name: value[name] for name in _OF_A_TOOL if isinstance(value.get(name), str)}
    if role != "assistant":
        return {}
    key = _filled(value, _CALL_KEYS)
    return {**_read_reasoning(value, where), **({"tool_calls": read_calls(value[key], where)} if key else {})}


def _read_reasoning(value: Mapping[str, Any], where: str) -> Message:
    reasoning = value[key] if (key := _filled(value, REASONING_KEYS)) else ""
    if not isinstance(reasoning, str):
        raise RowProblem("not_text", f"{where} must have its reasoning as text, got {kind_of(reasoning)}")
    return {"reasoning_content": reasoning} if reasoning.strip() else {}


def _filled(value: Mapping[str, Any], keys: Iterable[str]) -> str:
    """The first of some keys that holds something; else empty."""
    return next((key for key in keys if value.get(key)), "")


def _shown(name: Any) -> str:
    return repr(name[:40]) if isinstance(name, str) else kind_of(name)


def read_content(content: Any, where: str) -> str:
    """Text, or a list of typed parts that are all text, such as ``[{"type": "text", "text": ...}]``."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RowProblem("not_text", f"{where} must have text content, got {kind_of(content)}")
    return "".join(_part_text(part, f"{where} has a part {index}") for index, part in enumerate(content))


def _part_text(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise RowProblem("not_text", f"{where} that is {kind_of(part)}; only text is read")
    texts = [part[key] for key in ("text", "value") if isinstance(part.get(key), str)]
    if part.get("type") in _TEXT_PARTS and texts:
        return texts[0]
    raise RowProblem("not_text", f"{where} of type {_shown(part.get('type'))}; only text is read")


# --- what is not read ---------------------------------------------------------------------------


def unread_of_turns(turns: Any, also_read: Collection[str], roles: Mapping[str, str] = ROLE_NAMES) -> list[str]:
    """Names of what turns hold beside what is read of them; none where the value is no list of turns, nor one."""
    found: dict[str, None] = {}
    for turn in turns if type(turns) is list else [turns]:
        if type(turn) is list:
            found.update(dict.fromkeys(unread_of_turns(turn, also_read, roles)))
        elif type(turn) is dict and len(turn) > 2:
            if is_turn(turn):
                taken = _read_of(turn, roles)
            elif keys := pair_in(turn):
                taken = {*keys, "system"}
            else:
                continue
            found.update(dict.fromkeys(unread_beside(turn, {*taken, *also_read})))
    return list(found)


def _read_of(turn: Mapping[str, Any], roles: Mapping[str, str]) -> set[str]:
    """The keys of a turn that :func:`read_message` reads."""
    role, is_call = _role_of(turn, roles)
    taken = {key_in(turn, ROLE_KEYS), key_in(turn)}
    if role == "tool":
        taken.update(_OF_A_TOOL)
    elif role == "assistant":
        taken |= {_filled(turn, REASONING_KEYS), "" if is_call else _filled(turn, _CALL_KEYS)}
    return taken


def read_of_answer(value: Mapping[str, Any]) -> set[str]:
    """The keys of an answer that is no turn which hold its text, its reasoning and its calls."""
    return {key_in(value, ANSWER_KEYS), _filled(value, REASONING_KEYS), _filled(value, _CALL_KEYS)}


def unread_beside(value: Mapping[str, Any], taken: Collection[str]) -> list[str]:
    """The keys of an object that hold something, beside those that are read."""
    return [key for key in value if key not in taken and says_something(value[key])]


def media_keys(names: Iterable[Any]) -> tuple[str, ...]:
    """Those of these names by which pictures, sound and films go."""
    return tuple(name for name in names if isinstance(name, str) and _MEDIA.fullmatch(name))


def refuse_media(value: Mapping[str, Any], names: Iterable[str], where: str = "") -> None:
    """Text that belongs to a picture is no text alone.

    Raises:
        RowProblem: One of these fields is not empty.
    """
    for name in names:
        if _is_there(value.get(name)):
            raise RowProblem(
                "media",
                f"{where + ' ' if where else ''}has media in {name!r}, and only text is read; take the field out of the"
                " file to train on the text alone",
            )


def _is_there(media: Any) -> bool:
    """Whether a field holds a picture or the like: a path, bytes, or an object or a list with some of them."""
    if isinstance(media, list | dict):
        return any(map(_is_there, media.values() if isinstance(media, dict) else media))
    return bool(media)


# --- conversations ------------------------------------------------------------------------------

_SPEAKERS = (("human", "assistant"), ("user", "assistant"), ("human", "gpt"), ("human", "bot"), ("user", "bot"))
_PAIR_KEYS = (
    *_SPEAKERS, ("input", "output"), ("question", "answer"), ("query", "response"), ("prompt", "response"),
    ("instruction", "output"),
)  # fmt: skip
"""What a question and its answer are called where both are one object of a conversation."""


def pair_in(value: Any) -> tuple[str, str] | None:
    """The keys of question and answer, where an object of a conversation is both."""
    if not isinstance(value, dict) or any(key in value for key in ROLE_KEYS):
        return None
    return next((keys for keys in _PAIR_KEYS if keys[0] in value and keys[1] in value), None)


def turn_by_turn(values: list[Any]) -> list[Any]:
    """A conversation with its questions and answers as turns of their own; a last answer that is null is none yet."""
    if not any(map(pair_in, values)):
        return values
    turns: list[Any] = []
    for index, value in enumerate(values):
        if (keys := pair_in(value)) is None:
            turns.append(value)
            continue
        asked, answered = keys
        refuse_media(value, media_keys(value))
        if value.get("system"):
            turns.append({"role": "system", "content": value["system"]})
        turns.append({"role": "user", "content": value[asked]})
        if value[answered] is not None or index < len(values) - 1:
            turns.append({"role": "assistant", "content": value[answered]})
    return turns


def read_messages(values: Any, where: str, roles: Mapping[str, str] = ROLE_NAMES) -> Messages:
    """A list of turns, a single one, or either as JSON text (as a CSV file has it)."""
    values = with_turns(values)
    if isinstance(values, str):
        refuse_python(values, where)
        raise RowProblem("bad_message", f"{where!r} must be a list of messages, got text")
    if isinstance(values, dict):
        return [read_message(values, where, roles)]
    if not isinstance(values, list):
        raise RowProblem("bad_message", f"{where!r} must be a list of messages, got {kind_of(values)}")
    return [read_message(value, f"{where}[{index}]", roles) for index, value in enumerate(turn_by_turn(values))]


def with_turns(value: Any) -> Any:
    """The turns that a text holds as JSON, as a CSV file has them: a list of turns, or one; else the value itself."""
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return value
    if not any(f'"{key}"' in value for key in (*ROLE_KEYS, "human", "user")):
        return value
    found = json_in(value)
    if is_conversation(found) and pair_in(found[0]) not in (None, *_SPEAKERS):
        return value  # a text may well be a list of questions and answers
    return found if is_turn(found) or is_conversation(found) else value


def with_list(value: Any) -> Any:
    """The list that a text holds as JSON, null where it is broken; else the value itself."""
    return json_in(value) if isinstance(value, str) and value[:1] == "[" else value


def json_in(text: str) -> Any:
    """What a text says as JSON; None where it is none."""
    try:
        return orjson.loads(text)
    except ValueError:
        return None


def refuse_python(text: str, where: str) -> None:
    """Messages as Python prints them are no JSON and no text.

    Raises:
        RowProblem: The text looks like that.
    """
    if _PYTHON.match(text) and any(f"'{key}'" in text for key in ROLE_KEYS):
        raise RowProblem(
            "not_json", f"{where!r} holds messages as Python prints them; write the file as JSON lines or parquet"
        )


def is_turn(value: Any) -> bool:
    """Whether a value looks like a turn: it says whose it is."""
    return isinstance(value, dict) and ("role" in value or "from" in value or "speaker" in value)


def is_conversation(value: Any) -> bool:
    """Whether a value looks like a list of turns, by the first and the last of them."""
    return isinstance(value, list) and bool(value) and _is_said(value[0]) and _is_said(value[-1])


def _is_said(value: Any) -> bool:
    return is_turn(value) or pair_in(value) is not None


def last_role(turns: Sequence[Any]) -> str | None:
    """Whose the last turn of a conversation is, where its name is a usual one."""
    last = turns[-1]
    if keys := pair_in(last):
        return "user" if last[keys[1]] is None else "assistant"
    return role_in(last)


# --- tools and calls ----------------------------------------------------------------------------


def read_tools(value: Any) -> str | None:
    """OpenAI's list of tool schemas as JSON text; None where there is none.

    Raises:
        RowProblem: It is no list of them.
    """
    listed = _parsed(value)
    if listed in (None, "", [], {}):
        return None
    listed = [listed] if isinstance(listed, dict) else listed
    if not isinstance(listed, list):
        raise _bad_tools(f"got {kind_of(listed)}")
    return _json_text([_tool(tool, index) for index, tool in enumerate(listed)])


def _tool(value: Any, index: int) -> dict[str, Any]:
    tool = _parsed(value)
    if isinstance(tool, dict):
        tool = {name: member for name, member in tool.items() if member is not None}  # parquet has all rows' keys
        if isinstance(tool.get("function"), dict) and isinstance(tool["function"].get("name"), str):
            return tool if "type" in tool else {"type": "function", **tool}
        if isinstance(tool.get("name"), str):
            return {"type": "function", "function": tool}
    raise _bad_tools(f"tools[{index}] is {kind_of(tool)}")


def _bad_tools(why: str) -> RowProblem:
    return RowProblem(
        "bad_tools",
        f"'tools' must be a list of tool schemas, each with a name, {why}; say columns: {{tools: ''}} if they are"
        " something else",
    )


def read_calls(value: Any, where: str) -> str:
    """OpenAI's list of tool calls as JSON text, from such a list, one call, or either as JSON text.

    Raises:
        RowProblem: It is no call.
    """
    calls = _parsed(value)
    calls = [calls] if isinstance(calls, dict) else calls
    if not isinstance(calls, list) or not calls:
        raise RowProblem("bad_tool_call", f"{where} must hold a call with name and arguments, got {kind_of(calls)}")
    return _json_text([_call(call, f"{where} has a call {index}") for index, call in enumerate(calls)])


def _call(value: Any, where: str) -> dict[str, Any]:
    call = _parsed(value)
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowProblem("bad_tool_call", f"{where} without a name: it is {kind_of(call)}")
    arguments = function.get("arguments", function.get("parameters"))
    parsed = _parsed(arguments)
    own = {"id": call["id"]} if call is not function and isinstance(call.get("id"), str) else {}
    # arguments that are no object, as a model may write them that calls wrongly, stay as they stand
    arguments = parsed if isinstance(parsed, dict) else {} if arguments is None else arguments
    return {**own, "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _parsed(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return orjson.loads(value)
    except ValueError:
        return value


def _json_text(value: Any) -> str:
    try:
        return orjson.dumps(value).decode()
    except TypeError:
        raise RowProblem("bad_unicode", "has half of a surrogate pair, which is no text") from None
