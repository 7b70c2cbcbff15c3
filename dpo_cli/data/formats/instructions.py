"""Instructions with one answer, in three formats, and single answers with a verdict, which are none.

``alpaca``: ``{"instruction", "input", "output"}``. ``input`` may be missing or empty; it stands on a new line below the
instruction. ``prompt_completion``: ``{"prompt", "completion"}``, each a text or a list of messages.

``messages``: ``{"messages": [turns]}`` or ``{"conversations": [turns]}``. A conversation is one example: its last
answer, with all that stands before it as the prompt. With ``turns: all`` every answer is an example. What follows the
last answer is an error. Answers whose ``weight`` (or ``loss_weight``) is 0 are not to be learned: they are no examples.

A verdict is a column of two values whose name or values call an answer good or bad, as KTO takes them: ``label``,
``is_safe``, ``thumbs``, ``"accepted"``. A truth value of another name (``is_english``) may be anything: it is no
verdict, and the account names it among the columns that nobody reads.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from dpo_cli.data.formats.base import Format, Part, Reading, says_something, text_field
from dpo_cli.data.formats.content import (
    REASONING_KEYS,
    is_conversation,
    last_role,
    read_messages,
    turn_by_turn,
    with_turns,
)
from dpo_cli.data.formats.prompts import (
    CONTEXT_NAMES,
    CONVERSATION_NAMES,
    PROMPT_ALTERNATIVES,
    PROMPT_NAMES,
    PROMPT_NEEDS,
    REASONING_NAMES,
    check_prompt,
    read_answer,
    read_prompt,
    roles_of,
    with_context,
    with_reasoning,
)
from dpo_cli.data.problem import RowProblem
from dpo_cli.data.schema import Messages, RawRow, SftExample, assistant

ANSWER_NAMES = ("completion", "answer", "response", "output", "target", "reply", "generation")
"""What a single answer is called."""
_WEIGHTS = ("weight", "loss_weight")


# --- single answers with a verdict --------------------------------------------------------------

_ASKED = frozenset(name for field, others in PROMPT_NAMES.items() for name in (field, *others))
_CONTENT = _ASKED | {*ANSWER_NAMES, *CONVERSATION_NAMES}
_TURN = ("role", "from", "speaker", "content", "value", "text")
_GRADES = frozenset("score scores scored rating rated reward rewards grade graded quality vote votes".split())
"""Names of verdicts that may as well be marks on a longer scale: of numbers, both must be there."""
_JUDGED = frozenset(
    """
    acceptable accept accepted accurate appropriate approve approved bad best biased bug chosen clean coherent complete
    compliant confirmed correct desirable discard dislike disliked downvote downvoted drop error errors exclude excluded
    factual fail failed fails faithful false feedback fine flagged good great grounded hallucinated hallucination harm
    harmful harmless helpful honest inaccurate inappropriate include included incorrect invalid irrelevant judgement
    judgment keep kto label labels like liked lost offensive ok okay pass passed passes polite poor positive prefer
    preferred refusal refused reject rejected relevant review reviewed right safe safety satisfied satisfactory selected
    solved success successful thumb thumbs toxic toxicity true truthful undesirable unhelpful unsafe upvote upvoted
    usable useful useless valid verdict verified violation win winner won wrong
    """.split()
)
"""Words in the name of a column that says whether an answer is good."""
_YES_OR_NO = frozenset(("true", "false", "yes", "no", "y", "n", "0", "1", "-1", "0.0", "1.0", "-1.0"))
_OPPOSITES = frozenset(("up", "down", "like", "dislike", "pass", "fail", "right", "wrong"))
"""Values that are verdicts under such a name only."""
_VERDICTS = frozenset(
    """
    good bad accepted rejected accept reject chosen preferred dispreferred desirable undesirable correct incorrect
    safe unsafe helpful unhelpful harmless harmful toxic acceptable unacceptable passed failed upvoted downvoted liked
    disliked approved thumbs_up thumbs_down thumbsup thumbsdown \U0001f44d \U0001f44e
    """.split()
)
"""Values that are verdicts under any name."""


def unpaired_label(rows: Sequence[RawRow]) -> str | None:
    """The column that calls each of these rows' answers good or bad, if there is one."""
    values: dict[str, list[Any]] = {}
    for row in rows:
        for name, value in _columns_of(row):
            values.setdefault(name, []).append(value)
    return next((name for name, found in values.items() if _is_verdict(name, found)), None)


def _columns_of(row: RawRow) -> Iterator[tuple[str, Any]]:
    """What a row says beside prompt and answer, also within objects and in the last turn of a conversation."""
    for name, value in row.items():
        if name in CONVERSATION_NAMES and isinstance(value, list) and value and isinstance(value[-1], dict):
            yield from ((f"{name}.{key}", found) for key, found in value[-1].items() if key not in _TURN)
        elif name in _CONTENT or value is None or value == "":
            continue
        elif isinstance(value, dict):
            yield from ((f"{name}.{key}", found) for key, found in value.items() if found is not None)
        else:
            yield name, value


