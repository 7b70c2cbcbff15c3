"""Stage evaluate on a tiny model: every judge, other models, steps that are kept, figures that no batch moves."""

from __future__ import annotations

import contextlib
import csv
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dpo_cli.cli.app import app
from dpo_cli.core import paths
from dpo_cli.core.errors import DataError, MachineError, ParamsError, StaleArtifactError
from dpo_cli.core.params import Params
from dpo_cli.judging.prepare import JUDGE_PATH
from tests.tiny_project import CONVERTED, run_stages, tiny_params, write_raw

Evaluate = Callable[..., dict[str, Any]]

NUM_PROMPTS = 12
SETTINGS: dict[str, Any] = {"judge": "world", "num_prompts": NUM_PROMPTS, "temperature": 0.7, "max_new_tokens": 10}


def make_params(tiny_folder: Path, runtime: dict[str, Any] | None = None, **evaluate: Any) -> Params:
    steps = {name: {"max_steps": 6} for name in ("sft", "train", "reward")}
    return tiny_params(tiny_folder, **steps, evaluate={**SETTINGS, **evaluate}, runtime=runtime or {})


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path, make_reporter: Callable[[], Any]) -> Path:
    """A project in which all stages but evaluate have run."""
    folder = tmp_path_factory.mktemp("built")
    with contextlib.chdir(folder):
        write_raw(380, 120)
        stages = (*CONVERTED, "sft", "precompute_ref", "train", "reward")
        run_stages(make_params(tiny_folder), make_reporter(), *stages)
    return folder


