"""The factor that keeps small gradients in float16, which has no number between 0 and 6e-8.

The loss is multiplied by it before the backward pass, and the gradients of the parameters, float32, are divided by it
after that. It is a power of two, so nothing is rounded: gradients are what they would be, but for those that would have
vanished. Where they overflow instead it is halved, and the step done again.

Source: Micikevicius et al. 2018, Mixed Precision Training, section 3.2.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from dpo_cli.core.artifacts import write_json
from dpo_cli.core.progress import Reporter

_START = 2.0**13


class LossScale:
    """The loss's factor; 1, and never another, where products are not computed in float16.

    Args:
        compute_dtype: What products are computed in.
        section: Name of the stage, for messages.
        reporter: Says when it is halved.
        memory: File that keeps a halved one for the next run of the same work; None: it is not kept.

    Attributes:
        value: The factor, a power of two.
    """

    def __init__(self, compute_dtype: torch.dtype, section: str, reporter: Reporter, memory: Path | None) -> None:
        self._section = section
        self._reporter = reporter
        self._memory = memory
        self.value = 1.0
        if compute_dtype == torch.float16:
            self.value = _recall(memory) or _START

    def unscale(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Divide the parameters' gradients by it, in place."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if self.value != 1 and gradients:
            torch._foreach_div_(gradients, self.value)  # type: ignore[attr-defined]

    def halve(self) -> bool:
        """Take half of it, after gradients overflowed; False where there is nothing to halve."""
        if self.value <= 1:
            return False
        self.value /= 2
        self._reporter.say(
            f"{self._section}: gradients overflowed float16; the step is done again with loss scale {self.value:.0f}"
        )
        if self._memory is not None:
            write_json(self._memory, {"loss_scale": self.value})
        return True


def _recall(memory: Path | None) -> float | None:
    try:
        return float(json.loads(memory.read_text(encoding="utf-8"))["loss_scale"]) if memory else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
