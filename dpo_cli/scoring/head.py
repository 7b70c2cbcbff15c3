"""From hidden states to the log-probabilities of given tokens.

Legend: N scored tokens, V vocabulary, D hidden.

Only the rows that predict a scored token go through the head, a bounded number of them at a
time, so there is never a [tokens, vocabulary] tensor of a whole batch. The log-sum-exp is
float32 whatever the model computes in: a bfloat16 one costs 0.02 nats a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

_CHUNK_BYTES = 256 << 20
_MIN_CHUNK_ROWS = 64


def max_logit_rows(vocabulary: int) -> int:
    """How many rows of logits, with their float32 copy, may be held at once: 256 MiB, but 64 rows at least."""
    return max(_MIN_CHUNK_ROWS, _CHUNK_BYTES // (8 * vocabulary))


@dataclass(frozen=True)
class LogitTransform:
    """What a model does to its head's output: scale, then soft cap.

    Attributes:
        scale: Factor on the logits (Cohere's logit_scale, Granite's 1 / logits_scaling).
        softcap: ``softcap * tanh(z / softcap)`` where set (Gemma's final_logit_softcapping).
    """

    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, config: Any) -> LogitTransform:
        """Read it from a model's configuration."""
        scale = getattr(config, "logit_scale", None) or 1.0
        if divisor := getattr(config, "logits_scaling", None):
            scale /= divisor
        return cls(float(scale), getattr(config, "final_logit_softcapping", None))

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """Transformed logits, float32."""
        logits = logits.float()
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits


def token_logps(
    hidden_ND: torch.Tensor, targets_N: torch.Tensor, head: torch.nn.Module, transform: LogitTransform
) -> torch.Tensor:
    """Log-probability of each target under softmax(transform(head(hidden))).

    Args:
        hidden_ND: [N, D], the hidden states that predict the targets.
        targets_N: int64 [N].
        head: The output embedding.
        transform: What the model does to its logits.

    Returns:
        float32 [N], nats.
    """
    chunk = max_logit_rows(head.weight.shape[0])  # type: ignore[index]

    def logps(hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = transform(head(hidden))
        return logits.gather(1, targets[:, None]).squeeze(1) - logits.logsumexp(1)

    if hidden_ND.shape[0] <= chunk:
        return logps(hidden_ND, targets_N)
    pieces = zip(hidden_ND.split(chunk), targets_N.split(chunk), strict=True)
    if not torch.is_grad_enabled():
        return torch.cat([logps(hidden, targets) for hidden, targets in pieces])
    return torch.cat([checkpoint(logps, hidden, targets, use_reentrant=False) for hidden, targets in pieces])
