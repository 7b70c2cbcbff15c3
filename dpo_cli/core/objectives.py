"""Which objectives there are, which settings each reads, and where each comes from.

The losses themselves are in :mod:`dpo_cli.objectives`, by the same names; docs/objectives.md is made of
this table.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

PairwiseName = Literal[
    "sigmoid", "cdpo", "robust", "hinge", "ipo", "ipo_sum", "exo_pair", "nca_pair", "bco_pair", "sppo_hard",
    "aot", "aot_unpaired", "apo_zero", "apo_down", "discopop", "sigmoid_norm",
    "simpo", "orpo", "cpo", "sft", "sft_norm",
]  # fmt: skip
LossName = Literal[PairwiseName, "plackett_luce"]


@dataclass(frozen=True)
class ObjectiveInfo:
    """An objective, for messages and for the documentation.

    Attributes:
        formula: With r = beta log(pi / ref) of an answer, w the chosen one, l the rejected one,
            m = r_w - r_l, e = label_smoothing.
        source: Paper and equation.
        use: When to use it.
        reads: Settings of section train that it reads beside beta.
        needs: Of them, those that must not be at their default.
        has_reference: Whether the reference's log-probabilities are in it.
        learns_log_ratio: Whether the reward that it learns is beta log(pi / ref), summed over tokens.
        is_coupled: Whether one loss depends on all pairs of an optimizer step.
    """

    formula: str
    source: str
    use: str
    reads: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    has_reference: bool = True
    learns_log_ratio: bool = True
    is_coupled: bool = False


_MARGIN = ("divergence", "ld_alpha", "weighting")
_REWARD = ("ld_alpha", "weighting")

OBJECTIVES: Mapping[LossName, ObjectiveInfo] = {
    "sigmoid": ObjectiveInfo(
        "-log σ(m)",
        "DPO: Rafailov et al. 2023, eq. 7",
        "the default",
        (*_MARGIN, "margin_scale"),
    ),
    "cdpo": ObjectiveInfo(
        "-(1 - e) log σ(m) - e log σ(-m)",
        "conservative DPO: Mitchell 2023",
        "a share e of the labels is wrong: the margin has an end, log((1 - e) / e)",
        ("label_smoothing", *_MARGIN, "margin_scale"),
        ("label_smoothing",),
    ),
    "robust": ObjectiveInfo(
        "(-(1 - e) log σ(m) + e log σ(-m)) / (1 - 2e)",
        "Chowdhury et al. 2024, eq. 12",
        "a known share e of the labels was flipped at random: unbiased, but without a lower bound",
        ("label_smoothing", *_MARGIN, "margin_scale"),
        ("label_smoothing",),
    ),
    "hinge": ObjectiveInfo(
        "max(0, 1 - m)",
        "SLiC: Zhao et al. 2023; RSO: Liu et al. 2023",
        "pairs with a margin beyond 1 are to be left alone",
        (*_MARGIN, "margin_scale"),
    ),
    "ipo": ObjectiveInfo(
        "(m' / beta - 1 / (2 beta))², m' with log-ratios a token",
        "IPO: Azar et al. 2023, eq. 17, length-normalised as in TRL",
        "labels without noise, where the sigmoid would push on for ever; answers of differing length",
        ("divergence", "weighting"),
        learns_log_ratio=False,
    ),
    "ipo_sum": ObjectiveInfo(
        "(m / beta - 1 / (2 beta))²",
        "IPO: Azar et al. 2023, eq. 17",
        "IPO as its authors write it",
        _MARGIN,
    ),
    "exo_pair": ObjectiveInfo(
        "σ(m) log(σ(m) / (1 - e)) + σ(-m) log(σ(-m) / e)",
        "EXO: Ji et al. 2024, eq. 16",
        "the reverse divergence, which seeks the mode; e = 0.001 in the paper",
        ("label_smoothing", *_MARGIN),
        ("label_smoothing",),
    ),
    "nca_pair": ObjectiveInfo(
        "-log σ(r_w) - ½ log σ(-r_w) - ½ log σ(-r_l)",
        "NCA: Chen et al. 2024",
        "the chosen answers' probability should not fall",
        _REWARD,
    ),
    "bco_pair": ObjectiveInfo(
        "-log σ(r_w) - log σ(-r_l)",
        "BCO: Jung et al. 2024, without its reward shift",
        "each answer is good or bad by itself",
        _REWARD,
    ),
    "sppo_hard": ObjectiveInfo(
        "(r_w / beta - 1 / (2 beta))² + (r_l / beta + 1 / (2 beta))²",
        "SPPO: Wu et al. 2024, eq. 4.7, with sure labels",
        "self-play: pairs sampled from the policy",
        _REWARD,
    ),
    "aot": ObjectiveInfo(
        "logistic loss of sort(log π_w / π_l) - sort(log ref_w / ref_l), times beta",
        "AOT: Melnyk et al. 2024",
        "the whole distribution of margins is to move; large batches",
        ("label_smoothing", "ld_alpha"),
        is_coupled=True,
    ),
    "aot_unpaired": ObjectiveInfo(
        "logistic loss of sort(r_w) - sort(r_l)",
        "AOT: Melnyk et al. 2024, unpaired",
        "the same, where the two sides of a row do not belong together",
        ("label_smoothing", "ld_alpha"),
        is_coupled=True,
    ),
    "apo_zero": ObjectiveInfo(
        "1 - σ(r_w) + σ(r_l)",
        "APO: D'Oosterlinck et al. 2024, eq. 7",
        "the chosen answers are better than the model's own",
        _REWARD,
    ),
    "apo_down": ObjectiveInfo(
        "σ(r_w) + 1 - σ(m)",
        "APO: D'Oosterlinck et al. 2024, eq. 8",
        "the chosen answers are worse than the model's own",
        _REWARD,
    ),
    "discopop": ObjectiveInfo(
        "(1 - s) · -log σ(m) + s · exp(-m), s = σ(m / discopop_tau)",
        "DiscoPOP: Lu et al. 2024, eq. 5",
        "a loss that a language model found",
        ("discopop_tau", *_MARGIN),
    ),
    "sigmoid_norm": ObjectiveInfo(
        "-log σ(m'), m' with log-ratios a token",
        "length-normalised DPO: Lambert et al. 2024 (Tülu 3), eq. 6",
        "answers grow longer with sigmoid; beta is larger here, about 5",
        ("divergence", "weighting"),
        learns_log_ratio=False,
    ),
    "simpo": ObjectiveInfo(
        "-log σ(beta (log π_w / |w| - log π_l / |l|) - gamma)",
        "SimPO: Meng et al. 2024, eq. 6",
        "no reference wanted; beta about 2, gamma about half of it",
        ("gamma", "label_smoothing", "weighting"),
        has_reference=False,
    ),
    "orpo": ObjectiveInfo(
        "-beta log σ(log odds_w - log odds_l), odds of the mean probability a token",
        "ORPO: Hong et al. 2024, eq. 6 and 7; whole as {orpo: 1, sft: 1}",
        "SFT and preferences in one training, from a base model",
        ("weighting",),
        has_reference=False,
    ),
    "cpo": ObjectiveInfo(
        "-log σ(beta (log π_w - log π_l))",
        "CPO: Xu et al. 2024, eq. 3; whole as {cpo: 1, sft: 1}",
        "no reference wanted",
        ("label_smoothing", "ld_alpha", "weighting"),
        has_reference=False,
    ),
    "sft": ObjectiveInfo(
        "-log π_w, a mean over the chosen tokens of the step",
        "Rafailov et al. 2023, section 6 (Preferred-FT); the SFT term of ORPO, CPO and TRL",
        "a term beside another loss, or alone as the baseline Preferred-FT",
        has_reference=False,
    ),
    "sft_norm": ObjectiveInfo(
        "-log π_w / |w|",
        "RPO: Pang et al. 2024, eq. 2, as {sigmoid: 1, sft_norm: 1}",
        "a term beside another loss: the chosen answers' probability should not fall",
        has_reference=False,
    ),
    "plackett_luce": ObjectiveInfo(
        "-Σ_k log(exp r_k / Σ_{j ≥ k} exp r_j), answers in the order of their ranks",
        "Rafailov et al. 2023, appendix A.3, eq. 20",
        "rankings of more than two answers (data/preference/*.ranking.parquet)",
        ("ties",),
    ),
}

SETTINGS = ("label_smoothing", "gamma", "discopop_tau", "divergence", "ld_alpha", "weighting", "margin_scale", "ties")
"""Settings of section train that only some objectives read."""


def learns_log_ratio(losses: Iterable[str], divergence: str = "reverse_kl", ld_alpha: float | None = None) -> bool:
    """Whether beta log(pi / ref), summed over tokens, is the reward that a training with these settings learned.

    A term on the chosen answer alone, beside others, does not change which reward they learn.
    """
    found = [OBJECTIVES[name] for name in losses if name in OBJECTIVES]  # type: ignore[index]
    comparing = [info for info in found if info not in (OBJECTIVES["sft"], OBJECTIVES["sft_norm"])]
    ours = bool(comparing) and all(info.has_reference and info.learns_log_ratio for info in comparing)
    return ours and divergence == "reverse_kl" and ld_alpha is None


def readers(setting: str) -> list[LossName]:
    """The objectives that read a setting."""
    return [name for name, info in OBJECTIVES.items() if setting in info.reads]
