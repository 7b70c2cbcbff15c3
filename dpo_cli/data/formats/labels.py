"""What names say of two outputs: which fields they are, which one is the verdict, and what its labels mean."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from dpo_cli.data.formats.base import Column, Columns, Suggestion
from dpo_cli.data.schema import RawRow

_STEMS = (
    "output", "response", "answer", "completion", "reply", "summary", "generation", "conversation", "human_ref",
)  # fmt: skip
_ENDS = (("1", "2", "3"), ("0", "1", "2"), ("a", "b", "c"), ("A", "B", "C"))
"""What the names of the first and second output end with, and what that of a third would."""
_LABELS = ("label", "labels", "winner", "preference", "choice", "better_response_id")
_VOTE = re.compile(r"(annotator|vote|annotation|rater)_?\d+")
_WINNERS = ("winner_model_", "winner_", "win_", "preferred_")
_TIE_COLUMNS = ("winner_tie", "winner_tie (bothbad)", "winner_tie_both_bad", "tie")
_SCORES = ("score", "rating", "reward")

TIES = dict.fromkeys(("tie", "tie (bothbad)", "bothbad", "both_bad", "both", "equal", "same", "draw", "neither"), "tie")
"""Labels that mean a tie anywhere."""
WORDS = {
    **dict.fromkeys(("first", "a", "model_a"), "first"),
    **dict.fromkeys(("second", "b", "model_b"), "second"),
}
"""Labels that mean a side whatever the outputs are called. Numbers may count from 0 or from 1: they do not."""
_RULE = re.compile(r"\s*(<=|>=|<|>)\s*(\S+)\s*")
_COMPARE = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
_FEW = 3
"""Numbers up to so many are names of the outputs; more are a scale."""
_SIGNED = {str(value): "first" if value < 0 else "second" if value else "tie" for value in range(-3, 4)}
"""How strongly the second output is preferred to the first, as HelpSteer says it."""


def label_text(value: Any) -> str:
    """A label as text: 2.0 and "2.0" are 2."""
    text = str(value).strip()
    return text[:-2] if text.endswith(".0") and text[:-2].lstrip("-").isdecimal() else text


def label_number(text: str) -> float | None:
    """The finite number that a label is, if it is one."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def side_of(text: str, labels: Mapping[str, str]) -> str | None:
    """What a label means: ``first``, ``second`` or ``tie``; None where nothing says it.

    Args:
        text: The label (:func:`label_text`).
        labels: Meanings of labels; ``<1.5``, ``<=1.5``, ``>1.5`` and ``>=1.5`` stand for all numbers there, and the
            first of these that holds counts where no label is named itself.
    """
    side = labels.get(text) or labels.get(text.lower())
    if side is not None or (value := label_number(text)) is None:
        return side
    rules = ((match, meaning) for key, meaning in labels.items() if (match := _RULE.fullmatch(key)))
    bounds = ((match[1], label_number(match[2]), meaning) for match, meaning in rules)
    return next((side for sign, bound, side in bounds if bound is not None and _COMPARE[sign](value, bound)), None)


def is_soft(values: Collection[str]) -> bool:
    """Whether labels are numbers on a scale, such as probabilities, in place of names of outputs."""
    numbers = [value for text in values if (value := label_number(text)) is not None]
    return len(set(numbers)) > _FEW or any(value % 1 and value % 1 != 0.5 for value in numbers)


def what_to_say(values: Collection[str]) -> str:
    """Settings that would explain some labels, for a message."""
    if is_soft(values):
        cut = _cut_of(values)
        return f'labels: {{"<{cut}": first, ">{cut}": second, "{cut}": tie}}, or the other way round'
    if {label_number(text) for text in values} == {0, 1, 2}:
        return 'labels: {"0": first, "1": second, "2": tie}, or {"0": tie, "1": first, "2": second}'
    names = [text[:40] for text in sorted(values, key=lambda text: (label_number(text) or 0, text))]
    sides = {1: ("first",), 2: ("first", "second")}.get(len(names), ("first", "second", "tie"))
    if len(names) == _FEW and (middle := label_number(names[1])) is not None and (middle == 0 or middle % 1):
        sides = ("first", "tie", "second")
    said = ", ".join(f'"{name}": {side}' for name, side in zip(names, sides, strict=False))
    return f"labels: {{{said}}}, or what else {'they mean' if len(names) > 1 else 'it means'} (first, second or tie)"


def _cut_of(values: Collection[str]) -> str:
    """The middle of the scale that some numbers lie on, as far as they show it."""
    numbers = [value for text in values if (value := label_number(text)) is not None]
    low, high = math.floor(min(numbers)), math.ceil(max(numbers))
    return "0" if low < 0 < high else f"{(low + high) / 2:g}"


