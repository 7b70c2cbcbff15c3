"""K answers to a prompt with their order, as a list or as a tree.

``kwise``: ``{"prompt", "completions": [...]}`` where a completion is a text, a turn, or an object with its text and its
rank or score. The order comes from ``ranks`` (1 is best, equal is tied), ``scores`` (higher is better; true is better
than false) or ``preference``: the verdicts on all pairs in the order 1-2, 1-3, ..., 2-3, ... (1 or 2: which wins, 0:
tie), or a matrix whose entry [i][j] says how often i beat j. A list without any of these may be in order, best first,
but need not be: it is read so only where the user names this format.

``oasst`` (Koepf et al. 2023): ``{"prompt": {"text", "role", "replies": [{"text", "rank", "replies"}]}}``. Every message
with two or more ranked answers is a ranking; ``rank`` 0 is best. Answers that were deleted, failed review or have no
rank are left out, each with its place in the tree. As instruction data, the best answers along the best path are taken.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

from dpo_cli.data.formats.base import Column, Columns, Format, Part, Reading, Suggestion, number
from dpo_cli.data.formats.content import (
    ANSWER_KEYS,
    ROLE_NAMES,
    is_turn,
    key_in,
    media_keys,
    read_extra,
    read_of_answer,
    refuse_media,
    unread_beside,
    unread_of_turns,
    with_list,
)
from dpo_cli.data.formats.prompts import PROMPT_ALTERNATIVES, PROMPT_NAMES, PROMPT_NEEDS, read_answer, read_prompt
from dpo_cli.data.problem import RowProblem, kind_of
from dpo_cli.data.schema import Message, Messages, RankingExample, RawRow, SftExample

_CLOSE = 1e-3
_NUMBERED = re.compile(r"(prediction|completion|response|output|answer|candidate|score|rating|reward|rank)[ _]?(\d+)")
_NUMBERED_ORDER = {"score": "scores", "rating": "scores", "reward": "scores", "rank": "ranks"}
_ORDER = ("ranks", "scores", "preference")
_RANK_KEYS = ("rank",)
_SCORE_KEYS = ("score", "overall_score", "rating", "reward", "pm_score", "is_correct", "correct")


def ranks_of_scores(scores: Sequence[float]) -> list[int]:
    """Ranks from 1 (best), equal scores tied, without gaps."""
    levels = {score: rank for rank, score in enumerate(sorted(set(scores), reverse=True), start=1)}
    return [levels[score] for score in scores]


# --- a list -------------------------------------------------------------------------------------


def _read_list(row: RawRow, reading: Reading) -> RankingExample:
    values = _answers(row)
    prompt = read_prompt(row, reading)
    completions = read_completions(row, prompt, reading)
    scores: list[float] | None = None
    verdicts: list[tuple[int, int]] | None = None
    if (listed := _of_each(row, "ranks", values, _RANK_KEYS)) is not None:
        ranks = _ranks(listed)
    elif (listed := _of_each(row, "scores", values, _SCORE_KEYS)) is not None:
        scores = [number(score, f"scores[{index}]") for index, score in enumerate(listed)]
        ranks = ranks_of_scores(scores)
    elif row.get("preference") is not None:
        verdicts = read_verdicts(with_list(row["preference"]), len(values))
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


def read_completions(row: RawRow, prompt: Messages, reading: Reading, fewest: int = 2) -> list[Messages]:
    """The completions of a row in the order in which they stand there, whether or not something orders them.

    Raises:
        RowProblem: There are fewer than that, or one of them is no answer.
    """
    return [_completion(value, index, prompt, reading, row) for index, value in enumerate(_answers(row, fewest))]


def _name_of_answers(row: RawRow) -> str:
    return "output" if row.get("completions") is None and "output" in row else "completions"


def _answers(row: RawRow, fewest: int = 2) -> list[Any]:
    name = _name_of_answers(row)
    values = with_list(row.get(name))
    if values is None:
        raise RowProblem("missing_field", "has no 'completions'")
    if not isinstance(values, list):
        raise RowProblem("not_a_list", f"{name!r} must be a list of answers, got {kind_of(values)}")
    if len(values) < fewest:
        raise RowProblem("too_few_completions", f"has {kind_of(values)} completions, a comparison needs two")
    return values


def _completion(value: Any, index: int, prompt: Messages, reading: Reading, row: RawRow) -> Messages:
    where = f"completions[{index}]"
    extra: Message = {}
    if isinstance(value, dict) and not is_turn(value):
        refuse_media(value, media_keys(value), where)
        extra = read_extra(value, "assistant", where)
        key = key_in(value, ANSWER_KEYS)
        if not key and not extra:
            raise RowProblem("missing_field", f"{where} has no text: it is {kind_of(value)}")
        value = value[key] if key else ""
    answer = read_answer({"prompt": row.get("prompt"), where: value}, where, prompt, reading)
    return [{**answer[0], **extra, **answer[0]}] if extra else answer


def _of_each(row: RawRow, name: str, values: list[Any], keys: Sequence[str]) -> list[Any] | None:
    """What the row says of each completion in a list beside them, or in the completions themselves."""
    listed = with_list(row.get(name))
    if listed is not None:
        if not isinstance(listed, list) or len(listed) != len(values):
            raise RowProblem(
                "bad_ranking",
                f"{name!r} must have a value for each of the {len(values)} completions, got {kind_of(listed)}",
            )
        return listed
    key = _key_of(values, keys, all) or _key_of(values, keys, any)
    if not key:
        return None
    found = [value.get(key) if isinstance(value, dict) else None for value in values]
    if None in found:
        raise RowProblem("no_ranking", f"completions[{found.index(None)}] has no {key}, others have")
    return found


def _key_of(values: Any, keys: Sequence[str], of: Callable[[Iterable[bool]], bool]) -> str:
    """The first of some keys that all completions have, or any; else empty."""
    objects = [value if isinstance(value, dict) else {} for value in (values if isinstance(values, list) else ())]
    return next((key for key in keys if of(value.get(key) is not None for value in objects)), "")


def _ranks(listed: list[Any]) -> list[int]:
    if any(isinstance(rank, bool) for rank in listed):
        raise RowProblem("bad_ranking", "'ranks' must be numbers, got truth values; as scores, true is better")
    return ranks_of_scores([-number(rank, f"ranks[{index}]") for index, rank in enumerate(listed)])


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


def _has_order(row: RawRow) -> bool:
    values = with_list(row.get(_name_of_answers(row)))
    return any(row.get(name) is not None for name in _ORDER) or bool(_key_of(values, (*_RANK_KEYS, *_SCORE_KEYS), any))


def _matches_list(row: RawRow) -> bool:
    if row.get("completions") is not None:
        return isinstance(with_list(row["completions"]), list) and _has_order(row)
    return isinstance(with_list(row.get("output")), list)


def _unread_of_list(row: RawRow) -> Iterable[str]:
    """What completions hold beside text, reasoning, calls and what orders them."""
    values = with_list(row.get(_name_of_answers(row)))
    order = "" if row.get("ranks") is not None else _key_of(values, _RANK_KEYS, all)
    if not order and all(row.get(listed) is None for listed in ("ranks", "scores")):
        order = _key_of(values, _SCORE_KEYS, all)
    parts: dict[str, None] = {}
    for value in values if isinstance(values, list) else ():
        if isinstance(value, dict) and not is_turn(value):
            parts.update(dict.fromkeys(unread_beside(value, {*read_of_answer(value), order})))
        else:
            parts.update(dict.fromkeys(unread_of_turns(value, (order,))))
    return parts


def _doubt_list(rows: Sequence[RawRow], reading: Reading) -> str:
    if all(map(_has_order, rows)):
        return ""
    return (
        "nothing says which answer in 'output' is better; if they are in order, best first, say format: kwise; if a"
        " column ranks or scores them, name it, such as columns: {scores: NAME}"
    )


def _suggest(keys: Collection[str], named: Mapping[str, Column]) -> Suggestion | None:
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
    read=_read_list,
    matches=_matches_list,
    note=lambda row, reading: "" if _has_order(row) else "the order of the list is the ranking, best first",
    doubt=_doubt_list,
    suggest=_suggest,
    unread={
        name: lambda row, name=name: _unread_of_list(row) if name == _name_of_answers(row) else ()
        for name in ("completions", "output")
    },
    alternatives=(*PROMPT_ALTERNATIVES, ("completions", "output"), *combinations(_ORDER, 2)),
)


# --- a tree -------------------------------------------------------------------------------------

_Reply = tuple[str, dict[str, Any], Message]
"""A reply: its place in the tree, itself, and its turn."""


def _turn(node: Any, where: str) -> Message:
    if not isinstance(node, dict):
        raise RowProblem("bad_message", f"{where} must be a message, got {kind_of(node)}")
    role, text = ROLE_NAMES.get(str(node.get("role"))), node.get("text")
    if role not in ("user", "assistant"):
        raise RowProblem("unknown_role", f"{where} must have the role prompter or assistant")
    if not isinstance(text, str):
        raise RowProblem("not_text", f"{where} must have text, got {kind_of(text)}")
    return {"role": role, "content": text}


def _replies(node: dict[str, Any], where: str) -> tuple[list[_Reply], list[tuple[str, RowProblem]]]:
    """The replies to a message, and what is wrong with those that are left out."""
    replies = node.get("replies") or []
    if not isinstance(replies, list):
        return [], [(where, RowProblem("bad_message", f"{where}.replies must be a list, got {kind_of(replies)}"))]
    found: list[_Reply] = []
    problems: list[tuple[str, RowProblem]] = []
    for index, reply in enumerate(replies):
        place = f"{where}.replies[{index}]"
        try:
            turn = _turn(reply, place)
            if reply.get("deleted") or reply.get("review_result") is False:
                raise RowProblem("deleted", f"{place} was deleted or failed review, with all that follows it")
            found.append((place, reply, turn))
        except RowProblem as problem:
            problems.append((place, problem))
    return found, problems


def _rank(reply: _Reply) -> int | None:
    rank = reply[1].get("rank")
    if isinstance(rank, float) and rank.is_integer():
        rank = int(rank)
    return rank if isinstance(rank, int) and not isinstance(rank, bool) else None


def _answers_among(replies: list[_Reply]) -> list[_Reply]:
    return [reply for reply in replies if reply[2]["role"] == "assistant"]


def _root(row: RawRow) -> tuple[str, dict[str, Any], Messages]:
    root = row.get("prompt")
    if not isinstance(root, dict):
        raise RowProblem("missing_field", "has no 'prompt' with the first message of the tree")
    turn = _turn(root, "prompt")
    if turn["role"] != "user":
        raise RowProblem("prompt_not_ending_with_user", "the first message of the tree is not a prompter's")
    return "prompt", root, [turn]


def _rankings(row: RawRow) -> Iterator[Part[RankingExample]]:
    todo = [_root(row)]
    while todo:
        where, node, path = todo.pop()
        replies, problems = _replies(node, where)
        yield from problems
        answers = _answers_among(replies) if path[-1]["role"] == "user" else []
        ranked = sorted((rank, at) for at, answer in enumerate(answers) if (rank := _rank(answer)) is not None)
        if len(answers) > 1 and len(ranked) < 2:
            told = f"{where} has {len(answers)} answers, {len(ranked)} of them with a rank"
            yield where, RowProblem("no_rank", told)
        elif len(answers) > 1:
            for answer in answers:
                if _rank(answer) is None:
                    yield answer[0], RowProblem("no_rank", f"{answer[0]} has no rank, others beside it have")
            ranks = ranks_of_scores([-rank for rank, _ in ranked])
            yield where, RankingExample(path, [[answers[at][2]] for _, at in ranked], ranks)
        todo += [(place, reply, [*path, turn]) for place, reply, turn in reversed(replies)]


def _best_path(row: RawRow) -> Iterator[Part[SftExample]]:
    todo = [_root(row)]
    while todo:
        where, node, path = todo.pop()
        replies, problems = _replies(node, where)
        yield from problems
        answers = _answers_among(replies)
        ranked = [answer for answer in answers if _rank(answer) is not None]
        if len(answers) > 1 and not ranked:
            yield where, RowProblem("no_rank", f"{where} has {len(answers)} answers, none of them with a rank")
        elif answers:
            place, best, turn = min(ranked or answers, key=lambda answer: _rank(answer) or 0)
            yield place, SftExample(path, [turn])
            questions, problems = _replies(best, place)
            yield from problems
            todo += [
                (deeper, question, [*path, turn, asked])
                for deeper, question, asked in reversed(questions)
                if asked["role"] == "user"
            ]


def _tree(parts_of: Callable[[RawRow], Iterator[Part[Any]]], reason: str, detail: str) -> Format[Any]:
    """The format of trees, of which some parts are read; without any, a tree is refused for this reason."""

    def read(row: RawRow, reading: Reading) -> Iterator[Part[Any]]:
        parts = list(parts_of(row))
        if not parts:
            raise RowProblem(reason, detail)
        return iter(parts)

    def matches(row: RawRow) -> bool:
        prompt = row.get("prompt")
        return isinstance(prompt, dict) and "replies" in prompt

    fields = "a prompt with replies, as a tree"
    return Format("oasst", fields, {"prompt": ()}, (("prompt",),), read, matches, of_a_turn=None)


OASST = _tree(_rankings, "too_few_completions", "no message of the tree has two ranked answers")
OASST_SFT = _tree(_best_path, "no_answer", "the tree has no answer")
