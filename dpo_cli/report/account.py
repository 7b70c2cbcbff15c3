"""The tables of the report: what became of every row of data, and the figures of each stage's run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Metrics = Mapping[str, Mapping[str, Any]]

_NONE = "\N{EN DASH}"
_ARROW = "\N{RIGHTWARDS ARROW}"


@dataclass(frozen=True)
class AccountRow:
    """One line of the account of the data.

    Attributes:
        name: What became of the rows.
        instructions: How many rows of the instruction data.
        pairs: How many preference pairs.
        kind: ``total`` for what is left at a point, ``left-out`` for what went.
    """

    name: str
    instructions: str
    pairs: str
    kind: str


@dataclass(frozen=True)
class RunTable:
    """The figures of one stage.

    Attributes:
        title: The stage in words.
        rows: Name, value, unit.
    """

    title: str
    rows: list[tuple[str, str, str]]


_UNTRAINED = {"none": "the base model as it is", "adapter": "one of the user's own, as it is"}
"""Methods of SFT that train nothing, in words."""


def data_account(metrics: Metrics) -> list[AccountRow]:
    """From the rows read to the rows used, with every reason to leave one out."""
    sft, pairs = metrics["convert_sft"], metrics["convert_preferences"]
    tuned, cached, trained = metrics["sft"], metrics["precompute_ref"], metrics["train"]
    reasons = dict.fromkeys([*sft["rejected"], *pairs["rejected"]])
    has_sft = tuned["method"] not in _UNTRAINED
    return [
        AccountRow("read", _count(sft["num_read"]), _count(pairs["num_read"]), "total"),
        *(
            AccountRow(
                reason.replace("_", " "),
                _count(sft["rejected"].get(reason, 0)),
                _count(pairs["rejected"].get(reason, 0)),
                "left-out",
            )
            for reason in reasons
        ),
        AccountRow("written for training", _count(sft["num_train"]), _count(pairs["num_train"]), "total"),
        AccountRow("written, held out", _count(sft["num_eval"]), _count(pairs["num_eval"]), "total"),
        AccountRow(
            "over-long, or refused by the chat template",
            _count(tuned["num_rejected"]) if has_sft else _NONE,
            _count(cached["num_rejected"]),
            "left-out",
        ),
        AccountRow(
            "used for training",
            _count(tuned["num_rows"]) if has_sft else _NONE,
            _count(trained["num_pairs"]),
            "total",
        ),
        AccountRow(
            "used, held out",
            _count(tuned["num_eval"]) if has_sft else _NONE,
            _count(trained["num_eval"]),
            "total",
        ),
    ]


def run_tables(metrics: Metrics) -> list[RunTable]:
    """The figures of the stages that run a model, in the order in which they run."""
    return [
        RunTable("Supervised fine-tuning", _sft_rows(metrics["sft"])),
        RunTable("Reference cache", _reference_rows(metrics["precompute_ref"])),
        RunTable("DPO", _train_rows(metrics["train"])),
        RunTable("Evaluation", _evaluate_rows(metrics["evaluate"])),
    ]


def _sft_rows(sft: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    if sft["method"] in _UNTRAINED:
        return [("method", sft["method"], _UNTRAINED[sft["method"]])]
    return [
        ("method", sft["method"], ""),
        _steps(sft),
        ("held-out loss", _change(sft["eval_loss_start"], sft["eval_loss"]), "nats a token"),
        ("held-out perplexity", f"{sft['eval_perplexity']:.3f}", ""),
        ("speed", f"{sft['rows_per_s']:,.1f}", "rows/s"),
        ("logical tokens", _count(sft["logical_tokens_per_s"]), "tokens/s"),
        _peak_memory(sft),
    ]


def _steps(trained: Mapping[str, Any]) -> tuple[str, str, str]:
    kept = trained.get("kept_step", trained["num_steps"])
    return "steps", _count(trained["num_steps"]), "" if kept == trained["num_steps"] else f"step {kept} kept"


def _reference_rows(cached: Mapping[str, Any]) -> list[tuple[str, str, str]]:
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


def _train_rows(trained: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    return [
        _steps(trained),
        ("loss at step 0", f"{trained['step0_loss']:.6f}", ""),
        ("largest margin at step 0", _small(trained["step0_max_abs_margin"]), "nats"),
        ("largest difference from the cache", _small(trained["step0_max_abs_logp_difference"]), "nats"),
        ("held-out loss", _change(trained["eval_loss_start"], trained["eval_loss"]), ""),
        ("held-out accuracy", f"{100 * trained['eval_accuracy']:.1f}", "%"),
        ("held-out margin", _signed(trained["eval_margin"]), "nats"),
        ("speed", f"{trained['pairs_per_s']:,.1f}", "pairs/s"),
        ("logical tokens", _count(trained["logical_tokens_per_s"]), "tokens/s"),
        _peak_memory(trained),
    ]


def _evaluate_rows(evaluated: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    lengths = (evaluated["answer_tokens_sft"], evaluated["answer_tokens_dpo"])
    return [
        ("held-out pairs", _count(evaluated["num_pairs"]), ""),
        ("of them ties", _count(evaluated["num_ties"]), ""),
        ("prompts answered", _count(evaluated["num_generated_prompts"]), ""),
        ("answer length, SFT to DPO", f"{lengths[0]:.1f} {_ARROW} {lengths[1]:.1f}", "tokens"),
        ("accuracy of the SFT model itself", f"{100 * evaluated['reference_accuracy']:.1f}", "%"),
        ("KL, over the whole vocabulary", f"{evaluated['kl']:.2f}", "nats"),
        ("KL, from the sampled tokens", f"{evaluated['kl_k1']:.2f}", "nats"),
        _peak_memory(evaluated),
    ]


def _peak_memory(stage: Mapping[str, Any]) -> tuple[str, str, str]:
    return ("peak memory", f"{stage['peak_mem_gib']:.2f}", "GiB")


def _count(number: float) -> str:
    return f"{number:,.0f}"


def _change(before: float, after: float) -> str:
    return f"{before:.4f} {_ARROW} {after:.4f}"


def _small(number: float) -> str:
    return f"{number:.2g}" if number else "0"


def _signed(number: float) -> str:
    return f"{number:+.3f}".replace("-", "\N{MINUS SIGN}")
