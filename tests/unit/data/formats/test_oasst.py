"""Trees: every message with ranked answers is a ranking, and the best path is instruction data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from dpo_cli.data.formats.base import Reading
from dpo_cli.data.formats.rankings import OASST, OASST_SFT
from dpo_cli.data.problem import RowProblem
from dpo_cli.data.schema import RankingExample, SftExample, assistant, user


def ask(text: str, *replies: Any, **fields: Any) -> dict[str, Any]:
    return {"text": text, "role": "prompter", "replies": list(replies), **fields}


def say(text: Any, rank: Any = None, *replies: Any, **fields: Any) -> dict[str, Any]:
    return {"text": text, "role": "assistant", "rank": rank, "replies": list(replies), **fields}


def parts_of(fmt: Any, tree: Any) -> dict[str, Any]:
    """The parts by name; a problem by its reason."""
    parts = fmt.read({"message_tree_id": "x", "prompt": tree}, Reading())
    return {name: found.reason if isinstance(found, RowProblem) else found for name, found in parts}


def ranking(prompt: list[Any], *answers: str, ranks: list[int] | None = None) -> RankingExample:
    return RankingExample(prompt, [[assistant(text)] for text in answers], ranks or list(range(1, len(answers) + 1)))


TREE = ask(
    "1",
    say("b", 1),
    say("a", 0, ask("2", say("d", 1), say("c", 0)), ask("3", say("only"))),
)


def test_every_message_with_two_ranked_answers_is_a_ranking() -> None:
    assert parts_of(OASST, TREE) == {
        "prompt": ranking([user("1")], "a", "b"),
        "prompt.replies[1].replies[0]": ranking([user("1"), assistant("a"), user("2")], "c", "d"),
    }


def test_the_best_path_is_instruction_data() -> None:
    assert parts_of(OASST_SFT, TREE) == {
        "prompt.replies[1]": SftExample([user("1")], [assistant("a")]),
        "prompt.replies[1].replies[0].replies[1]": SftExample([user("1"), assistant("a"), user("2")], [assistant("c")]),
        "prompt.replies[1].replies[1].replies[0]": SftExample(
            [user("1"), assistant("a"), user("3")], [assistant("only")]
        ),
    }


@pytest.mark.parametrize(
    ("ranks", "texts", "expected"),
    [
        ([0, 1, 2], "abc", [1, 2, 3]),
        ([2, 0, 1], "bca", [1, 2, 3]),
        ([1, 2, 3], "abc", [1, 2, 3]),
        ([0, 5, 2], "acb", [1, 2, 3]),
        ([0, 0, 1], "abc", [1, 1, 2]),
        ([1.0, 0.0, 2.0], "bac", [1, 2, 3]),
    ],
)
def test_ranks_may_begin_anywhere_and_have_gaps(ranks: list[Any], texts: str, expected: list[int]) -> None:
    tree = ask("q", *(say(text, rank) for text, rank in zip("abc", ranks, strict=True)))
    assert parts_of(OASST, tree) == {"prompt": ranking([user("q")], *texts, ranks=expected)}


def test_answers_without_a_rank_are_left_out_by_name() -> None:
    tree = ask("q", say("a", 1), say("b"), say("c", 0), say("d", True))
    assert parts_of(OASST, tree) == {
        "prompt.replies[1]": "no_rank",
        "prompt.replies[3]": "no_rank",
        "prompt": ranking([user("q")], "c", "a"),
    }
    assert parts_of(OASST, ask("q", say("a", 1), say("b"))) == {"prompt": "no_rank"}
    assert parts_of(OASST_SFT, ask("q", say("a"), say("b"))) == {"prompt": "no_rank"}
    assert parts_of(OASST_SFT, ask("q", say("a"), say("b", 3))) == {
        "prompt.replies[1]": SftExample([user("q")], [assistant("b")])
    }


@pytest.mark.parametrize("fields", [{"deleted": True}, {"review_result": False}])
def test_deleted_answers_are_left_out_with_all_below_them(fields: dict[str, Any]) -> None:
    tree = ask("q", say("x", 0, ask("2", say("y", 0), say("z", 1)), **fields), say("a", 1), say("b", 2))
    assert parts_of(OASST, tree) == {"prompt.replies[0]": "deleted", "prompt": ranking([user("q")], "a", "b")}
    found = parts_of(OASST_SFT, tree)
    assert found["prompt.replies[1]"] == SftExample([user("q")], [assistant("a")])


def test_one_broken_reply_leaves_the_others() -> None:
    tree = ask("q", say("a", 0), "text", say("b", 1), {"role": "robot", "text": "c"}, say(5, 2), ask("no answer"))
    assert parts_of(OASST, tree) == {
        "prompt.replies[1]": "bad_message",
        "prompt.replies[3]": "unknown_role",
        "prompt.replies[4]": "not_text",
        "prompt": ranking([user("q")], "a", "b"),
    }
    assert parts_of(OASST, ask("q", say("a", 0, ask("2", replies="none")), say("b", 1))) == {
        "prompt": ranking([user("q")], "a", "b"),
        "prompt.replies[0].replies[0]": "bad_message",
    }


@pytest.mark.parametrize(
    ("tree", "ranked", "best"),
    [
        (None, "missing_field", "missing_field"),
        ("q", "missing_field", "missing_field"),
        ({"replies": []}, "unknown_role", "unknown_role"),
        (ask("q"), "too_few_completions", "no_answer"),
        (ask("q", say("a", 0)), "too_few_completions", None),
        (say("a", 0), "prompt_not_ending_with_user", "prompt_not_ending_with_user"),
        ({"text": 5, "role": "prompter", "replies": []}, "not_text", "not_text"),
    ],
)
def test_a_tree_without_anything_to_learn_is_refused(
    tree: Any, ranked: str, best: str | None, reason_of: Callable[..., str]
) -> None:
    assert reason_of(OASST, {"prompt": tree}) == ranked
    if best is not None:
        assert reason_of(OASST_SFT, {"prompt": tree}) == best


def test_a_very_deep_tree_is_read() -> None:
    tree = ask("last", say("a", 0), say("b", 1))
    for number in range(3000):
        tree = ask(f"{number}", say("x", 0, tree))
    parts: Any = OASST.read({"prompt": tree}, Reading())
    ((_, found),) = parts
    assert isinstance(found, RankingExample)
    assert len(found.prompt) == 6001


def test_trees_are_known_by_their_replies(auto: Callable[..., Any]) -> None:
    assert auto({"message_tree_id": "x", "prompt": TREE}).formats == ["oasst"]
    assert auto({"message_tree_id": "x", "prompt": TREE}, kind="sft").formats == ["oasst"]
