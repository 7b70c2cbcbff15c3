"""K answers to a prompt with their order: ranks, scores, truth values or pairwise verdicts.

``{"prompt", "completions": [...]}`` where a completion is a text, a turn, or an object with its
text and its rank or score. The order comes from ``ranks`` (1 is best, equal is tied),
``scores`` (higher is better; true is better than false) or ``preference``: the verdicts on all
pairs in the order 1-2, 1-3, ..., 2-3, ... (1 or 2: which wins, 0: tie), or a matrix whose entry
[i][j] says how often i beat j. A list without any of these may be in order, best first, but need not be:
it is read so only where the user names this format.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

from dpo_cli.data.formats.base import Column, Columns, Format, Reading, Suggestion, number
from dpo_cli.data.formats.content import (
    ANSWER_KEYS,
    is_turn,
    json_in,
    key_in,
    media_keys,
    read_extra,
    read_of_answer,
    refuse_media,
    unread_beside,
    unread_of_turns,
)
from dpo_cli.data.formats.prompts import PROMPT_ALTERNATIVES, PROMPT_NAMES, PROMPT_NEEDS, read_answer, read_prompt
from dpo_cli.data.problem import RowProblem, kind_of
from dpo_cli.data.schema import Messages, RankingExample, RawRow

_CLOSE = 1e-3
_NUMBERED = re.compile(r"(prediction|completion|response|output|answer|candidate|score|rating|reward|rank)[ _]?(\d+)")
_ORDER = ("ranks", "scores", "preference")
_RANK_KEYS = ("rank",)
_SCORE_KEYS = ("score", "overall_score", "rating", "reward", "pm_score", "is_correct", "correct")
_NUMBERED_ORDER = {"score": "scores", "rating": "scores", "reward": "scores", "rank": "ranks"}


def suggest(keys: Collection[str], named: Mapping[str, Column]) -> Suggestion | None:
    """The columns of a row whose answers, and perhaps their scores or ranks, are numbered fields."""
    numbered: dict[str, dict[int, str]] = {}
    for name in keys:
        if match := _NUMBERED.fullmatch(name):
            numbered.setdefault(match[1], {})[int(match[2])] = name
    answers = [stem for stem in numbered if stem not in _NUMBERED_ORDER and len(numbered[stem]) > 2]
    if len(answers) != 1 or "completions" in named:
        return None
    numbers = sorted(numbered[answers[0]])
    columns: Columns = {"completions": [numbered[answers[0]][number] for number in numbers]}
    for stem, field in _NUMBERED_ORDER.items():
        if sorted(numbered.get(stem, {})) == numbers and field not in columns:
            columns[field] = [numbered[stem][number] for number in numbers]
    return columns, {}


def ranks_of_scores(scores: Sequence[float]) -> list[int]:
    """Ranks from 1 (best), equal scores tied, without gaps."""
    levels = {score: rank for rank, score in enumerate(sorted(set(scores), reverse=True), start=1)}
    return [levels[score] for score in scores]


def _list(value: Any) -> Any:
    """A list, perhaps as JSON text, as a CSV file has it."""
    return json_in(value) if isinstance(value, str) and value[:1] == "[" else value


def _completion(value: Any, index: int, prompt: Messages, reading: Reading, row: RawRow) -> Messages:
    where = f"completions[{index}]"
    if isinstance(value, dict) and not is_turn(value):
        refuse_media(value, media_keys(value), where)
        extra = read_extra(value, "assistant", where)
        key = key_in(value, ANSWER_KEYS)
        if not key and not extra:
            raise RowProblem("missing_field", f"{where} has no text: it is {kind_of(value)}")
        text = value[key] if key else ""
        (answer,) = read_answer({"prompt": row.get("prompt"), where: text}, where, prompt, reading)
        return [{**answer, **{name: said for name, said in extra.items() if name not in answer}}]
    return read_answer({"prompt": row.get("prompt"), where: value}, where, prompt, reading)


def _key_of_all(values: Sequence[Any], keys: Sequence[str]) -> str:
    """The first of some keys that all completions have; else empty."""
    objects = [value if isinstance(value, dict) else {} for value in values]
    return next((key for key in keys if all(value.get(key) is not None for value in objects)), "")


def _of_each(row: RawRow, name: str, values: list[Any], keys: Sequence[str]) -> list[Any] | None:
    """What the row says of each completion in a list beside them, or in the completions themselves."""
    listed = _list(row.get(name))
    if listed is not None:
        if not isinstance(listed, list) or len(listed) != len(values):
            raise RowProblem(
                "bad_ranking",
                f"{name!r} must have a value for each of the {len(values)} completions, got {kind_of(listed)}",
            )
        return listed
    objects = [value if isinstance(value, dict) else {} for value in values]
    if key := _key_of_all(values, keys):
        return [value[key] for value in objects]
    key = next((key for key in keys if any(value.get(key) is not None for value in objects)), None)
    if key is None:
        return None
    index = next(index for index, value in enumerate(objects) if value.get(key) is None)
    raise RowProblem("no_ranking", f"completions[{index}] has no {key}, others have")


def _ranks(listed: list[Any]) -> list[int]:
    if any(isinstance(rank, bool) for rank in listed):
        raise RowProblem("bad_ranking", "'ranks' must be numbers, got truth values; as scores, true is better")
    return ranks_of_scores([-number(rank, f"ranks[{index}]") for index, rank in enumerate(listed)])


def _answers(row: RawRow) -> list[Any]:
    name = "completions" if row.get("completions") is not None or "output" not in row else "output"
    values = _list(row.get(name))
    if values is None:
        raise RowProblem("missing_field", "has no 'completions'")
    if not isinstance(values, list):
        raise RowProblem("not_a_list", f"{name!r} must be a list of answers, got {kind_of(values)}")
    if len(values) < 2:
        raise RowProblem("too_few_completions", f"has {kind_of(values)} completions, a comparison needs two")
    return values


def read_verdicts(values: Any, num: int) -> list[tuple[int, int]]:
    """Decided pairs (better, worse) among ``num`` answers.

    Args:
        values: Verdicts on the pairs 1-2, 1-3, ..., 2-3, ...: 1 or 2 says which wins, 0 is a tie;
            or a matrix whose entry [i][j] says how often, or how likely, i beats j.
        num: How many answers there are.

    Raises:
        RowProblem: They are neither.
    """
    if not isinstance(values, list):
        raise RowProblem("bad_ranking", f"'preference' must be a list, got {kind_of(values)}")
    if len(values) == num and all(isinstance(line, list) and len(line) == num for line in values):
        return _read_matrix(values, num)
    pairs = list(combinations(range(num), 2))
    if len(values) != len(pairs) or not all(type(value) in (int, float) and value in (0, 1, 2) for value in values):
        raise RowProblem(
            "bad_ranking",
            f"'preference' must be a {num} by {num} matrix or {len(pairs)} verdicts that are 1, 2 or 0 (tie)",
        )
    return [(i, j) if value == 1 else (j, i) for (i, j), value in zip(pairs, values, strict=True) if value]


def _read_matrix(values: list[list[Any]], num: int) -> list[tuple[int, int]]:
    won: list[tuple[int, int]] = []
    for i, j in combinations(range(num), 2):
        mine, its = number(values[i][j], f"preference[{i}][{j}]"), number(values[j][i], f"preference[{j}][{i}]")
        # probabilities add up to one, log-odds to zero; half a matrix would be read wrongly
        if not (mine.is_integer() and its.is_integer()) and min(abs(mine + its - 1), abs(mine + its)) > _CLOSE:
            raise RowProblem(
                "bad_ranking", f"preference[{i}][{j}] and [{j}][{i}] must add up to 1 (or 0), got {mine + its:g}"
            )
        if mine != its:
            won.append((i, j) if mine > its else (j, i))
    return won


def _read(row: RawRow, reading: Reading) -> RankingExample:
    values = _answers(row)
    prompt = read_prompt(row, reading)
    completions = [_completion(value, index, prompt, reading, row) for index, value in enumerate(values)]
    scores: list[float] | None = None
    verdicts: list[tuple[int, int]] | None = None
    if (listed := _of_each(row, "ranks", values, _RANK_KEYS)) is not None:
        ranks = _ranks(listed)
    elif (listed := _of_each(row, "scores", values, _SCORE_KEYS)) is not None:
        scores = [number(score, f"scores[{index}]") for index, score in enumerate(listed)]
        ranks = ranks_of_scores(scores)
    elif row.get("preference") is not None:
        verdicts = read_verdicts(_list(row["preference"]), len(values))
        ranks = ranks_of_scores([sum((i == won) - (i == lost) for won, lost in verdicts) for i in range(len(values))])
    elif reading.in_order and not any(name in row for name in _ORDER):
        ranks = list(range(1, len(values) + 1))
    else:
        raise RowProblem(
            "no_ranking",
            "has no 'ranks', 'scores' or 'preference'; if a column ranks or scores them, name it, such as columns:"
            " {scores: NAME}; if the answers are in order, best first, say format: kwise",
        )
    order = sorted(range(len(values)), key=lambda index: ranks[index])  # stable: tied ones stay as they came
    place = {old: new for new, old in enumerate(order)}
    return RankingExample(
        prompt,
        [completions[index] for index in order],
        [ranks[index] for index in order],
        None if scores is None else [scores[index] for index in order],
        None if verdicts is None else sorted((place[better], place[worse]) for better, worse in verdicts),
    )


def _has_order(row: RawRow) -> bool:
    values = _list(row.get("completions") if row.get("completions") is not None else row.get("output"))
    return any(row.get(name) is not None for name in _ORDER) or any(
        isinstance(value, dict) and value.get(key) is not None
        for value in (values if isinstance(values, list) else ())
        for key in (*_RANK_KEYS, *_SCORE_KEYS)
    )


def _unread(row: RawRow) -> Iterator[tuple[str, str]]:
    """What completions hold beside text, reasoning, calls and what orders them."""
    name = "completions" if row.get("completions") is not None else "output"
    values = _list(row.get(name))
    values = values if isinstance(values, list) else []
    order = "" if row.get("ranks") is not None else _key_of_all(values, _RANK_KEYS)
    if not order and all(row.get(listed) is None for listed in ("ranks", "scores")):
        order = _key_of_all(values, _SCORE_KEYS)
    parts: dict[str, None] = {}
    for value in values:
        if isinstance(value, dict) and not is_turn(value):
            parts.update(dict.fromkeys(unread_beside(value, {*read_of_answer(value), order})))
        else:
            parts.update(dict.fromkeys(unread_of_turns(value, (order,))))
    return ((name, part) for part in parts)


def _doubt(rows: Sequence[RawRow], reading: Reading) -> str:
    if all(map(_has_order, rows)):
        return ""
    return (
        "nothing says which answer in 'output' is better; if they are in order, best first, say format: kwise; if a"
        " column ranks or scores them, name it, such as columns: {scores: NAME}"
    )


def _matches(row: RawRow) -> bool:
    if row.get("completions") is not None:
        return isinstance(_list(row["completions"]), list) and _has_order(row)
    return isinstance(_list(row.get("output")), list)


KWISE = Format(
    name="kwise",
    fields="a list of completions (or output) with ranks, scores or pairwise preference",
    names={
        **PROMPT_NAMES,
        "completions": ("responses", "answers", "candidates", "generations", "outputs"),
        "ranks": ("rank",),
        "scores": ("ratings", "rewards", "score", "rating"),
        "preference": ("preferences", "comparisons"),
        "output": (),
    },
    needs=tuple((*asked, answers) for answers in ("completions", "output") for asked in PROMPT_NEEDS),
    read=_read,
    matches=_matches,
    note=lambda row, reading: "" if _has_order(row) else "the order of the list is the ranking, best first",
    doubt=_doubt,
    suggest=suggest,
    leaves=("completions", "output"),
    unread=_unread,
    alternatives=(
        *PROMPT_ALTERNATIVES,
        ("completions", "output"),
        ("ranks", "scores"),
        ("ranks", "preference"),
        ("scores", "preference"),
    ),
)
