"""The prompt of a row and its answers, in the ways that formats share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dpo_cli.data.formats.base import Reading, number, optional_number, optional_text, says_something, text_field
from dpo_cli.data.formats.content import (
    REASONING_KEYS,
    ROLE_NAMES,
    is_conversation,
    is_turn,
    json_in,
    media_keys,
    read_messages,
    refuse_media,
    refuse_python,
    with_turns,
)
from dpo_cli.data.formats.texts import ends_like_open, is_open_transcript, read_open_transcript
from dpo_cli.data.problem import RowProblem, kind_of
from dpo_cli.data.schema import Messages, PreferenceExample, RankingExample, RawRow, assistant, user

PROMPT_NAMES: dict[str, tuple[str, ...]] = {
    "prompt": ("question", "query", "input"),
    "instruction": (),
    "input": ("context",),
    "system": ("system_prompt",),
    "history": (),
    "tools": (),
}
"""The fields that make a prompt, with the other names they go by."""
CONTEXT_NAMES = {name: PROMPT_NAMES[name] for name in ("system", "history", "tools")}
"""Those that stand beside a conversation."""
REASONING_NAMES = {"reasoning": tuple(name for name in REASONING_KEYS if name != "reasoning")}
"""The field that holds the reasoning before a row's only answer, with the other names it goes by."""
CONVERSATION_NAMES = ("messages", "conversations", "conversation")
"""What a list of messages is called."""
SIDES = ("chosen", "rejected")
SIDE_NAMES: dict[str, tuple[str, ...]] = {
    "chosen": ("better", "preferred", "response_j", "chosen_response", "preferred_output", "response"),
    "rejected": ("worse", "dispreferred", "response_k", "rejected_response", "non_preferred_output"),
    "chosen_score": ("score_chosen", "chosen_rating", "rating_chosen", "chosen-rating"),
    "rejected_score": ("score_rejected", "rejected_rating", "rating_rejected", "rejected-rating"),
    "margin": (),
}
"""The fields of a pair's two sides, with the other names they go by."""

PROMPT_NEEDS = (("prompt",), ("instruction",))
"""One of these says what is asked."""
PROMPT_ALTERNATIVES = (("prompt", "instruction"),)
"""An instruction beside a prompt is not read."""
SCORE_ALTERNATIVES = (("chosen_score", "margin"), ("rejected_score", "margin"))
"""A margin beside scores is not read."""
_ODD_STARTS = frozenset("[{ \n\t\rH")
"""What messages as JSON text and transcripts begin with, and answers to transcripts; most texts do not."""


def roles_of(reading: Reading) -> Mapping[str, str]:
    """All names of roles: the usual ones and the source's own."""
    return {**ROLE_NAMES, **reading.roles} if reading.roles else ROLE_NAMES


# --- the prompt ---------------------------------------------------------------------------------


def read_prompt(row: RawRow, reading: Reading) -> Messages:
    """``prompt`` as text, messages or a transcript, or ``instruction``; ``input`` stands on a new line below."""
    value = row.get("prompt")
    if type(value) is str:
        if value[:1] not in _ODD_STARTS and "input" not in row and not ends_like_open(value):
            asked = [user(value)]
        else:
            asked = _read_odd_prompt(value, row, reading)
    elif value is not None:
        asked = _read_prompt_messages(value, row, reading)
    elif "instruction" in row:
        asked = [user(_with_input(text_field(row, "instruction"), row))]
    else:
        raise RowProblem("missing_field", "has no 'prompt'")
    return with_context(row, asked, reading) if "system" in row or "history" in row else asked


def _read_odd_prompt(text: str, row: RawRow, reading: Reading) -> Messages:
    if is_open_transcript(text):
        return _without_input(check_prompt(read_open_transcript(text)), row)
    turns = with_turns(text)
    if turns is not text:
        return _read_prompt_messages(turns, row, reading)
    refuse_python(text, "prompt")
    texts = json_in(text) if text.startswith('["') else None
    if isinstance(texts, list) and all(isinstance(each, str) for each in texts):
        raise RowProblem("not_text", "'prompt' holds a list of texts, as JSON")
    # beside an instruction, a prompt is that instruction as some template has it, with its input
    whole = "instruction" in row or optional_text(row, "input") in text
    return [user(text if whole else _with_input(text, row))]


