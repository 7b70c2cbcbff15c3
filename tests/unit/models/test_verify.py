"""Verification of a model directory: each fault is one line that names file, tensor or token."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from transformers import (
    AutoTokenizer,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

from dpo_cli.core.errors import MachineError
from dpo_cli.core.params import ModelParams
from dpo_cli.models.verify import verify_model_folder, verify_numbers


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may change."""
    return shutil.copytree(tiny_folder, tmp_path / "model")


def refusal(folder: Path) -> str:
    """The one line with which a directory is refused."""
    with pytest.raises(MachineError) as caught:
        verify_model_folder(folder)
    (line,) = caught.value.problems
    assert "\n" not in line
    assert str(folder) in line
    return line.removeprefix(str(folder))


def configure(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_whole_model_passes_and_says_what_it_is(folder: Path, tokenizer: Any) -> None:
    found = verify_model_folder(folder)
    assert found.weights.facts.num_rows == len(tokenizer)
    assert found.weights.facts.context_length == 256
    assert "model.layers.*.self_attn.q_proj" in found.weights.facts.layers
    assert found.weights.facts.tied_layers == ["lm_head", "model.embed_tokens"]
    assert found.notes == ()


# --- config.json --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_attention_heads": 0}, "num_attention_heads must be a whole number > 0, got 0"),
        ({"hidden_size": "64"}, "hidden_size must be a whole number > 0, got '64'"),
        ({"num_hidden_layers": [2]}, "num_hidden_layers must be a whole number > 0, got [2]"),
        ({"num_hidden_layers": True}, "num_hidden_layers must be a whole number > 0, got True"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, but the weights are 20 tensors"),
        ({"num_labels": 10**9}, "num_labels is 1000000000, but the weights are 20 tensors"),
        ({"head_dim": 10**12}, "head_dim is 1000000000000, but the weights"),
        (
            {"vocab_size": 1500},
            "embed_tokens.weight has the shape [1575, 64], and config.json asks for [1500, 64]",
        ),
        ({"num_hidden_layers": 3}, "the weights lack model.layers.2."),
        ({"num_hidden_layers": 1}, "the weights hold model.layers.1."),
        ({"rope_parameters": 3}, "config.json cannot be used"),
        ({"quantization_config": {"quant_method": "gptq"}}, "the weights are quantized already (gptq)"),
    ],
)
def test_a_configuration_that_cannot_be_true_is_named(folder: Path, changes: dict[str, Any], named: str) -> None:
    configure(folder, **changes)
    begun = time.monotonic()
    assert named in refusal(folder)
    assert time.monotonic() - begun < 5


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("{half", "is not JSON"),
        ("[" * 100_000, "is nested too deeply"),
        ('{"model_type": ' + "[" * 900 + "]" * 900 + "}", "config.json cannot be used"),
        ("[1]", "must hold a JSON object, got a list"),
        ("\udcff", "is not UTF-8 text (byte 0)"),
    ],
)
def test_a_configuration_of_garbage_is_named(folder: Path, text: str, named: str) -> None:
    (folder / "config.json").write_text(text, encoding="utf-8", errors="surrogateescape")
    assert named in refusal(folder)


def test_models_of_other_kinds_are_named_with_a_way_out(tmp_path: Path) -> None:
    text = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 16,
    }
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(text_config=text | {"vocab_size": 64, "num_key_value_heads": 1}, vision_config=vision)
    Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path / "both")
    assert "gemma3 holds more than a language model" in (line := refusal(tmp_path / "both"))
    assert line.endswith("take its text part with: dpo-cli model import SOURCE --out DIR")
    small = T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(small).save_pretrained(tmp_path / "pair")
    assert "t5 is an encoder-decoder" in refusal(tmp_path / "pair")


# --- weights ------------------------------------------------------------------------------


def test_a_missing_tensor_is_named(folder: Path) -> None:
    change_weights(folder, lambda weights: weights.pop("model.norm.weight"))
    assert "the weights lack model.norm.weight (1 missing in all)" in refusal(folder)


def test_a_tensor_that_nothing_reads_is_noted(folder: Path) -> None:
    change_weights(folder, lambda weights: weights.update({"score.weight": torch.zeros(1, 64)}))
    (note,) = verify_model_folder(folder).notes
    assert note.endswith("no part of the model and are not used: score.weight")


