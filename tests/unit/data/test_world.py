"""The embedded world: a grammar that can be read backwards, with a known reward."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import pytest

from dpo_cli.data.world import (
    GOOD_SHARE,
    NUM_INSTRUCTIONS,
    NUM_PREFERENCES,
    Task,
    draw_tasks,
    instruction_rows,
    preference_rows,
    task_of,
    words,
)

KINDS = {f"{kind}.{lang}" for kind in ("add_one", "message", "review", "greeting") for lang in ("en", "zh")}


@pytest.fixture(scope="module")
def tasks() -> list[Task]:
    return list(islice(draw_tasks(0), 3000))


def test_a_prompt_tells_its_task(tasks: list[Task]) -> None:
    assert [task_of(task.prompt) for task in tasks] == tasks


def test_every_kind_of_task_is_drawn_in_both_languages(tasks: list[Task]) -> None:
    counts = Counter(task.kind for task in tasks)
    assert set(counts) == KINDS
    assert min(counts.values()) > 100


def test_one_answer_is_good_and_all_others_are_not(tasks: list[Task]) -> None:
    for task in tasks:
        assert task.reward(task.good) == 1
        assert task.bad
        assert {task.reward(bad) for bad in task.bad} == {0}
        assert len({task.good, *task.bad}) == 1 + len(task.bad)
        assert [task.reward(text) for text in ("", f"{task.good} ", task.prompt)] == [0, 0, 0]


def test_the_answers_of_a_prompt_are_well_formed_and_other_texts_are_not(tasks: list[Task]) -> None:
    for task in tasks:
        assert all(map(task.is_well_formed, (task.good, *task.bad)))
        broken = ("", task.good[:-1], f"{task.good}{task.good}", "word salad", f" {task.good}")
        assert not any(map(task.is_well_formed, broken))


def test_a_wrong_number_is_well_formed_and_has_no_reward() -> None:
    task = task_of("Add 1 to every number in the sentence.\nTom has 5 cats and 17 boats.")
    assert task is not None
    assert task.good == "Tom has 6 cats and 18 boats."
    assert set(task.bad) == {
        "Tom has 5 cats and 17 boats.",
        "Tom has 5 cats and 18 boats.",
        "Tom has 6 cats and 17 boats.",
    }
    assert task.is_well_formed("Tom has 99 cats and 1 boats.")
    assert task.reward("Tom has 99 cats and 1 boats.") == 0
    assert not task.is_well_formed("Tom has six cats and 18 boats.")
    assert not task.is_well_formed("Tom has 6 dogs and 18 boats.")


def test_a_carry_is_added_right() -> None:
    task = task_of("请将每个数字都加一。\n小明有9个苹果和29条船。")
    assert task is not None
    assert task.good == "小明有10个苹果和30条船。"


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "What is the capital of France?",
        "Add 1 to every number in the sentence.",
        "Add 1 to every number in the sentence.\nTom has five cats.",
        "Add 1 to every number in the sentence.\nZed has 5 cats.",
        "Add 1 to every number in the sentence.\nTom has 5 cats. ",
        " Answer the message.\nTom: My watch broke today.",
    ],
)
def test_a_prompt_from_elsewhere_has_no_task(prompt: str) -> None:
    assert task_of(prompt) is None


def test_a_stream_has_no_prompt_twice_and_depends_on_its_seed(tasks: list[Task]) -> None:
    assert len({task.prompt for task in tasks}) == len(tasks)
    assert list(islice(draw_tasks(0), 50)) == tasks[:50]
    assert list(islice(draw_tasks(1), 50)) != tasks[:50]


def test_rows_depend_on_the_seed_alone() -> None:
    assert instruction_rows(3, 450) == instruction_rows(3, 450) != instruction_rows(4, 450)
    assert preference_rows(3, 450) == preference_rows(3, 450) != preference_rows(4, 450)


def test_instructions_are_of_mixed_quality() -> None:
    rows = instruction_rows(0)
    assert len(rows) == NUM_INSTRUCTIONS
    rewards = []
    for row in rows:
        task = task_of(f"{row['instruction']}\n{row['input']}" if row["input"] else row["instruction"])
        assert task is not None
        if row["output"]:
            assert row["output"] in (task.good, *task.bad)
            rewards.append(task.reward(row["output"]))
    assert sum(rewards) / len(rewards) == pytest.approx(GOOD_SHARE, abs=0.04)


def test_preferences_hold_the_good_answer_over_a_bad_one_and_a_few_dirty_rows() -> None:
    rows = preference_rows(0)
    assert len(rows) == NUM_PREFERENCES
    dirty = 0
    for row in rows:
        task = task_of(row["prompt"])
        assert task is not None
        assert row["chosen"] == task.good
        dirty += row["rejected"] not in task.bad
    assert 0 < dirty < 0.01 * len(rows)
    assert len({tuple(row.values()) for row in rows}) < len(rows)


def test_every_text_of_the_world_is_made_of_its_words(tasks: list[Task]) -> None:
    import re

    known = set(words())
    assert len(known) == len(words())
    for task in tasks[:500]:
        for text in (task.prompt, task.good, *task.bad):
            assert set(re.findall(r"[A-Za-z]+|\d\d|[^\w\s]", text)) <= known