def _read_prompt_messages(value: Any, row: RawRow, reading: Reading) -> Messages:
    if isinstance(value, dict):
        value = _messages_in(value)
    elif not isinstance(value, list):
        raise RowProblem("not_text", f"'prompt' must be text or messages, got {kind_of(value)}")
    return _without_input(check_prompt(read_messages(value, "prompt", roles_of(reading))), row)


def _messages_in(value: dict[str, Any]) -> Any:
    """The messages in an object, as OpenAI's preference files have them, or a single one."""
    if not isinstance(value.get("messages"), list) and not is_turn(value):
        raise RowProblem(
            "bad_message", f"'prompt' is {kind_of(value)}; say in columns which of them is meant, with a dot between"
        )
    refuse_media(value, media_keys(value), "'prompt'")
    return value.get("messages", value)


def _with_input(text: str, row: RawRow) -> str:
    extra = optional_text(row, "input")
    if not extra.strip():
        return text
    return f"{text}\n{extra}" if text else extra


def _without_input(asked: Messages, row: RawRow) -> Messages:
    extra = optional_text(row, "input").strip()
    if extra and not any(extra in message["content"] for message in asked):
        raise RowProblem(
            "two_prompts", "has messages in 'prompt' and text in 'input'; say columns: {input: ''} to leave that out"
        )
    return asked


def check_prompt(prompt: Messages) -> Messages:
    """A prompt ends where it is the model's turn: with a user's turn or a tool's."""
    if not prompt:
        raise RowProblem("empty_prompt", "has no prompt")
    if prompt[-1]["role"] not in ("user", "tool"):
        raise RowProblem("prompt_not_ending_with_user", f"the prompt ends with a turn of the {prompt[-1]['role']}")
    return prompt


def tools_of(row: RawRow) -> Any:
    """The tools beside a prompt, or in it, as OpenAI's preference files have them."""
    tools = row.get("tools")
    if tools is None and type(row.get("prompt")) is dict:
        return row["prompt"].get("tools")
    return tools


def with_context(row: RawRow, messages: Messages, reading: Reading) -> Messages:
    """Messages with what stands before them in fields of their own: ``system`` and ``history``.

    Raises:
        RowProblem: They are of another kind, or the messages have another system turn of their own.
    """
    if "system" not in row and "history" not in row:
        return messages
    system = optional_text(row, "system")
    context = [*([{"role": "system", "content": system}] if system else []), *_read_history(row, reading)]
    if system and messages and messages[0]["role"] == "system":
        if messages[0]["content"] != system:
            raise RowProblem("two_systems", "has one system prompt in 'system' and another in its messages")
        messages = messages[1:]
    return [*context, *messages]


def _read_history(row: RawRow, reading: Reading) -> Messages:
    history = row.get("history") or []
    if isinstance(history, str):
        history = json_in(history)
        if history is None:
            raise RowProblem("bad_history", "'history' must be a list of pairs, got text that is no JSON")
    if not isinstance(history, list):
        raise RowProblem("bad_history", f"'history' must be a list of pairs, got {kind_of(history)}")
    if history and all(isinstance(turn, dict) for turn in history):
        messages = read_messages(history, "history", roles_of(reading))
        if messages[-1]["role"] not in ("assistant", "system"):
            raise RowProblem("bad_history", f"'history' must end with an answer, it ends with {messages[-1]['role']}")
        return messages
    messages: Messages = []
    for index, turn in enumerate(history):
        if not (isinstance(turn, list | tuple) and len(turn) == 2 and all(isinstance(text, str) for text in turn)):
            raise RowProblem("bad_history", f"history[{index}] must be a pair of texts, got {kind_of(turn)}")
        messages += [user(turn[0]), assistant(turn[1])]
    return messages


# --- an answer ----------------------------------------------------------------------------------


