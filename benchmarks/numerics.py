"""How far numbers move with layout, precision, quantization and recomputation: the table of docs/numerics.md.

    python benchmarks/numerics.py

A random llama of four layers with an adapter, 32 pairs as long as those of HH harmless, one CPU thread. Differences are
the largest of a completion's summed log-probability, in nats, and of all adapter gradients together, relative.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import torch
import transformers

from dpo_cli.core.training_params import LoraParams
from dpo_cli.models import lora
from dpo_cli.models.adapters import add_adapter
from dpo_cli.models.device import Machine
from dpo_cli.models.load import keep_weights_unpacked
from dpo_cli.models.shapes import random_model, random_pairs
from dpo_cli.scoring.layout import LAYOUTS, LayoutName
from dpo_cli.scoring.recompute import GRADES, Recompute, set_recompute
from dpo_cli.scoring.scorer import Scorer

NUM_PAIRS = 32
CPU = torch.device("cpu")

Numbers = tuple[torch.Tensor, torch.Tensor]


def make_model(quantization: str) -> Any:
    """A random model whose adapter does something."""
    model = add_adapter(random_model("tiny", Machine(CPU, torch.float32), quantization), LoraParams(), 0)
    keep_weights_unpacked(model)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def numbers(
    model: Any,
    layout: LayoutName,
    *,
    budget: int = 1024,
    dtype: torch.dtype = torch.float32,
    recompute: Recompute = "none",
) -> Numbers:
    """Log-probabilities float64 [B, 2], and the adapter's gradient of a fixed combination of them."""
    groups = random_pairs("harmless", NUM_PAIRS, 1024)
    weights = torch.randn(NUM_PAIRS, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logps = torch.zeros(NUM_PAIRS, 2, dtype=torch.float64)
    model.train()
    model.zero_grad()
    set_recompute(model, recompute)
    with Scorer(model, dtype, layout) as scorer:
        for indices in scorer.split(groups, budget):
            found = scorer.score([groups[index] for index in indices]).logps_BK
            (found * weights[indices]).sum().backward()
            logps[indices] = found.detach()
    set_recompute(model, "none")
    gradients = [parameter.grad.flatten().double() for parameter in model.parameters() if parameter.grad is not None]
    return logps, torch.cat(gradients)


@contextlib.contextmanager
def peft_forward() -> Iterator[None]:
    """PEFT's own way through its layers."""
    with patch.object(lora, "_plain_adapter", lambda layer: None):
        yield


@contextlib.contextmanager
def update_forward() -> Iterator[None]:
    """The update added to the output, never merged."""
    with patch.object(lora, "merging_pays", lambda *arguments: False):
        yield


def line(what: str, ours: Numbers, other: Numbers) -> str:
    """One line of the table."""
    gap = (ours[0] - other[0]).abs()
    gradient = ((ours[1] - other[1]).norm() / other[1].norm()).item()
    return f"| {what} | {gap.max():.1e} | {gap.mean():.1e} | {gradient:.1e} |"


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    plain, quantized = make_model("none"), make_model("nf4")
    alone = numbers(plain, "padded", budget=1)
    answers = [answer for pair in random_pairs("harmless", NUM_PAIRS, 1024) for answer in pair.completions]
    print(f"torch {torch.__version__}; {sum(map(len, answers)) / len(answers):.0f} tokens an answer on average\n")
    print("| what | largest, nats | mean, nats | gradients, relative |")
    print("|---|---|---|---|")
    for name in LAYOUTS:
        print(line(f"{name}, float32, against a pair at a time", numbers(plain, name), alone), flush=True)
    shared = numbers(plain, "shared")
    small, large = (numbers(plain, "shared", budget=budget) for budget in (256, 8192))
    print(line("shared, budget 256 against 8192", small, large))
    for grade in GRADES[1:]:
        print(line(f"shared, recompute {grade} against none", numbers(plain, "shared", recompute=grade), shared))
    with peft_forward():
        print(line("shared, our LoRA layers against PEFT's", shared, numbers(plain, "shared")))
    with update_forward():
        print(line("shared, merged update against added one", shared, numbers(plain, "shared")))
    alone_nf4 = numbers(quantized, "padded", budget=1)
    for name in LAYOUTS:
        print(line(f"{name}, nf4 in float32, against a pair at a time", numbers(quantized, name), alone_nf4))
    print(line("nf4 against float32 weights", alone_nf4, alone))
    rough = numbers(plain, "padded", budget=1, dtype=torch.bfloat16)
    print(line("bfloat16 products against float32", rough, alone))
    print(line("shared in bfloat16 against a pair at a time", numbers(plain, "shared", dtype=torch.bfloat16), rough))


if __name__ == "__main__":
    main()
