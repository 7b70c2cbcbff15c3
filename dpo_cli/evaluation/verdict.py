"""The verdict: what the metrics mean, in the order in which a user wants to know it.

A pure function of metrics.json, shared by the terminal and the report. No torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Status = Literal["good", "warn", "bad", "plain"]

HIGH_KL = 10.0
WELL_FORMED = 0.95
MORE_UNFINISHED = 0.05


@dataclass(frozen=True)
class Finding:
    """One line of the verdict.

    Attributes:
        name: The quantity.
        value: Its value with interval and unit, as text.
        status: good, warn, bad, or plain where no judgment is made.
        meaning: What it says, in one sentence.
    """

    name: str
    value: str
    status: Status
    meaning: str


def verdict(metrics: Mapping[str, Any]) -> list[Finding]:
    """The findings in the metrics of stage evaluate."""
    findings = []
    if "win_rate" in metrics:
        findings.append(_win_rate(metrics))
    findings += [_accuracy(metrics), _loss(metrics), _kl(metrics)]
    if "well_formed_dpo" in metrics:
        findings.append(_well_formed(metrics))
    findings += [_finished(metrics), _displacement(metrics)]
    return findings


def headline(metrics: Mapping[str, Any]) -> tuple[str, Status]:
    """The verdict in one sentence."""
    statuses = [finding.status for finding in verdict(metrics)]
    broken = "bad" in statuses
    if "win_rate" not in metrics:
        low, high = metrics["reward_accuracy_ci"]
        if broken or high < 0.5:
            return "Tuning did harm: see the red lines.", "bad"
        if low > 0.5:
            return "The tuned model learned the preferences; no judge compared its answers.", "good"
        return "The held-out pairs do not show that the preferences were learned.", "warn"
    low, high = metrics["win_rate_ci"]
    if low > 0.5 and not broken:
        return "The tuned model is better than the SFT model.", "good"
    if high < 0.5 or broken:
        return "Tuning did harm: see the red lines.", "bad"
    return "The comparison is open: the interval of the win rate holds one half.", "warn"


def _percent(value: float) -> str:
    return f"{100 * value:.1f}%"


def _interval(ci: tuple[float, float]) -> str:
    return f"[{_percent(ci[0])}, {_percent(ci[1])}]"


def _win_rate(metrics: Mapping[str, Any]) -> Finding:
    low, high = metrics["win_rate_ci"]
    ceiling = metrics.get("win_rate_ceiling")
    status: Status = "good" if low > 0.5 else "bad" if high < 0.5 else "warn"
    return Finding(
        "win rate over SFT",
        f"{_percent(metrics['win_rate'])} {_interval((low, high))}",
        status,
        f"on {metrics['num_generated_prompts']} unseen prompts at T = {metrics['temperature']:g},"
        f" ties ({_percent(metrics['tie_rate'])}) one half"
        + (
            "; the mean of the reward model's probabilities, which learned of the same preferences"
            if ceiling is None
            else f"; at most {_percent(ceiling)}, since SFT is right on {_percent(2 * (1 - ceiling))} already"
        ),
    )


def _accuracy(metrics: Mapping[str, Any]) -> Finding:
    low, high = metrics["reward_accuracy_ci"]
    status: Status = "good" if low > 0.5 else "bad" if high < 0.5 else "warn"
    return Finding(
        "held-out reward accuracy",
        f"{_percent(metrics['reward_accuracy'])} {_interval((low, high))}",
        status,
        f"of {metrics['num_pairs']} held-out pairs the implicit reward prefers the chosen answer;"
        f" always taking the longer one gives {_percent(metrics['longer_accuracy'])}",
    )


def _loss(metrics: Mapping[str, Any]) -> Finding:
    before, after = metrics["loss_at_reference"], metrics["loss"]
    low, high = metrics["loss_ci"]
    another = not metrics["learns_log_ratio"]
    return Finding(
        "held-out loss",
        f"{before:.4f} -> {after:.4f} [{low:.4f}, {high:.4f}]",
        "plain" if another else "good" if after < before else "bad" if low > before else "warn",
        "-log σ(margin) of pairs that were not trained on, before and after"
        + ("; the training loss learned a reward of another form (docs/objectives.md)" if another else ""),
    )


def _kl(metrics: Mapping[str, Any]) -> Finding:
    disagree = metrics["kl_estimates_disagree"]
    return Finding(
        "KL from the reference",
        f"{metrics['kl']:.2f} nats",
        "bad" if disagree else "warn" if metrics["kl"] > HIGH_KL else "good",
        "a sequence, along the tuned model's own samples at T = 1"
        + ("; its two estimates disagree, so one of them is wrong" if disagree else ""),
    )


def _well_formed(metrics: Mapping[str, Any]) -> Finding:
    share = metrics["well_formed_dpo"]
    return Finding(
        "well-formed answers",
        f"{_percent(metrics['well_formed_sft'])} -> {_percent(share)}",
        "good" if share >= WELL_FORMED else "warn" if share >= metrics["well_formed_sft"] else "bad",
        "a win that is bought by broken text is no win",
    )


def _finished(metrics: Mapping[str, Any]) -> Finding:
    before, after = metrics["finished_sft"], metrics["finished_dpo"]
    return Finding(
        "answers that end by themselves",
        f"{_percent(before)} -> {_percent(after)}",
        "warn" if after < before - MORE_UNFINISHED else "plain",
        "within evaluate.max_new_tokens; a falling share is a sign of degeneration",
    )


def _displacement(metrics: Mapping[str, Any]) -> Finding:
    chosen = metrics["chosen_reward"]
    return Finding(
        "reward of chosen answers",
        f"{chosen:+.3f} (rejected {metrics['rejected_reward']:+.3f})",
        "warn" if chosen < 0 else "plain",
        "chosen answers became less likely than before: common with DPO, and no failure by itself"
        if chosen < 0
        else "chosen answers became more likely than before",
    )