def read_answer(row: RawRow, name: str, prompt: Messages, reading: Reading) -> Messages:
    """An answer as text, as a turn, or as the conversation that ends with it."""
    value: Any = row.get(name)
    if type(value) is str:
        if value[:1] not in _ODD_STARTS:
            return [assistant(value)]
        turns = with_turns(value)
        if turns is value:
            refuse_python(value, name)
            asked = row.get("prompt")
            if value[:1] == " " and type(asked) is str and asked.endswith(":") and is_open_transcript(asked):
                value = value[1:]
            return [assistant(value)]
        value = turns
    if value is None:
        raise RowProblem("missing_field", f"has no {name!r}")
    if not isinstance(value, list | dict):
        raise RowProblem("not_text", f"{name!r} must be text or messages, got {kind_of(value)}")
    messages = read_messages(value, name, roles_of(reading))
    if len(messages) > 1 and messages[:-1] == prompt[1 - len(messages) :]:
        messages = messages[-1:]
    return _check_answer(messages, name)


def _check_answer(answer: Messages, where: str) -> Messages:
    """An answer is one assistant turn."""
    if len(answer) != 1 or answer[0]["role"] != "assistant":
        roles = ", ".join(message["role"] for message in answer[:9]) or "nothing"
        raise RowProblem("not_one_answer", f"{where!r} must be one assistant turn, or the prompt and one, got {roles}")
    return answer


def with_reasoning(row: RawRow, answer: Messages) -> Messages:
    """An answer with the reasoning that the row has in a field of its own."""
    reasoning = row.get("reasoning")
    if reasoning is None or reasoning == "" or "reasoning_content" in answer[0]:
        return answer
    if not isinstance(reasoning, str):
        raise RowProblem(
            "not_text",
            f"'reasoning' must be text, got {kind_of(reasoning)}; say columns: {{reasoning: ''}} if it is something"
            " else",
        )
    return [{**answer[0], "reasoning_content": reasoning}]


# --- two sides ----------------------------------------------------------------------------------

Pair = tuple[Messages, Messages, Messages]
"""A prompt, its chosen and its rejected answer."""


def read_pair(row: RawRow, prompt: Messages, reading: Reading) -> PreferenceExample | RankingExample:
    """The pair of ``chosen`` and ``rejected``, with their scores.

    Answers of several turns go on from the prompt (:func:`split_turns`). Of sides that are lists of answers it is the
    ranking in which those of a side are tied.

    Raises:
        RowProblem: A side is no answer, or scores are no numbers or do not fit its list.
    """
    if are_lists(row):
        return _read_lists(row, prompt, reading)
    scores = read_scores(row)
    try:
        chosen = read_answer(row, "chosen", prompt, reading)
        return PreferenceExample(prompt, chosen, read_answer(row, "rejected", prompt, reading), *scores)
    except RowProblem as problem:
        if problem.reason != "not_one_answer":
            raise
        chosen, rejected = (_turns_of(row[name], name, reading) for name in SIDES)
        if not all(side and side[0]["role"] == "assistant" for side in (chosen, rejected)):
            raise
    return PreferenceExample(*split_turns(prompt, chosen, rejected, reading), *scores)


def _turns_of(value: Any, name: str, reading: Reading) -> Messages:
    value = with_turns(value)
    return [assistant(value)] if isinstance(value, str) else read_messages(value, name, roles_of(reading))


def split_turns(before: Messages, chosen: Messages, rejected: Messages, reading: Reading) -> Pair:
    """Prompt, chosen and rejected answer in two conversations that go on from the same messages.

    All that both share up to their last messages belongs to the prompt. What follows must be one
    answer of each; with ``compare: first`` the first one counts, and what follows it is left out: only
    up to there do both answer the same prompt.

    Raises:
        RowProblem: They part earlier, or in a turn that is no answer.
    """
    # the last message of each is its answer, whatever else they share
    pairs = zip(chosen[:-1], rejected[:-1], strict=False)
    cut = next((at for at, (one, other) in enumerate(pairs) if one != other), min(len(chosen), len(rejected)) - 1)
    sides = [turns[max(cut, 0) :] for turns in (chosen, rejected)]
    longest = max(map(len, sides))
    if longest > 1 and any(side[0]["role"] != "assistant" for side in sides):
        raise RowProblem("diverges_early", "the two sides part in a turn that is no answer")
    if longest > 1 and reading.compare == "first":
        sides = [side[:1] for side in sides]
    elif longest > 1:
        raise RowProblem(
            "diverges_early",
            f"the two sides part before the last answer: {len(sides[0])} and {len(sides[1])} turns follow what they"
            " share, and DPO compares two answers to one prompt; say compare: first to compare the first answers in"
            " which they differ",
        )
    prompt = check_prompt([*before, *chosen[:cut]])
    return prompt, _check_answer(sides[0], "chosen"), _check_answer(sides[1], "rejected")


