"""Experiments side by side: differences by hand, paired intervals, and what is said where there is none."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from dpo_cli.evaluation.compare import (
    MAIN_METRICS,
    Difference,
    caveats,
    difference,
    differing,
    main_metrics,
    source_of,
)
from dpo_cli.evaluation.experiments import (
    OF_ANSWERS,
    OF_PAIRS,
    Experiment,
    Texts,
    flatten,
    rows_of_answers,
    rows_of_pairs,
)
from dpo_cli.statistics.intervals import Sampling

SAMPLING = Sampling(draws=2000, confidence=0.95, seed=0)
METRIC = "evaluate.win_rate"


def experiment(values: dict[str, float], name: str = "other", metric: str = METRIC, **changes: Any) -> Experiment:
    """An experiment with one value a prompt; its metric is their mean."""
    fields: dict[str, Any] = {
        "params": {},
        "metrics": {metric: sum(values.values()) / len(values)},
        "rows": {metric: {prompt: (prompt, value) for prompt, value in values.items()}},
    }
    return Experiment(name, "", **(fields | changes))


def compare(baseline: Experiment, other: Experiment, metric: str = METRIC, **changes: Any) -> Difference:
    return difference(baseline, other, metric, replace(SAMPLING, **changes))


def sample(prompt: str, win: float | None = 1.0, **changes: Any) -> dict[str, Any]:
    judged = {} if win is None else {"reward": win, "well_formed": True}
    answers = {name: {"text": name, "num_tokens": 3, "finished": True, **judged} for name in ("sft", "dpo")}
    return {"id": prompt, "prompt": [], **answers, **({} if win is None else {"win": win}), **changes}


# --- differences ----------------------------------------------------------------------------


def test_the_difference_is_the_mean_over_prompts_that_both_have() -> None:
    """(1 - 0) and (0.5 - 0.5) are shared; d is the baseline's alone, c and e are the other's."""
    ours = experiment({"a": 1.0, "b": 0.5, "c": 0.0, "e": 0.0})
    found = compare(experiment({"a": 0.0, "b": 0.5, "d": 1.0}, "base"), ours)
    assert found.value == 0.5
    assert (found.num_prompts, found.num_left_out) == (2, 3)
    assert found.low is not None
    assert found.high is not None
    assert found.low <= 0.5 <= found.high
    assert found.why == ""


def test_pairing_takes_out_what_prompts_have_in_common() -> None:
    """Prompts differ by 1, the models by 0.1: intervals of their own overlap, the paired one leaves out 0."""
    rng = np.random.default_rng(0)
    hard = rng.normal(size=300)
    theirs = dict(zip(map(str, range(300)), hard + 0.1 * rng.normal(size=300), strict=True))
    ours = dict(zip(map(str, range(300)), hard + 0.1 + 0.1 * rng.normal(size=300), strict=True))
    found = compare(experiment(theirs, "base"), experiment(ours))
    assert found.leaves_out_zero
    assert found.low is not None
    assert found.high is not None
    alone = [SAMPLING.interval([*rows.values()], [*rows]) for rows in (theirs, ours)]
    assert alone[0].high > alone[1].low
    assert found.high - found.low < 0.2 * (alone[0].high - alone[0].low)


def test_rows_of_one_prompt_hang_together() -> None:
    """Eight pairs of two prompts, all of a prompt alike: as sure as two prompts make one, not as eight rows would."""
    metric = "evaluate.margin"

    def rows(values: list[float]) -> Experiment:
        owners = {f"row-{i}": (f"prompt-{i // 4}", value) for i, value in enumerate(values)}
        return experiment({"x": sum(values) / len(values)}, metric=metric, rows={metric: owners})

    found = compare(rows([0.0] * 8), rows([1.0] * 4 + [0.0] * 4), metric)
    assert (found.value, found.low, found.high) == (0.5, 0.0, 1.0)
    assert (found.num_prompts, found.num_left_out) == (2, 0)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"rows": {}, "missing": {OF_ANSWERS: "other has no samples"}}, "other has no samples"),
        ({"rows": {}}, "samples.json of other does not hold it by prompt"),
        ({"rows": {METRIC: {"q": ("q", 0.5), "r": ("r", 0.5)}}}, "it shares 0 of 4 prompts with base"),
        ({"rows": {METRIC: {"a": ("a", 0.4), "b": ("b", 0.5)}}}, "of another run than its metrics.json"),
    ],
)
def test_where_rows_do_not_serve_the_difference_has_no_interval_and_says_why(changes: dict[str, Any], why: str) -> None:
    found = compare(experiment({"a": 0.0, "b": 0.5}, "base"), experiment({"a": 0.5, "b": 0.5}, **changes))
    assert found.value == pytest.approx(0.25)
    assert found.low is found.high is found.num_prompts is None
    assert why in found.why
    assert not found.leaves_out_zero


def test_a_metric_that_is_no_mean_over_prompts_or_no_number() -> None:
    base = Experiment("base", "", {}, {"train.loss": 1.0, "train.layout": "shared"})
    other = Experiment("other", "", {}, {"train.loss": 0.5, "train.layout": "padded", "train.new": 1})
    assert compare(base, other, "train.loss") == Difference(-0.5, why="no mean over held-out prompts")
    assert compare(base, other, "train.layout") == Difference(None)
    assert compare(base, other, "train.new") == Difference(None, why="base does not have it")


# --- what differs ---------------------------------------------------------------------------


def test_trees_are_flattened_and_compared_by_value() -> None:
    tree = {"train": {"beta": 1, "lora": None, "modules": ["a", "b"], "none": {}}, "x": True}
    assert flatten(tree) == {
        "train.beta": 1, "train.lora": None, "train.modules": '["a", "b"]', "train.none": "{}", "x": True,
    }  # fmt: skip
    assert differing([{"a": 1, "b": 1}, {"a": 1.0, "b": 2}, {"a": 1, "b": 1, "c": None}]) == ["b", "c"]
    assert flatten({"evaluate": {"kl": 1.0, "kl_ci": [0.5, 1.5], "refused": {}}}, lists=False) == {"evaluate.kl": 1.0}


def test_the_main_metrics_are_those_that_differ() -> None:
    base = Experiment("base", "", {}, {"evaluate.kl": 1.0, "evaluate.win_rate": 0.5, "train.loss": 1.0})
    other = Experiment("other", "", {}, {"evaluate.kl": 2.0, "evaluate.win_rate": 0.5, "train.loss": 0.0})
    assert main_metrics([base, other]) == ["evaluate.kl"]
    assert main_metrics([base, base]) == ["evaluate.win_rate", "evaluate.kl"]


def test_every_main_metric_has_a_file_with_its_rows() -> None:
    assert all(source_of(name) in (OF_ANSWERS, OF_PAIRS) for name in MAIN_METRICS)
    assert source_of("train.loss") is None
    assert source_of("evaluate.num_pairs") is None


# --- files ----------------------------------------------------------------------------------


def test_rows_of_answers() -> None:
    rows, answers = rows_of_answers(json.dumps([sample("a", kl=0.25), sample("b", 0.5, kl=0.75)]))
    assert rows[METRIC] == {"a": ("a", 1.0), "b": ("b", 0.5)}
    assert rows["evaluate.tie_rate"] == {"a": ("a", 0.0), "b": ("b", 1.0)}
    assert rows["evaluate.kl"] == {"a": ("a", 0.25), "b": ("b", 0.75)}
    assert rows["evaluate.finished_dpo"] == {"a": ("a", 1.0), "b": ("b", 1.0)}
    assert rows["evaluate.answer_tokens_sft"] == {"a": ("a", 3.0), "b": ("b", 3.0)}
    assert answers == dict.fromkeys("ab", Texts([], "sft", "dpo"))


def test_a_figure_that_some_rows_lack_is_left_out() -> None:
    rows, _ = rows_of_answers(json.dumps([sample("a", None), sample("b")]))
    assert list(rows[METRIC]) == ["b"], "the mean is over the prompts with a verdict"
    assert "evaluate.kl" not in rows
    assert "evaluate.finished_sft" in rows


def test_rows_of_pairs() -> None:
    text = "id,prompt,chosen_reward,rejected_reward,margin,loss\na,p,1,-1,2,0.1\nb,p,0,0,0,0.7\nc,q,0,1,-1,1.3\n"
    rows = rows_of_pairs(text)
    assert rows["evaluate.margin"] == {"a": ("p", 2.0), "b": ("p", 0.0), "c": ("q", -1.0)}
    assert [value for _, value in rows["evaluate.reward_accuracy"].values()] == [1.0, 0.5, 0.0]


@pytest.mark.parametrize("text", ["{", "[]", "[[]]", '[{"id": "a"}]', '[{"id": "a", "sft": "text", "dpo": {}}]'])
def test_damaged_answers(text: str) -> None:
    with pytest.raises(ValueError, match="."):
        rows_of_answers(text)


@pytest.mark.parametrize("text", ["id,prompt\na,p\n", "id,prompt,chosen_reward,rejected_reward,margin,loss\na,p,1\n"])
def test_damaged_pairs(text: str) -> None:
    with pytest.raises(ValueError, match="a row has no"):
        rows_of_pairs(text)


# --- caveats --------------------------------------------------------------------------------


def test_a_scale_that_depends_on_settings_is_named() -> None:
    base, other = (Experiment(f"{beta}", "", {"train.beta": beta}, {}) for beta in (0.1, 0.5))
    [caveat] = caveats([base, other], ["evaluate.margin", "evaluate.kl"])
    assert caveat.startswith("evaluate.margin: the scale depends on train.beta, which differs")
    assert caveats([base, other], ["evaluate.kl"]) == []


def test_an_opponent_of_its_own_is_named() -> None:
    base = experiment({"a": 1.0}, "base", answers={"a": Texts([], "yes", ""), "b": Texts([], "no", "")})
    other = experiment(
        {"a": 1.0},
        answers={name: Texts([], text, "") for name, text in zip("abc", ("yes", "maybe", "so"), strict=True)},
    )
    [caveat] = caveats([base, other], [METRIC])
    assert "other: its SFT model answers 1 of 2 shared prompts otherwise than that of base" in caveat
    assert caveats([base, other], ["evaluate.loss"]) == []
