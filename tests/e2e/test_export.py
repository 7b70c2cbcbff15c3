"""``dpo-cli export`` on a small project: every form is what was trained, and a planted fault is refused by its name."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from dpo_cli.cli.app import app
from dpo_cli.core.load_params import load_params
from dpo_cli.exporting import llama_cpp
from dpo_cli.exporting.export import TARGETS, ExportOptions, judge, open_trained
from dpo_cli.exporting.targets import Trained
from dpo_cli.models.gguf_file import read_header

pytest.importorskip("gguf")
WHOLE = ("merged-nf4", "merged", "gguf-f16", "gguf-q8_0", "gguf-q4_0", "gguf-q4_1")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, train_tiny: Any) -> Path:
    """A project of a tiny model, tuned on nf4 weights; not to be changed."""
    folder = tmp_path_factory.mktemp("made")
    train_tiny(
        folder,
        {
            "sft.method": "lora",
            "train.learning_rate": 1e-2,
            "train.max_steps": 8,
            "train.beta": 0.5,
            "reference.quantization": "nf4",
            "evaluate.max_new_tokens": 8,
        },
    )
    return folder


@pytest.fixture
def project(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, which is the working directory."""
    folder = Path(shutil.copytree(made, tmp_path / "project"))
    monkeypatch.chdir(folder)
    return folder


def export(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["export", "--out", "out", *arguments])


def to(*names: str) -> list[str]:
    return [word for name in names for word in ("--to", name)]


