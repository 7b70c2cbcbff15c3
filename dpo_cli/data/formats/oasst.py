"""OpenAssistant trees (Koepf et al. 2023): ``{"prompt": {"text", "role", "replies": [{"text", "rank", "replies"}]}}``.

Every message with two or more ranked answers is a ranking; ``rank`` 0 is best. Answers that
were deleted, failed review or have no rank are left out, each with its place in the tree. As
instruction data, the best answers along the best path are taken.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dpo_cli.data.formats.base import Format, Part, Reading
from dpo_cli.data.formats.content import ROLE_NAMES
from dpo_cli.data.formats.kwise import ranks_of_scores
from dpo_cli.data.problem import RowProblem, kind_of
from dpo_cli.data.schema import Message, Messages, RankingExample, RawRow, SftExample

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


def _rank(node: dict[str, Any]) -> int | None:
    rank = node.get("rank")
    if isinstance(rank, float) and rank.is_integer():
        rank = int(rank)
    return rank if isinstance(rank, int) and not isinstance(rank, bool) else None


def _answers(replies: list[_Reply]) -> list[_Reply]:
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
        answers = _answers(replies) if path[-1]["role"] == "user" else []
        ranked = sorted(
            ((rank, turn) for _, reply, turn in answers if (rank := _rank(reply)) is not None), key=lambda pair: pair[0]
        )
        if len(answers) > 1:
            if len(ranked) < 2:
                problem = RowProblem(
                    "no_rank", f"{where} has {len(answers)} answers, {len(ranked)} of them with a rank"
                )
                yield where, problem
            else:
                for place, reply, _ in answers:
                    if _rank(reply) is None:
                        yield place, RowProblem("no_rank", f"{place} has no rank, others beside it have")
                ranks = ranks_of_scores([-rank for rank, _ in ranked])
                yield where, RankingExample(path, [[turn] for _, turn in ranked], ranks)
        todo += [(place, reply, [*path, turn]) for place, reply, turn in reversed(replies)]


def _read(row: RawRow, reading: Reading) -> Iterator[Part[RankingExample]]:
    parts = list(_rankings(row))
    if not parts:
        raise RowProblem("too_few_completions", "no message of the tree has two ranked answers")
    return iter(parts)


def _best_path(row: RawRow) -> Iterator[Part[SftExample]]:
    todo = [_root(row)]
    while todo:
        where, node, path = todo.pop()
        replies, problems = _replies(node, where)
        yield from problems
        answers = _answers(replies)
        ranked = [answer for answer in answers if _rank(answer[1]) is not None]
        if len(answers) > 1 and not ranked:
            yield where, RowProblem("no_rank", f"{where} has {len(answers)} answers, none of them with a rank")
        elif answers:
            place, best, turn = min(ranked or answers, key=lambda answer: _rank(answer[1]) or 0)
            yield place, SftExample(path, [turn])
            questions, problems = _replies(best, place)
            yield from problems
            before = [*path, turn]
            todo += [
                (deeper, question, [*before, asked])
                for deeper, question, asked in reversed(questions)
                if asked["role"] == "user"
            ]


def _read_sft(row: RawRow, reading: Reading) -> Iterator[Part[SftExample]]:
    parts = list(_best_path(row))
    if not parts:
        raise RowProblem("no_answer", "the tree has no answer")
    return iter(parts)


def _matches(row: RawRow) -> bool:
    prompt = row.get("prompt")
    return isinstance(prompt, dict) and "replies" in prompt


_FIELDS = "a prompt with replies, as a tree"
OASST = Format("oasst", _FIELDS, {"prompt": ()}, (("prompt",),), _read, _matches, of_a_turn=None)
OASST_SFT = Format("oasst", _FIELDS, {"prompt": ()}, (("prompt",),), _read_sft, _matches, of_a_turn=None)
