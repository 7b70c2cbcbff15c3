"""What vLLM would say of an adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dpo_cli.exporting.vllm import problems_for_vllm, vllm_command

CONFIG = {"r": 24, "lora_alpha": 32, "target_modules": ["q_proj"], "bias": "none", "modules_to_save": None}


def write(
    folder: Path, config: dict[str, Any], layer: str = "base_model.model.model.layers.0.self_attn.q_proj"
) -> Path:
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file({f"{layer}.lora_{side}.weight": torch.zeros(2, 2) for side in "AB"}, folder / "adapter_model.safetensors")
    return folder


def test_one_that_it_serves(tmp_path: Path) -> None:
    write(tmp_path, CONFIG)
    assert problems_for_vllm(tmp_path) == []
    assert "--max-lora-rank 32 " in vllm_command(tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"r": 1024}, "its rank is 1024"),
        ({"modules_to_save": ["lm_head"]}, 'modules_to_save is ["lm_head"]'),
        ({"use_dora": True}, "DoRA"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern is set"),
    ],
)
def test_what_it_refuses(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    (problem,) = problems_for_vllm(write(tmp_path, CONFIG | changes))
    assert words in problem


def test_names_that_it_does_not_know(tmp_path: Path) -> None:
    found = problems_for_vllm(write(tmp_path, CONFIG, "base_model.model.language_model.layers.0.router"))
    assert len(found) == 2
    assert "it adapts router" in found[0]
