"""What is wrong with an export whose numbers are not those of the trained model: the faults that have names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from dpo_cli.models.adapters import POLICY

_ANOTHER = 0.5
"""Relative distance beyond which a matrix is another one: rounding to 4 bits moves a matrix by about 0.1."""
_NAMED = 3


def name_faults(found: Mapping[str, Any], frozen: Mapping[str, Any], deltas: Mapping[str, Any]) -> list[str]:
    """What the weights of a merged model show, one sentence each; empty where they are those that were trained.

    Args:
        found: The export's tensors by transformers' names.
        frozen: Those of the weights that the adapter was trained on.
        deltas: What the adapter adds, by the same names.
    """
    faults, others, turned = [], [], []
    overlap = size = error = 0.0
    for name, weight in frozen.items():
        if name not in found:
            faults.append(f"{name} is missing")
            continue
        delta = deltas.get(name)
        expected = _plain(weight) if delta is None else _plain(weight) + _plain(delta)
        now = _plain(found[name])
        if now.shape != expected.shape:
            faults.append(f"{name} has the shape {list(now.shape)}, not {list(expected.shape)}")
            continue
        if delta is not None:
            overlap += float((now - _plain(weight)).mul(_plain(delta)).sum())
            error += float((now - _plain(weight)).square().sum())
            size += float(_plain(delta).square().sum())
        scale = _ANOTHER * float(expected.norm())
        if float((now - expected).norm()) > scale:
            is_turned = now.ndim == 2 and now.shape[0] == now.shape[1] and float((now.T - expected).norm()) <= scale
            (turned if is_turned else others).append(name)
    faults += [f"{_named(turned)} transposed"] if turned else []
    faults += [f"{_named(others)} not what the adapter was trained on: another base"] if others else []
    share = overlap / size if size else 1.0
    # what is neither frozen weights nor adapter must be less than that: rounding to 4 bits has a share of its own
    is_telling = error - share * overlap < size * max(1.0, share * share)
    if not others and not turned and is_telling and abs(share - 1) > 0.25:
        faults.append(
            f"the adapter counts {share:.2g} times instead of once: its alpha or rank is not the one of its training"
        )
    return faults


def _named(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{', '.join(names[:_NAMED])}{more} {'is' if len(names) == 1 else 'are'}"


def _plain(tensor: Any) -> torch.Tensor:
    return tensor.detach().float().cpu()


def deltas_of(model: Any) -> dict[str, Any]:
    """What a PEFT model's LoRA adapter adds to each weight, by transformers' names."""
    from peft.tuners.lora import LoraLayer

    return {
        f"{name.removeprefix('base_model.model.')}.weight": module.get_delta_weight(POLICY)  # type: ignore[operator]
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }
