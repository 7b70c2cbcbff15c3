"""Models of known shapes with random weights, to measure speed and memory without a download."""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes.nn.modules import Linear4bit, Params4bit
from transformers import AutoConfig, AutoModelForCausalLM

from dpo_cli.models.device import Machine
from dpo_cli.models.load import keep_weights_unpacked

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "model_type": "llama",
        "vocab_size": 1024,
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    },
    "qwen2.5-0.5b": {
        "model_type": "qwen2",
        "vocab_size": 151936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
    },
    "qwen2.5-1.5b": {
        "model_type": "qwen2",
        "vocab_size": 151936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
    },
    "llama-3.2-3b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
    },
    "llama-3.1-8b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
    },
}
"""Configurations by name; what is not said is the family's default."""


def random_model(name: str, machine: Machine, quantization: str) -> Any:
    """A frozen model of a known shape in eval mode, the same for the same name.

    Args:
        name: One of :data:`SHAPES`.
        machine: Device and compute dtype.
        quantization: ``nf4`` or ``none``.
    """
    shape = dict(SHAPES[name])
    config = AutoConfig.for_model(shape.pop("model_type"), **shape)
    torch.manual_seed(0)
    with torch.device(machine.device):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=machine.compute_dtype)
    model.requires_grad_(False)
    if quantization == "nf4":
        _quantise(model, machine)
        keep_weights_unpacked(model)
    return model.eval()


def _quantise(model: Any, machine: Machine) -> None:
    """Put 4-bit layers in place of all linear ones but the head, one by one."""
    head = model.get_output_embeddings()
    params4bit: Any = Params4bit
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is torch.nn.Linear and child is not head:
                layer: Any = Linear4bit(
                    child.in_features,
                    child.out_features,
                    bias=False,
                    compute_dtype=machine.compute_dtype,
                    compress_statistics=True,
                    quant_type="nf4",
                    device="meta",
                )
                quantized: Any = params4bit(
                    child.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4", module=layer
                )
                layer.weight, layer.bias = quantized.to(machine.device), child.bias
                setattr(module, name, layer)
    model.is_loaded_in_4bit = True
