"""Pairs without a prompt of their own: ``{"chosen", "rejected"}``, both with the prompt at their start.

Conversations are cut behind the last message they share. Texts are cut behind the last *token*
they share, never inside a word (:mod:`dpo_cli.data.formats.boundaries`). Where there is a
``prompt`` that both texts begin with, they are cut behind it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dpo_cli.data.formats.base import Format, Reading
from dpo_cli.data.formats.boundaries import shared_tokens
from dpo_cli.data.formats.content import (
    is_conversation,
    read_messages,
    refuse_python,
    turns_in,
)
from dpo_cli.data.formats.hh import are_transcripts
from dpo_cli.data.formats.labels import names_in_place_of_answers
from dpo_cli.data.formats.prompts import (
    CONTEXT_NAMES,
    CONVERSATION_NAMES,
    PROMPT_NAMES,
    SCORE_ALTERNATIVES,
    SIDE_NAMES,
    read_scores,
    roles_of,
    split_turns,
    with_context,
)
from dpo_cli.data.formats.sides import unread_margin
from dpo_cli.data.problem import RowProblem, kind_of
from dpo_cli.data.schema import PreferenceExample, RawRow, assistant, user

_SIDES = ("chosen", "rejected")
_PROMPTS = ("prompt", "instruction", *CONVERSATION_NAMES, *PROMPT_NAMES["prompt"], *PROMPT_NAMES["input"])
"""Fields that hold the prompt where they are there."""


def _read(row: RawRow, reading: Reading) -> PreferenceExample:
    return split_implicit(row, reading, *read_scores(row))


def split_implicit(row: RawRow, reading: Reading, *scores: float | None) -> PreferenceExample:
    """The pair in a row whose ``chosen`` and ``rejected`` both begin with the prompt.

    Raises:
        RowProblem: They share no opening, or part before the last answer.
    """
    for name in _SIDES:
        if row.get(name) is None:
            raise RowProblem("missing_field", f"has no {name!r}")
    chosen, rejected = (_turns_or_text(row[name]) for name in _SIDES)
    if isinstance(chosen, str) and isinstance(rejected, str):
        refuse_python(chosen, "chosen")
        refuse_python(rejected, "rejected")
        return _split_texts(row, chosen, rejected, reading, *scores)
    for name, side in zip(_SIDES, (chosen, rejected), strict=True):
        if not isinstance(side, list | dict):
            raise RowProblem("not_text", f"{name!r} must be text or messages as the other side is, got {kind_of(side)}")
    roles = roles_of(reading)
    one, other = read_messages(chosen, "chosen", roles), read_messages(rejected, "rejected", roles)
    if one[:1] != other[:1] or min(len(one), len(other)) < 2:
        raise RowProblem("no_common_prompt", "the two sides share no opening messages, and there is no other prompt")
    prompt, one, other = split_turns([], one, other, reading)
    return PreferenceExample(with_context(row, prompt, reading), one, other, *scores)


def _turns_or_text(side: Any) -> Any:
    turns = turns_in(side) if isinstance(side, str) else None
    return side if turns is None else turns


def _split_texts(row: RawRow, chosen: str, rejected: str, reading: Reading, *scores: float | None) -> PreferenceExample:
    asked = row.get("prompt")
    if isinstance(asked, str):
        cut = len(asked) if chosen.startswith(asked) and rejected.startswith(asked) else 0
    else:
        cut = shared_tokens(chosen, rejected)
    if not chosen[:cut].strip():
        raise RowProblem(
            "no_common_prompt", "the two sides do not begin with the same words, and there is no other prompt"
        )
    return PreferenceExample(
        with_context(row, [user(chosen[:cut])], reading),
        [assistant(chosen[cut:])],
        [assistant(rejected[cut:])],
        *scores,
    )


def _is_text(row: RawRow) -> bool:
    return all(isinstance(row.get(name), str) and turns_in(row[name]) is None for name in _SIDES)


def _matches(row: RawRow) -> bool:
    if _is_text(row):
        return not any(row.get(name) is not None for name in _PROMPTS) and not are_transcripts(row)
    sides = [_turns_or_text(row.get(name)) for name in _SIDES]
    return all(is_conversation(side) and len(side) > 1 for side in sides)


def _doubt(rows: Sequence[RawRow], reading: Reading) -> str:
    texts = [row for row in rows if _is_text(row)]
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
        **SIDE_NAMES,
        "chosen": (*SIDE_NAMES["chosen"], "chosen_messages"),
        "rejected": (*SIDE_NAMES["rejected"], "rejected_messages"),
    },
    needs=(("chosen", "rejected"),),
    read=_read,
    matches=_matches,
    weak=_is_text,
    note=lambda row, reading: "texts are cut behind the last word they share" if _is_text(row) else "",
    doubt=_doubt,
    alternatives=SCORE_ALTERNATIVES,
    leaves=("margin",),
    unread=unread_margin,
)
