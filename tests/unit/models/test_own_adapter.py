"""An adapter of the user's own is copied as it is, or refused with the tensor or setting that does not fit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from dpo_cli.core.errors import MachineError, ParamsError
from dpo_cli.core.params import RuntimeParams
from dpo_cli.models.adapters import ADAPTER_FILES, load_adapter
from dpo_cli.models.folder import adapter_folder
from dpo_cli.models.load import load_model
from dpo_cli.models.verify import copy_adapter

Make = Callable[..., Any]

pytestmark = pytest.mark.filterwarnings("ignore:Could not find a config file")


def save(model: Any, folder: Path, **settings: Any) -> Path:
    """An adapter as PEFT saves it, without any code of ours."""
    config = LoraConfig(**({"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj", "v_proj"]} | settings))
    adapted = get_peft_model(model, config)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    adapted.save_pretrained(str(folder))
    return folder


@pytest.fixture
def source(tiny_folder: Path, cpu: Any, tmp_path: Path) -> Path:
    return save(load_model(tiny_folder, cpu, quantization="none"), tmp_path / "adapter")


def test_it_is_copied_as_it_is(source: Path, tiny_folder: Path, cpu: Any, tmp_path: Path) -> None:
    size = copy_adapter(source, tiny_folder, tmp_path / "built", "mine")
    assert size == {"num_adapted_layers": 4, "num_trained_parameters": 4 * 2 * ((64 + 64) + (64 + 32))}
    config, weights = ((tmp_path / "built" / name) for name in ADAPTER_FILES)
    assert weights.read_bytes() == (source / weights.name).read_bytes()
    assert json.loads(config.read_text())["base_model_name_or_path"] == "mine"
    base, tokens = load_model(tiny_folder, cpu, quantization="none"), torch.tensor([[5, 9, 44]])
    before = base(tokens).logits
    policy = load_adapter(base, tmp_path / "built", trainable=True)
    assert (policy(tokens).logits - before).abs().max() > 1e-3
    assert sum(parameter.requires_grad for parameter in policy.parameters()) == 8


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is set: the adapter holds more than LoRA"),
        ({"bias": "all"}, "bias is 'all': only none can be gone on with"),
        ({"target_modules": ["q_proj", "lm_head"]}, "it adapts lm_head, which shares its weights"),
        ({"task_type": "SEQ_CLS"}, "task_type is 'SEQ_CLS', not CAUSAL_LM"),
    ],
)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_adapters_that_are_more_than_lora_are_refused(
    tiny_folder: Path, cpu: Any, tmp_path: Path, settings: dict[str, Any], problem: str
) -> None:
    if settings.get("task_type") or settings.get("modules_to_save"):  # as PEFT would write it
        source = save(load_model(tiny_folder, cpu, quantization="none"), tmp_path / "adapter")
        path = source / ADAPTER_FILES[0]
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    else:
        source = save(load_model(tiny_folder, cpu, quantization="none"), tmp_path / "adapter", **settings)
    with pytest.raises(MachineError, match=problem):
        copy_adapter(source, tiny_folder, tmp_path / "built", "mine")
    assert not (tmp_path / "built").exists()


def test_an_adapter_of_another_model_is_named_by_its_tensor(
    make_llama: Make, tiny_folder: Path, tmp_path: Path
) -> None:
    source = save(make_llama(100, hidden_size=32, num_attention_heads=2), tmp_path / "small")
    with pytest.raises(
        MachineError, match=r"q_proj.lora_A.weight: the adapter has \[4, 32\], and the base .* \[4, 64\]"
    ):
        copy_adapter(source, tiny_folder, tmp_path / "built", "mine")
    source = save(make_llama(100, num_hidden_layers=3), tmp_path / "deep")
    with pytest.raises(MachineError, match=r"layers.2.*the adapter has .* has no place for it"):
        copy_adapter(source, tiny_folder, tmp_path / "built", "mine")


def test_what_is_missing_or_no_number_is_named(source: Path, tiny_folder: Path, tmp_path: Path) -> None:
    weights = load_file(source / ADAPTER_FILES[1])
    name = next(iter(weights))
    save_file(weights | {name: torch.full_like(weights[name], torch.nan)}, source / ADAPTER_FILES[1])
    with pytest.raises(MachineError, match="holds NaN or infinity"):
        copy_adapter(source, tiny_folder, tmp_path / "built", "mine")
    del weights[name]
    save_file(weights, source / ADAPTER_FILES[1])
    with pytest.raises(MachineError, match=f"{name}: the adapter lacks it"):
        copy_adapter(source, tiny_folder, tmp_path / "built", "mine")


@pytest.mark.parametrize("content", ["[]", "{half", '{"peft_type": "IA3"}', '{"peft_type": "LORA", "r": "x"}'])
def test_a_configuration_of_garbage_is_one_line(source: Path, tiny_folder: Path, tmp_path: Path, content: str) -> None:
    (source / ADAPTER_FILES[0]).write_text(content)
    with pytest.raises(MachineError, match=r"adapter_config.json") as caught:
        copy_adapter(source, tiny_folder, tmp_path / "built", "mine")
    assert len(str(caught.value).splitlines()) == 1


def test_the_directory_is_asked_for_and_looked_at(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ParamsError, match=r"sft.method adapter needs runtime.adapter_path \(or DPO_ADAPTER_PATH\)"):
        adapter_folder(RuntimeParams())
    monkeypatch.chdir(source.parent)
    assert adapter_folder(RuntimeParams(adapter_path="adapter")) == source.resolve()
    monkeypatch.setenv("DPO_ADAPTER_PATH", str(source.parent))
    with pytest.raises(MachineError, match=r"has no adapter_config.json: not an adapter as PEFT saves it"):
        adapter_folder(RuntimeParams(adapter_path="adapter"))
    monkeypatch.delenv("DPO_ADAPTER_PATH")
    shutil.move(source / ADAPTER_FILES[1], source / "adapter_model.bin")
    with pytest.raises(MachineError, match=r"has no adapter_model.safetensors: .*pickled weights can run code"):
        adapter_folder(RuntimeParams(adapter_path="adapter"))
