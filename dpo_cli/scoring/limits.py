"""What a pass over some groups costs at the least: operations and bytes, to hold a measurement against.

Legend: T tokens through the model, T_l tokens that a trainer without sharing would score (2 P + C + R for
a pair), n scored tokens, N_q weights of the layers' products, N_lora weights of adapters,
H = vocabulary * hidden.

    operations of a step        4 N_q T + 6 N_lora T + 4 H n + 3.5 A
    of a reference pass         2 N_q T + 2 N_lora T + 2 H n + A
    attention                   A = 4 * layers * heads * head size * (query, key) pairs that see each other

A frozen weight costs 4 operations a token and not 6: it has no gradient of its own. The head costs
4 whether its gradient is taken in the forward pass or later. The last layer's MLP is counted on all
T tokens, though one row needs it on those alone that predict something (``attention.py``).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dpo_cli.data.tokens import TokenGroup
from dpo_cli.scoring.layout import LayoutName, lay_out

_WORTH_SAYING = 0.05
"""Share of a model's bytes from which on it is said that they are not in 4 bits."""


def causal_of(model: Any) -> Any:
    """The causal language model under an adapter; a model without one is that itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def is_in_4_bit(parameters: Iterable[torch.nn.Parameter]) -> bool:
    """Whether some of these parameters are held in 4 bits."""
    return any(getattr(parameter, "quant_state", None) is not None for parameter in parameters)


@dataclass(frozen=True)
class Sizes:
    """A model's sizes, as the formulas need them.

    Attributes:
        layer_weights: N_q, those of the products in the layers; of experts, those that a token visits.
        adapter_weights: N_lora.
        head_weights: H.
        num_layers: Layers.
        hidden_size: Numbers of a hidden state.
        attention_width: Heads times head size.
        weight_bytes: Bytes that all weights take now, adapters aside.
        number_bytes: Bytes of a number of the activations.
    """

    layer_weights: float
    adapter_weights: int
    head_weights: int
    num_layers: int
    hidden_size: int
    attention_width: int
    weight_bytes: int
    number_bytes: int

    @classmethod
    def of(cls, model: Any, compute_dtype: torch.dtype) -> Sizes:
        """Count a model."""
        causal = causal_of(model)
        config = causal.config.get_text_config()
        embeddings = {id(causal.get_input_embeddings().weight), id(causal.get_output_embeddings().weight)}
        experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
        visited = getattr(config, "num_experts_per_tok", 1) / experts if experts else 1.0
        layers, adapters, num_bytes = 0.0, 0, 0
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                adapters += parameter.numel()
                continue
            num_bytes += parameter.untyped_storage().nbytes()
            if id(parameter) not in embeddings:
                layers += num_product_weights(parameter) * (visited if "expert" in name else 1.0)
        heads = config.num_attention_heads
        head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
        return cls(
            layer_weights=layers,
            adapter_weights=adapters,
            head_weights=config.vocab_size * config.hidden_size,
            num_layers=config.num_hidden_layers,
            hidden_size=config.hidden_size,
            attention_width=heads * head_size,
            weight_bytes=num_bytes,
            number_bytes=compute_dtype.itemsize,
        )


def num_product_weights(parameter: torch.nn.Parameter) -> int:
    """Weights of a parameter that multiplies; norms and biases are vectors."""
    if (state := getattr(parameter, "quant_state", None)) is not None:
        return math.prod(state.shape)
    return parameter.numel() if parameter.ndim > 1 else 0


def left_unquantized(model: Any) -> tuple[list[str], int]:
    """What a 4-bit model holds in plain numbers though products are made of it, and how many bytes that is.

    Experts that are one tensor of three dimensions are such: quantization replaces linear layers.

    Returns:
        Names, the largest first, with ``*`` for numbers; none where the model is not held in 4 bits, or where each is
        small beside the whole.
    """
    causal = causal_of(model)
    embeddings = {id(causal.get_input_embeddings().weight), id(causal.get_output_embeddings().weight)}
    found: Counter[str] = Counter()
    total = in_4_bit = 0
    for name, parameter in causal.named_parameters():
        num_bytes = parameter.numel() * parameter.element_size()
        total += num_bytes
        if getattr(parameter, "quant_state", None) is not None:
            in_4_bit += num_bytes
        elif (
            parameter.ndim > 1
            and not parameter.requires_grad
            and id(parameter) not in embeddings
            and ".lora_" not in name
        ):
            found[re.sub(r"\d+", "*", name)] += num_bytes
    large = [(name, size) for name, size in found.most_common() if in_4_bit and size >= _WORTH_SAYING * total]
    return [name for name, _ in large], sum(size for _, size in large)


@dataclass(frozen=True)
class Work:
    """Some micro-batches as counts.

    Attributes:
        num_groups: Groups.
        logical_tokens: T_l.
        tokens: T, padding included.
        padding: Of them padding.
        scored: n.
        visible: (query, key) pairs that see each other, padding aside.
        largest: Tokens of the largest micro-batch.
        largest_scored: Scored tokens of it.
    """

    num_groups: int
    logical_tokens: int
    tokens: int
    padding: int
    scored: int
    visible: int
    largest: int
    largest_scored: int

    @classmethod
    def of(cls, batches: Sequence[Sequence[TokenGroup]], name: LayoutName) -> Work:
        """Count micro-batches."""
        layouts = [lay_out(batch, name) for batch in batches]
        visible = 0
        for layout in layouts:
            if layout.positions_RT is not None:
                visible += int((layout.positions_RT + 1).sum())
        if name == "padded":
            for group in (group for batch in batches for group in batch):
                lengths = [len(group.prompt) + len(completion) - 1 for completion in group.completions]
                visible += sum(length * (length + 1) // 2 for length in lengths)
        groups = [group for batch in batches for group in batch]
        largest = max(layouts, key=lambda layout: layout.num_tokens)
        return cls(
            num_groups=len(groups),
            logical_tokens=sum(
                len(group.prompt) + len(completion) for group in groups for completion in group.completions
            ),
            tokens=sum(layout.num_tokens for layout in layouts),
            padding=sum(layout.num_padding for layout in layouts),
            scored=sum(len(layout.targets_N) for layout in layouts),
            visible=visible,
            largest=largest.num_tokens,
            largest_scored=len(largest.targets_N),
        )


def least_operations(sizes: Sizes, work: Work, *, train: bool) -> float:
    """Floating-point operations that a pass needs at the least."""
    attention = 4.0 * sizes.num_layers * sizes.attention_width * work.visible
    tokens = work.tokens - work.padding
    if train:
        per_token = 4 * sizes.layer_weights + 6 * sizes.adapter_weights
        return per_token * tokens + 4.0 * sizes.head_weights * work.scored + 3.5 * attention
    per_token = 2 * sizes.layer_weights + 2 * sizes.adapter_weights
    return per_token * tokens + 2.0 * sizes.head_weights * work.scored + attention


def least_bytes(sizes: Sizes, work: Work, head_bytes: int, *, train: bool) -> float:
    """Bytes that a pass needs at the least: weights, adapters with their optimizer, activations of one micro-batch.

    Activations are counted as if each layer were computed again in the backward pass: one hidden
    state a layer and token, and about 25 for the layer in work.
    """
    state = sizes.number_bytes * sizes.hidden_size
    kept_layers = sizes.num_layers if train else 0
    activations = work.largest * state * (kept_layers + 25) + 2 * work.largest_scored * state
    adapters = sizes.adapter_weights * (16 if train else 4)
    return sizes.weight_bytes + adapters + activations + head_bytes
