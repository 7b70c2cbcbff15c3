"""Supervised fine-tuning: the negative log-likelihood of the completions."""

from __future__ import annotations

import torch


def negative_log_likelihood(logps_B1: torch.Tensor) -> torch.Tensor:
    """-log pi(completion | prompt), float64 [B], nats; divide by the tokens for the loss a token."""
    return -logps_B1[:, 0]
