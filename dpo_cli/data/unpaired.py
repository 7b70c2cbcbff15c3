"""Single answers that are good or bad, as token groups: pairs of those to one prompt, and each beside another prompt's.

Both follow from a table's rows in their stored order alone, so every stage makes the same ones.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from dpo_cli.data.tokenize import UNPAIRED, TokenTable
from dpo_cli.data.tokens import LazyGroup, TokenGroup, completion_key

_MOST_TRIED = 1000
"""Answers that are tried as another prompt's: enough to pass those to the same prompt, and those that are too long."""

_Answer = tuple[TokenGroup, int]
"""A group, and the place of one of its completions."""


def pairs_of(table: TokenTable) -> TokenTable:
    """The pairs of a table: its rows that are pairs, and a good with a bad answer where a prompt has both.

    Of a prompt with g good and b bad answers there are max(g, b) pairs, in which each answer is. A pair has the id of
    one of its two rows, and the reasons of the answers that are in none are added.
    """
    if not table.sides:
        return table
    good, bad = defaultdict[str, list[int]](list), defaultdict[str, list[int]](list)
    for place, (_, side) in enumerate(table.sides):
        if side != "both":
            (good if side == "chosen" else bad)[table.groups[place].group].append(place)
    pairs = [group for group, (_, side) in zip(table.groups, table.sides, strict=True) if side == "both"]
    of_rows: dict[str, tuple[str, str]] = {}
    for prompt in sorted(good.keys() & bad.keys(), key=lambda prompt: good[prompt][0]):
        for number in range(max(len(good[prompt]), len(bad[prompt]))):
            better, worse = (table.groups[places[number % len(places)]] for places in (good[prompt], bad[prompt]))
            id = (better if len(good[prompt]) >= len(bad[prompt]) else worse).id
            of_rows[id] = better.id, worse.id
            pairs.append(_group_of(id, (better, 0), (worse, 0)))
    alone = [place for one, other in ((good, bad), (bad, good)) for prompt in one.keys() - other.keys()
             for place in one[prompt]]  # fmt: skip
    rejects = [_reject(table, place, "unpaired", UNPAIRED) for place in sorted(alone)]
    return replace(table, groups=pairs, rejects=[*table.rejects, *rejects], sides=[], of_rows=of_rows)


def beside_others(table: TokenTable, max_length: int) -> tuple[TokenTable, dict[str, bool]]:
    """Each answer of a table that has single ones, with another prompt's answer beside it, and which are good.

    That is the next answer in the order of the table, from its end on from its beginning, that is to another prompt
    and fits behind this one. The answers of a pair are two, the rejected one with a minus behind its id.

    Args:
        table: Of a split.
        max_length: Tokens a prompt with one answer may have.

    Returns:
        Groups of two completions, no more than there are answers, and whether the first is good, by id; both empty
        where the table holds pairs alone.
    """
    answers: list[tuple[str, int, _Answer, bool]] = []
    for place, (_, side) in enumerate(table.sides):
        group = table.groups[place]
        answers.append((group.id, place, (group, 0), side != "rejected"))
        if side == "both":
            answers.append((f"{group.id}-", place, (group, 1), False))
    groups: dict[str, TokenGroup] = {}
    rejects = []
    for number, (id, place, own, _) in enumerate(answers):
        if id in groups:  # the same row once more, which gets the same one beside it
            continue
        following = islice(_from(answers, number), _MOST_TRIED)
        other = next((each for _, _, each, _ in following if _fits(own[0], each, max_length)), None)
        if other is None:
            rejects.append(_reject(table, place, "no_other_prompt", "finds no answer to another prompt that fits"))
        else:
            groups[id] = _group_of(id, own, other)
    found = [groups[id] for id, *_ in answers if id in groups]
    good = {id: is_good for id, _, _, is_good in answers}
    return replace(table, groups=found, rejects=[*table.rejects, *rejects] if table.sides else [], sides=[]), good


def _from(answers: Sequence[Any], number: int) -> Any:
    """All answers but one, from the one behind it on."""
    return (answers[(number + step) % len(answers)] for step in range(1, len(answers)))


def _fits(own: TokenGroup, other: _Answer, max_length: int) -> bool:
    group, place = other
    return group.group != own.group and own.sizes[0] + group.sizes[1 + place] <= max_length


def _reject(table: TokenTable, place: int, reason: str, detail: str) -> dict[str, Any]:
    file = table.path.as_posix() if table.path is not None else ""
    return {"file": file, "row": table.sides[place][0], "reason": reason, "detail": detail}


def _group_of(id: str, first: _Answer, second: _Answer) -> TokenGroup:
    """The prompt of the first answer with both; read when it is asked for."""
    return LazyGroup(_read, (id, first, second))


def _read(source: tuple[str, _Answer, _Answer], name: str) -> Any:
    id, *answers = source
    own = answers[0][0]
    if name == "id":
        return id
    if name in ("group", "prompt"):
        return getattr(own, name)
    if name == "sizes":
        return own.sizes[0], *(group.sizes[1 + place] for group, place in answers)
    completions = tuple(group.completions[place] for group, place in answers)
    return completions if name == "completions" else [completion_key(own.prompt, each) for each in completions]
