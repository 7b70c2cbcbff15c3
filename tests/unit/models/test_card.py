"""The code on a model card gives the very model that was trained, and merging is what it says it is."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML

from dpo_cli.core.training_params import LoraParams
from dpo_cli.models import card
from dpo_cli.models.adapters import add_adapter, load_adapter, save_adapter
from dpo_cli.models.card import Card, usage
from dpo_cli.models.load import load_model

TOKENS = torch.tensor([[7, 300, 41, 99, 512, 23, 1000, 8]])


def code_of(card: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card, re.DOTALL)


def logps(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits.log_softmax(-1)


@pytest.mark.filterwarnings("ignore:Could not find a config file")
@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_the_code_loads_what_was_trained(
    tiny_folder: Path, cpu: Any, tokenizer: Any, tmp_path: Path, quantization: str
) -> None:
    trained = add_adapter(load_model(tiny_folder, cpu, quantization=quantization), LoraParams(r=4), 0).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.05)
    save_adapter(trained, tmp_path / "adapter", "tiny")
    tokenizer.save_pretrained(tmp_path / "adapter")
    names: dict[str, Any] = {
        "BASE_DIRECTORY": str(tiny_folder),
        "THIS_DIRECTORY": str(tmp_path / "adapter"),
        "MERGED_DIRECTORY": str(tmp_path / "merged"),
    }
    text = usage(tiny_folder, cpu, quantization, directory="BASE_DIRECTORY")
    loading, *merging = code_of(text)
    exec(loading, names)
    assert (logps(names["model"]) - logps(trained)).abs().max() < 1e-5
    assert names["tokenizer"].get_vocab() == tokenizer.get_vocab()
    assert bool(merging) == (quantization == "nf4")
    assert "`AutoPeftModelForCausalLM.from_pretrained(THIS_DIRECTORY)` does not find the base" in text
    if merging:
        plain = load_adapter(load_model(tiny_folder, cpu, quantization="none"), tmp_path / "adapter", trainable=False)
        assert (logps(plain.eval()) - logps(trained)).abs().max() > 1e-2, "the plain weights are another model"
        exec(merging[0], names)
        merged = load_model(tmp_path / "merged", cpu, quantization="none")
        assert (logps(merged) - logps(trained)).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["Qwen2.5-0.5B", "a: b # c", "x\n---\ny", "<b>", '"'])
def test_a_name_of_any_letters_stays_a_name(name: str, tiny_folder: Path, cpu: Any) -> None:
    project: Any = SimpleNamespace(
        sft=SimpleNamespace(method="qlora"), base=tiny_folder, machine=cpu, quantization="none"
    )
    head = card._card_text(Card(["dpo", "lora"], "# Title", []), project, name, "dpo.json").split("---\n")
    assert head[0] == ""
    found = YAML(typ="safe").load(head[1])
    assert found["tags"] == ["dpo", "lora"]
    assert found["base_model"] == name.replace("\n", "\\n")
