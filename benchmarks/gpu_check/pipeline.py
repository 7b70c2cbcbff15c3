"""All stages on a tiny model; the same training twice; optimizers and processes that there are on GPUs alone."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.gpu_check import ROOT
from benchmarks.gpu_check.bench import Bench, Policy, RecordingReporter, adapter_of, train
from dpo_cli.core import paths
from dpo_cli.core.errors import Interrupted
from dpo_cli.core.load_params import parse_params
from dpo_cli.core.params import Params, TrainParams
from dpo_cli.data import world
from dpo_cli.models.embedded import build_tokenizer
from dpo_cli.training.objective import PairObjective

BEFORE_TRAINING = ("base", "convert_sft", "convert_preferences", "sft", "precompute_ref")
STEP_ZERO_MARGIN = 0.05
SAME_TRAINING = 0.1
"""Difference of two trainings that rounding may make, as a share of how far they went."""


def stages(bench: Bench) -> None:
    """A tiny model goes through all stages, is evaluated twice, and its training is killed and goes on."""
    params, reporter = _prepare_project(bench, "auto"), RecordingReporter()
    for stage in BEFORE_TRAINING:
        _run(stage, params, reporter)
    shutil.copytree(".", killed := bench.folder / "killed")
    metrics = _run("train", params, reporter)
    whole = _adapter(paths.DPO_MODEL)
    with contextlib.chdir(killed):
        with contextlib.suppress(Interrupted):
            _run(
                "train",
                params,
                RecordingReporter(lambda done: signal.raise_signal(signal.SIGINT) if done == 3 else None),
            )
        _run("train", params, reporter)
        off = ((_adapter(paths.DPO_MODEL) - whole).norm() / (whole - _adapter(paths.SFT_MODEL)).norm()).item()
        _run("reward", params, reporter)
        _run("evaluate", params, reporter)
        _run("evaluate", _params(bench, "auto", temperature=0.3, temperatures=[0.3, 1.3], scales=[2.0]), reporter)
    bench.check(
        "Do all stages run, evaluate twice with other temperatures?",
        "yes, nothing raises",
        f"yes; {reporter.last('train: layout')}",
        True,
    )
    _check_margin(bench, metrics)
    went_on = "checkpoint-3" in reporter.last("going on from")
    bench.check(
        "Does a training that was killed end as one that was not?",
        f"it goes on from step 3; off by at most {SAME_TRAINING:g} of how far training went",
        f"{'went on from step 3' if went_on else 'BEGAN ANEW'}; off by {off:.2g}",
        went_on and off <= SAME_TRAINING,
    )


def _adapter(folder: Path) -> torch.Tensor:
    tensors = load_file(folder / "adapter_model.safetensors")
    return torch.cat([tensors[name].flatten().float() for name in sorted(tensors)])


def float16(bench: Bench) -> None:
    """The stages up to train in float16, as on GPUs without bfloat16."""
    params, reporter = _prepare_project(bench, "float16"), RecordingReporter()
    for stage in BEFORE_TRAINING:
        _run(stage, params, reporter)
    metrics = _run("train", params, reporter)
    halved = sum("overflowed float16" in line for line in reporter.lines)
    bench.check(
        "Does training in float16 go well, with its loss scale?",
        "a loss lower than ln 2 + 0.1; the scale halved 5 times at most",
        f"loss {metrics['loss']:.4f}; halved {halved} times",
        metrics["loss"] < 0.794 and halved <= 5,
    )
    _check_margin(bench, metrics)


def _check_margin(bench: Bench, metrics: dict[str, Any]) -> None:
    margin = metrics["step0_max_abs_margin"]
    bench.check(
        "Largest step-0 margin of the tiny model?",
        f"at most {STEP_ZERO_MARGIN:g}",
        f"{margin:.2g}",
        margin <= STEP_ZERO_MARGIN,
    )


def _prepare_project(bench: Bench, dtype: str) -> Params:
    """Raw data in a project folder, which is the working directory from now on, and a random model beside it."""
    (project := bench.folder / "project").mkdir()
    os.chdir(project)
    paths.RAW.mkdir(parents=True)
    rows = {"instructions": world.instruction_rows(0, 80), "preferences": world.preference_rows(0, 160)}
    for name, data in rows.items():
        (paths.RAW / f"{name}.json").write_text(json.dumps(data), encoding="utf-8")
    tokenizer = build_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64 if bench.small else 256,
        intermediate_size=128 if bench.small else 512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.1,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(bench.folder / "tiny")
    tokenizer.save_pretrained(bench.folder / "tiny")
    return _params(bench, dtype)


def _params(bench: Bench, dtype: str, **evaluate: Any) -> Params:
    training = {"learning_rate": 1e-3, "batch_size": 8, "max_steps": 6}
    settings = {"judge": "reward-model", "num_prompts": 6, "max_new_tokens": 8, "temperatures": [], "scales": [0.5]}
    runtime = bench.runtime(model_path=str(bench.folder / "tiny"), compute_dtype=dtype)
    return parse_params(
        {
            "data": {"eval_fraction": 0.2},
            "model": {"name": "tiny"},
            "sft": {**training, "max_length": 256},
            "reference": {"max_length": 256},
            "train": training,
            "reward": {**training, "loss": "bradley_terry"},
            "evaluate": {**settings, **evaluate},
            "runtime": runtime.model_dump(),
        }
    )


def _run(stage: str, params: Params, reporter: RecordingReporter) -> dict[str, Any]:
    return importlib.import_module(f"dpo_cli.stages.{stage}").run(params, reporter)


# --- the same again -----------------------------------------------------------------------


def repeat(bench: Bench) -> None:
    """Five steps twice, and five in PyTorch's deterministic mode."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic mode asks for it before CUDA starts
    first, _ = _five_steps(bench, "first")
    second, seconds = _five_steps(bench, "second")
    off = ((first - second).norm() / first.norm()).item()
    bench.check(
        "Are five training steps the same twice?",
        "to rounding; whether to the bit is open",
        "equal to the bit" if torch.equal(first, second) else f"off by {off:.2g} of the adapter's norm",
        off <= SAME_TRAINING,
    )
    try:
        torch.use_deterministic_algorithms(True)
        third, slower = _five_steps(bench, "third")
        fourth, _ = _five_steps(bench, "fourth")
        same = "equal to the bit" if torch.equal(third, fourth) else "NOT equal"
        seen = f"{same}, in {slower / seconds:.2f} times the time"
    except RuntimeError as error:
        seen = f"refused: {str(error).splitlines()[0][:150]}"
    finally:
        torch.use_deterministic_algorithms(False)
    bench.check("What does PyTorch's deterministic mode give?", "open", seen, None)


