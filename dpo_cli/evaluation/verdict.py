"""The verdict: what the metrics mean, in the order in which a user wants to know it.

A function of metrics.json alone, shared by the terminal and the report. No torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from dpo_cli.core.progress import Reporter, Status
from dpo_cli.evaluation.flags import FEWEST, Finding, flags, judge_quality, percent, percent_interval, rate_text

HIGH_KL = 10.0
HARDLY_MOVED = 0.01
"""KL below which the model is all but the reference, nats a sequence."""
USUAL_RATE = 1e-4
"""Default of train.learning_rate: where a model hardly moved, a lower one is the likeliest reason."""
WELL_FORMED = 0.95
FORGETS = 1.25
"""Ratio of perplexities on instruction data above which the model has forgotten some of it."""
WORST_CALIBRATION = 0.1


def verdict(metrics: Mapping[str, Any]) -> list[Finding]:
    """The findings in the metrics of stage evaluate."""
    findings: list[Finding | None] = []
    if "win_rate" in metrics:
        findings += [_win_rate(metrics), _length_controlled(metrics), _against_chosen(metrics), judge_quality(metrics)]
    if "reward_accuracy" in metrics:
        findings += [_accuracy(metrics), _loss(metrics), _calibration(metrics)]
    findings += [_auc(metrics), _kto_loss(metrics), _kl(metrics)]
    if "well_formed_dpo" in metrics:
        findings.append(_well_formed(metrics))
    findings += [_perplexity(metrics), *flags(metrics)]
    return [finding for finding in findings if finding is not None]


def headline(metrics: Mapping[str, Any]) -> tuple[str, Status]:
    """The verdict in one sentence."""
    if metrics["kl_estimates_disagree"]:
        return "Something is wrong with the computation: two estimates of the KL disagree.", "bad"
    too_far = f" It went far from the SFT model; {_to_change(metrics)[0]}." if metrics["kl"] > HIGH_KL else ""
    red = [finding.name for finding in verdict(metrics) if finding.status == "bad"]
    if metrics["kl"] < HARDLY_MOVED and not red:
        return (
            f"The tuned model is all but the SFT model: it hardly moved; {_to_change(metrics)[0]}.",
            "warn",
        )
    if red:  # a win rate or, without a judge, an accuracy below one half is among them
        return f"Tuning did harm: {', '.join(red)}.{too_far}", "bad"
    if "win_rate" not in metrics:
        of_pairs = "reward_accuracy" in metrics
        number = metrics["num_prompts" if of_pairs else "num_answer_prompts"]
        if _around_half(metrics.get("reward_accuracy_ci" if of_pairs else "auc_ci"), number) == "good":
            return "The tuned model learned the preferences; no judge compared its answers.", "good"
        if number < FEWEST:
            return "Too few prompts are held out to show whether the preferences were learned.", "warn"
        return "The held-out preferences do not show that they were learned.", "warn"
    if _around_half(metrics["win_rate_ci"], metrics["num_decided"]) == "good":
        return "The tuned model is better than the SFT model.", "good"
    if metrics["num_decided"] < FEWEST:
        return "The comparison is open: too few prompts have a winner.", "warn"
    return f"The comparison is open: the interval of the win rate contains one half.{too_far}", "warn"


def report_verdict(
    metrics: Mapping[str, Any], reporter: Reporter, *, of: str = "", also: Sequence[tuple[str, str]] = ()
) -> None:
    """Print the verdict.

    Args:
        metrics: Those of stage evaluate.
        reporter: Prints it.
        of: What the headline begins with.
        also: Rows below the findings: name and value.
    """
    text, status = headline(metrics)
    rows: list[tuple[Status, str, str]] = [
        (finding.status, finding.name, f"{finding.value}  ({finding.meaning})") for finding in verdict(metrics)
    ]
    rows.extend(("plain", name, value) for name, value in also)
    reporter.verdict(f"{of}: {text}" if of else text, status, rows)


def _around_half(ci: list[float] | None, number: int) -> Status:
    """Of a rate's interval over so many prompts; too few say nothing, whatever a bootstrap of them says."""
    if ci is None or number < FEWEST:
        return "warn"
    return "good" if ci[0] > 0.5 else "bad" if ci[1] < 0.5 else "warn"