def _is_verdict(name: str, values: Sequence[Any]) -> bool:
    if not all(isinstance(value, bool | int | float | str) for value in values):
        return False
    said = {re.sub(r"(?<=\w)[ -](?=\w)", "_", str(value).strip().lower()) for value in values}
    if said <= _VERDICTS:
        return True
    words = set(re.findall(r"[a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()))
    if words & _GRADES and not words & _JUDGED:
        is_plain = len(said) > 1 or said <= {"-1", "-1.0", "true", "false", *_OPPOSITES}
        return is_plain and said <= _YES_OR_NO | _OPPOSITES
    if "feedback" in words and said <= {"positive", "negative"}:  # under the name of label, these are classes of texts
        return True
    of_the_answer = words & set(ANSWER_NAMES) and all(isinstance(value, bool) for value in values)
    return bool(of_the_answer or (words & _JUDGED and said <= _YES_OR_NO | _OPPOSITES | _VERDICTS))


def _doubt_of(name: str) -> Callable[[Sequence[RawRow], Reading], str]:
    """Why such answers are no instructions, for the format of this name."""

    def doubt(rows: Sequence[RawRow], reading: Reading) -> str:
        label = unpaired_label(rows)
        if label is None:
            return ""
        good = "keep the good ones in a file of their own"
        if name != "messages":
            columns = "" if label == "label" else f" and columns: {{label: {label}}}"
            good = f"say format: unpaired{columns} to take the good ones"
        return (
            f"{label} calls single answers good or bad (unpaired, as KTO takes them), and the bad ones are no"
            f" instructions; {good}, or say format: {name} to take all of them"
        )

    return doubt


# --- a prompt and an answer ---------------------------------------------------------------------


def _read_alpaca(row: RawRow, reading: Reading) -> SftExample:
    prompt = read_prompt({**row, "prompt": None} if "prompt" in row else row, reading)
    return SftExample(prompt, with_reasoning(row, [assistant(text_field(row, "output"))]))


def _read_completion(row: RawRow, reading: Reading) -> SftExample:
    prompt = read_prompt(row, reading)
    return SftExample(prompt, with_reasoning(row, read_answer(row, "completion", prompt, reading)))


def _note_reasoning(row: RawRow, reading: Reading) -> str:
    return "'reasoning' is the reasoning before the answer" if row.get("reasoning") else ""


def _unread_reasoning(row: RawRow) -> list[str]:
    """The field of reasoning, where the answer has its own."""
    answer = row.get("completion")
    last = answer[-1] if isinstance(answer, list) and answer else answer
    has_own = isinstance(last, dict) and any(last.get(key) for key in REASONING_KEYS)
    return [""] if has_own and says_something(row.get("reasoning")) else []


ALPACA = Format(
    name="alpaca",
    fields="instruction and output",
    names={
        **{name: PROMPT_NAMES[name] for name in ("instruction", "input")},
        **CONTEXT_NAMES,
        **REASONING_NAMES,
        "output": ("response",),
    },
    needs=(("instruction", "output"),),
    read=_read_alpaca,
    matches=lambda row: not isinstance(row["output"], list),
    note=_note_reasoning,
    doubt=_doubt_of("alpaca"),
)
PROMPT_COMPLETION = Format(
    name="prompt_completion",
    fields="prompt and completion",
    names={**PROMPT_NAMES, **REASONING_NAMES, "completion": ("answer", "response", "output", "target")},
    needs=tuple((*asked, "completion") for asked in PROMPT_NEEDS),
    read=_read_completion,
    matches=lambda row: not isinstance(row["completion"], list) or is_conversation(row["completion"]),
    note=_note_reasoning,
    doubt=_doubt_of("prompt_completion"),
    alternatives=PROMPT_ALTERNATIVES,
    unread={"reasoning": _unread_reasoning},
)


# --- a conversation -----------------------------------------------------------------------------


def _read_messages(row: RawRow, reading: Reading) -> SftExample | Iterator[Part[SftExample]]:
    turns = with_turns(row.get("messages"))
    if turns is None:
        raise RowProblem("missing_field", "has no 'messages'")
    own = read_messages(turns, "messages", roles_of(reading))
    turns = turn_by_turn(turns) if isinstance(turns, list) else [turns]
    if not own or own[-1]["role"] != "assistant":
        last = f"a turn of the {own[-1]['role']}" if own else "nothing"
        raise RowProblem("no_answer", f"the conversation must end with an answer, it ends with {last}")
    messages = with_context(row, own, reading)
    start = len(messages) - len(own)
    if reading.turns == "last":
        return _answer_at(messages, len(messages) - 1, turns[-1])
    answers = [index for index, message in enumerate(own) if message["role"] == "assistant"]
    return ((f"messages[{index}]", _part_at(messages, start + index, turns[index])) for index in answers)


def _answer_at(messages: Messages, index: int, turn: Any) -> SftExample:
    if any(turn.get(name) == 0 for name in _WEIGHTS):
        raise RowProblem("weight_zero", "the answer has the weight 0: it is not to be learned")
    return SftExample(check_prompt(messages[:index]), [messages[index]])


def _part_at(messages: Messages, index: int, turn: Any) -> SftExample | RowProblem:
    try:
        return _answer_at(messages, index, turn)
    except RowProblem as problem:
        return problem


def _matches_messages(row: RawRow) -> bool:
    turns = with_turns(row["messages"])
    if not is_conversation(turns):
        return False
    # a conversation that ends with a question has its answers in other fields; beside a rejected answer the last one
    # may be any
    role = last_role(turns)
    if all(isinstance(row.get(name), str | list | dict) and row[name] for name in ("chosen", "rejected")):
        return False
    return role == "assistant" or (role is None and "chosen" not in row)


MESSAGES = Format(
    name="messages",
    fields="messages (or conversations)",
    names={"messages": CONVERSATION_NAMES, **CONTEXT_NAMES},
    needs=(("messages",),),
    read=_read_messages,
    matches=_matches_messages,
    note=lambda row, reading: "the tools beside them go to the chat template" if row.get("tools") else "",
    doubt=_doubt_of("messages"),
    of_a_turn=_WEIGHTS,
)