def test_weights_in_whole_numbers_are_refused(folder: Path) -> None:
    change_weights(folder, lambda weights: weights.update({"model.norm.weight": torch.ones(64, dtype=torch.int8)}))
    assert "model.norm.weight is of dtype I8; plain floats are needed" in refusal(folder)


def test_an_adapter_is_no_whole_model(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    assert "holds an adapter (adapter_config.json)" in refusal(folder)


@pytest.mark.parametrize(
    ("kind", "value"),
    [(torch.float32, torch.nan), (torch.bfloat16, torch.inf), (torch.float16, -torch.inf), (torch.bfloat16, torch.nan)],
)
def test_numbers_that_are_none_are_named_by_tensor(folder: Path, kind: torch.dtype, value: float) -> None:
    def spoil(weights: dict[str, torch.Tensor]) -> None:
        for name in weights:
            weights[name] = weights[name].to(kind)
        weights["model.layers.1.mlp.up_proj.weight"][-1, -1] = value

    heard: list[int] = []
    weights = folder / "model.safetensors"
    verify_numbers([weights], heard.append)
    assert sum(heard) == weights.stat().st_size
    change_weights(folder, spoil)
    with pytest.raises(MachineError, match=r"model.layers.1.mlp.up_proj.weight holds NaN or infinity; fetch"):
        verify_numbers([weights])


# --- the index ----------------------------------------------------------------------------


@pytest.fixture
def sharded(folder: Path) -> Path:
    """The model with an index; returns the index."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "one.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(weights, "one.safetensors")}))
    return index


def test_an_index_serves(sharded: Path) -> None:
    verify_model_folder(sharded.parent)


@pytest.mark.parametrize(
    ("entry", "named"),
    [
        ("../one.safetensors", "names the file '../one.safetensors', which is not in"),
        ("/etc/passwd", "names the file '/etc/passwd', which is not in"),
        ("two.safetensors", "names two.safetensors, which is missing"),
        (3, "must hold metadata, and under weight_map the file of each tensor"),
    ],
)
def test_an_index_that_leads_elsewhere_is_refused(sharded: Path, entry: Any, named: str) -> None:
    found = json.loads(sharded.read_text())
    found["weight_map"]["model.norm.weight"] = entry
    sharded.write_text(json.dumps(found))
    assert named in refusal(sharded.parent)


def test_an_index_that_names_a_tensor_too_many_is_refused(sharded: Path) -> None:
    found = json.loads(sharded.read_text())
    found["weight_map"]["no.such.weight"] = "one.safetensors"
    sharded.write_text(json.dumps(found))
    assert "has no tensor no.such.weight, which model.safetensors.index.json says is there" in refusal(sharded.parent)


# --- tokenizer and template ---------------------------------------------------------------


def test_a_tokenizer_larger_than_the_embedding_names_token_id_and_rows(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = len(tokenizer)
    tokenizer.add_tokens(["extra", "more"])
    tokenizer.save_pretrained(folder)
    line = refusal(folder)
    assert f"the tokenizer's 'extra' has the id {rows}, and the model's embedding has {rows} rows (2 such" in line


def test_a_special_token_without_a_row_is_noted_unless_something_makes_it(folder: Path) -> None:
    """Gemma's text models ship a token for images that they have no row for."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = len(tokenizer)
    tokenizer.add_tokens([AddedToken("<image>", special=True)], special_tokens=True)
    tokenizer.save_pretrained(folder)
    (note,) = verify_model_folder(folder).notes
    assert f"no row for the special token '<image>' (id {rows}, {rows} rows)" in note
    tokenizer.pad_token = "<image>"
    tokenizer.save_pretrained(folder)
    assert f"the tokenizer's '<image>' has the id {rows}" in refusal(folder)


@pytest.mark.parametrize(
    ("name", "text"),
    [("tokenizer.json", "[1]"), ("tokenizer_config.json", "{half"), ("generation_config.json", "\x00")],
)
def test_other_files_of_garbage_are_named(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)
    assert name in refusal(folder)


@pytest.mark.parametrize(
    "template",
    [
        "{% for",
        "{{ messages[7].content }}",
        "{{ raise_exception('no') }}",
        "no question",
        "{{ 5 + '' }}",
    ],
)
def test_a_template_that_renders_nothing_is_refused_with_the_way_out(folder: Path, template: str) -> None:
    (folder / "chat_template.jinja").write_text(template)
    refusal(folder)
    assert verify_model_folder(folder, ModelParams(name="own", chat_template="plain")).encoder.template.startswith(
        "{{ bos_token"
    )
