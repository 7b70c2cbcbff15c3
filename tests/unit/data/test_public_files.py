"""Whole files in the shapes of public data sets: each row is used or left out for a reason, unread columns are named.

In each shape a number makes a row, whose better answer begins with "good".
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl
import pytest

from dpo_cli.core.data_params import DataChecks, PreferenceSource, SftSource
from dpo_cli.data.account import SPLITS
from dpo_cli.data.convert import convert
from dpo_cli.data.formats.detect import UnknownFormatError
from dpo_cli.data.plan import Treatment

NUM = 40


class Shape(NamedTuple):
    """A file's shape, and what is right: the format, why rows are left out, what is kept, and what nobody reads."""

    row: Callable[[int], dict[str, Any]]
    format: str
    unread: str = ""
    left_out: dict[str, int] | None = None
    kept: dict[str, int] | None = None
    settings: dict[str, Any] | None = None


def ask(number: int) -> str:
    return f"question {number}"


def said(number: int, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": ask(number)}, {"role": "assistant", "content": f"{answer} {number}"}]


def swapped(number: int) -> tuple[str, str]:
    """The answers of a row whose first one is better in every second row."""
    sides = (f"good {number}", f"poor {number}")
    return sides if number % 2 == 0 else sides[::-1]


def ultrafeedback(n: int) -> dict[str, Any]:
    return {
        "prompt": ask(n), "prompt_id": f"{n:x}", "chosen": said(n, "good"), "rejected": said(n, "poor"),
        "messages": said(n, "good"), "score_chosen": 8.0, "score_rejected": 8.0 if n % 4 == 0 else 7.5,
    }  # fmt: skip


def shp(n: int) -> dict[str, Any]:
    first, second = swapped(n)
    return {
        "post_id": f"p{n}", "domain": "askx", "upvote_ratio": 0.9, "history": ask(n), "c_root_id_A": "a",
        "human_ref_A": first, "human_ref_B": second, "labels": 1 - n % 2, "seconds_difference": 5.0,
        "score_A": 9 - 8 * (n % 2), "score_B": 1 + 8 * (n % 2), "score_ratio": 9.0,
    }  # fmt: skip


def helpsteer2(n: int) -> dict[str, Any]:
    first, second = swapped(n)
    strength = 0 if n % 8 == 7 else (n % 3 + 1) * (-1 if n % 2 == 0 else 1)
    return {
        "split": "train", "prompt": ask(n), "response_1": first, "response_2": second, "preference_strength": strength,
        "preference_statement": "one is better", "preference_elaboration": "by far", "three_most_similar": [1, 2, 3],
    }  # fmt: skip


def helpsteer3(n: int) -> dict[str, Any]:
    first, second = swapped(n)
    return {
        "domain": "stem", "language": "en", "context": said(n, "x")[:1], "response1": first, "response2": second,
        "overall_preference": -2 if n % 2 == 0 else 1, "individual_preference": [{"score": 1, "reasoning": "so"}],
    }  # fmt: skip


def pku(n: int) -> dict[str, Any]:
    first, second = swapped(n)
    return {
        "prompt": ask(n), "response_0": first, "response_1": second, "is_response_0_safe": True,
        "is_response_1_safe": False, "better_response_id": n % 2, "safer_response_id": 0,
    }  # fmt: skip


def alpaca_eval(n: int) -> dict[str, Any]:
    first, second = swapped(n)
    preference = 1.5 if n % 8 == 7 else 1.02 if n % 2 == 0 else 1.97
    return {
        "instruction": ask(n), "output_1": first, "generator_1": "m", "dataset": "helpful", "output_2": second,
        "generator_2": "o", "annotator": "weighted", "preference": preference, "raw_completion": None,
    }  # fmt: skip


def three_way(n: int) -> dict[str, Any]:
    first, second = swapped(n)
    return {"prompt": ask(n), "response 1": first, "response 2": second, "label": 2 if n % 8 == 7 else n % 2}


def arena(n: int) -> dict[str, Any]:
    first, second = (side.split()[0] for side in swapped(n))
    winner = "tie (bothbad)" if n % 8 == 7 else "model_a" if n % 2 == 0 else "model_b"
    return {
        "question_id": f"q{n}", "model_a": "m", "model_b": "o", "winner": winner, "judge": "arena_user",
        "conversation_a": said(n, first), "conversation_b": said(n, second), "turn": 1, "anony": True,
        "language": "English", "tstamp": 1.7e9,
    }  # fmt: skip


def reward_bench_2(n: int) -> dict[str, Any]:
    return {
        "id": f"{n}", "prompt": ask(n), "chosen": [f"good {n}"], "rejected": [f"poor {n}", f"worse {n}", f"worst {n}"],
        "num_correct": 1, "num_incorrect": 3, "total_completions": 4, "models": ["m"], "subset": "Factuality",
    }  # fmt: skip


def nectar(n: int) -> dict[str, Any]:
    answers = [{"answer": f"{text} {n}", "model": "m", "rank": rank} for text, rank in (("poor", 2.0), ("good", 1.0))]
    return {
        "prompt": f"\n\nHuman: {ask(n)}\n\nAssistant: ", "answers": answers, "turns": 1, "num_responses": 2,
        "source": ["lmsys"], "good_natured": True,
    }  # fmt: skip


def summaries(n: int) -> dict[str, Any]:
    first, second = swapped(n)
    return {
        "info": {"id": f"t{n}", "post": ask(n), "title": "t", "subreddit": "r"}, "split": "train",
        "summaries": [{"text": first, "policy": "sup", "note": None}, {"text": second, "policy": "ref", "note": None}],
        "choice": n % 2, "worker": "w", "batch": "b", "extra": {"confidence": 8},
    }  # fmt: skip


def webgpt(n: int) -> dict[str, Any]:
    first, second = swapped(n)
    score = 0.0 if n % 8 == 7 else 0.5 if n % 2 == 0 else -0.5
    return {
        "question": {"dataset": "eli5", "id": f"{n}", "full_text": ask(n)}, "quotes_0": {"title": ["t"]},
        "answer_0": first, "score_0": score, "answer_1": second, "score_1": -score,
    }  # fmt: skip


def orca(n: int) -> dict[str, Any]:
    return {
        "system": "Be brief.", "input": ask(n), "chosen": f"good {n}", "rejected": f"poor {n}",
        "generations": [f"good {n}", f"poor {n}"], "order": ["a", "b"], "rating": [9.0, 7.0], "status": "unchanged",
        "chosen_score": 9.0, "in_gsm8k_train": False,
    }  # fmt: skip


def capybara(n: int) -> dict[str, Any]:
    return {
        "source": "x", "conversation": [{"input": ask(n), "output": f"poor {n}"}], "original_response": f"poor {n}",
        "generation_prompt": None, "rating": [4, 5], "chosen": said(n, "good"), "rejected": said(n, "poor"),
        "rating_chosen": 5, "rating_rejected": 4, "chosen_model": "m", "rejected_model": "o",
    }  # fmt: skip


def pair_rm(n: int) -> dict[str, Any]:
    return {
        "prompt_id": f"{n}", "prompt": ask(n), "chosen": said(n, "good"), "rejected": said(n, "poor"),
        "all_generated_responses": [f"good {n}", f"poor {n}"], "all_rm_scores": [0.4, -0.4],
    }  # fmt: skip


def openai(n: int) -> dict[str, Any]:
    return {
        "input": {"messages": said(n, "x")[:1]},
        "preferred_output": said(n, "good")[1:], "non_preferred_output": said(n, "poor")[1:],
    }  # fmt: skip


SHAPES = {
    "UltraFeedback binarized": Shape(ultrafeedback, "pairs", "messages prompt_id", kept={"score_conflict": 10}),
    "SHP": Shape(shp, "two_outputs", "c_root_id_A domain post_id score_ratio seconds_difference upvote_ratio"),
    "HelpSteer2": Shape(
        helpsteer2,
        "two_outputs",
        "preference_elaboration preference_statement split three_most_similar",
        left_out={"tie": 5},
    ),
    "HelpSteer3": Shape(helpsteer3, "two_outputs", "domain individual_preference language"),
    "PKU-SafeRLHF": Shape(pku, "two_outputs", "is_response_0_safe is_response_1_safe safer_response_id"),
    "AlpacaEval": Shape(
        alpaca_eval,
        "two_outputs",
        "annotator dataset generator_1 generator_2",
        left_out={"tie": 5},
        settings={"labels": {"<1.5": "first", ">1.5": "second", "1.5": "tie"}},
    ),
    "three labels": Shape(
        three_way, "two_outputs", left_out={"tie": 5}, settings={"labels": {0: "first", 1: "second", 2: "tie"}}
    ),
    "Chatbot Arena": Shape(
        arena,
        "two_outputs",
        "anony judge language model_a model_b question_id tstamp turn",
        left_out={"tie": 5},
    ),
    "RewardBench 2": Shape(reward_bench_2, "pairs", "id models num_correct num_incorrect subset total_completions"),
    "Nectar": Shape(nectar, "kwise", "answers.model good_natured num_responses source turns"),
    "summarize_from_feedback": Shape(
        summaries,
        "two_outputs",
        "batch extra info.id info.subreddit info.title split summaries.0.policy summaries.1.policy worker",
        settings={
            "columns": {
                "prompt": "info.post",
                "first": "summaries.0.text",
                "second": "summaries.1.text",
                "label": "choice",
            },
            "labels": {"0": "first", "1": "second"},
        },
    ),
    "WebGPT comparisons": Shape(
        webgpt,
        "two_outputs",
        "question.dataset question.id quotes_0",
        left_out={"tie": 5},
        settings={"columns": {"prompt": "question.full_text"}},
    ),
    "Orca DPO": Shape(orca, "pairs", "generations in_gsm8k_train order rating status"),
    "Capybara DPO": Shape(
        capybara, "implicit", "chosen_model conversation original_response rating rejected_model source"
    ),
    "PairRM": Shape(pair_rm, "pairs", "all_generated_responses all_rm_scores prompt_id"),
    "OpenAI preferences": Shape(openai, "pairs"),
}


def convert_rows(folder: Path, kind: str, rows: list[Any], settings: dict[str, Any]) -> Any:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "work").mkdir()
    (folder / "out").mkdir()
    source = (SftSource if kind == "sft" else PreferenceSource).model_validate({"path": str(file), **settings})
    treatment = Treatment(DataChecks().model_dump(), 0.5)
    return convert([source], treatment, folder / "work", folder / "out", folder / "rejects.jsonl")


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("kind", ["preference", "sft"])
def test_a_file_of_a_public_shape_is_accounted_for(tmp_path: Path, shape: Shape, kind: str) -> None:
    report = convert_rows(tmp_path, kind, [shape.row(n) for n in range(NUM)], shape.settings or {})
    left_out = shape.left_out or {}
    assert report.num_read == NUM == report.num_used + sum(left_out.values())
    assert (dict(report.rejected), dict(report.files[0].formats)) == (left_out, {shape.format: report.num_used})
    answer = "completion" if kind == "sft" else "chosen"
    tables = [pl.read_parquet(tmp_path / "out" / f"{split}.parquet") for split in SPLITS]
    rows = [row for table in tables for row in table.select("prompt", answer).rows()]
    assert {prompt[-1]["content"] for prompt, _ in rows} <= {ask(n) for n in range(NUM)}
    assert {answers[0]["content"].split()[0] for _, answers in rows} == {"good"}
    assert " ".join(sorted(report.files[0].unread)) == shape.unread
    if kind == "preference":
        kept = {
            name: finding.count
            for name, finding in report.checks.items()
            if finding.policy == "keep" and finding.count and name != "longer_chosen"
        }
        assert kept == (shape.kept or {})


REFUSED = {
    "BeaverTails": {"prompt": "q", "response": "a", "category": {"theft": False}, "is_safe": False},
    "KTO mix": {"prompt": said(1, "x")[:1], "completion": said(1, "a")[1:], "label": True},
    "feedback of users": {"question": "q", "answer": "a", "thumbs": "down", "user": "u"},
    "an unranked list": {"instruction": "q", "input": "", "output": ["a", "b"]},
    "probabilities": {"prompt": "q", "answer_a": "a", "answer_b": "b", "preference": 0.83},
    "numbers": {"prompt": "q", "output_1": "a", "output_2": "b", "winner": 1},
}


@pytest.mark.parametrize("row", REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("kind", ["preference", "sft"])
def test_a_file_that_says_too_little_is_refused_with_what_to_write(
    tmp_path: Path, row: dict[str, Any], kind: str
) -> None:
    with pytest.raises(UnknownFormatError, match=r"say format: |labels: |DPO needs two answers"):
        convert_rows(tmp_path, kind, [row] * 3, {})