@pytest.fixture
def here(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, as the working directory."""
    folder = tmp_path / "project"
    shutil.copytree(built, folder)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def evaluate(here: Path, tiny_folder: Path, make_reporter: Callable[..., Any]) -> Evaluate:
    """``evaluate(judge="hf", ...)``: run the stage with these settings; its reporter is ``evaluate.reporter``."""
    from dpo_cli.stages.evaluate import run

    def go(reporter: Any = None, **settings: Any) -> dict[str, Any]:
        go.reporter = reporter or make_reporter()  # type: ignore[attr-defined]
        return run(make_params(tiny_folder, **settings), go.reporter)  # type: ignore[attr-defined]

    return go


def table(name: str) -> list[dict[str, str]]:
    with (paths.report_dir("evaluate") / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def samples(folder: Path | None = None) -> list[dict[str, Any]]:
    path = (folder or paths.report_dir("evaluate")) / "samples.json"
    return json.loads(path.read_text(encoding="utf-8"))


def work_of(reporter: Any) -> dict[str, int]:
    """What was computed, by label."""
    found: dict[str, int] = {}
    for meter in reporter.meters:
        found[meter.label] = found.get(meter.label, 0) + meter.total
    return found


# --- judges -------------------------------------------------------------------------------


def test_all_that_can_be_asked_of_the_known_reward(evaluate: Evaluate) -> None:
    temperatures, scales = [0.0, 0.7, 1.0], [0.5, 2.0]
    metrics = evaluate(opponents=["sft", "chosen"], judge_pairs=-1, temperatures=temperatures, scales=scales)
    rows = samples()
    assert len(rows) == NUM_PROMPTS == metrics["num_judged"] == metrics["num_judged_chosen"]
    assert metrics["win_rate"] == pytest.approx(sum(row["win"] for row in rows) / NUM_PROMPTS, abs=1e-12)
    assert metrics["win_rate_chosen"] == pytest.approx(sum(row["win_chosen"] for row in rows) / NUM_PROMPTS, abs=1e-12)
    assert metrics["judge_agreement"] == 1.0, "the data is labeled by this very reward"
    assert metrics["num_judge_agreement"] == metrics["num_pairs"]
    assert "judge_consistency" not in metrics, "it reads no text before another"
    curve = table("temperatures.csv")
    assert [(float(row["temperature"]), row["opponent"]) for row in curve] == [
        (temperature, opponent) for temperature in temperatures for opponent in ("sft", "chosen")
    ]
    assert float(curve[2]["win_rate"]) == pytest.approx(metrics["win_rate"], abs=1e-8), "T = 0.7 is the headline's"
    frontier = table("frontier.csv")
    assert [float(row["scale"]) for row in frontier] == [0, 0.5, 1, 2]
    kls = [float(row["kl"]) for row in frontier]
    assert kls == sorted(kls)
    assert kls[0] == 0
    assert kls[2] == pytest.approx(metrics["kl"], abs=1e-8)
    for row in rows:
        assert row["chosen"] != row["rejected"]
        assert "".join(text for text, _ in row["dpo"]["heat"]).startswith(row["dpo"]["text"])
    assert sum(int(row["num_pairs"]) for row in table("reliability.csv")) == metrics["num_pairs"]
    by = table("accuracy_by.csv")
    for kind in ("length", "source"):
        assert sum(int(row["num_pairs"]) for row in by if row["kind"] == kind) == metrics["num_pairs"]
    votes = table("votes.csv")
    assert len(votes) == NUM_PROMPTS
    assert {row["vote"] for row in votes} <= {"A", "B", "tie"}


def test_without_a_judge_there_are_no_wins(evaluate: Evaluate) -> None:
    metrics = evaluate(judge="none")
    assert metrics["judge"] == "none"
    assert not [name for name in metrics if name.startswith(("win_rate", "judge_", "cheaper"))]
    assert table("temperatures.csv") == table("frontier.csv") == table("length.csv") == table("votes.csv") == []
    assert all("win" not in row and "reward" not in row["dpo"] for row in samples())
    assert metrics["perplexity_sft"] > 1


def test_a_local_model_as_judge_is_asked_once(
    evaluate: Evaluate, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ParamsError, match=r"set runtime.judge_path \(or DPO_JUDGE_PATH\) to a directory"):
        evaluate(judge="hf")
    monkeypatch.setenv(JUDGE_PATH, str(tiny_folder))
    metrics = evaluate(judge="hf", hf={"name": "tiny judge"}, opponents=["sft", "chosen"], judge_pairs=5)
    assert metrics["judge_name"] == "tiny judge"
    assert 0 <= metrics["judge_consistency"] <= 1
    assert 0 <= metrics["judge_first_position_rate"] <= 1
    assert metrics["num_judge_agreement"] == 5
    assert "reward_dpo" not in metrics
    assert any("a judge favors answers like its own" in text for text in evaluate.reporter.warned)  # type: ignore[attr-defined]
    again = evaluate(judge="hf", hf={"name": "tiny judge"}, opponents=["sft", "chosen"], judge_pairs=5)
    assert without_memory(again) == without_memory(metrics)
    assert set(work_of(evaluate.reporter)) == {"evaluate: judging"}, "all else is kept"  # type: ignore[attr-defined]


def test_a_judge_whose_window_is_too_short_makes_no_headline(
    evaluate: Evaluate, make_llama: Callable[..., Any], tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = tmp_path / "short"
    make_llama(len(tokenizer), max_position_embeddings=16).save_pretrained(short)
    tokenizer.save_pretrained(short)
    monkeypatch.setenv(JUDGE_PATH, str(short))
    with pytest.raises(DataError, match=r"no verdict in 1\d of 1\d comparisons .*take a judge with a longer one"):
        evaluate(judge="hf")
    assert not (paths.report_dir("evaluate") / "metrics.json").exists()


def test_the_reward_model_as_judge(evaluate: Evaluate) -> None:
    metrics = evaluate(judge="reward-model", opponents=["sft", "chosen"], judge_pairs=-1, temperatures=[0.0])
    reward = json.loads(paths.metrics_file("reward").read_text(encoding="utf-8"))["reward"]
    # σ(r_chosen - r_rejected) on average; its accuracy counts on which side of one half each lies
    assert abs(metrics["judge_agreement"] - 0.5) < 0.5
    assert (metrics["judge_agreement"] > 0.5) == (reward["accuracy"] > 0.5)
    assert metrics["reward_dpo"] == pytest.approx(-metrics["reward_sft"], abs=1e-6)
    alone = evaluate(judge="reward-model")
    assert alone["win_rate"] == metrics["win_rate"], "who else is judged changes nothing"
    assert alone["reward_dpo"] == metrics["reward_dpo"]


def write_votes(path: Path, items: list[dict[str, str]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(items[0]))
        writer.writeheader()
        writer.writerows(items)


def test_people_as_judges_by_a_sheet(evaluate: Evaluate) -> None:
    world_says = evaluate()
    by_world = {row["prompt_id"]: row for row in table("votes.csv")}
    escaping = CliRunner().invoke(app, ["rating-sheet", "\x1b[31mred.csv"])
    assert "\\x1b[31mred.csv: " in escaping.output
    sheet = Path("data/raw/votes.csv")
    result = CliRunner().invoke(app, ["rating-sheet", str(sheet), "--rater", "human:anna"])
    assert result.exit_code == 0, result.output
    with sheet.open(encoding="utf-8", newline="") as file:
        items = list(csv.DictReader(file))
    assert {row["vote"] for row in items} == {""}
    again = CliRunner().invoke(app, ["rating-sheet", str(sheet)])
    assert again.exit_code == ParamsError.exit_code
    assert "may contain votes" in again.output
    unnamed = CliRunner().invoke(app, ["rating-sheet", "data/raw/other.csv", "--rater", ":anna"])
    assert unnamed.exit_code == ParamsError.exit_code
    for item in items:
        said = by_world[item["prompt_id"]]
        won = {"A": item["method"], "B": item["baseline"], "tie": None}[said["vote"]]
        item["vote"] = "tie" if won is None else "A" if item["a_is"] == won else "B"
    write_votes(sheet, items)
    metrics = evaluate(judge="votes", votes={"file": str(sheet)})
    assert metrics["win_rate"] == world_says["win_rate"]
    assert "judge_consistency" not in metrics
    other = Path("data/raw/half.csv")
    write_votes(other, items[: len(items) // 2])
    with pytest.raises(DataError, match="no verdict in .*collect votes on these answers"):
        evaluate(judge="votes", votes={"file": str(other)})
    with pytest.raises(ParamsError, match="must be under data/raw, where DVC sees a change, got data/raw/../votes.csv"):
        evaluate(judge="votes", votes={"file": "data/raw/../votes.csv"})


# --- other models -------------------------------------------------------------------------


def invoke(tiny_folder: Path, *arguments: str) -> Any:
    read = SETTINGS.keys() - ({"temperature"} if arguments[0] == "chat" else set())
    settings = {f"evaluate.{name}": SETTINGS[name] for name in SETTINGS if name in read}
    settings |= {
        "model.name": "tiny",
        "reference.max_length": 256,
        "runtime.model_path": str(tiny_folder),
        "runtime.device": "cpu",
    }
    Path("params.yaml").write_text("{}\n", encoding="utf-8")
    options = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    return CliRunner().invoke(app, [*arguments, *options])


def test_an_adapter_of_ones_own_is_judged_without_training(evaluate: Evaluate, tiny_folder: Path) -> None:
    whole = evaluate()
    shutil.copytree(paths.DPO_MODEL, "mine")
    result = invoke(tiny_folder, "evaluate", "--model", "mine")
    assert result.exit_code == 0, result.output
    found = json.loads(Path("evaluations/mine/metrics.json").read_text(encoding="utf-8"))["evaluate"]
    assert without_memory(found) == without_memory(whole)
    assert samples(Path("evaluations/mine")) == samples()
    known = json.loads(Path("evaluations/mine/params.json").read_text(encoding="utf-8"))
    assert known["train"]["max_steps"] == 6, "that of its provenance"
    assert found["num_leaked_prompts"] == 0
    for arguments, words in (
        (("--set", "train.beta=7"), "--set train.* has no effect on mine: its provenance.json says"),
        (("--out", "reports/evaluate"), "is where stages report to"),
        (("--out", "models/dpo"), "models/dpo holds other files, and no evaluation of a model"),
    ):
        result = invoke(tiny_folder, "evaluate", "--model", "mine", *arguments)
        assert result.exit_code == ParamsError.exit_code
        assert words in result.output


def test_a_prompt_is_put_to_all_models(evaluate: Evaluate, tiny_folder: Path) -> None:
    """Its answers are those that the evaluation sampled, whose random stream is the prompt's."""
    evaluate()
    sample = samples()[0]
    (asked,) = sample["prompt"]
    once = ("chat", "--once", asked["content"])
    result = invoke(tiny_folder, *once, "--temperature", str(SETTINGS["temperature"]), "--json")
    assert result.exit_code == 0, result.output
    answers = json.loads(result.stdout)["answers"]
    assert answers[0]["model"] == "base"
    assert [(each["model"], each["text"]) for each in answers[1:]] == [
        (name, sample[name]["text"]) for name in ("sft", "dpo")
    ]
    greedy = [json.loads(invoke(tiny_folder, *once, *seed, "--json").stdout)["answers"]
              for seed in ((), ("--set", "evaluate.seed=5"))]  # fmt: skip
    assert greedy[0] == greedy[1]
    shown = invoke(tiny_folder, *once, "--system", "Be kind.")
    assert shown.exit_code == 0, shown.output
    assert [name in shown.stdout for name in ("base (", "sft (", "dpo (")] == [True] * 3
    assert invoke(tiny_folder, "chat", "--once", " ").exit_code == DataError.exit_code
    for arguments, words in (
        ((*once, "--rater", "anna"), "--rater has no effect with --once"),
        (("chat", "--json"), "--json has no effect without --once"),
        (("chat",), "dpo-cli chat needs a terminal; without one, say --once PROMPT"),
    ):
        result = invoke(tiny_folder, *arguments)
        assert result.exit_code == ParamsError.exit_code
        assert words in result.output


def test_a_model_of_unknown_training_is_judged_with_a_warning(here: Path, tiny_folder: Path) -> None:
    """Its beta is that of params.yaml, and nobody knows what it has read."""
    shutil.copytree(paths.DPO_MODEL, "mine")
    provenance = Path("mine/provenance.json")
    content = json.loads(provenance.read_text(encoding="utf-8"))
    margins = []
    for change, words in (
        (content | {"made_of": {}}, "trained on another graph or other data"),
        ({"params": {"x": 1}}, "is not one of this version"),
        (None, "does not say what it was trained on"),
    ):
        provenance.chmod(0o644)
        if change is None:
            provenance.unlink()
        else:
            provenance.write_text(json.dumps(change), encoding="utf-8")
        beta = [] if change and "made_of" in change else ["--set", "train.beta=0.2"]
        result = invoke(tiny_folder, "evaluate", "--model", "mine", *beta)
        assert result.exit_code == 0, result.output
        assert words in " ".join(result.output.split())
        found = json.loads(Path("evaluations/mine/metrics.json").read_text(encoding="utf-8"))["evaluate"]
        assert found["num_leaked_prompts"] is None
        margins.append(found["margin"])
    assert margins[1] == margins[2] == pytest.approx(2 * margins[0], rel=1e-9)
    shutil.copytree(paths.SFT_MODEL, "other/mine")
    result = invoke(tiny_folder, "evaluate", "--model", "other/mine")
    assert result.exit_code == ParamsError.exit_code
    assert "evaluations/mine holds the evaluation of another model" in result.output


def test_a_whole_model_stands_beside_the_reference(
    evaluate: Evaluate, tiny_folder: Path, make_llama: Callable[..., Any], tokenizer: Any, reporter: Any
) -> None:
    """The base model itself, from elsewhere: nothing but SFT's adapter lies between the two."""
    from dpo_cli.stages.evaluate import evaluate_model

    make_llama(len(tokenizer)).save_pretrained("whole")
    tokenizer.save_pretrained("whole")
    metrics = evaluate_model(make_params(tiny_folder), Path("whole"), Path("out"), reporter)
    assert metrics["kl"] > 0
    assert "perplexity_base" not in metrics, "it is not in memory"
    trained = evaluate()
    assert metrics["perplexity_sft"] == pytest.approx(trained["perplexity_sft"], rel=1e-5)
    assert metrics["perplexity_dpo"] == pytest.approx(trained["perplexity_base"], rel=1e-2)  # nf4 as the project's
    with pytest.raises(DataError, match=r"evaluate.scales has no effect on whole: it is a whole model"):
        evaluate_model(make_params(tiny_folder, scales=[0.5]), Path("whole"), Path("out"), reporter)


def test_a_folder_that_holds_no_such_model_is_refused(
    here: Path, tiny_folder: Path, make_llama: Callable[..., Any], reporter: Any
) -> None:
    from dpo_cli.stages.evaluate import evaluate_model

    def refused(folder: str) -> Any:
        return evaluate_model(make_params(tiny_folder), Path(folder), Path("out"), reporter)

    with pytest.raises(StaleArtifactError, match="nowhere is missing; run: dpo-cli train, or name a folder with"):
        refused("nowhere")
    Path("empty").mkdir()
    with pytest.raises(StaleArtifactError, match="empty holds neither an adapter .* nor a model"):
        refused("empty")
    shutil.copytree(paths.DPO_MODEL, "pickled")
    Path("pickled/adapter_model.safetensors").rename("pickled/adapter_model.bin")
    with pytest.raises(MachineError, match="pickled adapters are not loaded"):
        refused("pickled")
    shutil.copytree(paths.DPO_MODEL, "other", ignore=shutil.ignore_patterns("provenance.json"))
    from safetensors.torch import load_file, save_file

    weights = load_file("other/adapter_model.safetensors")
    save_file(
        {name: value[..., :-1].contiguous() for name, value in weights.items()}, "other/adapter_model.safetensors"
    )
    misfit = r"other: no adapter for the project's model: size mismatch for .* \(\d+ misfits in all\); give one"
    with pytest.raises(MachineError, match=misfit):
        refused("other")
    result = invoke(tiny_folder, "evaluate", "--out", "somewhere")
    assert result.exit_code == ParamsError.exit_code
    assert "--out has no effect without --model" in result.output


@pytest.mark.parametrize(
    ("folder", "name", "command"),
    [
        (paths.DPO_MODEL, "adapter_model.safetensors", "train"),
        (paths.DPO_MODEL, "adapter_config.json", "train"),
        (paths.DPO_MODEL, "tokenizer.json", "train"),
        (paths.SFT_MODEL, "adapter_model.safetensors", "sft"),
        (paths.REFERENCE, "part-00000.parquet", "precompute-ref"),
        (paths.REWARD_MODEL, "adapter_model.safetensors", "reward"),
    ],
)
def test_a_flipped_bit_is_refused(evaluate: Evaluate, folder: Path, name: str, command: str) -> None:
    path = folder / name
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    with pytest.raises(StaleArtifactError, match=f"{path} has changed since it was made; run: dpo-cli {command}"):
        evaluate(judge="reward-model" if command == "reward" else "world")


# --- steps that are kept ------------------------------------------------------------------


class _StopError(Exception):
    """A kill."""


def assert_close(found: Any, expected: Any, tolerance: float) -> None:
    """Equal but for rounding, whatever lies in what."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name in expected:
            assert_close(found[name], expected[name], tolerance)
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_close(one, other, tolerance)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=tolerance, abs=tolerance)
    else:
        assert found == expected


def without_memory(metrics: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in metrics.items() if name != "peak_mem_gib"}


def test_a_run_that_was_stopped_goes_on_where_it_was(evaluate: Evaluate, make_reporter: Callable[..., Any]) -> None:
    settings = {"temperatures": [0.0], "scales": [0.5]}
    whole, answers = evaluate(**settings), samples()
    total = sum(work_of(evaluate.reporter).values())  # type: ignore[attr-defined]
    shutil.rmtree(".scratch/evaluate")
    shutil.rmtree(paths.report_dir("evaluate"))
    done = 0
    for patience in (2, 3, 4):
        left = patience

        def count(_: int) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise _StopError

        with pytest.raises(_StopError):
            evaluate(reporter=make_reporter(count), **settings)
        assert not (paths.report_dir("evaluate") / "metrics.json").exists(), "nothing half-written"
        now = len(list(Path(".scratch/evaluate").rglob("shard-*.parquet")))
        assert now > done, "it got further than before"
        done = now
    found = evaluate(**settings)
    assert sum(work_of(evaluate.reporter).values()) < 0.7 * total  # type: ignore[attr-defined]
    assert_close(without_memory(found), without_memory(whole), 1e-6)
    assert_close(samples(), answers, 2e-3)  # heats are rounded to 0.001


def test_more_prompts_and_another_temperature_compute_only_what_is_new(evaluate: Evaluate) -> None:
    evaluate()
    evaluate(num_prompts=NUM_PROMPTS + 3)
    work = work_of(evaluate.reporter)  # type: ignore[attr-defined]
    assert work["evaluate: sft answers at T = 0.7"] == 3
    assert work["evaluate: KL along the answers of dpo"] == 3
    assert "evaluate: scoring held-out pairs" not in work
    evaluate(temperature=0.5)
    work = work_of(evaluate.reporter)  # type: ignore[attr-defined]
    assert work["evaluate: sft answers at T = 0.5"] == NUM_PROMPTS
    assert "evaluate: KL along the answers of dpo" not in work, "it is of T = 1 whatever the headline's is"


# --- what no batch moves ------------------------------------------------------------------


def test_figures_depend_neither_on_the_batch_nor_on_the_order_of_rows(
    evaluate: Evaluate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With weights in float64 what a batch rounds lies far below what is kept, so that any other dependence shows."""
    import random

    from dpo_cli.models.adapters import FrozenBase, ModelPair
    from dpo_cli.models.project import Project
    from dpo_cli.scoring.scorer import Scorer

    def in_float64(*arguments: Any) -> ModelPair:
        pair = load_pair(*arguments)
        pair.model.double()
        return pair

    sizes: list[int] = []

    def counted(scorer: Any, groups: Any, max_tokens: int) -> list[list[int]]:
        batches = split(scorer, groups, max_tokens)
        sizes.append(max(map(len, batches)))
        return batches

    split, tokenize, load_pair = Scorer.split, Project.tokenize_pairs, FrozenBase.pair
    monkeypatch.setattr(FrozenBase, "pair", in_float64)
    monkeypatch.setattr(Scorer, "split", counted)
    settings: dict[str, Any] = {"num_prompts": 24, "opponents": ["sft", "chosen"], "judge_pairs": -1, "scales": [0.5]}
    found = []
    for max_tokens, batch, seed in ((1, 1, None), (240, 7, None), (16000, 64, None), (240, 7, 0)):
        if seed is not None:

            def shuffled(project: Project, name: str) -> Any:
                table = tokenize(project, name)
                groups = list(table.groups)
                random.Random(0).shuffle(groups)
                return replace(table, groups=groups)

            monkeypatch.setattr(Project, "tokenize_pairs", shuffled)
        shutil.rmtree(".scratch/evaluate", ignore_errors=True)
        sizes.clear()
        metrics = evaluate(runtime={"max_tokens_per_microbatch": max_tokens}, **settings)
        assert max(sizes) >= batch if batch > 1 else max(sizes) == 1
        rows = {name: table(name) for name in ("pairs.csv", "frontier.csv", "reliability.csv", "length.csv")}
        found.append((without_memory(metrics), rows, samples()))
    for other in found[1:]:
        assert_close(other[0], found[0][0], 1e-9)
        assert other[1] == found[0][1]
        assert_close(other[2], found[0][2], 1e-9)


# --- experiments against each other -----------------------------------------------------------


def test_models_are_judged_against_each_other(evaluate: Evaluate, tiny_folder: Path) -> None:
    evaluate()
    for folder in ("one", "two"):
        shutil.copytree(paths.DPO_MODEL, folder)
        assert invoke(tiny_folder, "evaluate", "--model", folder).exit_code == 0
    compared = ("compare", "evaluations/one", "evaluations/two")
    result = CliRunner().invoke(app, [*compared, "--judge", "--set", "train.beta=3", "--set", "evaluate.judge=world"])
    assert result.exit_code == ParamsError.exit_code
    assert "--set train.beta=3 has no effect on compare --judge" in result.output
    judged = ["--set", "evaluate.judge=world", "--set", "model.name=tiny", "--set", "reference.max_length=256"]
    judged += ["--set", f"runtime.model_path={tiny_folder}", "--set", "runtime.device=cpu"]
    result = CliRunner().invoke(app, [*compared, "--judge", "--json", *judged])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout.splitlines()[-1])["head_to_head"]
    assert found["num_prompts"] == NUM_PROMPTS
    rates = {(each["model"], each["opponent"]): each["value"] for each in found["win_rates"]}
    metrics = json.loads(paths.metrics_file("evaluate").read_text(encoding="utf-8"))["evaluate"]
    assert rates["evaluations/two", "evaluations/one"] == 0.5, "they are the same"
    assert rates["sft", "evaluations/one"] == pytest.approx(1 - metrics["win_rate"], abs=1e-12)
    assert rates["sft", "evaluations/two"] == rates["sft", "evaluations/one"]
    assert "NaN" not in result.stdout
    rule = [*judged[2:], "--set", "evaluate.judge=rule", "--set", "evaluate.rule=one_sentence"]
    result = CliRunner().invoke(app, [*compared, "--judge", "--json", *rule])
    assert result.exit_code == 0, result.output
    shutil.copytree("evaluations/one", "sft")
    result = CliRunner().invoke(app, ["compare", "sft", "evaluations/two", "--judge", "--json", *judged])
    models = {each["model"] for each in json.loads(result.stdout.splitlines()[-1])["head_to_head"]["win_rates"]}
    assert models == {"evaluations/two", "sft, the reference"}, "a model of that name is not taken for the SFT model"
    result = invoke(tiny_folder, "compare", "evaluations/one", "evaluations/two")
    assert "--set has no effect without --judge" in result.output
