"""Pairs of random tokens whose lengths are those of some kind of data, for measurements."""

from __future__ import annotations

import random
from dataclasses import dataclass

from dpo_cli.data.tokens import TokenGroup


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
