"""What held-out pairs say of a reward model: accuracy, log-loss and calibration of Bradley-Terry's probability.

All figures are means over pairs, with intervals clustered by prompt. A tie (equal rewards) counts
one half and is reported. Rewards are fixed up to a constant a prompt, so only differences are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dpo_cli.statistics.bootstrap import Estimate, Sampling
from dpo_cli.statistics.calibration import NUM_BINS, Bin, calibration_error, half_ties, reliability_table


@dataclass(frozen=True)
class RewardedPair:
    """A held-out pair; index 0 is chosen, 1 rejected.

    Attributes:
        id: The row's id.
        group: The prompt's id.
        rewards: Of the answers.
        num_tokens: Of the answers.
    """

    id: str
    group: str
    rewards: tuple[float, float]
    num_tokens: tuple[int, int]


@dataclass(frozen=True)
class RewardFigures:
    """Figures over all held-out pairs.

    Attributes:
        accuracy: How often the chosen answer has the higher reward.
        log_loss: Mean of -log sigma(r_w - r_l), nats; ln 2 where nothing is known.
        ece: Expected calibration error (Guo et al. 2017) of the preferred answer's probability sigma(|r_w - r_l|).
            Its interval leans upwards: noise never lowers it.
        margin: Mean of r_w - r_l.
        longer_accuracy: How often the chosen answer is the longer one: a baseline that reads nothing.
        by_length: The accuracy where the chosen answer is longer, as long, and shorter; None where there is no such
            pair.
        reliability: The bins that hold a pair, ascending.
        num_ties: Pairs with equal rewards.
        num_pairs: Pairs in all.
        num_prompts: Different prompts in them.
    """

    accuracy: Estimate
    log_loss: Estimate
    ece: Estimate
    margin: Estimate
    longer_accuracy: Estimate
    by_length: dict[str, tuple[int, Estimate | None]]
    reliability: list[Bin]
    num_ties: int
    num_pairs: int
    num_prompts: int


def summarize_rewards(
    pairs: Sequence[RewardedPair], *, draws: int, confidence: float, seed: int, num_bins: int = NUM_BINS
) -> RewardFigures:
    """Figures over held-out pairs.

    Args:
        pairs: At least one.
        draws: Draws behind each interval.
        confidence: Coverage of the intervals.
        seed: Of the draws.
        num_bins: Bins of the reliability table.
    """
    rows = sorted(pairs, key=lambda pair: pair.id)
    clusters = np.array([pair.group for pair in rows])
    rewards = np.array([pair.rewards for pair in rows], dtype=np.float64)
    margins = rewards[:, 0] - rewards[:, 1]
    longer = np.array([pair.num_tokens[0] - pair.num_tokens[1] for pair in rows])
    right = half_ties(margins)

    sampling = Sampling(draws, confidence, seed)

    def interval(values: np.ndarray) -> Estimate:
        return sampling.interval(values.tolist(), clusters.tolist())

    def rate(values: np.ndarray, where: np.ndarray | slice = slice(None)) -> Estimate:
        return sampling.rate(values[where].tolist(), clusters[where].tolist())

    ece = calibration_error(
        margins, clusters.tolist(), draws=draws, confidence=confidence, seed=seed, num_bins=num_bins
    )
    reliability = reliability_table(
        margins, clusters.tolist(), draws=draws, confidence=confidence, seed=seed, num_bins=num_bins
    )
    by_length = {
        name: (int(where.sum()), rate(right, where) if where.any() else None)
        for name, where in (("longer", longer > 0), ("as_long", longer == 0), ("shorter", longer < 0))
    }
    return RewardFigures(
        accuracy=rate(right),
        log_loss=interval(np.logaddexp(0.0, -margins)),
        ece=ece,
        margin=interval(margins),
        longer_accuracy=rate(half_ties(longer)),
        by_length=by_length,
        reliability=reliability,
        num_ties=int((margins == 0).sum()),
        num_pairs=len(rows),
        num_prompts=len(set(clusters.tolist())),
    )