def _five_steps(bench: Bench, name: str) -> tuple[torch.Tensor, float]:
    policy = bench.policy("qwen2.5-0.5b")
    fitted, groups = _fit(bench, policy, f"repeat-{name}", max_steps=5, num_pairs=40)
    return adapter_of(policy.model), groups / fitted.groups_per_s


def _fit(
    bench: Bench, policy: Policy, work: str, *, max_steps: int, num_pairs: int, **settings: Any
) -> tuple[Any, int]:
    groups = bench.pairs(policy, num_pairs)
    objective = PairObjective(TrainParams(), {group.id: [-50.0, -60.0] for group in groups})
    fitted = train(policy, objective, groups, Path(work), bench.runtime(), max_steps=max_steps, **settings)
    return fitted, max_steps * min(8, len(groups))


# --- optimizers and processes -------------------------------------------------------------


def optimizer(bench: Bench) -> None:
    """The paged optimizer of bitsandbytes with a kill between its steps, and a process group of one."""
    name = "paged_adamw_8bit" if bench.on_gpu else "adamw"
    settings = {"optimizer": name, "max_steps": 4, "num_pairs": 32}
    whole = bench.policy("qwen2.5-0.5b")
    _fit(bench, whole, "paged-whole", **settings)
    killed = bench.policy("qwen2.5-0.5b")
    killed.reporter.on_advance = lambda done: signal.raise_signal(signal.SIGINT) if done == 2 else None
    with contextlib.suppress(Interrupted):
        _fit(bench, killed, "paged-killed", **settings)
    resumed = bench.policy("qwen2.5-0.5b")
    _fit(bench, resumed, "paged-killed", **settings)
    ends = [adapter_of(policy.model) for policy in (whole, resumed)]
    off = ((ends[0] - ends[1]).norm() / ends[0].norm()).item()
    went_on = "checkpoint-2" in resumed.reporter.last("going on from")
    bench.check(
        "Does paged_adamw_8bit go on from a checkpoint?",
        f"from step 2; off by at most {SAME_TRAINING:g}",
        f"{'from step 2' if went_on else 'BEGAN ANEW'}; {name}, off by {off:.2g}",
        went_on and off <= SAME_TRAINING,
    )
    backend = "nccl" if bench.on_gpu else "gloo"
    done = subprocess.run([sys.executable, "-c", _ONE_PROCESS, backend], cwd=ROOT, capture_output=True, text=True)
    said = (done.stdout + done.stderr).strip().splitlines() or ["nothing"]
    bench.check("Does a process group of one sum?", "yes", f"{backend}: {said[-1]}", said[-1] == "3.0")


_ONE_PROCESS = """
import sys, torch, torch.distributed as dist
dist.init_process_group(sys.argv[1], store=dist.HashStore(), rank=0, world_size=1)
tensor = torch.full((1,), 3.0, device="cuda" if sys.argv[1] == "nccl" else "cpu")
dist.all_reduce(tensor)
print(tensor.item())
dist.destroy_process_group()
"""
