"""Rankings and the pairs made of them, worked out by hand: lists in order, verdicts, and trees."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from dpo_cli.data.formats import PREFERENCE_FORMATS, SFT_FORMATS
from dpo_cli.data.formats.base import Reading
from dpo_cli.data.formats.detect import RowReader, UnknownFormatError
from dpo_cli.data.formats.rankings import KWISE, OASST, OASST_SFT, read_verdicts
from dpo_cli.data.problem import RowProblem
from dpo_cli.data.schema import PreferenceExample, RankingExample, SftExample, assistant, user

# --- kwise -------------------------------------------------------------------------------------


Q = user("q")


def read(answers: list[Any], **order: Any) -> Any:
    return KWISE.read({"prompt": "q", "completions": answers, **order}, Reading())


def texts_of(ranking: RankingExample) -> str:
    """One letter an answer, in order."""
    return "".join(completion[0]["content"] for completion in ranking.completions)


def pairs_of(ranking: RankingExample, scheme: str) -> set[str]:
    """Pairs as better > worse."""
    texts = texts_of(ranking)
    return {f"{texts[better]}>{texts[worse]}" for better, worse in ranking.pairs(scheme)}


@pytest.mark.parametrize(
    ("order", "texts", "ranks", "all_pairs", "adjacent", "extremes"),
    [
        # ranks: 1 is best
        ({"ranks": [1, 2, 3]}, "abc", [1, 2, 3], "a>b a>c b>c", "a>b b>c", "a>c"),
        ({"ranks": [3, 1, 2]}, "bca", [1, 2, 3], "b>c b>a c>a", "b>c c>a", "b>a"),
        ({"ranks": [0, 2, 1]}, "acb", [1, 2, 3], "a>c a>b c>b", "a>c c>b", "a>b"),
        ({"ranks": [1, 1, 2]}, "abc", [1, 1, 2], "a>c b>c", "a>c b>c", "a>c"),
        ({"ranks": [2, 1, 2]}, "bac", [1, 2, 2], "b>a b>c", "b>a b>c", "b>c"),
        ({"ranks": [1, 1, 1]}, "abc", [1, 1, 1], "", "", ""),
        # scores: higher is better
        ({"scores": [0.1, 0.9, 0.5]}, "bca", [1, 2, 3], "b>c b>a c>a", "b>c c>a", "b>a"),
        ({"scores": [-1, "2", 0]}, "bca", [1, 2, 3], "b>c b>a c>a", "b>c c>a", "b>a"),
        ({"scores": [1, 0, 1]}, "acb", [1, 1, 2], "a>b c>b", "a>b c>b", "a>b"),
        ({"scores": [True, False, True]}, "acb", [1, 1, 2], "a>b c>b", "a>b c>b", "a>b"),
        # verdicts on 1-2, 1-3, 2-3
        ({"preference": [1, 1, 1]}, "abc", [1, 2, 3], "a>b a>c b>c", "a>b b>c", "a>c"),
        ({"preference": [2, 2, 2]}, "cba", [1, 2, 3], "b>a c>a c>b", "c>b b>a", "c>a"),
        ({"preference": [1, 0, 0]}, "acb", [1, 2, 3], "a>b", "a>c c>b", "a>b"),
        ({"preference": [1, 2, 1]}, "abc", [1, 1, 1], "a>b c>a b>c", "", ""),  # a > b > c > a
        # a matrix: entry [i][j] is how often i beat j
        ({"preference": [[0, 3, 0], [1, 0, 0], [4, 4, 0]]}, "cab", [1, 2, 3], "a>b c>a c>b", "c>a a>b", "c>b"),
        (
            {"preference": [[0.5, 0.2, 0.5], [0.8, 0.5, 0.6], [0.5, 0.4, 0.5]]},
            "bac",
            [1, 2, 2],
            "b>a b>c",
            "b>a b>c",
            "b>c",
        ),
    ],
)
def test_an_order_makes_pairs(
    order: dict[str, Any], texts: str, ranks: list[int], all_pairs: str, adjacent: str, extremes: str
) -> None:
    ranking = read(["a", "b", "c"], **order)
    assert (texts_of(ranking), ranking.ranks) == (texts, ranks)
    assert pairs_of(ranking, "all") == set(all_pairs.split())
    assert pairs_of(ranking, "adjacent") == set(adjacent.split())
    assert pairs_of(ranking, "best_vs_worst") == set(extremes.split())


def test_scores_stay_with_their_answers() -> None:
    ranking = read(["a", "b", "c"], scores=[0.1, 0.9, 0.5])
    assert ranking.scores == [0.9, 0.5, 0.1]
    assert ranking.pair(0, 2) == PreferenceExample([Q], [assistant("b")], [assistant("a")], 0.9, 0.1)
    assert read(["a", "b"], ranks=[1, 2]).pair(0, 1).chosen_score is None


@pytest.mark.parametrize(
    "answers",
    [
        ["a", "b"],
        [assistant("a"), assistant("b")],
        [[Q, assistant("a")], [assistant("b")]],
        [{"text": "a", "model": "x"}, {"text": "b"}],
        [{"response": "a"}, {"response": "b"}],
        [{"text": None, "content": "a"}, {"answer": "b"}],
        json.dumps(["a", "b"]),
    ],
)
def test_answers_come_in_many_shapes(answers: Any) -> None:
    expected = RankingExample([Q], [[assistant("b")], [assistant("a")]], [1, 2])
    assert read(answers, ranks=[2, 1]) == expected
    assert read(answers, ranks="[2, 1]") == expected


@pytest.mark.parametrize("key", ["score", "overall_score", "rating", "reward", "is_correct", "correct"])
def test_answers_may_have_their_own_scores(key: str) -> None:
    ranking = read([{"text": "a", key: False}, {"text": "b", key: 1.0}])
    assert (texts_of(ranking), ranking.scores) == ("ba", [1.0, 0.0])


def test_ranks_come_before_scores() -> None:
    assert texts_of(read([{"text": "a", "rank": 2, "score": 9}, {"text": "b", "rank": 1, "score": 3}])) == "ba"
    assert texts_of(read(["a", "b"], ranks=[2, 1], scores=[9, 3])) == "ba"
    ranking = read([{"text": "a", "score": None, "rating": 1}, {"text": "b", "score": None, "rating": 2}])
    assert texts_of(ranking) == "ba"


def test_a_list_is_in_order_where_the_user_says_so() -> None:
    ranking: Any = KWISE.read({"instruction": "q", "output": ["a", "b", "c"]}, Reading(in_order=True))
    assert (texts_of(ranking), ranking.ranks, ranking.scores) == ("abc", [1, 2, 3], None)
    ranking = KWISE.read({"instruction": "q", "output": ["a", "b"], "ranks": [2, 1]}, Reading())
    assert texts_of(ranking) == "ba"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"completions": None}, "missing_field"),
        ({"completions": "a"}, "not_a_list"),
        ({"completions": {"a": 1}}, "not_a_list"),
        ({"completions": ["a"]}, "too_few_completions"),
        ({"completions": ["a", None]}, "missing_field"),
        ({"completions": ["a", {"model": "x"}]}, "missing_field"),
        ({"completions": ["a", Q]}, "not_one_answer"),
        # an order that is not there is not made up
        ({"ranks": None}, "no_ranking"),
        ({"ranks": ...}, "no_ranking"),
        ({"ranks": None, "completions": [{"text": "a", "rank": 1}, {"text": "b", "rank": None}]}, "no_ranking"),
        ({"ranks": ..., "completions": [{"text": "a", "score": 1}, {"text": "b"}]}, "no_ranking"),
        ({"ranks": ..., "completions": ["a", {"text": "b", "rank": 2}]}, "no_ranking"),
        ({"ranks": ..., "completions": [{"text": "a", "score": 1}, {"text": "b", "rating": 1}]}, "no_ranking"),
        ({"ranks": [1]}, "bad_ranking"),
        ({"ranks": [1, 2, 3]}, "bad_ranking"),
        ({"ranks": 1}, "bad_ranking"),
        ({"ranks": "1, 2"}, "bad_ranking"),
        ({"ranks": [True, False]}, "bad_ranking"),
        ({"ranks": [1, None]}, "not_a_number"),
        ({"ranks": [1, "second"]}, "not_a_number"),
        ({"ranks": ..., "scores": [1, "high"]}, "not_a_number"),
        ({"ranks": ..., "scores": [1, float("inf")]}, "not_a_number"),
        ({"ranks": ..., "preference": [1, 2]}, "bad_ranking"),
        ({"ranks": ..., "preference": "a"}, "bad_ranking"),
    ],
)
def test_an_odd_ranking_is_refused(change: dict[str, Any], reason: str, reason_of: Callable[..., str]) -> None:
    row = {"prompt": "q", "completions": ["a", "b"], "ranks": [1, 2]} | change
    assert reason_of(KWISE, {name: value for name, value in row.items() if value is not ...}) == reason


@pytest.mark.parametrize(
    ("row", "texts"),
    [
        ({"instruction": "q", "input": "", "output": ["a", "b"], "history": [], "scores": [1, 2]}, "ba"),
        ({"instruction": "q", "output": [{"text": "a", "rank": 2}, {"text": "b", "rank": 1}]}, "ba"),
        ({"prompt": "q", "response_1": "a", "response_2": "b", "response_3": "c", "scores": [1, 3, 2]}, "bca"),
        (
            {
                "prompt": "q",
                "response_1": "a",
                "response_2": "b",
                "response_3": "c",
                "score_1": 1,
                "score_2": 3,
                "score_3": 2,
            },
            "bca",
        ),
        ({"question": "q", **{f"prediction {i}": "abc"[i - 1] for i in (1, 2, 3)}, "preference": [2, 2, 2]}, "cba"),
        ({"prompt": "q", "completions": '["a", "b"]', "ranks": "[2, 1]"}, "ba"),
    ],
)
def test_rankings_are_known_by_other_names(row: dict[str, Any], texts: str, auto: Callable[..., Any]) -> None:
    found = auto(row)
    assert (found.formats, texts_of(found.only)) == (["kwise"], texts)


def test_answers_in_fields_of_their_own_are_named_by_a_list(auto: Callable[..., Any]) -> None:
    row = {"ask": {"text": "q"}, "small": {"text": "a", "right": False}, "large": [{"text": "b", "right": True}]}
    columns = {
        "prompt": "ask.text",
        "completions": ["small.text", "large.0.text"],
        "scores": ["small.right", "large.0.right"],
    }
    assert auto(row, columns=columns).only == RankingExample(
        [Q], [[assistant("b")], [assistant("a")]], [1, 2], [1.0, 0.0]
    )
    lost = {**row, "large": []}
    found = auto(row, lost, columns=columns).found[1]
    assert (found.reason, found.detail) == ("missing_field", "has no 'large.0.text'")


@pytest.mark.parametrize("kind", ["preference", "sft"])
@pytest.mark.parametrize("name", ["output", "completions"])
def test_a_list_without_ranks_may_be_said_to_be_in_order(kind: str, name: str, auto: Callable[..., Any]) -> None:
    row = {"instruction": "q", "input": "", name: ["a", "b"]}
    with pytest.raises(UnknownFormatError, match="in order, best first, say format: kwise"):
        auto(row, kind=kind)
    formats = SFT_FORMATS if kind == "sft" else PREFERENCE_FORMATS
    found = RowReader(formats, "kwise", {}, Reading()).read(row)[1]
    assert (found.completion[0]["content"] if kind == "sft" else texts_of(found)) == ("a" if kind == "sft" else "ab")


def test_a_list_without_ranks_among_lists_with_ranks_is_in_doubt(auto: Callable[..., Any]) -> None:
    ranked = {"instruction": "q", "output": ["a", "b"], "ranks": [2, 1]}
    with pytest.raises(UnknownFormatError, match="nothing says which answer in 'output' is better"):
        auto(ranked, ranked, {"instruction": "q", "output": ["a", "b"]})


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "completions": ["a", "b"], "ranking": [2, 1]},  # ranks, or places in order?
        {"prompt": "q", "answers": ["a", "b"]},
        {"question": "q", "context": "c", "answers": {"text": ["a"], "answer_start": [1]}},
        {"prompt": "q", "response_1": "a", "response_2": "b", "response_3": "c"},
    ],
)
def test_lists_whose_order_nobody_names_are_a_riddle(row: dict[str, Any], auto: Callable[..., Any]) -> None:
    with pytest.raises(UnknownFormatError):
        auto(row)


CALL = [{"type": "function", "function": {"name": "add", "arguments": {"x": 2}}}]


def test_completions_that_are_objects_keep_reasoning_and_calls(auto: Callable[..., Any]) -> None:
    answers: list[dict[str, Any]] = [
        {"content": "6", "thinking": "no", "score": 0},
        {"content": "5", "reasoning_content": "sum", "score": 2},
        {"text": None, "tool_calls": CALL, "score": 1},
    ]
    found = auto({"prompt": "q", "completions": answers})
    called = {**assistant(""), "tool_calls": json.dumps(CALL, separators=(",", ":"))}
    assert found.only.completions == [
        [{**assistant("5"), "reasoning_content": "sum"}], [called], [{**assistant("6"), "reasoning_content": "no"}],
    ]  # fmt: skip
    turns = [{"role": "assistant", **answer} for answer in answers]
    assert auto({"prompt": "q", "completions": turns}).only == found.only
    assert found.unread == {}


@pytest.mark.parametrize("kind", ["preference", "sft"])
def test_completions_with_media_are_refused(kind: str, auto: Callable[..., Any]) -> None:
    answers = [{"text": "5", "images": ["a.png"], "score": 1}, {"text": "6", "images": [], "score": 0}]
    (problem,) = auto({"prompt": "q", "completions": answers}, kind=kind).found
    assert (problem.reason, problem.detail.split(",")[0]) == ("media", "completions[0] has media in 'images'")


@pytest.mark.parametrize(
    ("answer", "unread"),
    [
        ({"response": "a", "overall_score": 1, "fine-grained_score": 2, "model": "m"}, ["fine-grained_score", "model"]),
        ({"text": "a", "content": "b", "score": 1, "rank": 0, "note": ""}, ["content", "score"]),
        ({"role": "assistant", "content": "a", "score": 1, "extra": {"x": 1}}, ["extra"]),
        ({"text": "a", "pm_score": 1, "selected": False, "reasoning": "r", "thinking": "t"}, ["selected", "thinking"]),
    ],
)
def test_what_completions_hold_beside_is_named(answer: Any, unread: list[str], auto: Callable[..., Any]) -> None:
    other = {name: value + 1 if type(value) is int else value for name, value in answer.items()}
    read = auto({"prompt": "q", "answers": [answer, other]})
    assert read.formats == ["kwise"]
    assert read.unread == dict.fromkeys((f"answers.{name}" for name in unread), 1)


# --- verdicts ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "num", "decided"),
    [
        # the pairs are 1-2, 1-3, 2-3
        ([1, 2, 0], 3, [(0, 1), (2, 0)]),
        ([1.0, 0.0, 2.0], 3, [(0, 1), (2, 1)]),
        ([2], 2, [(1, 0)]),
        # 1-2, 1-3, 1-4, 2-3, 2-4, 3-4
        ([1, 1, 2, 1, 2, 0], 4, [(0, 1), (0, 2), (3, 0), (1, 2), (3, 1)]),
        # wins counted
        ([[0, 3, 1], [2, 0, 1], [1, 4, 0]], 3, [(0, 1), (2, 1)]),
        ([[0, 1], [0, 0]], 2, [(0, 1)]),
        ([[None, True], [False, None]], 2, [(0, 1)]),
        # probabilities, and log-odds
        ([[0.5, 0.7, 0.5], [0.3, 0.5, 0.9], [0.5, 0.1, 0.5]], 3, [(0, 1), (1, 2)]),
        ([[0, -1.5], [1.5, 0]], 2, [(1, 0)]),
        ([["", "0.2"], ["0.8", ""]], 2, [(1, 0)]),
    ],
)
def test_verdicts_decide_pairs(values: Any, num: int, decided: list[tuple[int, int]]) -> None:
    assert read_verdicts(values, num) == decided


@pytest.mark.parametrize(
    ("values", "num", "reason"),
    [
        (1, 2, "bad_ranking"),
        ("1", 2, "bad_ranking"),
        ([], 2, "bad_ranking"),
        ([1, 1], 3, "bad_ranking"),
        ([1, 3, 1], 3, "bad_ranking"),
        ([1, None, 1], 3, "bad_ranking"),
        ([True, False, True], 3, "bad_ranking"),
        (["1", "2", "0"], 3, "bad_ranking"),
        ([[0, 1], [0]], 2, "bad_ranking"),
        ([[0, 1, 0], [0, 0, 0]], 2, "bad_ranking"),
        ([[0, None], [1, 0]], 2, "not_a_number"),
        ([[0, 0.7], [0, 0]], 2, "bad_ranking"),  # half a matrix
        ([[0, 0.7], [0.7, 0]], 2, "bad_ranking"),
    ],
)
def test_odd_verdicts_are_refused(values: Any, num: int, reason: str) -> None:
    with pytest.raises(RowProblem) as caught:
        read_verdicts(values, num)
    assert caught.value.reason == reason


# --- oasst -------------------------------------------------------------------------------------


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