def read_scores(row: RawRow) -> tuple[float | None, float | None]:
    """The scores of chosen and rejected; where there is only a ``margin``, as TRL has it, that and 0."""
    scores = optional_number(row, "chosen_score"), optional_number(row, "rejected_score")
    if scores == (None, None) and (margin := _margin_in(row)) is not None:
        return margin, 0.0
    return scores


def _margin_in(row: RawRow) -> float | None:
    """The ``margin`` of a row, where it is a number, perhaps as text; anything else by this name is another thing."""
    margin = row.get("margin")
    if type(margin) in (int, float):
        return number(margin, "'margin'")
    try:
        return number(margin, "'margin'") if isinstance(margin, str) else None
    except RowProblem:
        return None


def unread_margin(row: RawRow) -> list[str]:
    """The margin, where it says something and is no number, or a side is a list."""
    is_read = _margin_in(row) is not None and not are_lists(row)
    return [""] if says_something(row.get("margin")) and not is_read else []


# --- sides that are lists of answers ------------------------------------------------------------


def are_lists(row: RawRow) -> bool:
    """Whether a side is a list of answers: of texts, or of whole conversations."""
    return _is_list(row.get("chosen")) or _is_list(row.get("rejected"))


def _is_list(value: Any) -> bool:
    if type(value) is not list or not value:
        return False
    return all(isinstance(answer, str) for answer in value) or all(map(is_conversation, value))


def lists_note(row: RawRow, reading: Reading) -> str:
    """What is made of lists, for the account."""
    return "sides that are lists: each chosen answer is better than each rejected one" if are_lists(row) else ""


def _read_lists(row: RawRow, prompt: Messages, reading: Reading) -> PreferenceExample | RankingExample:
    """The ranking of all answers, in which those of a side are tied; a pair, where each side has one."""
    chosen, rejected = (_read_list(row, name, prompt, reading) for name in SIDES)
    scores = [_scores_of(row, name, len(side)) for name, side in zip(SIDES, (chosen, rejected), strict=True)]
    if len([side for side in scores if side is None]) == 1:
        raise RowProblem("bad_scores", "has scores for one side alone")
    ranking = RankingExample(
        prompt,
        [*chosen, *rejected],
        [1] * len(chosen) + [2] * len(rejected),
        None if scores[0] is None or scores[1] is None else [*scores[0], *scores[1]],
    )
    return ranking.pair(0, 1) if len(ranking.ranks) == len(SIDES) else ranking


def _read_list(row: RawRow, name: str, prompt: Messages, reading: Reading) -> Sequence[Messages]:
    value: Any = row.get(name)
    if value == []:
        raise RowProblem("too_few_completions", f"has no answer in {name!r}")
    if not _is_list(value):
        return [read_answer(row, name, prompt, reading)]
    places = [f"{name}[{index}]" for index in range(len(value))]
    answers = {"prompt": row.get("prompt"), **dict(zip(places, value, strict=True))}
    return [read_answer(answers, place, prompt, reading) for place in places]


def _scores_of(row: RawRow, name: str, num: int) -> list[float] | None:
    field = f"{name}_score"
    value = row.get(field)
    if value is None or value == "":
        return None
    values = value if isinstance(value, list) else [value]
    if len(values) != num:
        raise RowProblem("bad_scores", f"{field!r} must have a number for each of {num} answers, got {kind_of(value)}")
    return [number(score, f"{field}[{index}]") for index, score in enumerate(values)]
