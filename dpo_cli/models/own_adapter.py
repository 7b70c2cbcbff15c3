"""A LoRA adapter of the user's own in place of SFT's: checked against the base model, and copied."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from dpo_cli.core.artifacts import write_json
from dpo_cli.core.errors import MachineError
from dpo_cli.core.text import shown
from dpo_cli.models.adapters import ADAPTER_FILES, adaptable_layers, adapter_size
from dpo_cli.models.folder import read_object, read_tensors, refuse_not_finite
from dpo_cli.models.load import in_words, load_config

_CONFIG, _WEIGHTS = ADAPTER_FILES
_WHOLE = ("modules_to_save", "trainable_token_indices", "target_parameters", "layer_replication")
"""Settings of PEFT with which an adapter is more than two matrices beside some layers."""
_CHANGING_STARTS = ("pissa", "olora", "corda", "loftq")
"""Starts of adapters that change the base weights, too."""


def copy_adapter(source: Path, base: Path, built: Path, base_name: str) -> dict[str, Any]:
    """Copy an adapter in PEFT's layout, if it is LoRA and of the base model's shape.

    Args:
        source: Its folder.
        base: Directory of the base model.
        built: Folder to copy it to.
        base_name: The base model's name, which stands in the copy in place of a path.

    Returns:
        How much it trains, as metrics.

    Raises:
        MachineError: It is no plain LoRA adapter, does not fit the model, or holds NaN.
    """
    raw = read_object(source / _CONFIG)
    _refuse_other_kinds(source, raw)
    tensors = read_tensors([source / _WEIGHTS])
    expected, size = _expected(source, base)
    for name in sorted({*expected, *tensors}):
        shape = list(tensors[name].shape) if name in tensors else None
        if shape != expected.get(name):
            has = f"has {shape}" if shape is not None else "lacks it"
            asks = f"asks for {expected[name]}" if name in expected else "has no place for it"
            raise MachineError(
                f"{source / _WEIGHTS}: {name}: the adapter {has}, and the base model with {_CONFIG} {asks}; it is of"
                " another model or damaged"
            )
    refuse_not_finite([source / _WEIGHTS], tensors, lambda _: None)
    built.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source / _WEIGHTS, built / _WEIGHTS)
    write_json(built / _CONFIG, raw | {"base_model_name_or_path": base_name, "inference_mode": True})
    return size


def _refuse_other_kinds(source: Path, raw: dict[str, Any]) -> None:
    path = source / _CONFIG
    if raw.get("peft_type") != "LORA":
        raise MachineError(f"{path}: peft_type is {shown(raw.get('peft_type'))}; only LORA can be gone on with")
    if raw.get("task_type") not in (None, "CAUSAL_LM"):
        raise MachineError(f"{path}: task_type is {shown(raw['task_type'])}, not CAUSAL_LM")
    for name in _WHOLE:
        if raw.get(name):
            raise MachineError(
                f"{path}: {name} is set: the adapter holds more than LoRA; merge it into its base, and give the result"
                " as runtime.model_path"
            )
    if raw.get("bias", "none") != "none":
        raise MachineError(f"{path}: bias is {shown(raw['bias'])}: only none can be gone on with; merge the adapter")
    start = raw.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_CHANGING_STARTS):
        raise MachineError(
            f"{path}: init_lora_weights is {shown(start)}, which changed the base weights as well; convert it to plain"
            " LoRA with PEFT (path_initial_model_for_weight_conversion)"
        )


def _expected(source: Path, base: Path) -> tuple[dict[str, list[int]], dict[str, Any]]:
    """Shapes of the tensors that an adapter of this configuration has on the base model; built on no device."""
    import torch
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
    from transformers import AutoModelForCausalLM

    with in_words(f"{source / _CONFIG} does not go with the base model"):
        config: Any = LoraConfig.from_pretrained(str(source))
        config.inference_mode, config.base_model_name_or_path = False, None
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(load_config(base))
        _, tied = adaptable_layers(model)
        adapted: Any = get_peft_model(model, config, low_cpu_mem_usage=True)
        if shared := sorted({*adapted.base_model.targeted_module_names} & {*tied}):
            raise MachineError(
                f"{source / _CONFIG}: it adapts {shared[0]}, which shares its weights with another layer; merging would"
                " change both"
            )
        state = get_peft_model_state_dict(adapted, save_embedding_layers=False)
        return {name: list(tensor.shape) for name, tensor in state.items()}, adapter_size(adapted)
