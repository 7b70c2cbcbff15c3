"""Models without numbers on the dry device, as loading would leave them there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from bitsandbytes.functional import QuantState
from bitsandbytes.nn.modules import Linear4bit
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig
from transformers.integrations.bitsandbytes import replace_with_bnb_linear

from dpo_cli.core.params import LoraParams
from dpo_cli.dry_run.device import CUDA
from dpo_cli.kernels.fused import NORM, ROTATION, SWIGLU, install
from dpo_cli.models.adapters import add_adapter
from dpo_cli.models.device import Machine

_BLOCK, _BLOCKS = 64, 256
"""Weights that share a scale in nf4, and scales that share one under double quantization."""


def dry_model(shape: Mapping[str, Any], machine: Machine, quantization: str, lora: LoraParams | None) -> Any:
    """A frozen model with a trainable adapter, or without one where ``lora`` is None; call under ``dry_cuda``.

    Args:
        shape: ``model_type``, and what its configuration says.
        machine: The dry device and the compute dtype.
        quantization: ``nf4`` or ``none``.
        lora: The adapter's shape.
    """
    settings = dict(shape)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    with unset_fake_temporarily():
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config, dtype=machine.compute_dtype)
        if quantization == "nf4":
            _to_four_bits(model, machine.compute_dtype)
        model.requires_grad_(False)
        model.eval()
        install(model, [NORM, SWIGLU, ROTATION])
        if lora is not None:
            model = add_adapter(model, lora, 0)
    _put_on_device(model, machine.compute_dtype)
    return model


def _to_four_bits(model: Any, dtype: torch.dtype) -> None:
    """As transformers does it: 4-bit layers in place of all linear ones but the head."""
    head = model.get_output_embeddings()
    kept = [name for name, module in model.named_modules() if module is head]
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    replace_with_bnb_linear(model, modules_to_not_convert=kept, quantization_config=settings)
    model.is_loaded_in_4bit = True


def _put_on_device(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Put a tensor of the dry device in place of each of a model's; shared ones stay shared."""
    done: dict[int, torch.nn.Parameter] = {}
    meta = []  # so that no id is used twice
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            meta.append(parameter)
            if id(parameter) not in done:
                if isinstance(module, Linear4bit) and name == "weight":
                    done[id(parameter)] = _packed(module, dtype)
                else:
                    done[id(parameter)] = _plain(parameter)
            module._parameters[name] = done[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=CUDA)


def _plain(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
    data = torch.empty(parameter.shape, dtype=parameter.dtype, device=CUDA)
    return torch.nn.Parameter(data, requires_grad=parameter.requires_grad)


def _packed(layer: Any, dtype: torch.dtype) -> torch.nn.Parameter:
    """A 4-bit weight with its scales; bitsandbytes' own kind of parameter cannot be without numbers."""
    size = layer.in_features * layer.out_features
    num_scales = -(-size // _BLOCK)
    weight: Any = torch.nn.Parameter(
        torch.empty((size + 1) // 2, 1, dtype=torch.uint8, device=CUDA), requires_grad=False
    )
    scales_of_scales = QuantState(
        absmax=torch.empty(-(-num_scales // _BLOCKS), device=CUDA),
        code=torch.empty(256, device=CUDA),
        blocksize=_BLOCKS,
        dtype=torch.float32,
    )
    weight.quant_state = QuantState(
        absmax=torch.empty(num_scales, dtype=torch.uint8, device=CUDA),
        shape=torch.Size((layer.out_features, layer.in_features)),
        dtype=dtype,
        blocksize=_BLOCK,
        code=torch.empty(16, device=CUDA),
        quant_type="nf4",
        offset=torch.empty((), device=CUDA),
        state2=scales_of_scales,
    )
    layer.quant_state = weight.quant_state
    return weight
