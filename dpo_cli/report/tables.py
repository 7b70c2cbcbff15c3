"""The tables of the report: what became of every row of data, the figures of each stage's run, and the judge."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from dpo_cli.core.judges import JUDGES

Metrics = Mapping[str, Any]
Rows = list[tuple[str, str, str]]
"""Name, value, unit."""

_NONE = "\N{EN DASH}"
_ARROW = "\N{RIGHTWARDS ARROW}"
_UNTRAINED = {"none": "the base model as it is", "adapter": "one of the user's own, as it is"}
"""Methods of SFT that train nothing, in words."""


def data_account(metrics: Mapping[str, Metrics]) -> list[tuple[str, str, str, str]]:
    """From the rows read to the rows used, with every reason to leave one out.

    Returns:
        ``total`` for what is left at a point or ``left-out`` for what went; what became of the rows; how many rows of
        the instruction data; how many preference pairs.
    """
    sft, pairs = metrics["convert_sft"], metrics["convert_preferences"]
    tuned, cached, trained = metrics["sft"], metrics["precompute_ref"], metrics["train"]
    if tuned["method"] in _UNTRAINED:
        tuned = {}
    rows = [
        ("total", "read", sft["num_read"], pairs["num_read"]),
        *(
            ("left-out", reason.replace("_", " "), sft["rejected"].get(reason, 0), pairs["rejected"].get(reason, 0))
            for reason in dict.fromkeys([*sft["rejected"], *pairs["rejected"]])
        ),
        ("total", "written for training", sft["num_train"], pairs["num_train"]),
        ("total", "written, held out", sft["num_eval"], pairs["num_eval"]),
        (
            "left-out",
            "over-long, or refused by the chat template",
            tuned.get("num_rejected"),
            cached["num_rejected"],
        ),
        ("total", "used for training", tuned.get("num_rows"), trained["num_pairs"]),
        ("total", "used, held out", tuned.get("num_eval"), trained["num_eval"]),
    ]
    return [
        (kind, name, _NONE if instructions is None else _count(instructions), _count(number))
        for kind, name, instructions, number in rows
    ]


def run_tables(metrics: Mapping[str, Metrics]) -> dict[str, Rows]:
    """The figures of the stages that run a model, by the stage in words, in the order in which they run."""
    return {
        "Supervised fine-tuning": _sft_rows(metrics["sft"]),
        "Reference cache": _reference_rows(metrics["precompute_ref"]),
        "DPO": _train_rows(metrics["train"]),
        "Evaluation": _evaluate_rows(metrics["evaluate"]),
    }


def round_rows(metrics: Mapping[str, Metrics]) -> list[tuple[str, ...]]:
    """The rounds beside each other, this one last, where the SFT model is what an earlier project tuned.

    Returns:
        A row a round: number and project, pairs, win rate over the model that it began with, its interval, KL from that
        model, and the mean reward of the answers before and after, where the judge has one.
    """
    before = metrics["sft"].get("rounds", [])
    last = {"project": "this project", **metrics["evaluate"], "num_pairs": metrics["train"]["num_pairs"]}
    rows = []
    for number, each in enumerate([*before, last] if before else [], start=1):
        low, high = each.get("win_rate_ci") or (None, None)
        rewards = [each.get(f"reward_{model}") for model in ("sft", "dpo")]
        rows.append(
            (
                f"{number}: {each['project']}",
                _or_none(each.get("num_pairs"), _count),
                _or_none(each.get("win_rate"), _percent),
                "" if low is None or high is None else f"[{_percent(low)}, {_percent(high)}]",
                _or_none(each.get("kl"), "{:.2f}".format),
                _NONE if None in rewards else f"{rewards[0]:.3f} {_ARROW} {rewards[1]:.3f}",
            )
        )
    return rows


def _or_none(value: float | None, text: Callable[[float], str]) -> str:
    return _NONE if value is None else text(value)


def _sft_rows(sft: Metrics) -> Rows:
    if sft["method"] in _UNTRAINED:
        rounds = sft.get("rounds")
        what = f"that of {rounds[-1]['project']}, as it is" if rounds else _UNTRAINED[sft["method"]]
        return [("method", sft["method"], what)]
    return [
        ("method", sft["method"], ""),
        _steps(sft),
        ("held-out loss", _change(sft), "nats a token"),
        ("held-out perplexity", f"{sft['eval_perplexity']:.3f}", ""),
        ("speed", f"{sft['rows_per_s']:,.1f}", "rows/s"),
        ("logical tokens", _count(sft["logical_tokens_per_s"]), "tokens/s"),
        _peak_memory(sft),
    ]


def _reference_rows(cached: Metrics) -> Rows:
    speed = []
    if cached["num_computed"]:
        speed = [
            ("speed", f"{cached['completions_per_s']:,.1f}", "answers/s"),
            ("completion tokens", _count(cached["completion_tokens_per_s"]), "tokens/s"),
        ]
    return [
        ("answers in the cache", _count(cached["num_completions"]), ""),
        ("computed in this run", _count(cached["num_computed"]), ""),
        ("reused from earlier runs", _count(cached["num_reused"]), ""),
        *speed,
        _peak_memory(cached),
    ]


def _train_rows(trained: Metrics) -> Rows:
    return [
        _steps(trained),
        ("loss at step 0", f"{trained['step0_loss']:.6f}", ""),
        ("largest margin at step 0", f"{trained['step0_max_abs_margin']:.2g}", "nats"),
        ("largest difference from the cache", f"{trained['step0_max_abs_logp_difference']:.2g}", "nats"),
        ("held-out loss", _change(trained), ""),
        ("held-out accuracy", f"{100 * trained['eval_accuracy']:.1f}", "%"),
        ("held-out margin", f"{trained['eval_margin']:+.3f}".replace("-", "\N{MINUS SIGN}"), "nats"),
        ("speed", f"{trained['pairs_per_s']:,.1f}", "pairs/s"),
        ("logical tokens", _count(trained["logical_tokens_per_s"]), "tokens/s"),
        _peak_memory(trained),
    ]


def _evaluate_rows(evaluated: Metrics) -> Rows:
    lengths = f"{evaluated['answer_tokens_sft']:.1f} {_ARROW} {evaluated['answer_tokens_dpo']:.1f}"
    held_out, reference = [], []
    if "num_pairs" in evaluated:
        held_out += [("held-out pairs", _count(evaluated["num_pairs"]), "")]
        held_out += [("of them ties", _count(evaluated["num_ties"]), "")]
        reference = [("accuracy of the SFT model itself", f"{100 * evaluated['reference_accuracy']:.1f}", "%")]
    if "num_good" in evaluated:
        held_out += [(f"held-out {side} answers", _count(evaluated[f"num_{side}"]), "") for side in ("good", "bad")]
    return [
        *held_out,
        ("prompts answered", _count(evaluated["num_generated_prompts"]), ""),
        ("answer length, SFT to DPO", lengths, "tokens"),
        *reference,
        ("KL, over the whole vocabulary", f"{evaluated['kl']:.2f}", "nats"),
        ("KL, from the sampled tokens", f"{evaluated['kl_k1']:.2f}", "nats"),
        _peak_memory(evaluated),
    ]


def judge_rows(metrics: Metrics) -> Rows:
    """What is known of the judge; nothing where there was none."""
    kind = metrics.get("judge", "none")
    if kind == "none":
        return []
    known = JUDGES.get(kind)
    rows = [("judge", known.words if known else str(kind))]
    if known and known.names_itself and (name := metrics.get("judge_name")):
        rows.append(("name", name))
    low, high = metrics.get("judge_agreement_ci") or (None, None)
    interval = "" if low is None or high is None else f" [{_percent(low)}, {_percent(high)}]"
    for key, label, text in (
        ("num_judged", "judged against SFT", _count),
        ("num_judged_chosen", "judged against chosen", _count),
        ("judge_consistency", "same winner in both orders", _percent),
        ("judge_first_position_rate", "prefers the first answer", _percent),
        ("judge_invalid_rate", "without a verdict", _percent),
        ("num_identical", "identical answers, so ties", _count),
        ("judge_agreement", "agrees with the data", lambda rate: f"{_percent(rate)}{interval}"),
        ("num_judge_agreement", "on held-out pairs", _count),
    ):
        if metrics.get(key) is not None:
            rows.append((label, text(metrics[key])))
    return [(name, value, "") for name, value in rows]


def _steps(trained: Metrics) -> tuple[str, str, str]:
    kept = trained.get("kept_step", trained["num_steps"])
    return "steps", _count(trained["num_steps"]), "" if kept == trained["num_steps"] else f"step {kept} kept"


def _peak_memory(stage: Metrics) -> tuple[str, str, str]:
    return "peak memory", f"{stage['peak_mem_gib']:.2f}", "GiB"


def _change(trained: Metrics) -> str:
    return f"{trained['eval_loss_start']:.4f} {_ARROW} {trained['eval_loss']:.4f}"


def _count(number: float) -> str:
    return f"{number:,.0f}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"
