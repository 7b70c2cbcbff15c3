"""Models of known shapes with random weights, and random pairs of known lengths, to measure without a download."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from bitsandbytes.nn.modules import Linear4bit, Params4bit
from transformers import AutoConfig, AutoModelForCausalLM

from dpo_cli.core.errors import MachineError, is_out_of_memory
from dpo_cli.data.tokens import TokenGroup
from dpo_cli.models.device import Machine
from dpo_cli.models.load import keep_weights_unpacked
from dpo_cli.scoring.fused import use_fused

_COLUMNS = (
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "max_position_embeddings", "tie_word_embeddings", "head_dim",
)  # fmt: skip
_ROWS: dict[str, tuple[Any, ...]] = {
    "tiny": ("llama", 1024, 256, 768, 4, 4, 4),
    "qwen2.5-0.5b": ("qwen2", 151936, 896, 4864, 24, 14, 2, 32768, True),
    "qwen2.5-1.5b": ("qwen2", 151936, 1536, 8960, 28, 12, 2, 32768, True),
    "llama-3.2-3b": ("llama", 128256, 3072, 8192, 28, 24, 8, 131072, True, 128),
    "llama-3.1-8b": ("llama", 128256, 4096, 14336, 32, 32, 8, 131072),
}
SHAPES: dict[str, dict[str, Any]] = {name: dict(zip(_COLUMNS, row, strict=False)) for name, row in _ROWS.items()}
"""Configurations by name; what is not said is the family's default."""


def random_model(name: str, machine: Machine, quantization: str) -> Any:
    """A frozen model of one of :data:`SHAPES` in eval mode, the same for the same name; in nf4 or plain.

    Raises:
        MachineError: It does not fit into memory.
    """
    shape = dict(SHAPES[name])
    config = AutoConfig.for_model(shape.pop("model_type"), **shape)
    torch.manual_seed(0)
    with init_empty_weights(include_buffers=False):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=machine.compute_dtype)
    try:
        _fill(model, machine, in_4_bit=quantization == "nf4")
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise MachineError(
            f"a model of the shape {name} does not fit into the memory of {machine.device}; name a smaller one"
        ) from error
    keep_weights_unpacked(model)
    use_fused(model, machine.device, machine.compute_dtype)
    return model.eval()


def _fill(model: Any, machine: Machine, *, in_4_bit: bool) -> None:
    """Give a model without numbers frozen random ones, module by module.

    In 4 bits each linear layer but the head is quantized before the next one is filled, so that not more than one of
    them is there in the compute dtype.
    """
    head = model.get_output_embeddings()
    for path in [path for path, _ in model.named_modules()]:  # the modules themselves would keep what was replaced
        module = model.get_submodule(path)
        if module is head and model.config.tie_word_embeddings:
            continue
        for name, empty in list(module.named_parameters(recurse=False)):
            numbers = torch.nn.Parameter(torch.empty_like(empty, device=machine.device), requires_grad=False)
            module.register_parameter(name, numbers)
            del numbers
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, buffer.to(machine.device))
        model._init_weights(module)
        if in_4_bit and type(module) is torch.nn.Linear and module is not head:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, _in_4_bit(module, machine))
    model.tie_weights()
    if in_4_bit:
        model.is_loaded_in_4bit = True


def _in_4_bit(linear: torch.nn.Linear, machine: Machine) -> torch.nn.Module:
    """A linear layer with its weight in 4 bits."""
    layer: Any = Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=False,
        compute_dtype=machine.compute_dtype,
        compress_statistics=True,
        quant_type="nf4",
        device="meta",
    )
    params4bit: Any = Params4bit
    quantized: Any = params4bit(
        linear.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4", module=layer
    )
    layer.weight, layer.bias = quantized.to(machine.device), linear.bias
    return layer


# --- pairs ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Regime:
    """Lengths of a kind of preference data, tokens.

    Attributes:
        meaning: What it stands for.
        prompt, chosen, rejected: Mean lengths.
        spread: Standard deviation of a length's logarithm; 0 makes all alike.
    """

    meaning: str
    prompt: int
    chosen: int
    rejected: int
    spread: float


REGIMES = {
    "harmless": Regime("dialogues like those of HH harmless-base", 121, 42, 52, 0.7),
    "0.42": Regime("short prompts, long answers: prompt to answer 0.42", 60, 143, 143, 0.5),
    "2.15": Regime("prompt to answer 2.15", 200, 93, 93, 0.5),
    "3.91": Regime("long prompts, short answers: prompt to answer 3.91", 300, 77, 77, 0.5),
    "equal": Regime("nothing to gain: equal lengths, a tiny prompt", 4, 128, 128, 0.0),
}


def random_pairs(regime: str, num_pairs: int, vocabulary: int, seed: int = 0) -> list[TokenGroup]:
    """Pairs of a regime, the same for the same seed; lengths are log-normal, cut off at five times the mean."""
    rng = random.Random(seed)
    lengths = REGIMES[regime]

    def tokens(mean: int) -> tuple[int, ...]:
        # a log-normal of this spread has the mean exp(spread ** 2 / 2)
        drawn = rng.lognormvariate(-(lengths.spread**2) / 2, lengths.spread) if lengths.spread else 1.0
        length = max(2, min(5 * mean, round(drawn * mean)))
        return tuple(rng.randrange(1, vocabulary) for _ in range(length))

    return [
        TokenGroup(
            f"{number:06d}",
            f"{number:06d}",
            tokens(lengths.prompt),
            (tokens(lengths.chosen), tokens(lengths.rejected)),
        )
        for number in range(num_pairs)
    ]