def test_every_form_of_the_embedded_model_is_what_was_trained(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By llama.cpp where it is installed; the bounds are what each form's rounding leaves."""
    hidden = shutil.ignore_patterns(".dvc", ".git")
    monkeypatch.chdir(shutil.copytree(finished, tmp_path / "project", ignore=hidden))
    result = export(*to("adapter", *WHOLE, "gguf-lora"), "--for", "vllm", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    nats = {name: one["mean_nats"] for name, one in found["targets"].items()}
    assert nats["adapter"] < 1e-5 < nats["merged-nf4"] < 1e-3
    assert nats["gguf-f16"] < 1e-3 < nats["gguf-q8_0"] < 0.01 < nats["gguf-q4_1"] < 0.1
    assert nats["gguf-lora"] == pytest.approx(nats["merged"], abs=0.01), "both stand on the full-precision weights"
    for name, one in found["targets"].items():
        assert one["margin_kept"] == pytest.approx(1, abs=0.1)
        card = Path("out", name, "README.md").read_text(encoding="utf-8")
        assert f"{name} keeps {100 * one['margin_kept']:.0f}% [" in card
    assert found["recommended"].startswith("Take gguf-q")
    told = json.loads(Path("out/export.json").read_text(encoding="utf-8"))
    assert told["targets"] == found["targets"]
    if llama_cpp.is_there():
        assert {one["read_by"] for name, one in found["targets"].items() if "gguf" in name} == {"llama.cpp"}
    assert not list(Path("out").glob(".*"))
    again = export(*to("merged"))
    assert again.exit_code == 3
    assert "out/merged is there already" in again.stderr


def test_without_llama_cpp_files_are_read_back_and_it_is_said(project: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(llama_cpp, "is_there", lambda: False)
    result = export(*to("gguf-f16", "gguf-lora"), "--max-nats", "1", "--json")
    assert result.exit_code == 0, result.output
    assert "NOT CHECKED by llama.cpp" in result.stderr
    found = json.loads(result.stdout)["targets"]
    assert {one["read_by"] for one in found.values()} == {"dpo-cli"}
    assert found["gguf-f16"]["mean_nats"] < 2e-3


def test_k_quants_are_made_by_llama_quantize(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that only copies stands for it: what it is given is the file in F16."""
    quantizer = Path("bin/llama-quantize")
    quantizer.parent.mkdir()
    quantizer.write_text('#!/bin/sh\necho "to $3"\n[ "$3" = Q6_K ] && cp "$1" "$2"\n', encoding="utf-8")
    quantizer.chmod(0o755)
    monkeypatch.setenv("PATH", str(quantizer.parent.resolve()), prepend=os.pathsep)
    result = export(*to("gguf-q6_k", "gguf-q4_k_m"), "--json")
    found = json.loads(result.stdout)["targets"]
    assert found["gguf-q6_k"]["mean_nats"] < 2e-3
    assert result.exit_code == 6
    assert "gguf-q4_k_m is refused: llama-quantize failed" in result.stderr
    assert Path("out/gguf-q6_k/tiny-Q6_K.gguf").is_file()


def test_after_full_sft_on_plain_weights_with_another_scale(
    tmp_path: Path, train_tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The adapter stands on models/sft, and rsLoRA's factor is not alpha / rank."""
    settings = {"sft.method": "full", "train.lora": {"rslora": True}, "train.learning_rate": 3e-3, "train.beta": 0.5}
    train_tiny(tmp_path, settings | {"evaluate.max_new_tokens": 8})
    monkeypatch.chdir(tmp_path)
    assert "--to merged-nf4 has no effect" in export(*to("merged-nf4")).stderr
    result = export("--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)["targets"]
    assert list(found) == ["adapter", "merged"]
    assert "the whole model in models/sft" in found["adapter"]["what"]
    result = export(*to("gguf-f16", "gguf-lora"), "--json")
    found |= json.loads(result.stdout)["targets"]
    assert result.exit_code == 0, result.output
    assert max(one["mean_nats"] for one in found.values()) < 3e-3


def test_one_that_is_too_far_is_refused_and_the_others_are_kept(project: Path) -> None:
    result = export(*to("merged-nf4", "merged"), "--max-nats", "0.01")
    assert result.exit_code == 6
    assert "merged is refused: its log-probabilities are" in " ".join(result.stderr.split())
    assert [path.name for path in sorted(Path("out").iterdir())] == ["export.json", "merged-nf4"]
    told = json.loads(Path("out/export.json").read_text(encoding="utf-8"))["targets"]
    assert (told["merged"]["done"], told["merged-nf4"]["done"]) == (False, True)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (to("gguf-q9"), 3, "--to gguf-q9 is not known; there are adapter, merged-nf4"),
        (to("gguf-q4_k_m"), 6, "no llama-quantize is on the PATH"),
        ([*to("gguf-f16"), "--dtype", "float16"], 3, "--dtype has no effect"),
        ([*to("merged"), "--for", "vllm"], 3, "--for vllm has no effect"),
        (["--for", "tgi"], 3, "--for must be vllm"),
        (["--set", "train.beta=1"], 3, "has no effect on export"),
    ],
)
def test_errors_are_one_line(
    arguments: list[str], code: int, words: str, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(made)
    monkeypatch.setenv("PATH", "/nowhere")
    result = export(*arguments)
    assert (result.exit_code, words in result.stderr) == (code, True), result.stderr


def test_an_adapter_is_not_exported_from_another_base(project: Path, tokenizer: Any, make_llama: Any) -> None:
    make_llama(len(tokenizer), seed=1).save_pretrained("other")
    tokenizer.save_pretrained("other")
    result = export("--set", "runtime.model_path=other")
    assert result.exit_code == 5
    assert "has changed since the model was locked" in result.stderr


# --- planted faults ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(made: Path, tmp_path_factory: pytest.TempPathFactory, make_reporter: Any) -> Iterator[Trained]:
    folder = Path(shutil.copytree(made, tmp_path_factory.mktemp("faults") / "project"))
    with contextlib.chdir(folder):
        params = load_params(Path("params.yaml"))
        with open_trained(ExportOptions(), params, make_reporter()) as opened:
            yield opened


def edit(path: Path, change: Callable[[str], str]) -> None:
    text = path.read_text(encoding="utf-8")
    assert change(text) != text
    path.write_text(change(text), encoding="utf-8")


def double_alpha(folder: Path) -> None:
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    config["lora_alpha"] *= 2
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")


def transpose(folder: Path) -> None:
    """A square matrix of the merged model."""
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file(weights | {name: weights[name].T.contiguous()}, folder / "model.safetensors", {"format": "pt"})


def rewrite(folder: Path, name: str, change: Callable[[np.ndarray], np.ndarray], kind: str = "<f2") -> None:
    """A tensor of a GGUF file."""
    (path,) = folder.glob("*.gguf")
    tensor = next(each for each in read_header(path).tensors if each.name == name)
    values = np.fromfile(path, kind, tensor.num_elements, offset=tensor.offset).reshape(tensor.shape)
    with path.open("r+b") as file:
        file.seek(tensor.offset)
        file.write(np.ascontiguousarray(change(values)).tobytes())


def another_end(folder: Path) -> None:
    """The header's end token is another one."""
    import struct

    (path,) = folder.glob("*.gguf")
    data = path.read_bytes()
    key = b"tokenizer.ggml.eos_token_id" + struct.pack("<I", 4)
    at = data.index(key) + len(key)
    path.write_bytes(data[:at] + struct.pack("<I", 7) + data[at + 4 :])


FAULTS: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "wrong template": (
        "gguf-f16",
        lambda folder: edit(folder / "Modelfile", lambda text: text.replace("<|assistant|>", "<|user|>")),
        "the Modelfile's TEMPLATE is another than the tokenizer's",
    ),
    "end token lost, Modelfile": (
        "gguf-f16",
        lambda folder: edit(folder / "Modelfile", lambda text: text.replace("PARAMETER stop", "# stop")),
        "the end token is lost: the Modelfile has no PARAMETER stop '<|end|>'",
    ),
    "end token lost, GGUF": ("gguf-f16", another_end, "the end token is lost: the file's eos_token_id is 7"),
    "weights transposed, GGUF": (
        "gguf-f16",
        lambda folder: rewrite(folder, "blk.1.attn_output.weight", lambda values: values.T),
        "model.layers.1.self_attn.o_proj.weight is transposed",
    ),
    "alpha doubled": ("adapter", double_alpha, "lora_alpha 64.0, and it was trained with 32.0"),
    "weights transposed": ("merged-nf4", transpose, "model.layers.0.self_attn.q_proj.weight is transposed"),
    "template, merged": (
        "merged-nf4",
        lambda folder: edit(folder / "chat_template.jinja", lambda text: text.replace("<|assistant|>", "<|user|>")),
        "the chat template or the tokenizer is another",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_refused_by_its_name(fault: str, trained: Trained, tmp_path: Path) -> None:
    name, plant, words = FAULTS[fault]
    target = TARGETS[name](trained, name)
    target.build(tmp_path)
    assert not judge(target, tmp_path, ExportOptions()).problems
    plant(tmp_path)
    problems = judge(target, tmp_path, ExportOptions()).problems
    assert any(words in problem for problem in problems), problems


def test_an_end_token_that_nothing_names_is_missed(trained: Trained, tmp_path: Path) -> None:
    target = TARGETS["merged-nf4"](trained, "merged-nf4")
    target.build(tmp_path)
    for name in ("generation_config.json", "config.json"):
        config = json.loads((tmp_path / name).read_text(encoding="utf-8"))
        (tmp_path / name).write_text(json.dumps(config | {"eos_token_id": 3}), encoding="utf-8")
    template = (tmp_path / "chat_template.jinja").read_text(encoding="utf-8")
    (tmp_path / "chat_template.jinja").write_text(template.replace("<|end|>", ""), encoding="utf-8")
    tokenizer = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer | {"eos_token": "<|pad|>"}), encoding="utf-8")
    problems = judge(target, tmp_path, ExportOptions()).problems
    assert any("the end token is lost" in problem and "'<|end|>'" in problem for problem in problems), problems


@pytest.mark.parametrize("name", ["merged-nf4", "gguf-f16", "gguf-lora"])
def test_an_adapter_that_counts_twice_is_named(name: str, trained: Trained, tmp_path: Path) -> None:
    twice = Path(shutil.copytree(trained.adapter, tmp_path / "twice"))
    double_alpha(twice)
    (tmp_path / "built").mkdir()
    TARGETS[name](replace(trained, adapter=twice), name).build(tmp_path / "built")
    problems = judge(TARGETS[name](trained, name), tmp_path / "built", ExportOptions()).problems
    assert any("the adapter counts 2 times instead of once" in problem for problem in problems), problems


def test_another_base_is_named(
    trained: Trained, tmp_path: Path, tokenizer: Any, make_llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Trained, "frozen", lambda self, *, rounded: make_llama(len(tokenizer), seed=1))
        (tmp_path / "built").mkdir()
        TARGETS["merged"](trained, "merged").build(tmp_path / "built")
    problems = judge(TARGETS["merged"](trained, "merged"), tmp_path / "built", ExportOptions()).problems
    assert any("not what the adapter was trained on: another base" in problem for problem in problems), problems
