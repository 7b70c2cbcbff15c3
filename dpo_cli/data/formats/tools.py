"""What a model may call, and its calls, in the forms in which they come; as OpenAI has them, they go on.

Tools are a list of ``{"type": "function", "function": {"name", "description", "parameters"}}``,
or of what is in ``function`` alone (ShareGPT). A call is ``{"type": "function", "function":
{"name", "arguments"}}``, or ``{"name", "arguments"}``; arguments are an object, or one as JSON
text. Either may be JSON text as a whole.
"""

from __future__ import annotations

from typing import Any

import orjson

from dpo_cli.data.problem import RowProblem, kind_of


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
    return _text([_tool(tool, index) for index, tool in enumerate(listed)])


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
    return _text([_call(call, f"{where} has a call {index}") for index, call in enumerate(calls)])


def _call(value: Any, where: str) -> dict[str, Any]:
    call = _parsed(value)
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowProblem("bad_tool_call", f"{where} without a name: it is {kind_of(call)}")
    arguments = function.get("arguments", function.get("parameters"))
    parsed = _parsed(arguments)
    own = {"id": call["id"]} if call is not function and isinstance(call.get("id"), str) else {}
    return {
        **own,
        "type": "function",
        "function": {
            "name": function["name"],
            # what is no object, as a model may write it that calls wrongly, stays as it stands
            "arguments": parsed if isinstance(parsed, dict) else {} if arguments is None else arguments,
        },
    }


def _parsed(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return orjson.loads(value)
    except ValueError:
        return value


def _text(value: Any) -> str:
    try:
        return orjson.dumps(value).decode()
    except TypeError:
        raise RowProblem("bad_unicode", "has half of a surrogate pair, which is no text") from None
