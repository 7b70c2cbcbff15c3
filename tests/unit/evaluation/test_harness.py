"""Tasks of lm-evaluation-harness: what cannot be read, fetched, found or compared is one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dpo_cli.core.errors import DataError, DpoCliError, ParamsError
from dpo_cli.evaluation.harness import load_tasks, measure_requests

ITEMS = [{"question": f"What is {n} + 1?", "answer": str(n + 1)} for n in range(5)]
TASK = """\
task: {name}
dataset_path: {path}
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
{more}
"""


def metrics(*names: str) -> str:
    return "metric_list: [" + ", ".join(f"{{metric: {name}}}" for name in names) + "]"


def write_task(folder: Path, name: str = "sums", **changes: str) -> None:
    values = {
        "path": "json",
        "file": "items.jsonl",
        "kind": "generate_until",
        "more": f"generation_kwargs: {{until: ['.'], max_gen_toks: 8}}\n{metrics('exact_match')}",
    }
    (folder / f"{name}.yaml").write_text(TASK.format(name=name, **(values | changes)), encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with one task."""
    found = tmp_path / "tasks"
    found.mkdir()
    (found / "items.jsonl").write_text("".join(f"{json.dumps(item)}\n" for item in ITEMS), encoding="utf-8")
    write_task(found)
    return found


def refused(folder: Path, *names: str, error: type[DpoCliError] = DataError) -> str:
    with pytest.raises(error) as caught:
        load_tasks(folder, names)
    assert all("\n" not in problem for problem in caught.value.problems)
    return str(caught.value)


def test_all_tasks_of_a_folder_or_the_named_ones(folder: Path) -> None:
    write_task(folder, "more")
    (folder / "both.yaml").write_text("group: both\ntask: [sums, more]\n", encoding="utf-8")
    assert [task.name for task in load_tasks(folder, [])] == ["more", "sums"]
    assert [task.name for task in load_tasks(folder, ["sums"])] == ["sums"]
    assert {task.name for task in load_tasks(folder, ["both", "sums"])} == {"sums", "more"}
    assert load_tasks(folder, ["sums"])[0].metric == "exact_match"


def test_a_folder_without_tasks(tmp_path: Path) -> None:
    assert "is no folder" in refused(tmp_path / "none")
    assert "has no YAML file" in refused(tmp_path)
    (tmp_path / "notes.yaml").write_text("color: red\n", encoding="utf-8")
    assert "none of them is a task" in refused(tmp_path)


def test_an_unknown_task_names_the_nearest_one(folder: Path) -> None:
    assert "has no task summs; did you mean sums?" in refused(folder, "summs", error=ParamsError)
    assert "has no task qqq; it has sums" in refused(folder, "qqq", error=ParamsError)


def test_files_that_the_harness_would_leave_out_are_named(folder: Path) -> None:
    (folder / "again.yaml").write_text((folder / "sums.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    (folder / "broken.yaml").write_text("task: [a\nb: {", encoding="utf-8")
    message = refused(folder)
    assert "again.yaml, too" in message
    assert "broken.yaml is no YAML" in message


def test_a_file_that_includes_what_is_not_there_is_named(folder: Path) -> None:
    (folder / "heir.yaml").write_text("include: parent.yaml\ntask: heir\n", encoding="utf-8")
    assert "heir.yaml: the harness cannot read it; is there all that it includes?" in refused(folder, "sums")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"more": f"unsafe_code: true\n{metrics('exact_match')}"}, ["task odd: it runs what a model writes"]),
        (
            {"path": "someone/tasks"},
            ["needs data that is not on this machine, and nothing is downloaded", "dataset_path: json"],
        ),
        ({"file": "gone.jsonl"}, ["gone.jsonl", "paths are relative to that folder"]),
        (
            {"kind": "loglikelihood_rolling", "more": metrics("word_perplexity")},
            ["task odd: its metrics (word_perplexity) are computed of all items at once", "acc or exact_match"],
        ),
    ],
)
def test_a_task_that_cannot_be_compared_is_refused(folder: Path, changes: dict[str, str], words: list[str]) -> None:
    write_task(folder, "odd", **changes)
    message = refused(folder, "odd")
    assert [each for each in words if each not in message] == []


def test_the_first_metric_that_is_a_mean_is_taken(folder: Path) -> None:
    more = f"generation_kwargs: {{until: ['.']}}\n{metrics('bleu', 'exact_match')}"
    write_task(folder, "sums", more=more)
    [task] = load_tasks(folder, [])
    assert (task.metric, task.higher_is_better) == ("exact_match", True)


def test_requests_are_measured_in_tokens(folder: Path, tokenizer: Any) -> None:
    [task] = load_tasks(folder, [])
    lengths = [len(tokenizer.encode(item["question"])) + 8 for item in ITEMS]
    found = measure_requests(task, tokenizer, None, None)
    assert (found.num, found.longest, found.num_too_long) == (5, max(lengths), 0)
    assert measure_requests(task, tokenizer, None, 2).num == 2
    assert measure_requests(task, tokenizer, min(lengths) - 1, None).num_too_long == 5
    with pytest.raises(DataError, match=r"max_gen_toks must be < 8, the model's context, got 8"):
        measure_requests(task, tokenizer, 8, None)


def test_items_that_do_not_fit_their_task(folder: Path, tokenizer: Any) -> None:
    write_task(folder, "odd")
    path = folder / "odd.yaml"
    path.write_text(path.read_text(encoding="utf-8").replace("{{question}}", "{{question.upper()}}"), encoding="utf-8")
    with (folder / "items.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"question": null, "answer": "3"}\n')
    [task] = load_tasks(folder, ["odd"])
    with pytest.raises(DataError, match="task odd: its items do not fit it: "):
        measure_requests(task, tokenizer, None, None)
