"""Win rates: which of two models' answers a judge prefers, ties as one half."""

from __future__ import annotations

from dpo_cli.evaluation.judges.base import Judge


def compare(judge: Judge, prompt: str, ours: str, theirs: str) -> float:
    """Probability that ours is better, asked in both orders so that no position is favoured."""
    if ours == theirs:
        return 0.5
    return (judge.prefer(prompt, ours, theirs) + 1 - judge.prefer(prompt, theirs, ours)) / 2
