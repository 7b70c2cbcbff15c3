"""Other annotation tools: items out as their tasks, their exports back as votes that mean what people meant.

The exports are of the forms that label-studio-sdk 2.1.2, argilla 2.8.0 and potato-annotation 2.12.1 write.
"""

from __future__ import annotations

import csv
import io
import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dpo_cli.cli.app import app
from dpo_cli.core.data_params import DataChecks, PreferenceSource
from dpo_cli.data.convert import convert
from dpo_cli.data.plan import Treatment
from dpo_cli.data.reading.files import read_records
from dpo_cli.data.schema import text_of
from dpo_cli.judging.votes import read_rows, read_votes
from dpo_cli.labeling.engine import Engine
from dpo_cli.labeling.items import Account, ItemStore, read_items
from dpo_cli.labeling.settings import Settings
from dpo_cli.statistics.agreement import WIN

RATERS = ("anna", "ben", "chloe")
LETTERS = "ABCDEFGHI"
Meant = dict[tuple[str, str], Any]
"""By rater and item: the text of the better answer, texts with the best one first, or a word."""

ODD = (
    'tab\there, "quoted", it\'s',
    "line\none\n\nline two\r\nthree",
    "再见 – Ωμέγα ‏مرحبا 🦆",
    "= 1+1; <script>&amp;",
    "x" * 20_000,
)


def run(*arguments: object) -> dict[str, Any]:
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def refused(*arguments: object) -> str:
    result = CliRunner().invoke(app, [*map(str, arguments)])
    assert result.exit_code == 4, result.output
    return " ".join(result.output.split())


def write_items(num: int, num_answers: int) -> Path:
    path = Path("items.jsonl")
    rows = []
    for number in range(num):
        prompt: Any = f"prompt {number} {ODD[number % 5]}"
        if number % 3 == 0:
            turns = (("system", "Be brief."), ("user", "Hi\n"), ("assistant", "Yes?\t"), ("user", prompt))
            prompt = [{"role": role, "content": content} for role, content in turns]
        answers = [f"answer {place} to {number}: {ODD[(number + place) % 4]}" for place in range(num_answers)]
        rows.append({"prompt": prompt, "completions": answers})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def letter_votes(shown: Mapping[str, str], meant: Any) -> Any:
    """What is meant, by the letters of the answers as they are shown."""
    by_text = {text: letter for letter, text in shown.items()}
    return [by_text[text] for text in meant] if isinstance(meant, list) else by_text.get(meant, meant)


def label_studio(folder: Path, meant: Meant, day: int) -> Path:
    tasks = []
    for task in json.loads((folder / "tasks.json").read_text("utf-8")):
        data, annotations = task["data"], []
        shown = {each["id"]: each["body"] for each in data.get("items", ())} or {
            letter: data[letter] for letter in LETTERS if letter in data
        }
        for rater in RATERS:
            if (what := meant.get((rater, data["item_id"]))) is None:
                continue
            said = letter_votes(shown, what)
            region = {"from_name": "vote", "to_name": "A", "type": "choices", "value": {"choices": [said]}}
            if isinstance(said, list):
                region = {"from_name": "vote", "to_name": "answers", "type": "ranker"}
                region["value"] = {"ranker": {"vote": said}}
            annotations.append(
                {
                    "id": f"{rater} {data['item_id']}",
                    "completed_by": {"id": RATERS.index(rater), "email": f"{rater}@example.org"},
                    "result": [] if said == "skip" else [region],
                    "was_cancelled": said == "skip",
                    "created_at": "2026-01-01T00:00:00.5Z",
                    "updated_at": f"2026-01-{day:02d}T00:00:00.5Z",
                    "lead_time": 2.5,
                }
            )
        tasks.append({**task, "id": len(tasks), "annotations": annotations, "drafts": [], "predictions": []})
    path = Path(f"label-studio-{day}.json")
    path.write_text(json.dumps(tasks), encoding="utf-8")
    return path


