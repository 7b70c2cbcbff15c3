"""From prompts to a win rate: the SFT model's answers are sampled, scored, made into pairs, learned from and judged."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from dpo_cli.cli.app import app
from dpo_cli.core import paths
from dpo_cli.core.errors import DataError, ParamsError
from dpo_cli.core.params import Params, SampleParams
from dpo_cli.data import world
from dpo_cli.data.chat import ChatEncoder
from dpo_cli.evaluation.sampling import read_prompts, repeated, sample_files
from dpo_cli.judging.known_reward import RULES
from tests.tiny_project import run_stages, tiny_params

K = 6
PROMPTS = [f"Say {word}." for word in "one two three four five six seven eight nine ten eleven twelve".split()]
TRAIN, UNSEEN = Path("data/prompts/train.jsonl"), Path("data/prompts/unseen.jsonl")


def make_params(tiny_folder: Path, **evaluate: Any) -> Params:
    training = {"learning_rate": 5e-3, "max_steps": 30, "eval_steps": 0}
    train, unseen = (
        {"path": f"data/raw/{name}.parquet", "format": "kwise", "split": split}
        for name, split in (("train", "train"), ("unseen", "eval"))
    )
    return tiny_params(
        tiny_folder,
        data={"sft": {"path": "data/raw/instructions.jsonl"}, "preferences": {**train, "also": [unseen]}},
        sft={**training, "method": "full", "max_length": 128},
        reference={"max_length": 128},
        train={**training, "max_steps": 4},
        evaluate={"judge": "rule", "rule": "one_sentence", "num_prompts": 0, "max_new_tokens": 8, **evaluate},
        runtime={"checkpoint_minutes": 0},
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path, make_reporter: Callable[[], Any]) -> Path:
    """A project with an SFT model whose answers end, and with two files of prompts."""
    folder = tmp_path_factory.mktemp("sampled")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_rows(TRAIN, [{"prompt": text} for text in [*PROMPTS[:8], PROMPTS[0]]])
        write_rows(UNSEEN, [{"prompt": text} for text in PROMPTS[8:]])
        rows = [{"prompt": f"{text} Now!", "completion": answer} for text in PROMPTS for answer in ("no", "no.")]
        write_rows(paths.RAW / "instructions.jsonl", rows)
        run_stages(make_params(tiny_folder), make_reporter(), "base", "convert_sft", "sft")
    return folder


@pytest.fixture
def tuned(built: Path, tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Params:
    """The settings of a copy of it, which is the working directory."""
    folder = tmp_path / "project"
    shutil.copytree(built, folder)
    monkeypatch.chdir(folder)
    return make_params(tiny_folder)


def write_rows(path: Path, rows: Sequence[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def rows_of(path: Path) -> list[dict[str, Any]]:
    return pl.read_parquet(path, glob=False).to_dicts()


def test_from_prompts_to_a_win_rate(tuned: Params, make_reporter: Callable[[], Any]) -> None:
    reporter = make_reporter()
    figures = sample_files([TRAIN, UNSEEN], K, None, paths.RAW, tuned, reporter)
    train = figures[TRAIN.as_posix()]
    assert (train["num_read"], train["num_prompts"], train["num_answers"]) == (9, 8, 8 * K)
    rows = rows_of(paths.RAW / "train.parquet")
    assert sum(sum(row["counts"]) for row in rows) == 8 * K - train["num_cut_off"]
    for row in rows:
        texts = [turn["content"] for turn in row["completions"]]
        assert len(set(texts)) == len(texts) == len(row["counts"]) == len(row["token_ids"])
        assert row["scores"] == [RULES["one_sentence"].reward("", text) for text in texts]
    assert train["num_tied"] < train["num_rows"]
    run_stages(tuned, make_reporter(), "convert_sft", "convert_preferences", "precompute_ref", "train")
    pairs = rows_of(paths.preference_table("train"))
    assert pairs
    assert {(pair["chosen_score"], pair["rejected_score"]) for pair in pairs} == {(1.0, 0.0)}
    held_out = {pair["prompt"][0]["content"] for pair in rows_of(paths.preference_table("eval"))}
    assert held_out <= set(PROMPTS[8:])
    metrics = run_stages(tuned, make_reporter(), "evaluate")
    samples = json.loads((paths.report_dir("evaluate") / paths.SAMPLES).read_text(encoding="utf-8"))
    right = {name: [RULES["one_sentence"].reward("", row[name]["text"]) for row in samples] for name in ("sft", "dpo")}
    assert [row["dpo"]["reward"] for row in samples] == right["dpo"]
    wins = [(1 + ours - theirs) / 2 for ours, theirs in zip(right["dpo"], right["sft"], strict=True)]
    assert metrics["win_rate"] == pytest.approx(sum(wins) / len(wins))
    assert metrics["win_rate_ceiling"] == 1 - sum(right["sft"]) / len(wins) / 2
    assert metrics["judge_name"] == "the rule one_sentence: one short sentence without a preamble"
    assert "well_formed_dpo" not in metrics
    # with --model another model is asked
    reporter = make_reporter()
    sample_files([UNSEEN], K, paths.DPO_MODEL, paths.SAMPLED, tuned, reporter)
    assert [meter.label.count("dpo") for meter in reporter.meters] == [1, 1], "it answers, and is scored"
    made_by = [pq.read_schema(folder / "unseen.parquet").metadata[b"model"] for folder in (paths.RAW, paths.SAMPLED)]
    assert made_by[0] != made_by[1]


def test_what_was_sampled_is_not_sampled_again(tuned: Params, make_reporter: Callable[..., Any]) -> None:
    """A stopped run goes on where it was, and both the files and one more answer leave what is there as it is."""
    small = tuned.model_copy(update={"runtime": tuned.runtime.model_copy(update={"max_tokens_per_microbatch": 16})})
    sample_files([TRAIN], K, None, paths.SAMPLED, small, make_reporter())
    whole = (paths.SAMPLED / "train.parquet").read_bytes()

    def stop(done: int) -> None:
        raise KeyboardInterrupt

    scratch = Path(".scratch/sample")
    scratch.rename("elsewhere")
    with pytest.raises(KeyboardInterrupt):
        sample_files([TRAIN], K, None, paths.SAMPLED, small, make_reporter(stop))
    again = make_reporter()
    sample_files([TRAIN], K, None, paths.SAMPLED, small, again)
    left, _ = [meter.total for meter in again.meters]
    assert 0 < left < 8 * K
    assert (paths.SAMPLED / "train.parquet").read_bytes() == whole

    more = make_reporter()
    sample_files([TRAIN], K + 1, None, paths.SAMPLED, small, more)
    assert more.meters[0].total == 8
    known = make_reporter()
    sample_files([TRAIN], K, None, paths.SAMPLED, small, known)
    assert known.meters == []
    assert (paths.SAMPLED / "train.parquet").read_bytes() == whole


def test_an_answers_log_probability_is_that_of_its_tokens(
    tuned: Params, tokenizer: Any, make_reporter: Callable[[], Any]
) -> None:
    """Summed over the answer and the token that ends it, at temperature 1, whatever it was sampled at."""
    changes = {
        "evaluate": tuned.evaluate.model_copy(update={"temperature": 0.7}),
        "reference": tuned.reference.model_copy(update={"quantization": "none"}),
    }
    sample_files([UNSEEN], K, None, paths.SAMPLED, tuned.model_copy(update=changes), make_reporter())
    model = AutoModelForCausalLM.from_pretrained(paths.SFT_MODEL, dtype=torch.float32).eval()
    [row, *_] = rows_of(paths.SAMPLED / "unseen.parquet")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": row["prompt"][0]["content"]}], add_generation_prompt=True, return_dict=False
    )
    for tokens, logp in zip(row["token_ids"], row["logps"], strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        each = logits.log_softmax(-1)[torch.arange(len(tokens)), tokens]
        assert logp == pytest.approx(each.sum().item(), abs=1e-4)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"text": "Hello?"}, "data/prompts/train.jsonl, row 1 has no 'prompt'"),
        ({"prompt": " "}, "data/prompts/train.jsonl, row 1 asks nothing: 'prompt' is empty"),
        (["Hello?"], "data/prompts/train.jsonl, row 1 must be an object with a 'prompt', got a list of 1"),
    ],
)
def test_a_row_without_a_prompt_is_named(
    tuned: Params, row: Any, problem: str, make_reporter: Callable[[], Any]
) -> None:
    write_rows(TRAIN, [{"prompt": "Hello?"}, row])
    with pytest.raises(DataError, match=f"^{re.escape(problem)}; correct the row, or take it out$"):
        sample_files([TRAIN], K, None, paths.SAMPLED, tuned, make_reporter())
    assert not paths.SAMPLED.exists()


def test_a_prompt_that_the_chat_template_refuses_is_named(tuned: Params, tokenizer: Any) -> None:
    refusing = copy.deepcopy(tokenizer)
    refusing.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
        + tokenizer.chat_template
    )
    turns = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello?"}]
    write_rows(TRAIN, [{"prompt": "Hello?"}, {"prompt": turns}])
    with pytest.raises(
        DataError, match=r"^data/prompts/train.jsonl, row 1 is refused .*: no system turn.*; correct the row, or take"
    ):
        repeated([read_prompts(TRAIN)], K, ChatEncoder(refusing, "auto"))


def test_a_file_without_rows_and_a_file_that_is_not_ours_are_refused(
    tuned: Params, make_reporter: Callable[[], Any]
) -> None:
    """A table is written over by a later one, and nothing else is."""
    mine = pl.DataFrame({"prompt": PROMPTS[:2]})
    mine.write_parquet(paths.RAW / "mine.parquet")
    before = (paths.RAW / "mine.parquet").read_bytes()
    write_rows(TRAIN.with_name("mine.jsonl"), [{"prompt": "Hello?"}])
    for prompts in (paths.RAW / "mine.parquet", TRAIN.with_name("mine.jsonl")):
        with pytest.raises(ParamsError, match=r"^data/raw/mine.parquet is there, and dpo-cli sample did not write it"):
            sample_files([prompts], K, None, paths.RAW, tuned, make_reporter())
    assert (paths.RAW / "mine.parquet").read_bytes() == before
    TRAIN.write_text("[]", encoding="utf-8")
    with pytest.raises(DataError, match=r"^data/prompts/train.jsonl has no rows"):
        sample_files([TRAIN], K, None, paths.SAMPLED, tuned, make_reporter())


def test_the_stage_answers_the_files_of_its_section(tuned: Params, make_reporter: Callable[[], Any]) -> None:
    """What lies there stays, and by default that is all that it does."""
    mine = paths.SAMPLED / "mine.parquet"
    run_stages(tuned, make_reporter(), "sample")
    assert list(paths.SAMPLED.iterdir()) == []
    mine.write_bytes(b"mine")
    write_rows(paths.RAW / "asked.jsonl", [{"messages": [{"role": "user", "content": text}]} for text in PROMPTS[:3]])
    section = SampleParams(prompts=["data/raw/asked.jsonl"], answers=2)
    run_stages(tuned.model_copy(update={"sample": section}), make_reporter(), "sample")
    assert pq.read_schema(paths.SAMPLED / "asked.parquet").metadata[b"num_answers"] == b"2"
    assert mine.read_bytes() == b"mine"
    section = SampleParams(prompts=[TRAIN.as_posix()])
    with pytest.raises(DataError, match="sample.prompts: data/prompts/train.jsonl is not under data/raw"):
        run_stages(tuned.model_copy(update={"sample": section}), make_reporter(), "sample")


def test_a_prompt_that_the_world_does_not_know_is_answered_and_not_scored(
    tuned: Params, tiny_folder: Path, make_reporter: Callable[[], Any]
) -> None:
    [known, *_] = (row["prompt"] for row in world.preference_rows(0, 1))
    write_rows(TRAIN, [{"prompt": "What is love?"}, {"prompt": known}])
    params = make_params(tiny_folder, judge="world", rule=None)
    figures = sample_files([TRAIN], K, None, paths.SAMPLED, params, make_reporter())[TRAIN.as_posix()]
    assert figures["num_unscored"] == 1
    assert figures["reward"] is not None
    unknown, scored = rows_of(paths.SAMPLED / "train.parquet")
    assert unknown["scores"] is None
    assert set(scored["scores"]) <= {0.0, 1.0}


def test_options_without_effect_are_refused(tuned: Params, make_reporter: Callable[[], Any], tiny_folder: Path) -> None:
    with pytest.raises(ParamsError, match=r"evaluate\.temperature 0 gives one answer 6 times"):
        sample_files([TRAIN], K, None, paths.SAMPLED, make_params(tiny_folder, temperature=0.0), make_reporter())
    with pytest.raises(ParamsError, match="top_p has no effect"):
        sample_files([TRAIN], 1, None, paths.SAMPLED, make_params(tiny_folder, temperature=0.0), make_reporter(), 0.9)
    with pytest.raises(ParamsError, match="two of the files have one name"):
        sample_files([TRAIN, TRAIN], K, None, paths.SAMPLED, tuned, make_reporter())
    result = CliRunner().invoke(app, ["sample", str(TRAIN), "--set", "train.beta=1"])
    assert result.exit_code == ParamsError.exit_code
    result = CliRunner().invoke(app, ["sample", "--answers", "3"])
    assert "--answers, --top-p, --model and --out have no effect without PROMPTS" in result.stderr


def test_a_language_model_votes_on_samples_as_a_rater(
    built: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, make_reporter: Callable[[], Any]
) -> None:
    """It sees the answers in an order that is drawn, some again flipped, so that its love of a place shows."""
    monkeypatch.chdir(built)
    monkeypatch.setenv("DPO_JUDGE_PATH", str(tiny_folder))
    params = make_params(tiny_folder)
    paths.PARAMS.write_text(json.dumps(params.model_dump(mode="json")), encoding="utf-8")  # judged by a rule otherwise
    write_rows(Path("answers.jsonl"), [{"prompt": text, "completions": ["no", "no."]} for text in PROMPTS])
    command = ["label", "answers.jsonl", "--judge", "hf", "--set", "evaluate.hf.template=summary", "--repeats", "0.5"]
    for _ in range(2):  # the second time there is nothing left to ask
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 0, done.output
    [file] = Path("data/votes/answers").glob("judge-*.jsonl")
    rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    first = [row for row in rows if row["drawn"] != "repeat"]
    again = [row for row in rows if row["drawn"] == "repeat"]
    assert len(first) == len(PROMPTS)
    assert 0 < len(again) < len(PROMPTS)
    assert {row["rater"].split()[-1] for row in rows} == {"summary"}
    found = CliRunner().invoke(app, ["agreement", str(file), "--json"])
    [rater] = json.loads(found.stdout)["raters"]
    assert rater["num_repeats"] == len(again)
    assert rater["position_bias"] is not None
    ranking = CliRunner().invoke(app, [*command[:4], "--mode", "ranking", "--out", "ranked"])
    assert ranking.exit_code == 3
    assert "compares two answers; take --mode pair" in ranking.stderr
