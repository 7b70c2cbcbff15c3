"""Optimizers and schedules by name, with the settings that transformers gives them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from dpo_cli.core.errors import MachineError
from dpo_cli.core.params import TrainingParams

_SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}
_NOT_DECAYED = re.compile(r"bias|layernorm|rmsnorm|(?:^|[._])norm(?:$|\.)")
_ADAM: dict[str, Any] = {"betas": (0.9, 0.999), "eps": 1e-8}


@dataclass(frozen=True)
class Descent:
    """How gradients become steps.

    Attributes:
        optimizer: Holds the trained parameters.
        schedule: Its learning rates.
        max_grad_norm: L2 norm to which gradients are clipped.
    """

    optimizer: torch.optim.Optimizer
    schedule: LRScheduler
    max_grad_norm: float


def make_descent(
    model: torch.nn.Module, params: TrainingParams, num_steps: int, device: torch.device, section: str
) -> Descent:
    """The optimizer that the settings name, over all trainable parameters, and its schedule.

    Args:
        model: Holds the parameters.
        params: Settings of the training.
        num_steps: Optimizer steps in all.
        device: Where the model is.
        section: Name of the stage, for messages.

    Raises:
        MachineError: The optimizer needs CUDA and there is none.
    """
    if params.optimizer == "paged_adamw_8bit" and device.type == "cpu":
        raise MachineError(f"{section}.optimizer paged_adamw_8bit needs CUDA; set it to adamw")
    optimizer = _optimizer(model, params)
    num_warmup = num_warmup_steps(params, num_steps)
    schedule = get_scheduler(_SCHEDULES[params.schedule], optimizer, num_warmup, num_steps)
    return Descent(optimizer, schedule, params.max_grad_norm)


def num_warmup_steps(params: TrainingParams, num_steps: int) -> int:
    """Steps, of so many in all, with a rising learning rate."""
    return round(params.warmup_ratio * num_steps)


def _optimizer(model: torch.nn.Module, params: TrainingParams) -> torch.optim.Optimizer:
    layer_norms = {id(own) for module in model.modules() if isinstance(module, torch.nn.LayerNorm)
                   for own in module.parameters()}  # fmt: skip
    groups: list[dict[str, Any]] = [{"params": [], "weight_decay": decay} for decay in (params.weight_decay, 0.0)]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_plain = id(parameter) in layer_norms or _NOT_DECAYED.search(name.lower()) is not None
            groups[is_plain]["params"].append(parameter)
    if params.optimizer == "rmsprop":
        return torch.optim.RMSprop(groups, lr=params.learning_rate)
    if params.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=params.learning_rate, **_ADAM)
    from bitsandbytes.optim.adamw import AdamW  # it looks for CUDA, which takes a second
    from bitsandbytes.optim.optimizer import GlobalOptimManager

    manager = GlobalOptimManager.get_instance()
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):  # whose gradients are too uneven for 8 bits
            manager.register_module_override(module, "weight", {"optim_bits": 32})
    return AdamW(groups, lr=params.learning_rate, **_ADAM, optim_bits=8, is_paged=True)
