"""A folder of reports as all stages and the commands beside them leave it, with as many prompts as wanted.

The numbers are made up, but hang together; equal arguments give equal files.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from typing import Any

from dpo_cli.core import paths
from dpo_cli.core.artifacts import write_json, write_json_array, write_text
from dpo_cli.training.history import write_tsv

ATTACK = "</script><script>alert(1)</script><img src=https://evil.example/x onerror=alert(1)>\"'&amp;"
SFT_COLUMNS = ("step", "loss", "eval_loss", "grad_norm", "learning_rate")
JUDGED = ("win_rate", "win_rate_ci", "tie_rate", "win_rate_ceiling", "well_formed_sft", "well_formed_dpo")
OPTIONAL = ("reliability", "accuracy_by", "temperatures", "frontier", "length")

METRICS: dict[str, dict[str, Any]] = {
    "convert_sft": {
        "num_read": 1600,
        "num_train": 1431,
        "num_eval": 161,
        "num_rejected": 8,
        "rejected": {"empty_completion": 5, "duplicate": 3},
    },
    "convert_preferences": {
        "num_read": 3600,
        "num_train": 3218,
        "num_eval": 355,
        "num_rejected": 27,
        "rejected": {"equal_sides": 17, "duplicate": 10},
    },
    "sft": {
        "method": "lora",
        "num_rows": 1429,
        "num_eval": 160,
        "num_rejected": 3,
        "num_steps": 540,
        "loss": 0.31,
        "eval_loss_start": 4.8,
        "eval_loss": 0.35,
        "eval_perplexity": 1.42,
        "rows_per_s": 92.0,
        "logical_tokens_per_s": 4123.0,
        "peak_mem_gib": 0.9,
    },
    "precompute_ref": {
        "num_completions": 7142,
        "num_computed": 0,
        "num_reused": 7142,
        "num_rejected": 2,
        "completions_per_s": None,
        "completion_tokens_per_s": None,
        "peak_mem_gib": 0.8,
    },
    "train": {
        "num_pairs": 3217,
        "num_eval": 354,
        "num_rejected": 2,
        "num_steps": 603,
        "step0_loss": 0.6931471805599453,
        "step0_max_abs_margin": 0.0,
        "step0_max_abs_logp_difference": 1.9e-6,
        "loss": 0.2,
        "eval_loss_start": 0.6931,
        "eval_loss": 0.27,
        "eval_accuracy": 0.9,
        "eval_margin": 3.4,
        "pairs_per_s": 38.0,
        "logical_tokens_per_s": 2950.0,
        "peak_mem_gib": 1.1,
    },
    "evaluate": {
        "judge": "hf",
        "judge_name": "a-judge-8b",
        "win_rate": 0.79,
        "win_rate_ci": [0.75, 0.83],
        "tie_rate": 0.3,
        "num_judged": 490,
        "num_decided": 343,
        "win_rate_ceiling": 0.865,
        "detectable_win_rate": 0.562,
        "win_rate_chosen": 0.55,
        "win_rate_chosen_ci": [0.505, 0.595],
        "num_judged_chosen": 490,
        "win_rate_lc": 0.74,
        "win_rate_lc_ci": [0.7, 0.78],
        "length_effect": 0.62,
        "length_scale": 41.0,
        "length_note": "",
        "judge_consistency": 0.87,
        "judge_first_position_rate": 0.54,
        "judge_invalid_rate": 0.012,
        "num_judge_invalid": 6,
        "num_identical": 11,
        "judge_agreement": 0.81,
        "judge_agreement_ci": [0.76, 0.85],
        "num_judge_agreement": 354,
        "calibration_error": 0.043,
        "calibration_error_ci": [0.027, 0.071],
        "calibration_temperature": 1.3,
        "calibration_note": "",
        "margin_quantiles": {"0.05": -1.1, "0.25": 1.2, "0.5": 3.1, "0.75": 4.9, "0.95": 7.3},
        "perplexity_base": 9.1,
        "perplexity_sft": 4.2,
        "perplexity_dpo": 4.9,
        "entropy_sft": 1.21,
        "entropy_dpo": 0.94,
        "repetition_sft": 0.021,
        "repetition_dpo": 0.034,
        "distinct_sft": 0.71,
        "distinct_dpo": 0.69,
        "length_ratio": 1.12,
        "reward_length_correlation": 0.18,
        "well_formed_sft": 1.0,
        "well_formed_dpo": 0.99,
        "reward_accuracy": 0.9,
        "reward_accuracy_ci": [0.87, 0.93],
        "loss": 0.27,
        "loss_ci": [0.24, 0.3],
        "loss_at_reference": 0.6931,
        "learns_log_ratio": True,
        "margin": 3.2,
        "margin_ci": [2.9, 3.5],
        "chosen_reward": -0.1,
        "rejected_reward": -3.3,
        "reference_accuracy": 0.5,
        "longer_accuracy": 0.47,
        "num_ties": 0,
        "num_pairs": 354,
        "num_prompts": 320,
        "num_generated_prompts": 500,
        "temperature": 0.7,
        "kl": 4.2,
        "kl_ci": [3.9, 4.5],
        "kl_k1": 4.3,
        "kl_estimates_disagree": False,
        "finished_sft": 1.0,
        "finished_dpo": 1.0,
        "answer_tokens_sft": 178.0,
        "answer_tokens_dpo": 199.0,
        "num_leaked_prompts": 0,
        "peak_mem_gib": 1.2,
    },
}

_WORDS = (
    "the a of to and in that it is was for on are with as his they at be this from have or by one had not but what all"
    " were when we there can an your which their said if do will each about how up out them then she many some so these"
    " would other into has more her two like him see time could no make than first been its who now people my made over"
    " did down only way find use may water long little very after words called just where most know get through back"
    " much before go good new write our used me man too any day same right look think also around another came come"
    " work three word must because does part even place well such here take why things help put years different away"
    " again off went old number great tell men say small every found still between name should home big give air line"
).split()


def write_reports(num_prompts: int = 100, *, num_tokens: int = 12, judged: bool = True, heat: bool = True) -> None:
    """Write reports/ into the working directory.

    Args:
        num_prompts: Rows of samples.json.
        num_tokens: Length of an answer, about.
        judged: Whether there was a judge.
        heat: Whether the tuned answers have their tokens' log-ratios.
    """
    for stage, metrics in METRICS.items():
        write_metrics(stage, metrics)
    if not judged:
        kept = {name: value for name, value in METRICS["evaluate"].items() if name not in JUDGED}
        write_metrics("evaluate", kept | {"judge": "none"})
    rows = train_rows()
    write_tsv(paths.report_dir("train") / "steps.tsv", rows, rows[0] | rows[1] | rows[2])
    sft = [{"step": step, "loss": 1.0 / (step + 1), "eval_loss": 1.1 / (step + 1)} for step in range(5)]
    write_tsv(paths.report_dir("sft") / "steps.tsv", sft, SFT_COLUMNS)
    write_samples(make_samples(num_prompts, num_tokens=num_tokens, judged=judged, heat=heat))
    _write_pairs()
    if judged:
        _write_win_rates()
    write_metrics("agreement", _agreement())
    write_metrics("capability", _capability())


def write_metrics(stage: str, metrics: dict[str, Any]) -> None:
    write_json(paths.metrics_file(stage), {stage: metrics})


def write_samples(samples: Iterable[dict[str, Any]]) -> None:
    write_json_array(paths.report_dir("evaluate") / "samples.json", samples)


def write_csv(name: str, header: str, rows: Iterable[Sequence[object]]) -> None:
    """A CSV file of stage evaluate."""
    lines = [",".join(f"{cell:.6g}" if isinstance(cell, float) else str(cell) for cell in row) for row in rows]
    write_text(paths.report_dir("evaluate") / f"{name}.csv", "\n".join([header, *lines]) + "\n")


# --- samples ------------------------------------------------------------------------------


def make_samples(count: int, *, num_tokens: int = 12, judged: bool = True, heat: bool = True) -> list[dict[str, Any]]:
    """Samples with losses, ties and wins in turn, 1 and 1 for each 8; every seventh verdict depends on the order.

    Sample 0 and 1 are attacks, sample 2 is Chinese, sample 3 Arabic; of twenty, one has several turns. Where there
    are more than twenty, the last one has no verdict.
    """
    rng = random.Random("samples")
    samples = []
    for number in range(count):
        sft, tuned = _answers(rng, number, num_tokens)
        sample: dict[str, Any] = {
            "id": sample_id(number),
            "prompt": _prompt(rng, number),
            "chosen": _prose(rng, num_tokens) if number % 5 else None,
            "rejected": _prose(rng, num_tokens) if number % 5 else None,
            "sft": {"text": "".join(sft), "num_tokens": len(sft), "finished": True},
            "dpo": {"text": "".join(tuned), "num_tokens": len(tuned) + 1, "finished": number % 11 != 3},
            "kl": round(rng.lognormvariate(1, 0.7), 6),
        }
        if heat:
            ratios = [round(rng.gauss(0.1, 0.5), 4) for _ in range(len(tuned) + 1)]
            sample["dpo"]["heat"] = [[text, ratio] for text, ratio in zip([*tuned, "<|end|>"], ratios, strict=True)]
        if judged and not (number >= 20 and number == count - 1):
            low = round(rng.uniform(0.02, 0.4), 3)
            sample["win"] = {0: low, 1: 0.5}.get(number % 10, 1 - low)
            sample["win_chosen"] = round(rng.random(), 3)
            sample["consistent"] = number % 7 != 0
        samples.append(sample)
    return samples


def sample_id(number: int) -> str:
    """Ids that lie about in no order, as digests do."""
    return f"{number * 2654435761 % 2**32:08x}{number:024x}"


def _prompt(rng: random.Random, number: int) -> list[dict[str, str]]:
    if number == 0:
        return [{"role": "system", "content": ATTACK}, {"role": "user", "content": ATTACK}]
    if number == 2:
        return [{"role": "user", "content": "请用一句话介绍你自己。"}]
    if number == 3:
        return [{"role": "user", "content": "اكتب جملة واحدة عن البحر، مع كلمة English في الوسط."}]
    question = {"role": "user", "content": f"Question {number}: {_prose(rng, 24)}?"}
    if number % 20:
        return [question]
    return [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": f"{_prose(rng, 18)}?"},
        {"role": "assistant", "content": _prose(rng, 30)},
        question,
    ]


def _answers(rng: random.Random, number: int, num_tokens: int) -> tuple[list[str], list[str]]:
    """Tokens of the SFT and of the tuned answer, which have most words in common."""
    if number < 2:
        return [ATTACK], [ATTACK, "<!-- ", "]]> ", "\u2028", "x"]
    if number == 2:
        return list("我是一个语言模型，可以回答问题。"), list("我是一个很有用的助手，可以回答许多问题。")
    if number == 3:
        return ["البحر", " هادئ", " جدا", "."], ["البحر", " English", " هادئ", " وجميل", " جدا", "."]
    sft = _words(rng, max(3, round(num_tokens * rng.uniform(0.6, 1.3))))
    tuned = [word for word in sft if rng.random() > 0.12]
    for _ in range(max(1, num_tokens // 8)):
        tuned.insert(rng.randrange(len(tuned) + 1), f" {rng.choice(_WORDS)}")
    return sft, tuned


def _words(rng: random.Random, count: int) -> list[str]:
    words = [f"{'' if place == 0 else ' '}{rng.choice(_WORDS)}" for place in range(count - 1)]
    for place in range(14, count - 1, 15):
        words[place] += ".\n\n" if rng.random() < 0.2 else "."
    return [*words, "."]


def _prose(rng: random.Random, count: int) -> str:
    return "".join(_words(rng, count))[:-1]


# --- tables -------------------------------------------------------------------------------


def train_rows(num_steps: int = 41) -> list[dict[str, Any]]:
    """Logged steps of a run whose chosen reward sinks below zero half-way; the held-out pass is at every fourth one."""
    rng = random.Random("steps")
    rows = []
    for step in range(num_steps):
        done = step / (num_steps - 1)
        values = {
            "loss": 0.693 * math.exp(-1.4 * done),
            "rewards/chosen": 1.2 * done * (1 - 1.6 * done),
            "rewards/rejected": -3 * done,
            "rewards/accuracies": 0.5 + 0.42 * (1 - math.exp(-4 * done)),
            "entropy": 1.3 - 0.4 * done,
        }
        values["rewards/margins"] = values["rewards/chosen"] - values["rewards/rejected"]
        row: dict[str, Any] = {"step": step}
        if step:
            row |= {name: round(value + rng.gauss(0, 0.04), 6) for name, value in values.items()}
            row["grad_norm"] = round(2 * math.exp(-2 * done) + abs(rng.gauss(0, 0.2)), 6)
        if step % 4 == 0:
            row |= {f"eval_{name}": round(value, 6) for name, value in values.items()}
        rows.append(row)
    return rows


def _write_pairs() -> None:
    rng = random.Random("pairs")
    margins = [rng.gauss(3.2, 2.4) for _ in range(354)]
    sources = [rng.choice(("web", "web", "books & letters", "$x_1$ <b>", "论坛")) for _ in margins]
    write_csv(
        "pairs",
        "id,prompt,chosen_reward,rejected_reward,margin,loss,chosen_tokens,rejected_tokens,source",
        (
            (f"{n:032x}", f"{n:032x}", margin - 3.3, -3.3, margin, math.log1p(math.exp(-margin)), n % 90, 45, source)
            for n, (margin, source) in enumerate(zip(margins, sources, strict=True))
        ),
    )
    edges = [-4 + 0.5 * number for number in range(29)]
    shares = [sum(edge <= margin < edge + 0.5 for margin in margins) / len(margins) for edge in edges]
    write_csv("margins", "margin,share", ((e + 0.25, share) for e, share in zip(edges, shares, strict=True)))
    bins = ((0.5, 21), (0.6, 24), (0.7, 38), (0.8, 61), (0.9, 210))
    write_csv(
        "reliability",
        "low,high,num_pairs,probability,accuracy,accuracy_low,accuracy_high",
        (
            (
                low,
                low + 0.1,
                num,
                low + 0.055,
                low + 0.02,
                low - 0.7 / num**0.5,
                min(1.0, low + 0.5 / num**0.5),
            )
            for low, num in bins
        ),
    )
    lengths = ("below -40", "-40 to -20", "-20 to -5", "-5 to 5", "5 to 20", "20 to 40", "above 40")
    by = [("length", label, 22 + 9 * n, 0.83 + 0.02 * n) for n, label in enumerate(lengths)]
    by += [
        ("source", source, sources.count(source), 0.93 - 0.04 * n) for n, source in enumerate(dict.fromkeys(sources))
    ]
    write_csv(
        "accuracy_by",
        "kind,label,num_pairs,accuracy,low,high",
        ((kind, label, num, value, value - 0.07, min(1.0, value + 0.05)) for kind, label, num, value in by),
    )


def _write_win_rates() -> None:
    write_csv(
        "temperatures",
        "temperature,opponent,num_prompts,win_rate,low,high,tie_rate,policy_tokens,opponent_tokens",
        (
            (t, opponent, 500, top - 0.16 * t**2, top - 0.16 * t**2 - 0.04, top - 0.16 * t**2 + 0.04, 0.1, 190.0, 180.0)
            for opponent, top in (("sft", 0.81), ("chosen", 0.58))
            for t in (0.0, 0.25, 0.5, 0.75, 1.0)
        ),
    )
    frontier = (
        (0.0, 0.0, 0.5, 0.0),
        (0.25, 0.3, 0.63, 0.5),
        (0.5, 1.1, 0.73, 0.9),
        (1.0, 4.2, 0.79, 1.3),
        (1.5, 9.6, 0.77, 1.2),
    )
    write_csv(
        "frontier",
        "scale,kl,kl_low,kl_high,win_rate,low,high,reward_gain",
        (
            (scale, kl, 0.93 * kl, 1.07 * kl, win, win - 0.035 * (kl > 0), win + 0.035 * (kl > 0), reward)
            for scale, kl, win, reward in frontier
        ),
    )
    write_csv(
        "length",
        "length_difference,num_prompts,win_rate,low,high",
        (
            (place, num, win, win - 0.9 / num**0.5, min(1.0, win + 0.6 / num**0.5))
            for place, num, win in (
                (-61.0, 40, 0.62),
                (-24.0, 80, 0.7),
                (-3.0, 150, 0.75),
                (21.0, 140, 0.82),
                (70.0, 90, 0.84),
            )
        ),
    )


def _agreement() -> dict[str, Any]:
    kinds = ("gpt-4-s", "gpt-4-c", "human")
    values = {(0, 1): (0.78, 0.55), (0, 2): (0.7, 0.4), (1, 2): (0.67, 0.35), (2, 2): (0.65, None)}

    def estimate(value: float | None) -> dict[str, float | None]:
        return {"value": value, "low": value and value - 0.06, "high": value and value + 0.06}

    def pair(first: int, second: int) -> dict[str, Any]:
        agreement, kappa = values[first, second]
        name = "cohen_kappa" if first != second else "krippendorff_alpha"
        who = {"first": kinds[first], "second": kinds[second], "num_items": 272, "num_pairs": 272}
        return {**who, "agreement": estimate(agreement), name: estimate(kappa)}

    return {
        "draws": 2000,
        "confidence": 0.95,
        "seed": 0,
        "methods": [
            {
                "method": method,
                "baseline": "ppo",
                "num_prompts": 272,
                "num_items": 272,
                "win_rates": {kind: {"num_votes": 272, "num_ties": 3, **estimate(0.54)} for kind in kinds},
                "pairs": [pair(*each) for each in values],
                "overall": {"krippendorff_alpha": estimate(0.4)},
            }
            for method in ("dpo", "sft")
        ],
    }


def _capability() -> dict[str, Any]:
    tasks = {
        "arithmetic": ("acc", 200, 0.41, 0.455, 0.46, [-0.02, 0.03]),
        "facts": ("acc_norm", 1000, 0.62, 0.61, 0.57, [-0.06, -0.02]),
        "reading": ("f1", 300, 0.3, 0.52, 0.58, [0.02, 0.1]),
    }
    return {
        "tasks": {
            name: {
                "metric": metric,
                "num_items": num,
                "base": base,
                "sft": sft,
                "dpo": dpo,
                "dpo_minus_sft": round(dpo - sft, 3),
                "dpo_minus_sft_ci": interval,
                "change": "better" if interval[0] > 0 else "worse" if interval[1] < 0 else "not told apart",
            }
            for name, (metric, num, base, sft, dpo, interval) in tasks.items()
        }
    }
