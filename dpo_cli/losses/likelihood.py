"""Losses that weigh an answer's likelihood by itself, with neither a margin nor a reference.

They are terms added to a pairwise loss, or the paper's baselines alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dpo_cli.losses.catalogue import Loss
from dpo_cli.losses.pairwise import Pairs

if TYPE_CHECKING:
    from torch import Tensor


@Loss(
    "-log π_w, a mean over the chosen tokens of the step",
    "Rafailov et al. 2023, section 6 (Preferred-FT); the SFT term of ORPO, CPO and TRL",
    "a term added to another loss, or alone as the baseline Preferred-FT",
    has_reference=False,
    compares=False,
)
def sft(pairs: Pairs, /) -> Tensor:
    """-log pi_w over the mean length of the step's chosen answers: a loss a token, as TRL's term ``sft`` has it."""
    return -pairs.policy_alone_B2[:, 0] / pairs.mean_chosen_tokens


@Loss(
    "-log π_w / |w|",
    "RPO: Pang et al. 2024, eq. 2, as {sigmoid: 1, sft_norm: 1}",
    "a term added to another loss: the chosen answers' probability should not fall",
    has_reference=False,
    compares=False,
)
def sft_norm(pairs: Pairs, /) -> Tensor:
    """-log pi_w / |w|: the term that RPO adds (Pang et al. 2024, eq. 2)."""
    return -pairs.policy_alone_B2[:, 0] / pairs.num_tokens_B2[:, 0]


@Loss(
    "-log π_w + unlikelihood_alpha · log π_l, a mean over the chosen tokens of the step",
    "Rafailov et al. 2023, section 6 (Unlikelihood), after Welleck et al. 2019",
    "the paper's baseline: without a lower bound, it pushes rejected answers down until the text falls apart",
    has_reference=False,
)
def unlikelihood(pairs: Pairs, /, unlikelihood_alpha: float) -> Tensor:
    """(-log pi_w + alpha * log pi_l) over the mean length of the step's chosen answers (Rafailov et al. 2023, 6).

    At alpha 0 it is :func:`sft`. It has no lower bound: log pi_l may fall forever. Welleck et al. 2019 minimize
    -log(1 - p) of each unwanted token, which has one.
    """
    chosen, rejected = pairs.policy_alone_B2.unbind(1)
    return -(chosen - unlikelihood_alpha * rejected) / pairs.mean_chosen_tokens
