"""``dpo-cli bench``: what it counts, what it prints, and that it leaves the project alone."""

from __future__ import annotations

import json
import mmap
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from dpo_cli.cli.app import app
from dpo_cli.core.errors import MachineError
from dpo_cli.core.training_params import LoraParams
from dpo_cli.data.tokens import TokenGroup
from dpo_cli.models.adapters import add_adapter
from dpo_cli.models.device import Machine, forget_peak_memory, peak_memory_bytes
from dpo_cli.models.shapes import REGIMES, SHAPES, random_model, random_pairs
from dpo_cli.scoring.limits import Sizes, Work, least_bytes, least_operations
from tests.live_memory import LiveMemory

CPU = Machine(torch.device("cpu"), torch.float32)
SMALL = ["bench", "--shape", "tiny", "--pairs", "3", "--turns", "1"]


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def test_both_passes_are_measured_and_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*SMALL, "--regime", "harmless", "--json")
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout.strip().splitlines()[-1])
    assert figures["layout"] == "shared"
    assert figures["attention"] == "PyTorch's flash kernel for the CPU"
    assert (figures["attention_refused"], figures["head"]) == ({}, "linear")
    assert figures["quantization"] == "nf4"
    for name in ("precompute_ref", "train"):
        found = figures[name]
        assert 0 < found["mfu"] < 1.5
        assert found["padding_share"] == 0
        assert found["logical_tokens_per_s"] > found["packed_tokens_per_s"] > found["pairs_per_s"] > 0
        assert found["peak_bytes"] > found["least_bytes"] > 0
    assert figures["train"]["least_operations"] > figures["precompute_ref"]["least_operations"]
    assert {path.name for path in tmp_path.iterdir()} <= {".scratch"}


