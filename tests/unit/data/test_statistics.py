"""Statistics of examples: counted by hand, exact where they say so, and the same in any order."""

from __future__ import annotations

import random
from typing import Any

import pytest

from dpo_cli.data.problem import RowProblem
from dpo_cli.data.schema import Messages, PreferenceExample, SftExample, assistant, user
from dpo_cli.data.statistics import TOO_SHORT, DataStatistics, distribution

Rows = list[dict[str, Any]]


def pair(prompt: str | Messages, chosen: str, rejected: str, ranking: int = -1) -> Rows:
    turns = [user(prompt)] if isinstance(prompt, str) else prompt
    example = PreferenceExample(turns, [assistant(chosen)], [assistant(rejected)])
    return [{**example.row("rows.json"), "ranking": ranking}]


def instruction(prompt: str | Messages, completion: str) -> Rows:
    turns = [user(prompt)] if isinstance(prompt, str) else prompt
    return [{**SftExample(turns, [assistant(completion)]).row("rows.json"), "ranking": -1}]


def statistics_of(*examples: Rows, **settings: Any) -> dict[str, Any]:
    statistics = DataStatistics(**settings)
    for example in examples:
        statistics.add(example)
    return statistics.summary()


# --- distributions ------------------------------------------------------------------------


def test_quantiles_are_exact() -> None:
    rng = random.Random("lengths")
    values = sorted(int(10 ** rng.uniform(0, 7)) for _ in range(5000))
    found = distribution(values)
    assert [found[name] for name in ("median", "p95", "p99", "max")] == [values[n * 50 - 1] for n in (50, 95, 99, 100)]
    assert found["mean"] == pytest.approx(sum(values) / 5000)
    assert distribution([3, 90])["median"] == 3


def test_bins_double_and_hold_every_value_once() -> None:
    assert distribution([0, 1, 2, 3, 4, 7, 8, 129, 1023, 1024])["histogram"] == [
        [0, 0, 1], [1, 1, 1], [2, 3, 2], [4, 7, 2], [8, 15, 1], [16, 31, 0],
        [32, 63, 0], [64, 127, 0], [128, 255, 1], [256, 511, 0], [512, 1023, 1], [1024, 2047, 1],
    ]  # fmt: skip


def test_nothing_has_no_figures() -> None:
    none = {"count": 0, "mean": 0.0, "median": 0, "p95": 0, "p99": 0, "max": 0, "histogram": []}
    assert distribution([]) == none


# --- examples -----------------------------------------------------------------------------


def test_pairs_by_hand() -> None:
    talk = [{"role": "system", "content": "x"}, user("abc"), assistant("d"), user("e")]  # 6, and 3 line ends
    found = statistics_of(
        pair("abcd", "12", "1"),  # 4 + 2 characters
        pair("ab", "1", "123456"),  # 2 + 6
        pair("a", "12", "12"),  # 1 + 2
        pair(talk, "123", ""),
        limits=(5, 8),
    )
    assert (found["examples"], found["pairs"], found["rankings"], found["unit"]) == (4, 4, 0, "characters")
    lengths = found["lengths"]
    assert [lengths[name]["mean"] for name in ("prompt", "chosen", "rejected")] == [4.0, 2.0, 2.25]
    assert [lengths[name]["max"] for name in ("prompt", "chosen", "rejected")] == [9, 3, 6]
    assert lengths["prompt"]["median"] == 2
    assert lengths["prompt_and_longest_answer"]["max"] == 12
    assert found["over"] == {"5": {"count": 3, "share": 0.75}, "8": {"count": 1, "share": 0.25}}
    assert found["multi_turn"] == {"count": 1, "share": 0.25}
    assert found["system_prompt"] == {"count": 1, "share": 0.25}
    assert (found["turns"]["mean"], found["turns"]["max"]) == (1.25, 2)
    longer = found["chosen_longer"]
    assert (longer["count"], longer["equal"], longer["share"]) == (2, 1, 0.5)
    assert longer["interval"] == pytest.approx([0.15004, 0.84996], abs=1e-4)


