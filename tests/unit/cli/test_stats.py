"""What data is like: figures by hand, read from files as the conversion reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dpo_cli.cli.app import app
from dpo_cli.cli.data_pages import print_profile
from dpo_cli.cli.sources import encoder_of, project_params, sources_of
from dpo_cli.data.statistics import profile_sources

PAIR = {"prompt": "2 + 2 =", "chosen": "4", "rejected": "55"}


def write(folder: Path, *rows: Any, name: str = "rows.jsonl") -> str:
    path = folder / name
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return str(path)


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["data", "stats", *arguments])


def stats_of(reporter: Any, *files: str, settings: list[str] | None = None, model: str | None = None) -> dict[str, Any]:
    sources = sources_of(files, None, settings or [])
    encoder = encoder_of(model, None) if model else None
    found = dict(profile_sources(sources, project_params(), encoder, reporter))
    for kind, figures in found.items():
        print_profile(kind, figures, reporter)
    return found


def test_rows_sources_formats_and_lengths(project: Path, reporter: Any) -> None:
    first = write(project, PAIR, {**PAIR, "prompt": "hello"}, name="first.jsonl")
    second = write(
        project, {"chosen": "Human: a\n\nAssistant: b", "rejected": "Human: a\n\nAssistant: cd"}, name="second.jsonl"
    )
    [(kind, found)] = stats_of(reporter, first, second).items()
    assert kind == "preferences"
    assert (found["rows"], found["examples"], found["left_out"]) == (3, 3, {})
    assert [(source["file"], source["rows"]) for source in found["sources"]] == [(first, 2), (second, 1)]
    assert sum(found["formats"].values()) == 3
    assert found["formats"]["pairs"] == 2
    assert found["lengths"]["prompt"]["mean"] == pytest.approx((7 + 5 + 1) / 3)
    assert found["lengths"]["rejected"]["max"] == 2
    assert found["chosen_longer"]["count"] == 0
    assert reporter.meters[0].done == sum(Path(file).stat().st_size for file in (first, second))


def test_what_the_conversion_leaves_out_is_counted_by_reason_and_not_measured(project: Path, reporter: Any) -> None:
    rows = [PAIR, {**PAIR, "chosen": ""}, {"prompt": "q"}, {**PAIR, "prompt": "half \ud83d"}, "no object"]
    found = stats_of(reporter, write(project, *rows))["preferences"]
    assert (found["rows"], found["examples"]) == (5, 1)
    assert found["left_out"] == {"empty_chosen": 1, "missing_field": 1, "bad_unicode": 1, "not_an_object": 1}
    assert found["lengths"]["prompt"]["count"] == 1


def test_rankings_count_once_and_by_the_pairs_that_stay(project: Path, reporter: Any) -> None:
    rows = [
        {"prompt": "q", "completions": ["aaa", "b", "aaa"], "ranks": [1, 2, 3]},  # the third says the first again
        {"prompt": "r", "completions": ["a", "b"], "ranks": [1, 1]},
    ]
    found = stats_of(reporter, write(project, *rows))["preferences"]
    assert (found["examples"], found["rankings"], found["pairs"]) == (1, 1, 1)
    assert found["left_out"] == {"equal_sides": 1, "tie": 1}
    assert found["chosen_longer"]["count"] == 1
    extreme = stats_of(reporter, write(project, *rows), settings=["pairs=best_vs_worst"])["preferences"]
    assert (extreme["examples"], extreme["pairs"]) == (1, 1)
    assert extreme["left_out"] == {"equal_sides": 1, "tie": 1}


def test_parts_of_conversations_are_examples_and_turns_are_counted(project: Path, reporter: Any) -> None:
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "dd")]
    file = write(project, {"messages": [{"role": role, "content": text} for role, text in turns]})
    last = stats_of(reporter, file)["sft"]
    assert (last["examples"], last["multi_turn"]["share"], last["turns"]["max"]) == (1, 1.0, 2)
    every = stats_of(reporter, file, settings=["turns=all"])["sft"]
    assert (every["rows"], every["examples"], every["multi_turn"]["count"]) == (1, 2, 1)
    assert every["turns"]["mean"] == 1.5


def test_both_kinds_have_figures_of_their_own(project: Path, reporter: Any) -> None:
    pairs = write(project, PAIR, name="pairs.jsonl")
    instructions = write(project, {"instruction": "a", "output": "bcd"}, name="sft.jsonl")
    found = stats_of(reporter, pairs, instructions)
    assert list(found) == ["sft", "preferences"]
    assert found["sft"]["lengths"]["completion"]["max"] == 3


def test_lengths_are_tokens_of_the_model_with_its_template(project: Path, reporter: Any) -> None:
    found = stats_of(
        reporter, write(project, {**PAIR, "prompt": "q"}, {**PAIR, "chosen": "x " * 600}), model="embedded"
    )
    found = found["preferences"]
    assert found["unit"] == "tokens"
    assert found["lengths"]["rejected"]["max"] == 2  # 55 and the end of the turn
    assert found["lengths"]["prompt"]["histogram"][0] == [4, 7, 1]  # q between three special tokens
    assert [found["over"][limit]["count"] for limit in ("512", "1024", "2048", "4096")] == [1, 1, 0, 0]


def test_languages_are_told_apart(project: Path, reporter: Any) -> None:
    rows = [
        {
            "prompt": "How do I bake a good loaf of bread at home?",
            "chosen": "Mix flour and water with yeast.",
            "rejected": "No.",
        },
        {
            "prompt": "怎样在家里烤出好吃的面包？",
            "chosen": "把面粉、水和酵母混合在一起，然后揉面。",
            "rejected": "不知道。",
        },
    ]
    found = stats_of(reporter, write(project, *rows))["preferences"]
    assert found["languages"]["prompts"] == {"en": 1, "zh": 1}
    assert found["languages"]["answers"] == {"en": 1, "zh": 1}
    assert found["languages"]["answer_in_another"]["count"] == 0
    assert found["scripts"]["Han"] > 0.2


def test_a_language_is_not_guessed_of_a_few_words(project: Path, reporter: Any) -> None:
    things = ("river", "bread", "lamp", "horse", "crow", "canal", "spoon", "gate")
    rows = [
        {"prompt": f"{asked} a {thing}.", "chosen": "Something that people know well.", "rejected": "No."}
        for thing in things
        for asked in ("Describe", "Name", "Draw", "What is")
    ]
    found = stats_of(reporter, write(project, *rows))["preferences"]["languages"]
    assert found["prompts"].keys() <= {"en", "too_short"}
    assert found["prompts"]["too_short"] > 0
    assert found["answer_in_another"]["count"] == 0


def test_the_tables_fit_80_columns_and_name_what_they_say(project: Path) -> None:
    rows = [{"prompt": "p" * size, "chosen": "c" * (size + 1), "rejected": "r"} for size in (1, 3, 3, 100, 5000)]
    result = run(write(project, *rows))
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    at = lines.index(next(line for line in lines if line.startswith("preferences: prompt (characters)")))
    assert lines[at + 1].split() == ["1", "█" * 18, "1", "(20.0%)"]
    assert lines[at + 2].split() == ["2-3", "█" * 36, "2", "(40.0%)"]
    assert lines[at + 3].split() == ["4-7", "0", "(0.0%)"]
    assert any("5 of 5 pairs: 100.0% [56.6%, 100.0%]" in line for line in lines)


def test_json_is_one_object_and_no_tables(project: Path) -> None:
    result = run(write(project, PAIR), "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["preferences"]["rows"] == 1


def test_a_file_of_which_nothing_stays_has_no_lengths(project: Path) -> None:
    result = run(write(project, {**PAIR, "chosen": ""}))
    assert result.exit_code == 0, result.output
    assert "left out: empty chosen" in result.stdout
    assert "lengths" not in result.stdout


def test_a_template_needs_a_model(project: Path) -> None:
    result = run(write(project, PAIR), "--template", "plain")
    assert result.exit_code == 3
    assert "--template has no effect without --model" in result.stderr
