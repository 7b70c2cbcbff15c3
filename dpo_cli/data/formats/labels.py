"""What names say of two outputs: which fields they are, which one is the verdict, and what its labels mean."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from dpo_cli.data.formats.base import Column, Columns, Suggestion

_STEMS = (
    "output", "response", "answer", "completion", "reply", "summary", "generation", "conversation", "human_ref",
)  # fmt: skip
_ENDS = (("1", "2", "3"), ("0", "1", "2"), ("a", "b", "c"), ("A", "B", "C"))
"""What the names of the first and second output end with, and what that of a third would."""
_LABELS = ("label", "labels", "winner", "preference", "choice", "better_response_id")
_VOTE = re.compile(r"(annotator|vote|annotation|rater)_?\d+")
_SCORES = ("score", "rating", "reward")

TIES = dict.fromkeys(("tie", "tie (bothbad)", "bothbad", "both_bad", "both", "equal", "same", "draw", "neither"), "tie")
"""Labels that mean a tie anywhere."""
WORDS = {
    **dict.fromkeys(("first", "a", "model_a"), "first"),
    **dict.fromkeys(("second", "b", "model_b"), "second"),
}
"""Labels that mean a side whatever the outputs are called. Numbers may count from 0 or from 1: they do not."""
_SIGNED = {str(value): "first" if value < 0 else "second" if value else "tie" for value in range(-3, 4)}
"""How strongly the second output is preferred to the first, as HelpSteer says it."""


def label_text(value: Any) -> str:
    """A label as text: 2.0 and "2.0" are 2."""
    text = str(value).strip()
    return text[:-2] if text.endswith(".0") and text[:-2].lstrip("-").isdecimal() else text


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
    labels = [name for name in _LABELS if name in keys]
    votes = [name for name in keys if _VOTE.fullmatch(name)]
    if "label" not in named and "votes" not in named:
        if len(labels) == 1:
            columns["label"] = labels[0]
        elif votes and not labels:
            columns["votes"] = votes
    if first == "human_ref_A":  # SHP, whose 1 means A, and whose history is the prompt
        return columns | _prompt(keys, "history"), {"1": "first", "0": "second"}
    return columns, _meaning(first, second, ends)


def _scores(keys: Collection[str], ends: tuple[str, str] | None) -> Columns:
    for score in _SCORES if ends else ():
        first, second = (f"{score}_{end}" for end in ends or ())
        if first in keys and second in keys:
            return {"first_score": first, "second_score": second}
    return {}


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


def _meaning(first: str, second: str, ends: tuple[str, str] | None) -> dict[str, str]:
    """What labels mean by the outputs' names: their ends, the names themselves, and words."""
    meaning = {**WORDS, first.lower(): "first", second.lower(): "second"}
    if ends:
        for end, side in zip(ends, ("first", "second"), strict=True):
            meaning |= dict.fromkeys((end.lower(), f"model_{end.lower()}"), side)
    if ends == ("1", "2"):
        meaning["0"] = "tie"
    return meaning