def test_instructions_have_completions_and_no_pairs() -> None:
    found = statistics_of(instruction("ab", "cde"))
    assert set(found["lengths"]) == {"prompt", "completion", "prompt_and_longest_answer"}
    assert found["lengths"]["completion"]["max"] == 3
    assert not {"pairs", "over"} & found.keys()


def test_a_ranking_counts_its_prompt_once_and_its_answers_once_a_pair() -> None:
    sides = [("a", "aaaaa"), ("a", "aaa"), ("aaaaa", "aaa")]
    found = statistics_of([row for chosen, rejected in sides for row in pair("ab", chosen, rejected, ranking=0)])
    assert (found["examples"], found["rankings"], found["pairs"]) == (1, 1, 3)
    assert found["lengths"]["prompt"]["count"] == 1
    assert found["lengths"]["chosen"]["mean"] == pytest.approx((1 + 1 + 5) / 3)
    assert found["lengths"]["rejected"]["mean"] == pytest.approx((5 + 3 + 3) / 3)
    assert found["chosen_longer"]["count"] == 1


class Words:
    """Makes a token of each word, and refuses a prompt that says so."""

    def encode_prompt(self, prompt: Messages) -> list[str]:
        if "refuse" in prompt[0]["content"]:
            raise RowProblem("template_refused", "is refused")
        return prompt[0]["content"].split()

    def encode_completion(self, prompt: Messages, answer: Messages) -> list[str]:
        return answer[0]["content"].split()


def test_lengths_are_those_of_the_encoder_and_what_it_refuses_is_not_counted() -> None:
    statistics = DataStatistics(Words())  # pyright: ignore[reportArgumentType] (the two methods are all that it calls)
    statistics.add(instruction("two words", "and three more"))
    with pytest.raises(RowProblem, match="refused"):
        statistics.add(instruction("refuse", "a"))
    found = statistics.summary()
    assert found["unit"] == "tokens"
    assert found["examples"] == found["lengths"]["prompt"]["count"] == found["sampled"] == 1
    assert found["lengths"]["completion"]["mean"] == 3


# --- languages and scripts ----------------------------------------------------------------


def language_of(text: str) -> str:
    return "zh" if "\u4e00" <= text[0] <= "\u9fff" else "en"


def test_languages_of_prompts_and_answers() -> None:
    found = statistics_of(
        instruction("hello", "there"),
        instruction("hello", "你好"),
        instruction([{"role": "system", "content": "be kind"}, user("你好")], "你"),
        instruction("1 + 1 = ", "2"),
        language_of=language_of,
    )["languages"]
    assert found["prompts"] == {"en": 2, "none": 1, "zh": 1}
    assert found["answers"] == {"zh": 2, "en": 1, "none": 1}
    assert found["answer_in_another"] == {"count": 1, "share": 0.25}


def test_a_language_that_cannot_be_told_is_no_other_one() -> None:
    tell = {"language_of": lambda text: TOO_SHORT if len(text) < 5 else "en"}
    found = statistics_of(instruction("hi", "hello there"), **tell)["languages"]
    assert (found["prompts"], found["answers"]) == ({TOO_SHORT: 1}, {"en": 1})
    assert found["answer_in_another"]["count"] == 0


def test_scripts_are_shares_of_the_letters() -> None:
    found = statistics_of(instruction("aé Ａ 12!😀。", "你々ひカｶー한яعहα"))["scripts"]
    shares = {"Latin": 3, "Han": 2, "Kana": 4, "Hangul": 1, "Cyrillic": 1, "Arabic": 1, "Devanagari": 1, "other": 1}
    assert found == {script: pytest.approx(count / 14) for script, count in shares.items()}


def test_the_sample_is_bounded_and_the_same_in_any_order() -> None:
    examples = [instruction(f"question {number}", "字" if number % 3 else "word") for number in range(300)]

    def sampled(order: list[Rows]) -> tuple[int, dict[str, float], dict[str, int]]:
        found = statistics_of(*order, language_of=language_of, sample_size=50)
        return found["sampled"], found["scripts"], found["languages"]["answers"]

    first = sampled(examples)
    assert first[0] == sum(first[2].values()) == 50
    assert first == sampled(examples[::-1])
    assert 0.45 < first[2]["zh"] / 50 < 0.85  # 2/3, as in all of them