def _to_change(metrics: Mapping[str, Any]) -> list[str]:
    """What to do about a model that hardly moved, or went too far: settings with their values, the likeliest first."""
    training, further = metrics.get("training"), metrics["kl"] < HARDLY_MOVED
    if training is None:  # a model of whose training nothing is known
        how_long, rate = ("longer", "higher") if further else ("less", "lower")
        return [f"train {how_long}, or with a {rate} learning rate"]
    limit = "max_steps" if training["max_steps"] else "epochs"
    steps = f", so {training['num_steps']} steps" if limit == "epochs" and training["num_steps"] else ""
    rate = f"train.learning_rate, which was {training['learning_rate']:g}"
    if further and training["kept_step"] == 0:
        return [f"train.keep best kept its start: lower {rate}"]
    do, undo = ("raise", "lower") if further else ("lower", "raise")
    first = [f"{do} {rate}", f"{do} train.{limit}, which was {training[limit]:g}{steps}"]
    rate_is_odd = training["learning_rate"] < USUAL_RATE if further else training["learning_rate"] > USUAL_RATE
    return [*(first if rate_is_odd else reversed(first)), f"{undo} train.beta, which was {training['beta']:g}"]


def _win_rate(metrics: Mapping[str, Any]) -> Finding:
    ceiling, detectable = metrics.get("win_rate_ceiling"), metrics["detectable_win_rate"]
    meaning = (
        f"on {metrics['num_judged']} unseen prompts at T = {metrics['temperature']:g},"
        f" ties ({percent(metrics['tie_rate'])}) one half"
    )
    if metrics["judge"] == "reward-model":
        meaning += "; the mean probability of the reward model, which learned from the same preferences"
    elif ceiling is not None:
        meaning += f"; at most {percent(ceiling)}, since SFT is already right on {percent(2 * (1 - ceiling))}"
    if detectable is not None:
        meaning += f"; 80% power to detect a true {percent(detectable)}"
    status = _around_half(metrics["win_rate_ci"], metrics["num_decided"])
    return Finding("win rate over SFT", rate_text(metrics, "win_rate"), status, meaning)


def _length_controlled(metrics: Mapping[str, Any]) -> Finding | None:
    name, rate, ci = "win rate at equal length", metrics["win_rate_lc"], metrics["win_rate_lc_ci"]
    if rate is None:
        return Finding(name, "-", "plain", metrics["length_note"])
    meaning = "offline length control, from the trend of wins with the difference in length; not AlpacaEval's"
    if metrics["length_note"]:
        meaning = metrics["length_note"]
    if ci is None:
        return Finding(name, percent(rate), "plain", f"{meaning}; no interval: too many bootstrap draws have no fit")
    return Finding(name, f"{percent(rate)} {percent_interval(ci)}", "good" if ci[0] > 0.5 else "warn", meaning)


def _against_chosen(metrics: Mapping[str, Any]) -> Finding | None:
    if "win_rate_chosen" not in metrics:
        return None
    return Finding(
        "win rate over the data",
        rate_text(metrics, "win_rate_chosen"),
        "plain",
        "against the chosen answers of the held-out pairs; one half means as good as what it learned from",
    )


def _accuracy(metrics: Mapping[str, Any]) -> Finding:
    return Finding(
        "held-out reward accuracy",
        rate_text(metrics, "reward_accuracy"),
        _around_half(metrics["reward_accuracy_ci"], metrics["num_prompts"]),
        f"of {metrics['num_pairs']} held-out pairs the implicit reward prefers the chosen answer;"
        f" always taking the longer one gives {percent(metrics['longer_accuracy'])}",
    )


def _auc(metrics: Mapping[str, Any]) -> Finding | None:
    if "auc" not in metrics:
        return None
    return Finding(
        "held-out AUC",
        rate_text(metrics, "auc"),
        _around_half(metrics["auc_ci"], metrics["num_answer_prompts"]),
        "how often a good held-out answer has a higher implicit reward than a bad one, to whichever prompts"
        f" ({metrics['num_good']} good, {metrics['num_bad']} bad); taking the longer one gives"
        f" {percent(metrics['longer_auc'])}",
    )


def _loss(metrics: Mapping[str, Any]) -> Finding:
    of = "-log σ(margin) of pairs that were not trained on, before and after"
    return _fall(metrics, "held-out loss", "loss", metrics["num_prompts"], of)


