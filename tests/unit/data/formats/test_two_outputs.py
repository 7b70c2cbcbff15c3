"""Two outputs with a verdict: which one a label, votes or scores mean."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from dpo_cli.data.formats.base import Reading
from dpo_cli.data.formats.detect import UnknownFormatError
from dpo_cli.data.formats.two_outputs import TWO_OUTPUTS
from dpo_cli.data.problem import RowProblem
from dpo_cli.data.schema import PreferenceExample, assistant, user

Q, A, B = user("q"), assistant("a"), assistant("b")
FIRST, SECOND = PreferenceExample([Q], [A], [B]), PreferenceExample([Q], [B], [A])


@pytest.mark.parametrize(
    ("names", "label", "expected"),
    [
        (("output_1", "output_2"), "output_1", FIRST),
        (("output_1", "output_2"), "A", FIRST),
        (("output_1", "output_2"), "model_b", SECOND),
        (("response_1", "response_2"), "model_2", SECOND),
        (("response1", "response2"), "Response2", SECOND),
        (("response_a", "response_b"), "a", FIRST),
        (("response_a", "response_b"), " B ", SECOND),
        (("answer_A", "answer_B"), "answer_B", SECOND),
        (("completion a", "completion b"), "second", SECOND),
    ],
)
def test_a_label_means_an_output_by_its_name(
    names: tuple[str, str], label: Any, expected: PreferenceExample, auto: Callable[..., Any]
) -> None:
    for verdict in ("label", "winner", "preference", "choice"):
        read = auto({"prompt": "q", names[0]: "a", names[1]: "b", verdict: label})
        assert (read.formats, read.only) == (["two_outputs"], expected)


LLMBAR = {"input": "q", "output_1": "a", "output_2": "b"}
ALPACA_EVAL = {"instruction": "q", "output_1": "a", "output_2": "b"}
PKU = {"prompt": "q", "response_0": "a", "response_1": "b"}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({**LLMBAR, "label": 1}, FIRST),
        ({**LLMBAR, "label": "2"}, SECOND),
        ({**LLMBAR, "label": 2.0}, SECOND),
        ({**ALPACA_EVAL, "preference": 1}, FIRST),
        ({**ALPACA_EVAL, "preference": 2.0}, SECOND),
        ({**PKU, "better_response_id": 0}, FIRST),
        ({**PKU, "better_response_id": "1.0"}, SECOND),
    ],
)
def test_a_number_means_an_output_in_columns_of_a_known_data_set(
    row: dict[str, Any], expected: PreferenceExample, auto: Callable[..., Any]
) -> None:
    assert auto(row).only == expected


@pytest.mark.parametrize("label", ["tie", "Tie", "tie (bothbad)", "both", "draw"])
def test_ties_make_no_pair(label: Any, auto: Callable[..., Any]) -> None:
    rows = [{"prompt": "q", "output_1": "a", "output_2": "b", "label": label} for label in (label, "a", "b")]
    found = auto(*rows).found
    assert (found[0].reason, found[1:]) == ("tie", [FIRST, SECOND])


@pytest.mark.parametrize("tie", [0, "0", 0.0, 1.5])
def test_a_number_may_be_a_tie(tie: Any, auto: Callable[..., Any]) -> None:
    found = auto(*[{**ALPACA_EVAL, "preference": label} for label in (tie, 1, 2)]).found
    assert (found[0].reason, found[1:]) == ("tie", [FIRST, SECOND])


@pytest.mark.parametrize(
    ("votes", "winner"),
    [
        ([1, 1, 2], FIRST),
        ([2, 0, 2], SECOND),
        ([2, "", 2], SECOND),
        (["2", "1", "2"], SECOND),
        ([1, 2], "tie"),
        ([0, 1, 2], "tie"),
        ([1, 1, 0, 0], "tie"),
        ([None, None], "no_label"),
        ([], "no_label"),
    ],
)
def test_the_most_frequent_vote_counts(votes: list[Any], winner: Any, auto: Callable[..., Any]) -> None:
    row = {"instruction": "q", "input": "", "response1": "a", "response2": "b"}
    row |= {f"annotator{number}": vote for number, vote in enumerate(votes, start=1)}
    sure = {**row, "annotator1": 2, "annotator2": 2}
    if not votes:
        row |= {"annotator1": None}
    found = auto(row, *[sure] * 3).found[0]
    if isinstance(found, RowProblem):
        assert found.reason == winner
        return
    said = [str(vote) for vote in votes]
    better, worse = ("1", "2") if winner == FIRST else ("2", "1")
    assert found == replace(winner, chosen_score=said.count(better), rejected_score=said.count(worse))


@pytest.mark.parametrize(
    ("scores", "winner"),
    [
        ((0.9, 0.1), FIRST),
        (("-1.5", "2"), SECOND),
        ((1, 1.0), "tie"),
        ((0, -1), FIRST),
        ((None, 1), "no_label"),
        (("", 1), "no_label"),
        (("good", 1), "not_a_number"),
        ((float("nan"), 1), "not_a_number"),
        (([1], 1), "not_a_number"),
    ],
)
def test_the_higher_score_wins(scores: tuple[Any, Any], winner: Any, auto: Callable[..., Any]) -> None:
    for name in ("score", "rating", "reward"):
        row = {"prompt": "q", "response_a": "a", "response_b": "b", f"{name}_a": scores[0], f"{name}_b": scores[1]}
        found = auto(row).found[0]
        if isinstance(found, RowProblem):
            assert found.reason == winner
        else:
            better, worse = scores if winner is FIRST else scores[::-1]
            assert found == PreferenceExample(
                winner.prompt, winner.chosen, winner.rejected, float(better), float(worse)
            )


def test_a_label_decides_and_scores_are_kept(auto: Callable[..., Any]) -> None:
    row = {"prompt": "q", "answer_1": "a", "answer_2": "b", "label": "b", "score_1": 9, "score_2": 3}
    assert auto(row).only == PreferenceExample([Q], [B], [A], 3.0, 9.0)


@pytest.mark.parametrize("shape", [list, json.dumps])
def test_whole_conversations_need_no_prompt(shape: Callable[[Any], Any], auto: Callable[..., Any]) -> None:
    row = {"conversation_a": shape([Q, A]), "conversation_b": shape([Q, B]), "winner": "model_b"}
    assert auto(row).only == SECOND


def test_texts_need_a_prompt_even_where_they_share_an_opening(auto: Callable[..., Any]) -> None:
    found = auto({"post": "x y", "response_a": "The a", "response_b": "The b", "winner": "a"}).found[0]
    assert (found.reason, found.detail) == ("missing_field", "has no 'prompt', nor question, query, input")


# --- labels that say nothing by themselves -------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "remedy"),
    [
        ((0, 1), '{"0": first, "1": second}'),
        (("1", "0", "1"), '{"0": first, "1": second}'),
        ((1.0, 2.0), '{"1": first, "2": second}'),
        ((-1, 1), '{"-1": first, "1": second}'),
        ((-1, 0, 1), '{"-1": first, "0": tie, "1": second}'),
        ((0, 0.5, 1), '{"0": first, "0.5": tie, "1": second}'),
        ((1, 2, 3), '{"1": first, "2": second, "3": tie}'),
        ((0, 1, 2), '{"0": first, "1": second, "2": tie}, or {"0": tie, "1": first, "2": second}'),
        ((1,), '{"1": first}'),
    ],
)
@pytest.mark.parametrize(
    "names", [("output_1", "output_2"), ("response 1", "response 2"), ("answer_0", "answer_1"), ("reply_a", "reply_b")]
)
def test_numbers_say_nothing_of_which_output_is_better(
    labels: tuple[Any, ...], remedy: str, names: tuple[str, str], auto: Callable[..., Any]
) -> None:
    for verdict in ("label", "winner", "choice"):
        rows = [{"prompt": "q", names[0]: "a", names[1]: "b", verdict: label} for label in labels]
        with pytest.raises(UnknownFormatError) as caught:
            auto(*rows)
        assert f"'{verdict}' is" in str(caught.value)
        assert "nothing says which output a number means" in str(caught.value)
        assert f"say labels: {remedy}" in str(caught.value)


@pytest.mark.parametrize("row", [{**LLMBAR, "label": 0}, {**ALPACA_EVAL, "preference": -1}, {**PKU, "label": 1}])
def test_a_number_that_its_convention_does_not_have_puts_all_in_doubt(
    row: dict[str, Any], auto: Callable[..., Any]
) -> None:
    with pytest.raises(UnknownFormatError, match="nothing says which output a number means"):
        auto({**LLMBAR, "label": 1}, {**LLMBAR, "label": 2}, {**PKU, "better_response_id": 0}, row)


def test_votes_0_and_1_of_outputs_1_and_2_are_a_riddle(auto: Callable[..., Any]) -> None:
    rows = [{**ALPACA_EVAL, "preference": label} for label in (0, 1)]
    with pytest.raises(UnknownFormatError, match="0 may be a tie or the first output"):
        auto(*rows)
    assert auto(*rows, labels={"0": "first", "1": "second"}).found == [FIRST, SECOND]
    assert auto(*rows, {**ALPACA_EVAL, "preference": 2}).found[0].reason == "tie"


@pytest.mark.parametrize(
    ("labels", "remedy"),
    [
        ((True, False), '{"False": first, "True": second}'),
        (("left", "right"), '{"left": first, "right": second}'),
        (("x", "y", "z"), '{"x": first, "y": second, "z": tie}'),
    ],
)
def test_words_that_mean_nothing_are_a_riddle(labels: tuple[Any, ...], remedy: str, auto: Callable[..., Any]) -> None:
    rows = [{"prompt": "q", "response_a": "a", "response_b": "b", "label": label} for label in labels]
    with pytest.raises(UnknownFormatError, match="says nothing of which output is better; say labels: ") as caught:
        auto(*rows)
    assert remedy in str(caught.value)


# --- labels on a scale ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "cut"),
    [((1.03, 1.97, 2.0), "1.5"), ((0.1, 0.62), "0.5"), ((-2, -1, 1, 3), "0"), ((1, 2, 6, 7), "4"), ((0.07,), "0.5")],
)
def test_a_number_on_a_scale_is_cut(values: tuple[float, ...], cut: str, auto: Callable[..., Any]) -> None:
    rows = [{**ALPACA_EVAL, "preference": value} for value in values]
    with pytest.raises(UnknownFormatError, match="'preference' is a number on a scale.*a probability or a strength"):
        auto(*rows)
    with pytest.raises(UnknownFormatError) as caught:
        auto(*rows)
    assert f'labels: {{"<{cut}": first, ">{cut}": second, "{cut}": tie}}' in str(caught.value)
    found = auto(*rows, labels={f"<{cut}": "first", f">{cut}": "second", cut: "tie"}).found
    assert found == [FIRST if value < float(cut) else SECOND for value in values]


def test_the_first_rule_that_holds_counts_and_a_label_itself_before_all_rules(auto: Callable[..., Any]) -> None:
    labels = {"<=1.2": "first", ">= 1.8": "second", ">1.2": "tie", "1": "second"}
    rows = [{**ALPACA_EVAL, "preference": value} for value in (1, 1.2, 1.5, 1.8, 2, "unsure", None)]
    found = auto(*rows, labels=labels).found
    assert [found[0], found[1], found[3], found[4]] == [SECOND, FIRST, SECOND, SECOND]
    assert [found[place].reason for place in (2, 5, 6)] == ["tie", "unknown_label", "no_label"]


def test_a_late_number_on_a_scale_is_refused_with_the_way_to_cut_it(reason_of: Callable[..., str]) -> None:
    row = {"prompt": "q", "first": "a", "second": "b", "label": 1.03}
    assert reason_of(TWO_OUTPUTS, row) == "unknown_label"
    with pytest.raises(RowProblem, match=r'or where to cut: \{"<1.5": first, ">1.5": second\}'):
        TWO_OUTPUTS.read(row, Reading())


def test_the_user_says_what_labels_mean(auto: Callable[..., Any]) -> None:
    row = {"prompt": "q", "left": "a", "right": "b", "verdict": "R"}
    columns = {"first": "left", "second": "right", "label": "verdict"}
    assert auto(row, columns=columns, labels={"L": "first", "R": "second"}).only == SECOND
    assert (
        auto({**row, "verdict": "x"}, row, columns=columns, labels={"R": "second", "x": "tie"}).found[0].reason == "tie"
    )
    row = {"prompt": "q", "response_a": "a", "response_b": "b", "label": True}
    assert auto(row, labels={"True": "first", "False": "second"}).only == FIRST


def test_labels_that_leave_a_number_out_are_a_riddle(auto: Callable[..., Any]) -> None:
    rows = [{"prompt": "q", "output_1": "a", "output_2": "b", "label": label} for label in (0, 1, 2)]
    with pytest.raises(UnknownFormatError, match="'label' is 0 in some rows, of which labels say nothing; add it"):
        auto(*rows, labels={"1": "first", "2": "second"})


def test_columns_of_other_names_have_no_convention(auto: Callable[..., Any]) -> None:
    row = {"prompt": "q", "human 0": "a", "human 1": "b", "better": 1}
    columns = {"first": "human 0", "second": "human 1", "label": "better"}
    with pytest.raises(UnknownFormatError, match="'better' is 1, and nothing says which output a number means"):
        auto(row, columns=columns)
    assert auto({**row, "better": "human 1"}, columns=columns).only == SECOND


def test_a_rare_odd_label_is_refused_alone(auto: Callable[..., Any]) -> None:
    rows = [{**LLMBAR, "label": label} for label in (1, 2, "unsure", None, [1])]
    assert [found.reason for found in auto(*rows).found[2:]] == ["unknown_label", "no_label", "unknown_label"]


def test_two_verdicts_or_two_pairs_of_outputs_are_a_riddle(auto: Callable[..., Any]) -> None:
    row = {"prompt": "q", "output_1": "a", "output_2": "b", "choice": "sports", "winner": "a"}
    with pytest.raises(UnknownFormatError, match="two_outputs comes next to it, which needs label, too"):
        auto(row)
    assert auto(row, columns={"label": "winner"}).only == FIRST
    with pytest.raises(UnknownFormatError):
        auto({"prompt": "q", "output_1": "a", "output_2": "b", "response_1": "c", "response_2": "d", "winner": 1})


def test_the_account_says_what_the_first_label_means(auto: Callable[..., Any]) -> None:
    why = auto({**PKU, "better_response_id": 1}).why
    assert "(first <- response_0, second <- response_1, label <- better_response_id)" in why
    assert why.endswith("its first label, 1, means that the second is better")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"first": None}, "missing_field"),
        ({"second": ...}, "missing_field"),
        ({"label": None}, "no_label"),
        ({"label": ...}, "no_label"),
        ({"label": {}}, "unknown_label"),
        ({"label": "third"}, "unknown_label"),
        ({"prompt": ...}, "missing_field"),
        ({"prompt": ..., "first": "[{'role': 'user'}]"}, "not_json"),
        ({"prompt": ..., "first": [Q, A], "second": [user("r"), B]}, "no_common_prompt"),
        ({"prompt": ..., "first": [Q, A, Q, A], "second": [Q, B, Q, B]}, "diverges_early"),
    ],
)
def test_an_odd_row_of_two_outputs_is_refused(
    change: dict[str, Any], reason: str, reason_of: Callable[..., str]
) -> None:
    row = {"prompt": "q", "first": "a", "second": "b", "label": "first"} | change
    assert reason_of(TWO_OUTPUTS, {name: value for name, value in row.items() if value is not ...}) == reason


def test_without_labels_numbers_mean_nothing() -> None:
    row = {"prompt": "q", "first": "a", "second": "b"}
    assert TWO_OUTPUTS.read({**row, "label": "B"}, Reading()) == SECOND
    with pytest.raises(RowProblem, match="has the label '1'; known are first .*; say in labels which side it means"):
        TWO_OUTPUTS.read({**row, "label": 1}, Reading())
