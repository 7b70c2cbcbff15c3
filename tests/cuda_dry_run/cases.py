"""What is run dry: families of models, and in which ways; known without torch."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from dpo_cli.losses.catalogue import LOSSES

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
LAYOUTS = ("shared", "pieces", "padded")
"""The scorer's layouts; ``pieces`` is ``shared`` without a kernel for sequences of any length: in float16 on a card
before Ampere, in bfloat16 where none is installed.
"""
GRADES = ("none", "elementwise", "layers")
DTYPES = ("bfloat16", "float16")


@dataclass(frozen=True)
class Case:
    """One way to take a training step, or another pass.

    Attributes:
        model: A family, or a shape that ``dpo-cli bench`` knows.
        quantization: One of :data:`QUANTIZATIONS`.
        layout: One of :data:`LAYOUTS`.
        grade: What the backward pass computes again, of :data:`GRADES`.
        dtype: Of products, of :data:`DTYPES`.
        work: What is done: a step of train with a loss, of reward with a loss (``reward/`` in front), of sft
            (``stage/sft``), or one of :data:`PASSES`.
        settings: Further settings of section train.
        fault: What is planted, of :data:`FAULTS`; None for nothing.
        num_pairs: Pairs of it.
        max_tokens: Tokens of a micro-batch; so many that the step has two or three.
    """

    model: str = "llama"
    quantization: str = "nf4"
    layout: str = "shared"
    grade: str = "layers"
    dtype: str = "bfloat16"
    work: str = "sigmoid"
    settings: tuple[tuple[str, Any], ...] = ()
    fault: str | None = None
    num_pairs: int = 3
    max_tokens: int = 512

    def __str__(self) -> str:
        """Its name."""
        further = [f"{name}={value}" for name, value in self.settings]
        parts = [self.model, self.quantization, self.layout, self.grade, self.dtype, self.work, *further]
        return "-".join([*parts, self.fault] if self.fault else parts)


PASSES = ("reference", "kl", "generation")
"""Without gradients: the reference pass, KL along an answer, and answers of 24 tokens."""

FAULTS = (
    "number read",
    "tensor read",
    "copy waited for",
    "tensor on the host",
    "narrow gradient",
    "estimate too high",
    "estimate too low",
)
"""Each is planted into a step that is right without it, and must be found."""


def family_cases() -> Iterator[Case]:
    """Each family in nine ways, in which each pair of values of the four ways to vary occurs."""
    for number, family in enumerate(FAMILIES):
        for row, (layout, grade) in enumerate(itertools.product(LAYOUTS, GRADES)):
            yield Case(family, QUANTIZATIONS[(row + number) % 2], layout, grade, DTYPES[(row // 2 + number) % 2])


_SMOOTHED = ("cdpo", "robust", "exo_pair")


def work_cases() -> Iterator[Case]:
    """Every loss, every setting that brings code of its own into a loss, the reward model, and the passes."""
    for loss in LOSSES:
        settings: dict[str, Any] = {"label_smoothing": 0.1} if loss in _SMOOTHED else {}
        settings |= {"simpo": {"gamma": 1.0}, "r_dpo": {"rdpo_alpha": 0.1}}.get(loss, {})
        yield Case(grade="none", work=loss, settings=tuple(settings.items()))
    further: list[tuple[str, Any]] = [("weighting", "wpo"), ("ld_alpha", 0.5), ("margin_scale", 1.0)]
    further += [("divergence", name) for name in ("forward_kl", "js", "alpha")]
    for setting in further:
        yield Case(grade="none", settings=(setting,))
    for work in ("stage/sft", "reward/bradley_terry", "reward/plackett_luce", *PASSES):
        yield Case(grade="none", work=work)


LARGE = "llama-3.1-8b"
LARGE_CASES = [Case(LARGE, grade=grade, num_pairs=18, max_tokens=4096) for grade in GRADES]
"""A step of 3,915 tokens in one micro-batch, which is what fits under 4,096."""
LARGE_PASSES = [Case(LARGE, grade="none", work=work, num_pairs=2, max_tokens=4096) for work in ("reference", "kl")]
SMALL_CASE = Case("qwen2.5-0.5b", grade="none", num_pairs=18, max_tokens=4096)
PIECES_CASE = Case("gemma2", layout="pieces", grade="none", num_pairs=18, max_tokens=4096)

FAULT_CASES = [Case(fault=fault) for fault in FAULTS[:-2]] + [
    Case(LARGE, grade="elementwise", fault=fault, num_pairs=18, max_tokens=4096) for fault in FAULTS[-2:]
]

SUITES = {
    "families": list(family_cases()),
    "steps": [*work_cases(), *LARGE_CASES, *LARGE_PASSES, SMALL_CASE, PIECES_CASE, *FAULT_CASES, Case()],
}
"""Each is run by one process, and read by one file of tests."""