def _kto_loss(metrics: Mapping[str, Any]) -> Finding | None:
    if "kto_loss" not in metrics:
        return None
    of = "KTO's loss of single answers that were not trained on, before and after"
    return _fall(metrics, "held-out KTO loss", "kto_loss", metrics["num_answer_prompts"], of)


def _fall(metrics: Mapping[str, Any], name: str, loss: str, num_prompts: int, meaning: str) -> Finding:
    """A loss before and after."""
    before, after, ci = metrics[f"{loss}_at_reference"], metrics[loss], metrics[f"{loss}_ci"]
    low, high = ci or (-math.inf, math.inf)
    another = not metrics["learns_log_ratio"]
    return Finding(
        name,
        f"{before:.4f} -> {after:.4f}" + (f" [{low:.4f}, {high:.4f}]" if ci else ""),
        "plain"
        if another
        else "good"
        if after < before
        else "bad"
        if low > before and num_prompts >= FEWEST
        else "warn",
        meaning + ("; the training loss learned a reward of another form (docs/objectives.md)" if another else ""),
    )


def _calibration(metrics: Mapping[str, Any]) -> Finding:
    error, temperature = metrics["calibration_error"], metrics["calibration_temperature"]
    value = f"{percent(error)} off"
    meaning = "how far σ(margin) is from how often it is right (ECE)"
    if temperature is not None:
        value += f", temperature {temperature:.2f}"
        meaning += (
            f"; margins are {'overconfident' if temperature > 1 else 'underconfident'}; dividing by this fits best"
        )
    elif metrics["calibration_note"]:
        meaning += f"; {metrics['calibration_note']}"
    if not metrics["learns_log_ratio"]:
        return Finding("calibration", value, "plain", f"{meaning}; the training loss learned a reward of another form")
    return Finding("calibration", value, "warn" if error > WORST_CALIBRATION else "plain", meaning)


def _kl(metrics: Mapping[str, Any]) -> Finding:
    disagree, kl = metrics["kl_estimates_disagree"], metrics["kl"]
    meaning = "per answer, along the tuned model's own samples at T = 1"
    if disagree:
        meaning += "; its two estimates disagree, so one of them is wrong"
    elif kl < HARDLY_MOVED:
        meaning += f"; the model hardly moved: {', or '.join(_to_change(metrics))}"
    elif kl > HIGH_KL:
        meaning += f"; the model went far, look at its answers: {', or '.join(_to_change(metrics))}"
    status: Status = "bad" if disagree else "warn" if kl > HIGH_KL or kl < HARDLY_MOVED else "good"
    return Finding("KL from the reference", f"{kl:.2f} nats", status, meaning)


def _well_formed(metrics: Mapping[str, Any]) -> Finding:
    """Red where, of the prompts that only one model answers in form, the tuned one surely has fewer than half."""
    share, number = metrics["well_formed_dpo"], metrics.get("num_form_decided", 0)
    meaning = "a win with broken text is not a win"
    if number:
        meaning += f"; on {number} prompts only one of the two answers is well formed, ours"
        meaning += f" on {percent(metrics['form_win_rate'])}"
        meaning += f" {percent_interval(metrics['form_win_rate_ci'])} of them"
    fell = _around_half(metrics.get("form_win_rate_ci"), number) == "bad"
    return Finding(
        "well-formed answers",
        f"{percent(metrics['well_formed_sft'])} -> {percent(share)}",
        "good" if share >= WELL_FORMED else "bad" if fell else "warn",
        meaning,
    )


def _perplexity(metrics: Mapping[str, Any]) -> Finding | None:
    if "perplexity_dpo" not in metrics:
        return None
    before, after = metrics["perplexity_sft"], metrics["perplexity_dpo"]
    forgets = after > FORGETS * before
    base = f" (base {metrics['perplexity_base']:.2f})" if "perplexity_base" in metrics else ""
    return Finding(
        "perplexity of SFT text",
        f"{before:.2f} -> {after:.2f}{base}",
        "warn" if forgets else "plain",
        "a token of held-out instruction data"
        + ("; it rose: some of what SFT taught was forgotten" if forgets else "; a rise means forgetting"),
    )
