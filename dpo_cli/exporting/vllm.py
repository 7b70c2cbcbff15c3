"""Whether vLLM serves an adapter: what it reads of adapter_config.json and of the names of the tensors.

Source: vLLM's vllm/lora/peft_helper.py (PEFTHelper), vllm/config/lora.py (MaxLoRARanks), and the modules that its
models give an adapter (packed_modules_mapping and embedding_modules of vllm/model_executor/models).
"""

from __future__ import annotations

import json
from pathlib import Path

from dpo_cli.models.folder import ADAPTER_FILES, read_object, read_tensors

_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "qkv_proj", "gate_up_proj")
"""Linear layers of its dense decoders (Llama, Mistral, Qwen, Gemma, Phi-3)."""


def problems_for_vllm(folder: Path) -> list[str]:
    """Why vLLM would refuse an adapter, or load only a part of it; one sentence each."""
    config = read_object(folder / ADAPTER_FILES[0])
    found = []
    if not isinstance(config.get("r"), int) or config["r"] > _RANKS[-1]:
        found.append(f"its rank is {config.get('r')}, and vLLM's largest is {_RANKS[-1]} (--max-lora-rank)")
    for name in ("r", "lora_alpha", "target_modules"):
        if name not in config:
            found.append(f"{ADAPTER_FILES[0]} has no {name}, which vLLM asks for")
    if config.get("modules_to_save"):
        found.append(f"modules_to_save is {json.dumps(config['modules_to_save'])}; vLLM takes none")
    if config.get("use_dora"):
        found.append("it is DoRA, which vLLM does not load")
    if config.get("bias", "none") != "none":
        found.append(f"bias is {config['bias']!r}; vLLM takes none")
    for name in ("rank_pattern", "alpha_pattern"):
        if config.get(name):
            found.append(f"{name} is set, which vLLM does not read: it would scale those layers as all others")
    layers = {name.partition(".lora_")[0] for name in read_tensors([folder / ADAPTER_FILES[1]]) if ".lora_" in name}
    unknown = sorted({layer.rpartition(".")[2] for layer in layers} - set(_MODULES))
    if unknown:
        found.append(f"it adapts {', '.join(unknown)}, for which vLLM's models take no adapter")
    strange = sorted(layer for layer in layers if not layer.startswith("base_model.model.model."))
    if strange:
        found.append(f"its tensors are named {strange[0]}, not base_model.model.model.layers. and so on")
    return found


def vllm_command(folder: Path) -> str:
    """The command line that serves the adapter of a folder, wherever that lies."""
    rank = read_object(folder / ADAPTER_FILES[0])["r"]
    allowed = next(each for each in _RANKS if each >= rank)
    return f"vllm serve BASE_DIRECTORY --enable-lora --max-lora-rank {allowed} --lora-modules tuned=THIS_DIRECTORY"