def argilla(folder: Path, meant: Meant, day: int) -> Path:
    rows = []
    for record in json.loads((folder / "records.json").read_text("utf-8")):
        names = [name for name in record["fields"] if name != "prompt"]
        shown = dict(zip(LETTERS, (record["fields"][name] for name in names), strict=False))
        row = {"id": record["id"], "status": "pending", **record["fields"], **record["metadata"]}
        said = [(rater, meant.get((rater, record["id"]))) for rater in RATERS]
        votes = [(rater, letter_votes(shown, what)) for rater, what in said if what is not None]
        row["vote.responses"] = [
            [names[LETTERS.index(letter)] for letter in vote] if isinstance(vote, list) else vote for _, vote in votes
        ]
        row["vote.responses.users"] = [rater for rater, _ in votes]
        row["vote.responses.status"] = ["discarded" if vote == "skip" else "submitted" for _, vote in votes]
        rows.append(row)
    path = Path(f"argilla-{day}.json")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def potato(folder: Path, meant: Meant, day: int) -> list[Path]:
    items = [record.value for record in read_records(folder / "items.jsonl")]
    paths = []
    for rater in RATERS:
        labels, histories = {}, {}
        for item in items:
            if (what := meant.get((rater, item["id"]))) is None:
                continue
            said = letter_votes({letter: item[letter] for letter in LETTERS if item.get(letter)}, what)
            name, value = ("rank_order", ",".join(said)) if isinstance(said, list) else (said, said)
            labels[item["id"]] = [[{"schema": "vote", "name": name}, value]]
            histories[item["id"]] = {
                "session_end": 9e8,
                "total_time_ms": 2500,
                "annotation_changes": [{"timestamp": 1.7e9 + 86400 * day, "schema_name": "vote", "action": "select"}],
            }
        path = Path(f"potato-{day}") / rater / "user_state.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {"user_id": rater, "instance_id_to_label_to_value": labels, "instance_id_to_behavioral_data": histories}
        path.write_text(json.dumps(state), encoding="utf-8")
        paths.append(path)
    return paths


ANNOTATE: dict[str, Callable[[Path, Meant, int], Any]] = {
    "label-studio": label_studio,
    "argilla": argilla,
    "potato": potato,
}


def exported(tool: str, mode: str, num: int) -> dict[str, list[str]]:
    """Export items to a tool; the texts of each one's answers."""
    figures = run(
        "votes", "export", write_items(num, 2 if mode == "pair" else 3), "--to", tool, "--mode", mode, "--out", "tasks"
    )
    rows = [record.value for record in read_records(Path("tasks/key.jsonl"))]
    assert figures["num_items"] == len(rows)
    return {row["item_id"]: sorted(text_of(each) for each in row["completions"]) for row in rows}


def imported(tool: str, meant: Meant, day: int, *more: object) -> dict[str, Any]:
    paths = ANNOTATE[tool](Path("tasks"), meant, day)
    paths = paths if isinstance(paths, list) else [paths]
    voters = {rater for rater, _ in meant}
    names = [f"--rater={rater}@example.org={rater}" for rater in voters] if tool == "label-studio" else []
    return run("votes", "import", *paths, "--from", tool, "--out", "votes", *names, *more)


def meant_in(votes: Path) -> Meant:
    """What the standing votes of a folder mean."""
    found: Meant = {}
    for path in votes.glob("*.jsonl"):
        for _, row in read_rows(path):
            texts = [text_of(each) for each in row["completions"]]
            vote = row["vote"]
            if isinstance(vote, list):
                vote = [texts[place] for place in sorted(range(len(texts)), key=vote.__getitem__)]
            found[row["rater"].partition(":")[2], row["item_id"]] = texts[vote == "B"] if vote in ("A", "B") else vote
    return found


def random_meaning(mode: str, texts: list[str], rng: random.Random) -> Any:
    if rng.random() < 0.1:
        return "skip"
    if mode == "ranking":
        return rng.sample(texts, len(texts))
    return rng.choice([*texts, *texts, "tie", "both bad"] if mode == "pair" else ["up", "down"])


