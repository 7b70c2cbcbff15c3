r"""Pairs, ``chosen`` and ``rejected``: each a text or a list of messages, in four formats by where the prompt lies.

``pairs``: in ``prompt``, or in ``instruction`` and ``input`` as in Alpaca. Answers may be whole conversations: what
both share is the prompt then, where it holds what ``prompt`` asks. A side may be a list of answers: each chosen one is
paired with each rejected one.

``sharegpt``: in a conversation, ``{"conversations": [turns], "chosen": turn, "rejected": turn}``. Without ``chosen``,
its last answer is that: ``{"messages": [turns with an answer], "rejected_response": "..."}``. Beside both sides, which
are an answer each, its last answer is left out.

``implicit``: at the start of both sides. Conversations are cut behind the last message they share; texts behind the
last *token* they share, never inside a word. Where there is a ``prompt`` that both texts begin with, they are cut
behind it.

``hh`` (Bai et al. 2022): at the start of both sides, which are transcripts. The prompt is what both have in common up
to their last common Assistant turn; what that says is the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dpo_cli.data.formats.base import Format, Reading, says_something, text_field
from dpo_cli.data.formats.content import (
    is_conversation,
    is_turn,
    last_role,
    read_messages,
    refuse_python,
    with_turns,
)
from dpo_cli.data.formats.labels import names_in_place_of_answers
from dpo_cli.data.formats.prompts import (
    CONTEXT_NAMES,
    CONVERSATION_NAMES,
    PROMPT_ALTERNATIVES,
    PROMPT_NAMES,
    PROMPT_NEEDS,
    SCORE_ALTERNATIVES,
    SIDE_NAMES,
    SIDES,
    are_lists,
    check_prompt,
    lists_note,
    read_pair,
    read_prompt,
    read_scores,
    roles_of,
    split_turns,
    unread_margin,
    with_context,
)
from dpo_cli.data.formats.texts import (
    begins_with_turn,
    gap_of,
    is_transcript,
    last_answer,
    read_turns,
    shared_start,
    shared_tokens,
)
from dpo_cli.data.problem import RowProblem, kind_of
from dpo_cli.data.schema import Messages, PreferenceExample, RankingExample, RawRow, assistant, user

_PROMPTS = ("prompt", "instruction", *PROMPT_NAMES["prompt"], *PROMPT_NAMES["input"])
"""Fields that hold the prompt where they are there."""
_NUM_ECHOES = 3
_LONG_ECHO = 20


# --- pairs --------------------------------------------------------------------------------------


def _read_pairs(row: RawRow, reading: Reading) -> PreferenceExample | RankingExample:
    prompt = read_prompt(row, reading)
    try:
        return read_pair(row, prompt, reading)
    except RowProblem as problem:
        if problem.reason != "not_one_answer" or are_lists(row):
            raise
        return _read_conversations(row, prompt, reading, problem)


def _read_conversations(row: RawRow, prompt: Messages, reading: Reading, problem: RowProblem) -> PreferenceExample:
    """The pair in two conversations that hold more than the prompt, such as a system turn."""
    try:
        pair = read_implicit(row, reading)
    except RowProblem as other:
        raise (other if other.reason == "diverges_early" else problem) from None
    if prompt[-1] not in pair.prompt:
        raise problem
    return pair


def _doubt_pairs(rows: Sequence[RawRow], reading: Reading) -> str:
    if all(map(are_transcripts, rows)):
        return (
            "both answers are transcripts from the first Human turn in every row;"
            " say format: hh to take the prompt from them, or format: pairs if such a text is the answer"
        )
    if told := names_in_place_of_answers(rows):
        return told
    texts = [[row.get(name) for name in ("prompt", *SIDES)] for row in rows]
    asked = [(p, c, r) for p, c, r in texts if isinstance(p, str) and isinstance(c, str) and isinstance(r, str)]
    if not asked or not all(p.strip() and c.startswith(p) and r.startswith(p) for p, c, r in asked):
        return ""
    if len(asked) < _NUM_ECHOES and all(len(prompt) < _LONG_ECHO for prompt, _, _ in asked):
        return ""
    return (
        "both answers begin with the whole prompt in every row;"
        " say format: implicit to cut it off them, or format: pairs if they are to repeat it"
    )


PAIRS = Format(
    name="pairs",
    fields="prompt (or instruction), chosen and rejected",
    names={**PROMPT_NAMES, **SIDE_NAMES},
    needs=tuple((*asked, *SIDES) for asked in PROMPT_NEEDS),
    read=_read_pairs,
    note=lists_note,
    doubt=_doubt_pairs,
    alternatives=PROMPT_ALTERNATIVES + SCORE_ALTERNATIVES,
    unread={"margin": unread_margin},
)


# --- sharegpt -----------------------------------------------------------------------------------


def _read_sharegpt(row: RawRow, reading: Reading) -> PreferenceExample | RankingExample:
    if row.get("conversations") is None:
        raise RowProblem("missing_field", "has no 'conversations'")
    turns = read_messages(row["conversations"], "conversations", roles_of(reading))
    prompt = with_context(row, turns, reading)
    if row.get("chosen") is None and prompt and prompt[-1]["role"] == "assistant":
        prompt, row = prompt[:-1], {**row, "chosen": prompt[-1:]}
    elif _has_third_answer(row):
        prompt = prompt[:-1]
    return read_pair(row, check_prompt(prompt), reading)


def _matches_sharegpt(row: RawRow) -> bool:
    turns = with_turns(row.get("conversations"))
    if not is_conversation(turns):
        return False
    # with an answer at its end it is another copy of what the other fields hold, unless it alone has the prompt
    return last_role(turns) != "assistant" or row.get("chosen") is None or _has_third_answer(row)


def _has_third_answer(row: RawRow) -> bool:
    """Whether the conversation ends with an answer, though it is the prompt of the two sides, an answer each."""
    turns = with_turns(row.get("conversations"))
    return (
        is_conversation(turns)
        and last_role(turns) == "assistant"
        and all(_is_answer(with_turns(row.get(name))) for name in SIDES)
        and not are_transcripts(row)
        and not any(says_something(row.get(name)) for name in _PROMPTS)
    )


def _is_answer(side: Any) -> bool:
    return isinstance(side, str) or is_turn(side) or (is_conversation(side) and not side[1:])


def _note_sharegpt(row: RawRow, reading: Reading) -> str:
    if row.get("chosen") is None:
        return "the conversation's last answer is the chosen one"
    if _has_third_answer(row):
        return "the conversation's last answer is left out, for chosen and rejected are the answers"
    return lists_note(row, reading)


SHAREGPT = Format(
    name="sharegpt",
    fields="conversations (or messages) and two answers, chosen and rejected",
    names={
        "conversations": (*CONVERSATION_NAMES, "context"),
        **CONTEXT_NAMES,
        **SIDE_NAMES,
        "rejected": (*SIDE_NAMES["rejected"], "rejected_messages"),
    },
    needs=(("conversations", *SIDES), ("conversations", "rejected")),
    read=_read_sharegpt,
    matches=_matches_sharegpt,
    note=_note_sharegpt,
    alternatives=SCORE_ALTERNATIVES,
    unread={"margin": unread_margin, "conversations": lambda row: ["last answer"] if _has_third_answer(row) else []},
)


# --- hh -----------------------------------------------------------------------------------------


def _read_hh(row: RawRow, reading: Reading) -> PreferenceExample:
    chosen, rejected = (f"\n\n{text_field(row, name).lstrip()}" for name in SIDES)
    gap = gap_of(chosen, rejected)
    cut = last_answer(shared_start(chosen, rejected), gap)
    if cut < 0:
        raise RowProblem("bad_transcript", "the two sides share no opening up to an Assistant turn")
    one, other = (read_turns(text[cut:], gap) for text in (chosen, rejected))
    prompt = check_prompt(read_turns(chosen[:cut], gap) if chosen[:cut].strip() else [])
    return PreferenceExample(*split_turns(prompt, one, other, reading))


def are_transcripts(row: RawRow) -> bool:
    """Whether both sides are texts that begin with a Human turn, or share one with an Assistant turn behind it."""
    sides = [row.get(name) for name in SIDES]
    texts = [side for side in sides if isinstance(side, str) and is_transcript(side)]
    if len(texts) < len(SIDES):
        return False
    return all(map(begins_with_turn, texts)) or is_transcript(shared_start(*texts))


HH = Format(
    name="hh",
    fields="chosen and rejected transcripts",
    names={"chosen": (), "rejected": ()},
    needs=(SIDES,),
    read=_read_hh,
    matches=are_transcripts,
)


# --- implicit -----------------------------------------------------------------------------------


def read_implicit(row: RawRow, reading: Reading) -> PreferenceExample:
    """The pair in a row whose ``chosen`` and ``rejected`` both begin with the prompt.

    Raises:
        RowProblem: They share no opening, or part before the last answer.
    """
    scores = read_scores(row)
    for name in SIDES:
        if row.get(name) is None:
            raise RowProblem("missing_field", f"has no {name!r}")
    chosen, rejected = (with_turns(row[name]) for name in SIDES)
    if isinstance(chosen, str) and isinstance(rejected, str):
        refuse_python(chosen, "chosen")
        refuse_python(rejected, "rejected")
        prompt, one, other = _split_texts(row.get("prompt"), chosen, rejected)
    else:
        one, other = (_turns_of(side, name, reading) for name, side in (("chosen", chosen), ("rejected", rejected)))
        if one[:1] != other[:1] or min(len(one), len(other)) < 2:
            raise RowProblem(
                "no_common_prompt", "the two sides share no opening messages, and there is no other prompt"
            )
        prompt, one, other = split_turns([], one, other, reading)
    return PreferenceExample(with_context(row, prompt, reading), one, other, *scores)


def _turns_of(side: Any, name: str, reading: Reading) -> Messages:
    if not isinstance(side, list | dict):
        raise RowProblem("not_text", f"{name!r} must be text or messages as the other side is, got {kind_of(side)}")
    return read_messages(side, name, roles_of(reading))


def _split_texts(asked: Any, chosen: str, rejected: str) -> tuple[Messages, Messages, Messages]:
    if isinstance(asked, str):
        cut = len(asked) if chosen.startswith(asked) and rejected.startswith(asked) else 0
    else:
        cut = shared_tokens(chosen, rejected)
    if not chosen[:cut].strip():
        raise RowProblem(
            "no_common_prompt", "the two sides do not begin with the same words, and there is no other prompt"
        )
    return [user(chosen[:cut])], [assistant(chosen[cut:])], [assistant(rejected[cut:])]


def _are_texts(row: RawRow) -> bool:
    return all(isinstance(with_turns(row.get(name)), str) for name in SIDES)


def _matches_implicit(row: RawRow) -> bool:
    if _are_texts(row):
        asked = (*_PROMPTS, *CONVERSATION_NAMES)
        return not any(row.get(name) is not None for name in asked) and not are_transcripts(row)
    sides = [with_turns(row.get(name)) for name in SIDES]
    return all(is_conversation(side) and len(side) > 1 for side in sides)


def _doubt_implicit(rows: Sequence[RawRow], reading: Reading) -> str:
    texts = [row for row in rows if _are_texts(row)]
    if not texts:
        return ""
    if told := names_in_place_of_answers(rows):
        return told
    apart = sum(not row["chosen"][: shared_tokens(row["chosen"], row["rejected"])].strip() for row in texts)
    others = {key for row in texts for key, value in row.items() if key not in IMPLICIT.names and _may_be_prompt(value)}
    others -= {name for names in SIDE_NAMES.values() for name in names}
    remedy = (
        "say in columns which field is the prompt, such as columns: {prompt: NAME},"
        " or say format: implicit if both sides begin with it"
    )
    if others:
        return f"there is no field known as the prompt, and {', '.join(sorted(others))} may be it; {remedy}"
    if 2 * apart > len(texts):
        return f"there is no prompt, and in {apart} of {len(texts)} rows the two sides share no first word; {remedy}"
    return ""


def _may_be_prompt(value: Any) -> bool:
    return is_conversation(value) or (isinstance(value, str) and len(value.split()) > 1)


IMPLICIT = Format(
    name="implicit",
    fields="chosen and rejected that begin with the prompt",
    names={
        "prompt": (),
        **CONTEXT_NAMES,
        **{name: (*others, f"{name}_messages") if name in SIDES else others for name, others in SIDE_NAMES.items()},
    },
    needs=(SIDES,),
    read=read_implicit,
    matches=_matches_implicit,
    weak=_are_texts,
    note=lambda row, reading: "texts are cut behind the last word they share" if _are_texts(row) else "",
    doubt=_doubt_implicit,
    alternatives=SCORE_ALTERNATIVES,
    unread={"margin": unread_margin},
)
