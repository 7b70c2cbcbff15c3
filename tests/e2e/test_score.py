"""``dpo-cli score`` on a small project: right numbers, nothing scored twice, every row accounted for."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from typer.testing import CliRunner, Result

from dpo_cli.cli.app import app
from dpo_cli.cli.sources import sources_of
from dpo_cli.core import paths
from dpo_cli.core.errors import Interrupted
from dpo_cli.core.load_params import load_params
from dpo_cli.evaluation.score import SCHEMA, score_sources

BETA = 0.5
ATTACK = "</script><script>alert(1)</script>"
NEW_PAIRS = [
    {"prompt": f"What comes after {n}? {ATTACK if n == 3 else ''}", "chosen": f"{n + 1}", "rejected": f"{n} 你好"}
    for n in range(6)
]
RANKING = {"prompt": "Name a color.", "completions": ["red", "a tree", "blue-green", "no"], "ranks": [1, 3, 1, 4]}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, train_tiny: Any) -> Path:
    """A project that was trained on pairs and rankings; not to be changed."""
    folder = tmp_path_factory.mktemp("trained")
    rates = {"sft.learning_rate": 3e-3, "train.learning_rate": 3e-3}
    rankings = [{**RANKING, "prompt": f"{RANKING['prompt']} {n}"} for n in range(12)]
    train_tiny(folder, {**rates, "sft.method": "lora", "train.beta": BETA}, rankings)
    return folder


@pytest.fixture
def project(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the trained project, which is the working directory."""
    folder = tmp_path / "project"
    shutil.copytree(trained, folder)
    monkeypatch.chdir(folder)
    return folder


def write(name: str, *rows: Any) -> str:
    Path(name).write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return name


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["score", *arguments])


