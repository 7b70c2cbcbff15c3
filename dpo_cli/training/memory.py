"""How a training step goes through the memory: what is computed again, and how many tokens go through at once."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from dpo_cli.core.environment import is_gpu
from dpo_cli.core.errors import MachineError
from dpo_cli.core.params import RuntimeParams
from dpo_cli.data.tokens import TokenGroup
from dpo_cli.models.device import free_memory_bytes, token_budget
from dpo_cli.models.project import Workplace
from dpo_cli.scoring.limits import is_in_4_bit, num_product_weights
from dpo_cli.scoring.recompute import (
    GRADES,
    CannotRecomputeError,
    KeptBytes,
    MemoryPlan,
    Recompute,
    StepShape,
    measure_kept,
    plan_memory,
    set_recompute,
)
from dpo_cli.training.protocols import GroupScorer

if TYPE_CHECKING:
    import torch

_BYTES_A_TRAINED_NUMBER = 12
"""Its gradient and the optimizer's two moments, float32; made after the first forward pass."""
_USABLE = 0.9
"""Share of the free memory that activations may take; the rest is for the products' own work and for gaps."""
_BUDGETS_ON_GPU = (1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384)
"""Tokens of a micro-batch to choose from. On the CPU what fits into its caches is best."""
_NUM_SAMPLED = 1000
"""Groups whose tokens are counted for the mean."""


def choose_memory(
    model: Any,
    scorer: GroupScorer[Any],
    groups: Sequence[TokenGroup],
    groups_a_step: int,
    work: Workplace,
) -> MemoryPlan:
    """Set what the backward pass computes again, and say how many tokens go through at once.

    Where the settings leave it open, both are chosen together: the fastest that fits. On the CPU the number of tokens
    is that of :func:`~dpo_cli.models.device.token_budget`.

    Args:
        model: The model, its trainable parameters marked.
        scorer: Scores groups with it.
        groups: What it is trained on.
        groups_a_step: How many of them make an optimizer step.
        work: What the user says of it, and who hears what is chosen.

    Raises:
        MachineError: The model cannot do what runtime.recompute says.
    """
    runtime = work.runtime
    set_recompute(model, "none")
    if runtime.recompute != "auto" and (runtime.max_tokens_per_microbatch is not None or not is_gpu(scorer.device)):
        grades, budgets = choices(model, runtime, scorer.device)
        set_recompute(model, grades[0])
        return MemoryPlan(grades[0], budgets[0], 0.0, fits=True)
    free = free_memory_bytes(scorer.device) - num_training_bytes(model)
    shape = step_shape(scorer, groups, groups_a_step)
    plan = plan_step(model, scorer, kept_bytes(model, scorer, groups), shape, runtime, free)
    set_recompute(model, plan.grade)
    if is_gpu(scorer.device) or plan.grade != "none":
        work.reporter.say(
            f"{work.command}: {plan.max_tokens} tokens at once, recompute {plan.grade}: activations take up to"
            f" {plan.num_bytes / 2**30:.1f} GiB, {free / 2**30:.1f} are free"
            " (runtime.max_tokens_per_microbatch, runtime.recompute)"
        )
    return plan


def plan_step(
    model: Any, scorer: GroupScorer[Any], kept: KeptBytes, shape: StepShape, runtime: RuntimeParams, free_bytes: float
) -> MemoryPlan:
    """The fastest way that fits into so many bytes, among those that the settings leave.

    Raises:
        MachineError: The model cannot do what runtime.recompute says.
    """
    weights = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    return plan_memory(
        kept,
        shape,
        _USABLE * free_bytes,
        *choices(model, runtime, scorer.device),
        layer_weights=sum(map(num_product_weights, weights)) / scorer.config.num_hidden_layers,
        is_quantized=is_in_4_bit(weights),
    )


def choices(model: Any, runtime: RuntimeParams, device: torch.device) -> tuple[Sequence[Recompute], Sequence[int]]:
    """What the settings leave to choose from: grades of recomputing, and tokens of a micro-batch.

    Nothing is computed again when it returns.

    Raises:
        MachineError: The model cannot do what runtime.recompute says.
    """
    set_recompute(model, "none")
    budgets = (token_budget(runtime, device),)
    if runtime.max_tokens_per_microbatch is None and is_gpu(device):
        budgets = _BUDGETS_ON_GPU
    if runtime.recompute == "auto":
        return GRADES if _can_recompute(model) else ("none",), budgets
    try:
        set_recompute(model, runtime.recompute)
    except CannotRecomputeError as error:
        raise MachineError(f"params.yaml: runtime.recompute {runtime.recompute}: {error}; set it to none") from None
    set_recompute(model, "none")
    return (runtime.recompute,), budgets


def num_training_bytes(model: Any) -> int:
    """Bytes that training takes for what is trained, beside its numbers, before the first step is over."""
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return _BYTES_A_TRAINED_NUMBER * trained


def _can_recompute(model: Any) -> bool:
    try:
        set_recompute(model, "layers")
    except CannotRecomputeError:
        return False
    set_recompute(model, "none")
    return True


def kept_bytes(model: Any, scorer: GroupScorer[Any], groups: Sequence[TokenGroup]) -> KeptBytes:
    """What activations take in a step, measured on short rows of the data; nothing is computed again after it."""
    set_recompute(model, "none")
    model.train()
    tokens = [token for group in groups[:100] for token in (*group.prompt, *group.completions[0])]

    def forward(size: int) -> int:
        """Score a text of so many tokens of the data."""
        text = tuple((tokens * (size // len(tokens) + 1))[:size])
        group = TokenGroup("measured", "measured", text[: size // 2], (text[size // 2 :],))
        scorer.score([group])
        return size - 1

    return measure_kept(model, forward, scorer.config.num_hidden_layers, scorer.head_bytes)


def step_shape(scorer: GroupScorer[Any], groups: Sequence[TokenGroup], groups_a_step: int) -> StepShape:
    """What a step puts through the model: its mean from a sample, its most from the longest groups."""

    def size(group: TokenGroup) -> int:
        return sum(group.sizes)

    longest = [scorer.num_tokens(group) for group in heapq.nlargest(groups_a_step, groups, key=size)]
    sampled = groups[:: max(1, len(groups) // _NUM_SAMPLED)]
    mean = fmean(scorer.num_tokens(group) for group in sampled)
    return StepShape(mean * min(groups_a_step, len(groups)), sum(longest), max(longest))