def test_one_pass_alone_as_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*SMALL, "--pass", "train", "--set", "runtime.layout=padded")
    assert result.exit_code == 0, result.output
    assert "bench: train" in result.stdout
    assert "precompute-ref" not in result.stdout
    assert "layout padded (forced" in result.stderr
    assert "the model's own sdpa" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["bench", "--shape", "huge"], 3, "--shape must be one of tiny"),
        (["bench", "--shape", "tiny", "--regime", "long"], 3, "--regime must be one of harmless"),
        (["bench", "--shape", "tiny", "--pass", "sft"], 3, "--pass must be one of precompute-ref, train"),
        (["bench", "--shape", "tiny", "--set", "runtime.layout=dense"], 3, "runtime.layout"),
        (["bench", "--shape", "tiny", "--set", "runtime.recompute=layers", "--pass", "precompute-ref"], 3, "no effect"),
        (["bench", "--shape", "tiny", "--set", "train.beta=0.5"], 3, "train.beta=0.5 has no effect"),
        (["bench", "--shape", "tiny", "--set", "model.name=mine"], 3, "model.name=mine has no effect"),
        (["bench", "--shape", "tiny", "--set", "runtime.workers=2"], 3, "runtime.workers=2 has no effect"),
        (["bench", "--shape", "tiny", "--set", "runtime.layuot=shared"], 3, "did you mean runtime.layout?"),
        (["bench"], 3, "params.yaml is missing"),
        (["bench", "--card", "rtx-9999", "--shape", "tiny"], 3, "--card must be one of t4"),
        (["bench", "--card", "rtx-4090"], 3, "name its --shape"),
        (["bench", "--card", "rtx-4090", "--shape", "tiny", "--turns", "3"], 3, "--turns has no effect"),
    ],
)
def test_bad_options_are_one_line(
    arguments: list[str], code: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == code, result.output
    assert said in result.stderr


# --- limits -------------------------------------------------------------------------------


def test_sizes_of_a_small_llama_are_those_of_its_shape() -> None:
    """A layer: 4 * 256 * 256 for attention, 3 * 256 * 768 for the rest; rank 16 adds 16 (I + O) to each product."""
    model = add_adapter(random_model("tiny", CPU, "none"), LoraParams(r=16), 0)
    sizes = Sizes.of(model, torch.float32)
    assert sizes.layer_weights == 4 * (4 * 256 * 256 + 3 * 256 * 768)
    assert sizes.adapter_weights == 4 * 16 * (4 * 512 + 3 * 1024)
    assert sizes.head_weights == 1024 * 256
    assert (sizes.num_layers, sizes.attention_width) == (4, 256)
    norms = (2 * 4 + 1) * 256
    assert sizes.weight_bytes == 4 * (sizes.layer_weights + 2 * sizes.head_weights + norms)


def test_4_bit_weights_are_counted_whole_and_weigh_half_a_byte() -> None:
    plain, quantized = (Sizes.of(random_model("tiny", CPU, kind), torch.float32) for kind in ("none", "nf4"))
    assert quantized.layer_weights == plain.layer_weights
    assert quantized.weight_bytes < plain.weight_bytes - 3 * plain.layer_weights


def test_work_and_operations_by_hand() -> None:
    """A prompt of 3 with answers of 2 and 4: 3 + 1 + 3 tokens go through, 6 are scored.

    They see 1, 2, 3 of the prompt, 4 in the first answer and 4, 5, 6 in the second: 25 pairs.
    """
    group = TokenGroup("a", "a", (1, 2, 3), ((4, 5), (6, 7, 8, 9)))
    work = Work.of([[group]], "shared")
    assert (work.tokens, work.scored, work.visible, work.padding) == (7, 6, 25, 0)
    assert work.logical_tokens == (3 + 2) + (3 + 4)
    padded = Work.of([[group]], "padded")
    assert (padded.tokens, padded.padding, padded.visible) == (12, 2, 10 + 21)
    sizes = Sizes(100, 10, 50, 2, 8, 8, 1000, 4)
    attention = 4 * 2 * 8 * 25
    assert least_operations(sizes, work, train=True) == 7 * (400 + 60) + 4 * 50 * 6 + 3.5 * attention
    assert least_operations(sizes, work, train=False) == 7 * (200 + 20) + 2 * 50 * 6 + attention
    assert least_bytes(sizes, work, 64, train=True) == 1000 + 160 + 7 * 32 * 27 + 2 * 6 * 32 + 64


# --- regimes and shapes -------------------------------------------------------------------


@pytest.mark.parametrize("name", REGIMES)
def test_lengths_of_a_regime_have_the_means_that_it_names(name: str) -> None:
    pairs = random_pairs(name, 2000, 500)
    assert pairs == random_pairs(name, 2000, 500)
    assert pairs != random_pairs(name, 2000, 500, seed=1)
    regime = REGIMES[name]
    wanted = {"prompt": regime.prompt, "chosen": regime.chosen, "rejected": regime.rejected}
    for part, lengths in {
        "prompt": [len(pair.prompt) for pair in pairs],
        "chosen": [len(pair.completions[0]) for pair in pairs],
        "rejected": [len(pair.completions[1]) for pair in pairs],
    }.items():
        assert sum(lengths) / len(lengths) == pytest.approx(wanted[part], rel=0.06)


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_is_a_configuration_that_transformers_takes(name: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = dict(SHAPES[name])
    config = AutoConfig.for_model(shape.pop("model_type"), **shape)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    billions = sum(parameter.numel() for parameter in model.parameters()) / 1e9
    named = {"tiny": 0.0039, "qwen2.5-0.5b": 0.494, "qwen2.5-1.5b": 1.54, "llama-3.2-3b": 3.21, "llama-3.1-8b": 8.03}
    assert billions == pytest.approx(named[name], rel=0.01)


def test_a_quantized_shape_computes_in_4_bit_what_the_plain_one_does_nearly() -> None:
    plain, quantized = random_model("tiny", CPU, "none"), random_model("tiny", CPU, "nf4")
    tokens = torch.arange(1, 30)[None]
    with torch.no_grad():
        exact, rough = plain(input_ids=tokens).logits, quantized(input_ids=tokens).logits
    assert 1e-3 < ((rough - exact).norm() / exact.norm()).item() < 0.3
    assert not any(parameter.requires_grad for parameter in quantized.parameters())


def num_bytes(model: Any) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def test_a_shape_is_quantized_layer_by_layer() -> None:
    """So that one of 8B fits where it is trained: its plain weights would take 16 GB."""
    plain = num_bytes(random_model("tiny", CPU, "none"))
    with LiveMemory() as memory:
        model = random_model("tiny", CPU, "nf4")
    assert memory.peak <= num_bytes(model) + plain / 8
    assert memory.peak < plain


def test_a_shape_that_does_not_fit_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(torch, "empty_like", full)
    with pytest.raises(MachineError, match="a model of the shape tiny does not fit into the memory of cpu"):
        random_model("tiny", CPU, "nf4")


def test_the_peak_of_memory_is_counted_from_where_it_is_forgotten() -> None:
    """With pages that are new: what an allocator gives again lies in memory already."""
    device, size = torch.device("cpu"), 160 << 20

    def fill() -> mmap.mmap:
        held = mmap.mmap(-1, size)
        for place in range(0, size, mmap.PAGESIZE):
            held[place] = 1
        return held

    fill().close()
    forget_peak_memory(device)
    base = peak_memory_bytes(device)
    held = fill()
    assert peak_memory_bytes(device) - base > 0.9 * size
    held.close()