def score(*arguments: str) -> dict[str, Any]:
    result = invoke(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def rows_in(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def plain_token_logps(model: Any, prompts: list[list[int]], answers: list[list[int]]) -> list[list[float]]:
    """Log-probabilities of answers as transformers gives them on one padded batch, nats."""
    import torch

    texts = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    width = max(map(len, texts))
    ids = torch.tensor([text + [0] * (width - len(text)) for text in texts])
    mask = torch.tensor([[1] * len(text) + [0] * (width - len(text)) for text in texts])
    with torch.no_grad():
        logps = model(input_ids=ids, attention_mask=mask).logits[:, :-1].double().log_softmax(-1)
    found = logps.gather(2, ids[:, 1:, None]).squeeze(2)
    return [
        found[at, len(prompt) - 1 : len(prompt) + len(answer) - 1].tolist()
        for at, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
    ]


def test_values_are_those_of_a_plain_computation(project: Path, tiny_folder: Path, tokenizer: Any) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    figures = score(write("new.jsonl", *NEW_PAIRS, RANKING), "--out", "rows.jsonl")
    rows = rows_in("rows.jsonl")
    assert [row["row"] for row in rows] == list(range(7))
    prompts, answers, told = [], [], []
    for row in rows:
        ids = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
        for completion in row["completions"]:
            prompts.append(list(ids))
            answers.append(completion["token_ids"])
            told.append(completion)
    logps = {}
    for name, folder in (("logp", "models/dpo"), ("ref_logp", "models/sft")):
        base = AutoModelForCausalLM.from_pretrained(tiny_folder)
        logps[name] = plain_token_logps(PeftModel.from_pretrained(base, folder).eval(), prompts, answers)
    for at, completion in enumerate(told):
        ours, theirs = logps["logp"][at], logps["ref_logp"][at]
        assert completion["num_tokens"] == len(ours)
        assert completion["logp"] == pytest.approx(sum(ours), abs=1e-4)
        assert completion["ref_logp"] == pytest.approx(sum(theirs), abs=1e-4)
        assert completion["reward"] == pytest.approx(BETA * (sum(ours) - sum(theirs)), abs=1e-4)
        ratios = [a - b for a, b in zip(ours, theirs, strict=True)]
        assert completion["token_log_ratios"] == pytest.approx(ratios, abs=1e-4)
    assert any(abs(completion["reward"]) > 0.01 for completion in told), "the adapter does something"
    rewards = [[completion["reward"] for completion in row["completions"]] for row in rows]
    assert [row["margin"] for row in rows[:6]] == pytest.approx([a - b for a, b in rewards[:6]])
    ranks = [completion["rank"] for completion in rows[6]["completions"]]
    assert ranks == [1, 1, 2, 3]
    right = [
        a > b for x, a in zip(ranks, rewards[6], strict=True) for y, b in zip(ranks, rewards[6], strict=True) if x < y
    ]
    assert rows[6]["accuracy"] == pytest.approx(sum(right) / len(right))
    accuracy = [a > b for a, b in rewards[:6]] + [rows[6]["accuracy"]]
    assert figures["all"]["accuracy"]["value"] == pytest.approx(sum(accuracy) / 7)
    assert figures["beta"] == BETA


def test_nothing_is_scored_twice(project: Path) -> None:
    new = write("new.jsonl", *NEW_PAIRS)
    first = score(new, "--out", "first.jsonl")
    assert first["reference"] == first["policy"] == {"num_cached": 0, "num_computed": 12}
    second = score(new, "--out", "second.jsonl")
    assert second["reference"] == second["policy"] == {"num_cached": 12, "num_computed": 0}
    assert Path("first.jsonl").read_bytes() == Path("second.jsonl").read_bytes()
    grown = score(write("new.jsonl", *NEW_PAIRS, RANKING))
    assert grown["reference"] == {"num_cached": 12, "num_computed": 4}
    plain = invoke(new)
    assert "16 answers taken from the cache, 0 computed" in plain.stdout


@pytest.mark.parametrize("gone", [".scratch/precompute_ref", "data/reference"])
def test_either_cache_of_the_reference_serves(gone: str, project: Path) -> None:
    shutil.rmtree(gone)
    found = score("data/preference/eval.parquet")
    assert found["reference"]["num_computed"] == 0
    assert found["policy"]["num_computed"] == found["reference"]["num_cached"] > 0


def test_a_cache_of_another_graph_is_left_alone(project: Path) -> None:
    shutil.rmtree(".scratch/precompute_ref")
    manifest = Path("data/reference/manifest.json")
    manifest.write_text(manifest.read_text(encoding="utf-8").replace('"float32"', '"bfloat16"'), encoding="utf-8")
    result = invoke("data/preference/eval.parquet")
    assert result.exit_code == 0
    assert "data/reference is not used" in result.stderr
    assert "compute_dtype" in result.stderr


def test_stopped_it_keeps_what_it_scored(project: Path, make_reporter: Any) -> None:
    new = write("new.jsonl", *NEW_PAIRS)

    def stop(done: int) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    params = load_params(Path("params.yaml"), ["runtime.max_tokens_per_microbatch=1"])

    class Stopping(make_reporter):  # type: ignore[misc]
        @contextlib.contextmanager
        def meter(self, label: str, total: int, unit: str) -> Any:
            self._on_advance = stop if "under sft" in label else None
            with super().meter(label, total, unit) as meter:
                yield meter

    with pytest.raises(Interrupted, match="what was computed is kept"):
        score_sources(sources_of([new], "preferences", []), paths.DPO_MODEL, None, None, params, Stopping())
    again = score(new)
    assert again["reference"]["num_cached"] > 0
    assert again["reference"]["num_computed"] < 12


def test_canonical_tables_keep_their_sources_and_ids(project: Path) -> None:
    pairs, rankings = "data/preference/eval.parquet", "data/preference/eval.ranking.parquet"
    table = pl.read_parquet(pairs)
    mixed = table.with_columns(source=pl.Series(["a.json", "b.json"] * table.height).head(table.height))
    mixed.write_parquet("mixed.parquet")
    found = score("mixed.parquet", "--out", "rows.parquet")
    assert list(found["sources"]) == ["a.json", "b.json"]
    assert sum(one["num_rows"] for one in found["sources"].values()) == found["all"]["num_rows"] == table.height
    assert found["reference"]["num_computed"] == 0
    rows = pl.read_parquet("rows.parquet")
    assert rows.columns == SCHEMA.names
    assert rows["id"].to_list() == table["id"].to_list()
    assert not rows["in_training"].any()
    ranked = score(rankings, "--out", "rows.parquet")
    assert list(ranked["sources"]) == ["preferences.json"]
    assert ranked["policy"]["num_computed"] == 0, "its answers are in the pairs, too"
    rows = pl.read_parquet("rows.parquet")
    assert rows["id"].to_list() == pl.read_parquet(rankings)["id"].to_list() != []
    assert set(rows["kind"]) == {"ranking"}


def test_a_ranking_whose_pairs_are_all_there_counts_once(project: Path) -> None:
    pairs, rankings = "data/preference/eval.parquet", "data/preference/eval.ranking.parquet"
    found = score(pairs, rankings)
    assert found["all"]["num_rows"] == pl.read_parquet(pairs).height
    assert {entry["reason"] for entry in found["left_out"]} == {"duplicate"}
    assert {entry["file"] for entry in found["left_out"]} == {rankings}


def test_prompts_that_were_trained_on_are_counted(project: Path) -> None:
    seen = pl.read_parquet("data/preference/train.parquet").head(4)
    rows = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in seen.iter_rows(named=True)]
    result = invoke(write("new.jsonl", *rows, *NEW_PAIRS))
    assert result.exit_code == 0
    assert "4 of 10 rows (40%) have prompts that were trained on" in " ".join(result.stderr.split())


def test_rows_left_out_are_counted_and_named(project: Path) -> None:
    found = score(
        write(
            "new.jsonl",
            NEW_PAIRS[0],
            {"prompt": "Long?", "chosen": "1 2 3 4 " * 100, "rejected": "no"},
            {"prompt": "Same?", "chosen": "x", "rejected": "x"},
            {"prompt": "No answer?", "chosen": "x"},
            NEW_PAIRS[0],
            {**RANKING, "completions": ["red", "", "blue", "red"], "ranks": [1, 3, 2, 4]},
        )
    )
    assert {(entry["row"], entry.get("part"), entry["reason"]) for entry in found["left_out"]} == {
        (1, None, "over_long"),
        (2, None, "equal_sides"),
        (3, None, "missing_field"),
        (4, None, "duplicate"),
        (5, "answer 3", "empty_rejected"),
        (5, "answer 4", "equal_sides"),
    }
    assert (found["num_read"], found["num_scored"]) == (6, 2)
    assert all(entry["file"] == "new.jsonl" and entry["detail"] for entry in found["left_out"])
    shown = " ".join(invoke("new.jsonl").stdout.split())
    assert "6 read, 2 scored, 4 left out" in shown
    assert "row 1: has" in shown


def test_the_page_is_safe(project: Path) -> None:
    score(write("new.jsonl", *NEW_PAIRS, RANKING), "--html", "heat.html")
    page = Path("heat.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "&lt;/script&gt;&lt;script&gt;alert(1)" in page
    assert "All 7 rows" in " ".join(page.split())


def test_max_rows_beta_and_columns(project: Path) -> None:
    rows = [{"q": row["prompt"], "chosen": row["chosen"], "rejected": row["rejected"]} for row in NEW_PAIRS]
    columns = "columns={prompt: q}"
    whole = score(write("new.jsonl", *rows), "--set", columns)
    first = score("new.jsonl", "--max-rows", "2", "--beta", "1", "--set", columns, "--set", "runtime.threads=1")
    assert (whole["all"]["num_rows"], first["all"]["num_rows"]) == (6, 2)
    again = score("new.jsonl", "--max-rows", "2", "--set", columns)
    assert first["all"]["margin"]["value"] == pytest.approx(again["all"]["margin"]["value"] / BETA)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--beta", "-1"], 3, "--beta must be > 0"),
        (["--beta", "nan"], 3, "--beta must be > 0"),
        (["--out", "rows.csv"], 3, "--out must end with .parquet or .jsonl"),
        (["--html", "heat.txt"], 3, "--html must end with .html"),
        (["--out", "new.jsonl"], 3, "is a file that is read"),
        (["--set", "train.beta=1"], 3, "has no effect on score"),
        (["--set", "runtime.recompute=none"], 3, "has no effect on score"),
        (["--set", "weight=2"], 3, "every row is scored once"),
        (["--set", "data.preferences.pairs=adjacent"], 3, "scored as a whole"),
        (["--set", "colums={a: b}"], 3, "colums"),
        (["--model", "models/other"], 5, "provenance.json is missing"),
    ],
)
def test_errors_are_one_line(arguments: list[str], code: int, words: str, project: Path) -> None:
    result = invoke(write("new.jsonl", *NEW_PAIRS), *arguments)
    assert result.exit_code == code, result.output
    lines = result.stderr.splitlines()
    assert len([line for line in lines if line.startswith("dpo-cli: error: ")]) == 1
    assert words in lines[-1]


def test_what_is_missing_is_named(project: Path) -> None:
    assert "nothing.jsonl" in invoke("nothing.jsonl").stderr
    assert invoke("nothing.jsonl").exit_code == 4
    result = invoke(write("all_bad.jsonl", {"prompt": "Same?", "chosen": "x", "rejected": "x"}))
    assert result.exit_code == 4
    assert "all 1 rows are left out; row 0" in result.stderr
    shutil.rmtree("models/dpo")
    result = invoke(write("new.jsonl", *NEW_PAIRS))
    assert result.exit_code == 5
    assert "run: dpo-cli train" in result.stderr


def test_an_adapter_of_another_graph_is_refused(project: Path) -> None:
    path = Path("models/dpo/provenance.json")
    path.write_text(path.read_text(encoding="utf-8").replace('"float32"', '"bfloat16"'), encoding="utf-8")
    result = invoke(write("new.jsonl", *NEW_PAIRS))
    assert result.exit_code == 5
    assert "made of another graph: compute_dtype is" in result.stderr
