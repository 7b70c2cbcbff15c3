"""A folder of reports as all stages and the commands beside them leave it, with as many prompts as wanted.

Figures and tables are those of the committed run, with a judge that can be doubted; prompts and answers are made up.
Equal arguments give equal files.
"""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Iterable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from dpo_cli.core import paths
from dpo_cli.core.artifacts import write_json, write_json_array, write_text
from dpo_cli.report.inputs import STAGES, evaluation_table

COMMITTED = Path(__file__).resolve().parents[1] / "reports"
ATTACK = "</script><script>alert(1)</script><img src=https://evil.example/x onerror=alert(1)>\"'&amp;"
JUDGED = ("win_rate", "win_rate_ci", "tie_rate", "win_rate_ceiling", "well_formed_sft", "well_formed_dpo")
OPTIONAL = ("reliability", "accuracy_by", "temperatures", "frontier", "length")

METRICS: dict[str, dict[str, Any]] = {
    stage: json.loads((COMMITTED / stage / "metrics.json").read_text(encoding="utf-8"))[stage] for stage in STAGES
}
METRICS["evaluate"] |= {
    "judge": "hf",
    "judge_name": "a-judge-8b",
    "judge_consistency": 0.87,
    "judge_first_position_rate": 0.54,
    "judge_agreement": 0.81,
    "judge_agreement_ci": [0.76, 0.85],
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


def write_reports(num_prompts: int = 100, *, num_tokens: int = 12, judged: bool = True) -> None:
    """Write reports/ into the working directory.

    Args:
        num_prompts: Rows of samples.json.
        num_tokens: Length of an answer, about.
        judged: Whether there was a judge.
    """
    shutil.copytree(COMMITTED, paths.REPORTS, ignore=lambda folder, names: {*names} & {"report.html", "figures"})
    write_metrics("evaluate", METRICS["evaluate"])
    if not judged:
        kept = {name: value for name, value in METRICS["evaluate"].items() if name not in JUDGED}
        write_metrics("evaluate", kept | {"judge": "none"})
        for name in ("temperatures", "frontier", "length"):
            evaluation_table(name).unlink()
    write_samples(make_samples(num_prompts, num_tokens=num_tokens, judged=judged))
    sources = ("web", "books & letters", "$x_1$ <b>", "论坛")
    rows = [("length", "-20 to -5", 90, 0.83, 0.76, 0.88), *(("source", name, 99, 0.9, 0.8, 0.95) for name in sources)]
    write_csv("accuracy_by", "kind,label,num_pairs,accuracy,low,high", rows)
    write_metrics("agreement", _agreement())
    write_metrics("capability", _capability())


def write_metrics(stage: str, metrics: dict[str, Any]) -> None:
    write_json(paths.metrics_file(stage), {stage: metrics})


def write_samples(samples: Iterable[dict[str, Any]]) -> None:
    write_json_array(paths.report_dir("evaluate") / "samples.json", samples)


def write_csv(name: str, header: str, rows: Iterable[Sequence[object]]) -> None:
    """A CSV file of stage evaluate."""
    write_text(evaluation_table(name), "\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n")


class Elements(HTMLParser):
    """Every element of a page with its attributes, and the text between them; texts of scripts and styles apart."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.raw: dict[str, list[str]] = {"script": [], "style": []}
        self._inside = ""
        self.feed(page)
        self.text = re.sub(r"\s+", " ", " ".join(self.texts))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        self.raw.get(self._inside, self.texts).append(data)

    def count(self, tag: str, name: str = "") -> int:
        """Elements of this tag, and of this class where one is given."""
        return sum(tag == found and name in (attrs.get("class") or "").split(" ") for found, attrs in self.elements)

    @property
    def ids(self) -> list[str]:
        return [attributes["id"] or "" for _, attributes in self.elements if "id" in attributes]

    @property
    def data(self) -> dict[str, Any]:
        """What the prompt browser reads."""
        return json.loads(self.raw["script"][0])


# --- samples ------------------------------------------------------------------------------


def make_samples(count: int, *, num_tokens: int = 12, judged: bool = True) -> list[dict[str, Any]]:
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


# --- what the commands beside the stages leave ----------------------------------------------


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

    method = {
        "baseline": "ppo",
        "num_prompts": 272,
        "num_items": 272,
        "win_rates": {kind: {"num_votes": 272, "num_ties": 3, **estimate(0.54)} for kind in kinds},
        "pairs": [pair(*each) for each in values],
        "overall": {"krippendorff_alpha": estimate(0.4)},
    }
    return {"draws": 2000, "confidence": 0.95, "seed": 0, "methods": [{"method": name, **method} for name in "ab"]}


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
