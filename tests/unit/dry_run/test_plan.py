"""``dpo-cli plan``: what is counted without numbers is what a model takes, and what it says about it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from dpo_cli.cli.app import app
from dpo_cli.core.params import Params, TrainParams
from dpo_cli.core.training_params import LoraParams
from dpo_cli.data.tokens import TokenGroup
from dpo_cli.dry_run import outlook, target
from dpo_cli.dry_run.outlook import look_ahead, stage_seconds
from dpo_cli.dry_run.plan import Plan, Target, Task, changes, measure_lengths, micro_batches, plan_training
from dpo_cli.dry_run.tasks import other_subject
from dpo_cli.models.adapters import add_adapter
from dpo_cli.models.device import Machine
from dpo_cli.models.shapes import SHAPES, random_model, random_pairs
from dpo_cli.scoring.scorer import MAX_READ_SHARE, Scorer
from dpo_cli.training.memory import kept_bytes

TINY, GIB = SHAPES["tiny"], 2**30
RUNTIME = Params().runtime


def task(groups: Sequence[TokenGroup], *, batch: int = 16, quantization: str = "nf4") -> Task:
    settings = TrainParams(batch_size=batch)
    return Task("train", groups, settings, LoraParams(), quantization, "reference.max_length", "train.lora.r")


def on_cpu(limit: float, process: int = GIB // 2) -> Target:
    return Target("this CPU", int(limit), limit, 32 * GIB, process)


def plan_of(groups: Sequence[TokenGroup], limit: float = 16 * GIB, **more: Any) -> Plan:
    return plan_training(TINY, task(groups, **more), on_cpu(limit), RUNTIME)


@pytest.fixture(scope="module")
def groups() -> list[TokenGroup]:
    return random_pairs("harmless", 64, 1024)


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_without_numbers_a_model_takes_what_it_takes_with_them(quantization: str, groups: list[TokenGroup]) -> None:
    """Weights to the byte; activations but for what only numbers decide, such as which rows the last MLP reads."""
    plan = plan_of(groups, quantization=quantization)
    machine = Machine(torch.device("cpu"), torch.float32)
    model = add_adapter(random_model("tiny", machine, quantization), LoraParams(), 0)
    scorer = Scorer(model, torch.float32, "shared")
    scorer.max_read_share = MAX_READ_SHARE
    with scorer:
        kept = kept_bytes(model, scorer, groups)
    own = {}
    for tensor in (*model.parameters(), *model.buffers()):
        state = getattr(tensor, "quant_state", None)
        for part in (tensor, *([state.absmax, state.state2.absmax] if state is not None else [])):
            own[part.untyped_storage()._cdata] = part.untyped_storage().nbytes()
    assert plan.counted.weight_bytes == sum(own.values())
    for grade, per_token in kept.per_token.items():
        assert plan.counted.kept.per_token[grade] == pytest.approx(per_token, rel=0.05)
    trained = sum(each.numel() for each in model.parameters() if each.requires_grad)
    assert (plan.counted.adapter_bytes, plan.counted.training_bytes) == (4 * trained, 12 * trained)


def test_the_peak_grows_with_the_largest_micro_batch_and_not_with_the_batch(groups: list[TokenGroup]) -> None:
    small, large = (plan_of(groups, batch=size) for size in (16, 64))
    assert max(small.largest, large.largest) <= large.chosen.max_tokens == 1024
    assert large.peak_bytes == pytest.approx(small.peak_bytes, rel=0.05)
    assert small.most_of <= small.largest
    held = small.target.process_bytes + small.counted.weight_bytes + small.counted.training_bytes
    assert small.peak_bytes == held + small.activation_bytes


def test_a_micro_batch_is_never_less_than_the_longest_group(groups: list[TokenGroup]) -> None:
    long = TokenGroup("long", "long", tuple(range(5, 4000)), (tuple(range(5, 2000)), tuple(range(6, 2000))))
    sizes, largest = micro_batches(task([*groups, long]), "shared", 1024)
    assert largest > 7000
    assert sorted(sizes)[-2] <= 1024


def test_experts_that_stay_in_plain_numbers_are_named(groups: list[TokenGroup]) -> None:
    config = {
        "model_type": "mixtral", "vocab_size": 1024, "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4,
        "num_experts_per_tok": 2,
    }  # fmt: skip
    lora = LoraParams(target_modules=["q_proj", "v_proj"])
    plan = plan_training(config, replace(task(groups), lora=lora), on_cpu(16 * GIB), RUNTIME)
    names, size = plan.counted.plain
    assert any("experts" in name for name in names)
    assert size > plan.counted.weight_bytes / 4


# --- what does not fit ----------------------------------------------------------------------


def test_what_makes_it_fit_comes_by_its_cost_and_ends_where_it_fits(groups: list[TokenGroup]) -> None:
    plan = plan_of(groups)
    needed = plan.peak_bytes
    found = list(changes(replace(plan, target=on_cpu(needed - 20 * 2**20)), TINY, RUNTIME))
    assert found[0].setting.startswith("runtime.max_tokens_per_microbatch=")
    assert [change.fits for change in found] == [*[False] * (len(found) - 1), True]
    hopeless = list(changes(replace(plan, target=on_cpu(GIB // 2)), TINY, RUNTIME))
    settings = [change.setting.partition("=")[0] for change in hopeless]
    assert settings[:3] == ["runtime.max_tokens_per_microbatch", "runtime.recompute", "runtime.recompute"]
    assert settings[-2:] == ["train.lora.r", "a smaller model"]
    peaks = [change.peak_bytes for change in hopeless[:-1]]
    assert peaks == sorted(peaks, reverse=True)
    assert not any(change.fits for change in hopeless)


def test_one_very_long_pair_among_short_ones_is_called_out(groups: list[TokenGroup], reporter: Any) -> None:
    half = tuple(range(5, 1000)) * 4
    long = TokenGroup("the-long-one", "long", half, (half[:-1], half))
    lengths = measure_lengths([*groups * 4, long], "shared")
    assert (lengths.num_outliers, lengths.longest_id) == (1, "the-long-one")
    assert lengths.longest > 4000 > lengths.without
    assert lengths.bound == max(group.longest for group in groups)
    assert measure_lengths(groups, "shared").num_outliers == 0
    plan = plan_of([*groups * 4, long])
    subject = replace(other_subject("tiny", None, "harmless", 4, Params()), tasks=(plan.task,))
    outlook.report(look_ahead(subject, [plan], Params(), {}, 1e11, None), reporter)
    (said,) = [
        text
        for name, text in next(rows for title, rows in reporter.tables.items() if title.startswith("train"))
        if name == "much longer"
    ]
    assert "1 of 257 rows is much longer" in said
    assert f"reference.max_length={lengths.bound} leaves them out" in said
    assert "GiB of the peak" in said or "MiB of the peak" in said


def test_what_was_measured_decides_the_time(groups: list[TokenGroup]) -> None:
    subject = other_subject("tiny", None, "harmless", 64, Params())
    plan = plan_of(subject.tasks[0].groups)
    measured = {"train": {"tokens_per_s": 100.0, "reference_tokens_per_s": 400.0, "peak_bytes": GIB}}
    tokens = sum(sum(group.sizes) for group in plan.task.groups)
    seconds = stage_seconds(look_ahead(subject, [plan], Params(), measured, 1e11, None))
    assert seconds["precompute-ref"] == pytest.approx(tokens / 400, rel=0.05)
    assert seconds["train"] == pytest.approx(tokens / 100, rel=0.05)
    assert stage_seconds(look_ahead(subject, [plan], Params(), {}, None, None)) == {}


# --- the command ----------------------------------------------------------------------------


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["plan", *arguments])


def test_the_command_says_it_as_json_and_by_its_exit_code(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run("--shape", "tiny", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)["plan"]
    assert (found["fits"], found["is_prediction"], found["model"]) == (True, False, "tiny")
    assert found["stages"]["train"]["peak_bytes"] > found["stages"]["train"]["process_bytes"] > 0
    assert found["seconds"]["train"] > found["seconds"]["precompute-ref"] > 0
    assert list(project.iterdir()) == []
    monkeypatch.setattr(target, "available_memory_bytes", lambda: -(1 << 40))
    result = run("--shape", "tiny")
    assert result.exit_code == 6
    assert "DOES NOT FIT" in result.stdout
    assert "a smaller model" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--card", "rtx-9999"], "--card must be one of"),
        (["--card", "rtx-3060", "--measure"], "--measure has no effect with --card rtx-3060"),
        (["--shape", "tiny", "--model", "x"], "--model and --shape both name a model"),
        (["--regime", "equal"], "--regime has no effect on the project's own pairs"),
        ([], "params.yaml is missing"),
    ],
)
def test_options_without_effect_are_errors(arguments: list[str], words: str, project: Path) -> None:
    result = run(*arguments)
    assert result.exit_code == 3
    assert words in result.stderr