def suggest(keys: Collection[str], named: Mapping[str, Column]) -> Suggestion | None:
    """The columns and labels of a row with these fields, where it has two outputs and a verdict."""
    first, second = (named.get(side) for side in ("first", "second"))
    pairs = [(first, second)] if isinstance(first, str) and isinstance(second, str) else _outputs(keys)
    if len(pairs) != 1:
        return None
    first, second = pairs[0]
    ends = next((ends[:2] for ends in _ENDS if _stem(first, ends[0]) == _stem(second, ends[1]) != ""), None)
    columns: Columns = {"first": first, "second": second, **_scores(keys, ends)}
    if "label" not in named and (signed := _signed(keys)) is not None:
        return columns | _prompt(keys, "context") | {"label": signed}, dict(_SIGNED)
    if not named.keys() & {"label", "votes", "won"} and (won := _won(keys, ends)):
        return {"first": first, "second": second, "won": won}, {}
    labels = [name for name in _LABELS if name in keys]
    votes = [name for name in keys if _VOTE.fullmatch(name)]
    if "label" not in named and "votes" not in named:
        if len(labels) == 1:
            columns["label"] = labels[0]
        elif votes and not labels:
            columns["votes"] = votes
    if first == "human_ref_A":  # SHP, whose 1 means A, and whose history is the prompt
        return columns | _prompt(keys, "history"), {"1": "first", "0": "second"}
    verdict = named.get("label") or named.get("votes") or columns.get("label") or columns.get("votes")
    return columns, _words(first, second, ends) | _numbers(first, second, verdict, keys)


def names_in_place_of_answers(rows: Sequence[RawRow]) -> str:
    """What to say where ``chosen`` and ``rejected`` name outputs that stand in other columns; empty: they do not."""
    sides = [[label_text(row.get(name, "")) for name in ("chosen", "rejected")] for row in rows]
    keys = [key for key in rows[0] if all(key in row for row in rows)]
    columns, labels = suggest(keys, {}) or ({}, {})
    names = sorted({name for pair in sides for name in pair})
    outputs = [columns.get(side) for side in ("first", "second")]
    if None in outputs and len(names) == len(outputs) and all(name in keys for name in names):
        outputs, labels = list(names), dict(zip(names, ("first", "second"), strict=True))
    if None not in outputs and all({side_of(name, labels) for name in pair} == {"first", "second"} for pair in sides):
        return (
            "'chosen' and 'rejected' name columns in place of answers in every row; say columns:"
            f" {{first: {outputs[0]}, second: {outputs[1]}, label: 'chosen'}}"
        )
    if all(set(pair) <= row.keys() for pair, row in zip(sides, rows, strict=True)):
        return (
            "'chosen' and 'rejected' name columns in place of answers in every row, more than two in all; write the"
            " answers themselves into them"
        )
    return ""


def _scores(keys: Collection[str], ends: tuple[str, str] | None) -> Columns:
    for score in _SCORES if ends else ():
        first, second = (f"{score}_{end}" for end in ends or ())
        if first in keys and second in keys:
            return {"first_score": first, "second_score": second}
    return {}


def _won(keys: Collection[str], ends: tuple[str, str] | None) -> list[str]:
    """The columns that say of each output whether it won, and of neither, as Chatbot Arena has them."""
    for stem in _WINNERS if ends else ():
        won = [f"{stem}{end}" for end in ends or ()]
        if all(name in keys for name in won):
            return [*won, *(name for name in _TIE_COLUMNS if name in keys)]
    return []


def _signed(keys: Collection[str]) -> str | None:
    """The label of HelpSteer 2 or 3: less than nothing where the first output is better."""
    if "preference_strength" in keys:
        return "preference_strength"
    return "overall_preference" if "overall_preference" in keys and "individual_preference" in keys else None


def _prompt(keys: Collection[str], name: str) -> Columns:
    return {"prompt": name} if name in keys and "prompt" not in keys else {}


def _outputs(keys: Collection[str]) -> list[tuple[str, str]]:
    """All two fields that are outputs by their names, and have no third beside them."""
    return [
        (f"{stem}{joint}{first}", f"{stem}{joint}{second}")
        for stem in _STEMS
        for first, second, third in _ENDS
        for joint in ("_", "", " ")
        if f"{stem}{joint}{first}" in keys and f"{stem}{joint}{second}" in keys and f"{stem}{joint}{third}" not in keys
    ]


def _stem(name: str, end: str) -> str:
    """A name without its end; empty where it has another."""
    return name[: -len(end)] if name.endswith(end) else ""


def _words(first: str, second: str, ends: tuple[str, str] | None) -> dict[str, str]:
    """What labels in words mean by the outputs' names: the names themselves, their ends where these are letters."""
    words = {**WORDS, first.lower(): "first", second.lower(): "second"}
    for end, side in zip(ends or (), ("first", "second"), strict=False):
        words[f"model_{end.lower()}"] = side
    return words


def _numbers(first: str, second: str, verdict: Column | None, keys: Collection[str]) -> dict[str, str]:
    """What labels in numbers mean, where a convention that the columns' names show settles it; else nothing does."""
    one_two = {"1": "first", "2": "second"}
    if (first, second) == ("output_1", "output_2"):
        if verdict == "preference":  # AlpacaFarm and AlpacaEval, where 0 and 1.5 are draws
            return one_two | {"0": "tie", "1.5": "tie"}
        if verdict == "label" and "input" in keys and "instruction" not in keys:  # LLMBar
            return one_two
    if (first, second) == ("response1", "response2") and _are_annotators(verdict):  # PandaLM
        return one_two | {"0": "tie"}
    if (first, second) == ("response_0", "response_1") and verdict == "better_response_id":  # PKU-SafeRLHF
        return {"0": "first", "1": "second"}
    return {}


def _are_annotators(verdict: Column | None) -> bool:
    return isinstance(verdict, list) and all(re.fullmatch(r"annotator_?\d+", name) for name in verdict)