@pytest.mark.parametrize("tool", ANNOTATE)
@pytest.mark.parametrize("mode", ["pair", "ranking", "thumbs"])
def test_votes_come_back_as_they_were_meant_whatever_was_shown_first_and_however_often_changed(
    tool: str, mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rng = random.Random(1)
    items = exported(tool, mode, 200 if mode == "pair" else 20)
    first: Meant = {
        (rater, item): random_meaning(mode, texts, rng)
        for rater in RATERS
        for item, texts in items.items()
        if rater == "anna" or rng.random() < 0.7
    }
    needs = ["--tasks", "tasks"] if tool == "potato" else []
    figures = imported(tool, first, 2, *needs)
    assert figures["num_annotations"] == len(first) == sum(figures["raters"].values())
    assert meant_in(Path("votes")) == first
    # one in five is changed, and changed back; what is there already is not added again
    changed = {
        key: random_meaning(mode, items[key[1]], rng) if rng.random() < 0.2 else what for key, what in first.items()
    }
    num_changed = sum(changed[key] != first[key] for key in first)
    for meant, day in ((changed, 3), (first, 4)):
        moved = {key: what for key, what in meant.items() if changed[key] != first[key]}
        figures = imported(tool, moved, day, *needs)
        assert figures["left_out"] == {"changed later": num_changed}
        assert meant_in(Path("votes")) == meant
    assert imported(tool, moved, 4, *needs)["left_out"] == {"imported before": num_changed}
    # the labeling goes on in the same folder
    store = ItemStore(read_items(Path("items.jsonl"), mode, 1, 0, Account()), Path("votes"))  # type: ignore[arg-type]
    with Engine(store, Settings(mode=mode), Path("votes")) as engine:  # type: ignore[arg-type]
        for rater in RATERS:
            engine.join(f"human:{rater}")
            assert engine.num_unknown == 0
            assert engine.progress(f"human:{rater}").done == sum(name == rater for name, _ in first)
    if mode == "pair":
        assert_pairs_are_those_of_the_majority(items, first)


def assert_pairs_are_those_of_the_majority(items: dict[str, list[str]], meant: Meant) -> None:
    expected = {}
    for item, (one, other) in items.items():
        said = [meant.get((rater, item)) for rater in RATERS]
        counts = said.count(one), said.count(other)
        if counts[0] != counts[1]:
            better = int(counts[1] > counts[0])
            expected[(one, other)[better]] = ((one, other)[1 - better], float(max(counts)), float(min(counts)))
    Path("held_out.json").write_text('[{"prompt": "h", "chosen": "x", "rejected": "y"}]', encoding="utf-8")
    sources = [PreferenceSource(path="votes", split="train"), PreferenceSource(path="held_out.json", split="eval")]
    for folder in ("work", "out"):
        Path(folder).mkdir()
    convert(sources, Treatment(DataChecks().model_dump(), 0.5), Path("work"), Path("out"), Path("rejects"))
    rows = [record.value for record in read_records(Path("out/train.parquet"))]
    found = {
        text_of(row["chosen"]): (text_of(row["rejected"]), row["chosen_score"], row["rejected_score"]) for row in rows
    }
    assert found == expected
    assert len(expected) > 100
    assert len(read_votes(*Path("votes").glob("*.jsonl"))) == sum(what != "skip" for what in meant.values())


def test_raters_learn_nothing_and_the_key_has_the_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sample = {"id": "p1", "prompt": "q", "sft": {"text": "of the first"}, "dpo": {"text": "of the second"}}
    Path("samples.json").write_text(json.dumps([sample]), encoding="utf-8")
    for tool in ANNOTATE:
        run("votes", "export", "samples.json", "--to", tool, "--out", tool)
        told = "".join(
            path.read_text("utf-8") for path in Path(tool).rglob("*") if path.is_file() and path.name != "key.jsonl"
        )
        assert "of the first" in told
        assert not [word for word in ("sft", "dpo", "method", "baseline", "a_is") if word in told]
        # the item's own id is a hash that says in which order its models come
        assert json.loads(Path(tool, "key.jsonl").read_text("utf-8"))["item_id"] not in told
    item = json.loads(Path("label-studio/tasks.json").read_text("utf-8"))[0]["data"]["item_id"]
    path = argilla(Path("argilla"), {("anna", item): "of the second"}, 1)
    run("votes", "import", path, "--from", "argilla", "--tasks", "argilla", "--out", "votes")
    [vote] = read_votes(Path("votes/anna.jsonl"))
    assert (vote.method, vote.baseline, vote.result) == ("dpo", "sft", WIN)
    # without the key nobody knows who wrote what
    assert "--tasks DIR" in refused("votes", "import", path, "--from", "argilla", "--out", "other")


def test_tables_of_label_studio_are_read_as_its_json_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    items = exported("label-studio", "ranking", 10)
    meant: Meant = {("anna", item): list(reversed(texts)) for item, texts in items.items()}
    tasks = json.loads(label_studio(Path("tasks"), meant, 2).read_text("utf-8"))
    rows = []
    for task in tasks:
        [said] = task["annotations"]
        row = {**task["data"], "vote": [each["value"] for each in said["result"]], "annotator": "anna"}
        times = {name: said[name] for name in ("created_at", "updated_at", "lead_time")}
        rows.append({"id": task["id"], "annotation_id": said["id"], **row, **times})
    Path("min.json").write_text(json.dumps(rows), encoding="utf-8")
    table = io.StringIO()
    writer = csv.DictWriter(table, list(rows[0]), quoting=csv.QUOTE_NONNUMERIC)
    writer.writeheader()
    for row in rows:
        writer.writerow({name: json.dumps(value) if isinstance(value, list) else value for name, value in row.items()})
    Path("table.csv").write_text(table.getvalue(), encoding="utf-8", newline="")
    for path in ("min.json", "table.csv"):
        run("votes", "import", path, "--from", "label-studio", "--out", path[:3])
        assert meant_in(Path(path[:3])) == meant


OTHERS: list[tuple[str, dict[str, Any], list[tuple[str, str]]]] = [
    (
        "label-studio",
        {
            "data": {"prompt": "q", "answer1": "x", "answer2": "y"},
            "annotations": [
                {
                    "completed_by": 1,
                    "result": [{"type": "pairwise", "from_name": "pw", "value": {"selected": "right"}}],
                },
                {
                    "completed_by": 2,
                    "result": [{"type": "textarea", "from_name": "why", "value": {"text": ["because"]}}],
                },
            ],
        },
        [("1", "B")],
    ),
    (
        "argilla",
        {
            "fields": {"instruction": "q", "response1": "x", "response2": "y"},
            "responses": [
                {
                    "user_id": "u1",
                    "status": "submitted",
                    "values": {
                        "ranking": {"value": [{"value": "response2", "rank": 1}, {"value": "response1", "rank": 2}]}
                    },
                },
                {
                    "user_id": "u2",
                    "status": "draft",
                    "values": {"ranking": {"value": [{"value": "response2", "rank": 1}]}},
                },
                {
                    "user_id": "u3",
                    "status": "submitted",
                    "values": {
                        "ranking": {"value": [{"value": "response2", "rank": 1}, {"value": "response1", "rank": 1}]},
                        "comment": {"value": "hm"},
                    },
                },
            ],
        },
        [("u1", "B"), ("u3", "tie")],
    ),
]


@pytest.mark.parametrize(("tool", "row", "expected"), OTHERS)
def test_projects_of_others_are_read_where_their_fields_have_the_documented_names(
    tool: str, row: dict[str, Any], expected: list[tuple[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("export.json").write_text(json.dumps([row]), encoding="utf-8")
    figures = run("votes", "import", "export.json", "--from", tool, "--out", "votes")
    votes = [(path.stem, vote["vote"]) for path in sorted(Path("votes").glob("*.jsonl")) for _, vote in read_rows(path)]
    assert votes == expected
    assert sum(figures["left_out"].values()) == figures["num_annotations"] - len(expected) > 0


@pytest.mark.parametrize(
    ("tool", "row", "message"),
    [
        ("label-studio", {"data": {}}, "row 0 is no task of Label Studio's JSON export"),
        ("label-studio", {"data": {"prompt": "q"}, "annotations": []}, "nobody has annotated anything"),
        ("argilla", {"prompt": "q"}, "row 0 is no record of Argilla"),
        ("label-studio", {"data": {}, "annotations": [7]}, "row 0 is not as label-studio writes it: AttributeError"),
        ("potato", {"user_id": "anna"}, "name the folder that you exported: --tasks DIR"),
        (
            "label-studio",
            {"data": {"a": "x"}, "annotations": [{"completed_by": 1, "result": [{"value": {"selected": "left"}}]}]},
            "row 0 has no prompt and answers in fields of known names",
        ),
        (
            "label-studio",
            {
                "data": {"prompt": "q", "A": "x", "B": "changed", "item_id": "0" * 32},
                "annotations": [{"completed_by": 1, "result": [{"value": {"choices": ["A"]}}]}],
            },
            "row 0 has other texts than its item",
        ),
        (
            "label-studio",
            {
                "data": {"prompt": "q", "A": "x", "B": "y"},
                "annotations": [{"completed_by": 1, "result": [{"value": {"choices": ["up"]}}]}],
            },
            "row 0 says 'up', which is no vote on 2 answers",
        ),
        (
            "label-studio",
            {"data": {"prompt": "q", "A": "x", "B": "y"}, "annotations": [{"result": [{"value": {"choices": ["A"]}}]}]},
            "row 0 has an annotation that names no annotator",
        ),
        (
            "argilla",
            {
                "fields": {"prompt": "q", "response1": "x", "response2": "y", "response3": "z"},
                "responses": {"vote": [{"value": ["response1", "response3"], "user_id": "u"}]},
            },
            "row 0 does not rank response2",
        ),
    ],
)
def test_what_cannot_be_a_vote_is_named_and_nothing_is_written(
    tool: str, row: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("export.json").write_text(json.dumps([row]), encoding="utf-8")
    assert message in refused("votes", "import", "export.json", "--from", tool, "--out", "votes")
    assert not Path("votes").exists()


def test_a_name_of_nobody_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = argilla(Path("tasks"), dict.fromkeys((("anna", item) for item in exported("argilla", "thumbs", 1)), "up"), 1)
    arguments = ("votes", "import", str(path), "--from", "argilla", "--out", "votes", "--rater", "ana=bo")
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 3
    assert "there is no such annotator, only anna" in " ".join(result.output.split())


def test_an_item_that_the_exported_folder_does_not_have_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    exported("potato", "pair", 2)
    state = {"user_id": "anna", "instance_id_to_label_to_value": {"f" * 32: [[{"schema": "vote", "name": "A"}, "f"]]}}
    Path("user_state.json").write_text(json.dumps(state), encoding="utf-8")
    told = refused("votes", "import", "user_state.json", "--from", "potato", "--tasks", "tasks", "--out", "votes")
    assert f"user_state.json, row 0 is on item {'f' * 16}" in told


def test_an_import_that_was_cut_off_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind the line that takes a vote back, before the new vote."""
    monkeypatch.chdir(tmp_path)
    ((item, texts),) = exported("label-studio", "pair", 1).items()
    imported("label-studio", {("anna", item): texts[0]}, 1)
    imported("label-studio", {("anna", item): texts[1]}, 2)
    votes = Path("votes/anna.jsonl")
    lines = votes.read_text("utf-8").splitlines(keepends=True)
    assert [json.loads(line)["vote"] == "undone" for line in lines] == [False, True, False]
    votes.write_text("".join(lines[:2]), encoding="utf-8")
    imported("label-studio", {("anna", item): texts[1]}, 2)
    assert [json.loads(line)["supersedes"] for line in votes.read_text("utf-8").splitlines()] == [None, 0, None]


def test_votes_of_another_mode_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ((item, texts),) = exported("label-studio", "pair", 1).items()
    imported("label-studio", {("anna", item): texts[0]}, 1)
    before = Path("votes/anna.jsonl").read_bytes()
    Path("tasks").rename("tasks-of-pairs")
    item = next(iter(exported("label-studio", "thumbs", 1)))
    path = label_studio(Path("tasks"), {("anna", item): "up"}, 1)
    names = ("--rater", "anna@example.org=anna", "--tasks", "tasks", "--out", "votes")
    assert "votes of the modes pair and thumbs" in refused("votes", "import", path, "--from", "label-studio", *names)
    assert Path("votes/anna.jsonl").read_bytes() == before
