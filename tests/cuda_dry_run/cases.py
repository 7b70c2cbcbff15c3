"""What is run dry: families of models, and in which ways; known without torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

_SMALL: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
_CAPPED = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "query_pre_attn_scalar": 32}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
_OLD = {key: _SMALL[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")}
_NO_DROPOUT = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _SMALL,
    "qwen2": _SMALL,
    "qwen3": _SMALL,
    "mistral": _SMALL | {"sliding_window": 64},
    "gemma2": _SMALL | _CAPPED,
    "gemma3_text": _SMALL | {"sliding_window": 64},
    "phi3": _SMALL | {"pad_token_id": 0},
    "granite": _SMALL | {"logits_scaling": 8.0},
    "cohere": _SMALL,
    "smollm3": _SMALL | {"pad_token_id": 0},
    "olmo2": _SMALL,
    "gpt_neox": _OLD | {"intermediate_size": 256},
    "gpt2": _OLD | _NO_DROPOUT,
    "qwen3_moe": _SMALL | _EXPERTS,
    "mixtral": _SMALL | {"num_local_experts": 4},
}
"""Small configurations by transformers' names of the families."""

QUANTIZATIONS = ("none", "nf4")
LAYOUTS = ("shared", "pieces", "packed", "padded")
"""The scorer's layouts; ``pieces`` is ``shared`` without a kernel for sequences of any length, as before Ampere."""
GRADES = ("none", "elementwise", "layers")
DTYPES = ("bfloat16", "float16")


@dataclass(frozen=True)
class Case:
    """One way to take a training step.

    Attributes:
        model: A family, or a shape that ``dpo-cli bench`` knows.
        quantization: One of :data:`QUANTIZATIONS`.
        layout: One of :data:`LAYOUTS`.
        grade: What the backward pass computes again, of :data:`GRADES`.
        dtype: Of products, of :data:`DTYPES`.
        objective: A loss, ``sft``, or one of the reward model's losses with ``reward/`` in front.
        settings: Further settings of section train.
        fault: What is planted into the step; None for nothing.
        num_pairs: Pairs of the step.
        max_tokens: Tokens of a micro-batch.
    """

    model: str
    quantization: str = "nf4"
    layout: str = "shared"
    grade: str = "layers"
    dtype: str = "bfloat16"
    objective: str = "sigmoid"
    settings: tuple[tuple[str, Any], ...] = ()
    fault: str | None = None
    num_pairs: int = 4
    max_tokens: int = 512

    def __str__(self) -> str:
        """Its name: what differs from the defaults of a Case, too."""
        further = [f"{name}={value}" for name, value in self.settings]
        parts = [self.model, self.quantization, self.layout, self.grade, self.dtype, self.objective, *further]
        return "-".join([*parts, self.fault] if self.fault else parts)


def family_cases() -> Iterator[Case]:
    """For each family nine ways of the 48, among which are all pairs of quantization, layout, grade and dtype."""
    for number, family in enumerate(FAMILIES):
        for row, (layout, grade) in enumerate((layout, grade) for layout in LAYOUTS for grade in GRADES):
            yield Case(family, QUANTIZATIONS[(row + number) % 2], layout, grade, DTYPES[(row // 2 + number) % 2])
