"""Experiments side by side: what differs in their settings and metrics, with paired intervals by prompt.

Two models that answer the same prompts are compared prompt by prompt: the mean of the differences
has a far narrower interval than the difference of two means with intervals of their own. Pure
functions of what the stages wrote; no torch.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dpo_cli.core import paths
from dpo_cli.data.schema import Messages
from dpo_cli.evaluation import DPO, SFT
from dpo_cli.statistics.bootstrap import Sampling

MIN_DRAWS = 2000
"""Bootstrap draws behind each interval, at the least."""

MAIN_METRICS = tuple(
    f"evaluate.{name}"
    for name in (
        "win_rate", "reward_dpo", "reward_accuracy", "margin", "loss", "kl",
        "well_formed_dpo", "finished_dpo", "answer_tokens_dpo",
    )
)  # fmt: skip
"""The metrics that a comparison begins with, in the order in which a user wants to know them."""

OF_ANSWERS = paths.SAMPLES
OF_PAIRS = "pairs.csv"
"""Files of reports/evaluate with a value a prompt, and a value a held-out pair."""

_ANSWER_FIGURES = {
    "reward": "reward", "well_formed": "well_formed", "finished": "finished", "num_tokens": "answer_tokens"
}  # fmt: skip
_OF_PROMPTS = ("win_rate", "tie_rate", "kl")
_PAIR_FIGURES = ("loss", "margin", "chosen_reward", "rejected_reward")
_SCALED = ("evaluate.loss", "evaluate.margin", "evaluate.chosen_reward", "evaluate.rejected_reward")
_SCALES = ("train.beta", "train.loss", "train.divergence", "train.divergence_alpha", "train.ld_alpha")
"""What decides which reward a training learns, and so the scale of a margin; entries of a mapping go with it."""
_SAMPLED = ("evaluate.judge", "evaluate.temperature", "evaluate.max_new_tokens")
_JUDGES = ("evaluate.hf.", "evaluate.openai.", "evaluate.votes.")
_ANOTHER_RUN = 1e-6

Scalar = float | int | bool | str | None
Rows = Mapping[str, tuple[str, float]]
"""Value of each row by the row's id, beside the id of its prompt."""


@dataclass(frozen=True)
class Texts:
    """A prompt and what both models of a run answered.

    Attributes:
        prompt: Its messages.
        sft: The SFT model's answer.
        dpo: The tuned model's.
    """

    prompt: Messages
    sft: str
    dpo: str


@dataclass(frozen=True)
class Experiment:
    """What one run left behind.

    Attributes:
        name: What the user calls it.
        revision: Its commit; empty for the workspace.
        params: Its settings by dotted path.
        metrics: Its metrics by dotted path, the stage first.
        rows: By metric, the values that the metric is the mean of.
        missing: By file of reports/evaluate, why there are no such values.
        answers: What was asked and answered, by prompt.
    """

    name: str
    revision: str
    params: Mapping[str, Scalar]
    metrics: Mapping[str, Scalar]
    rows: Mapping[str, Rows] = field(default_factory=dict)
    missing: Mapping[str, str] = field(default_factory=dict)
    answers: Mapping[str, Texts] = field(default_factory=dict)


@dataclass(frozen=True)
class Difference:
    """How far an experiment's metric lies from the baseline's.

    Attributes:
        value: Experiment minus baseline; with an interval, over the rows that both have. None: no number.
        low: Lower end of the interval; None where there is none.
        high: Upper end.
        num_prompts: Prompts that both have; None without an interval.
        num_left_out: Prompts that only one of them has.
        why: Why there is no interval; empty where there is one, or where the metric is no number.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    num_prompts: int | None = None
    num_left_out: int | None = None
    why: str = ""

    @property
    def leaves_out_zero(self) -> bool:
        """Whether the interval holds no zero."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


# --- what a run left behind -----------------------------------------------------------------


def flatten(tree: Mapping[str, Any], prefix: str = "", *, lists: bool = True) -> dict[str, Scalar]:
    """A tree as values by dotted path; a list, or a mapping that is empty, is one value, as text, or left out."""
    flat: dict[str, Scalar] = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{path}.", lists=lists)
        elif not isinstance(value, list | Mapping):
            flat[path] = value
        elif lists:
            flat[path] = json.dumps(value, ensure_ascii=False)
    return flat


def rows_of_answers(text: str) -> tuple[dict[str, Rows], dict[str, Texts]]:
    """Values by metric in samples.json, and the texts by prompt.

    A metric is left out where not every row has it.

    Raises:
        ValueError: It is no such file.
    """
    columns: dict[str, dict[str, tuple[str, float]]] = {}
    answers: dict[str, Texts] = {}
    num_rows = 0
    try:
        for row in json.loads(text):
            num_rows += 1
            prompt = row["id"]
            answers[prompt] = Texts(row["prompt"], row["sft"]["text"], row["dpo"]["text"])
            for metric, value in _answer_figures(row):
                columns.setdefault(f"evaluate.{metric}", {})[prompt] = (prompt, float(value))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"a row has no {error}") from None
    partial = {"evaluate.win_rate", "evaluate.tie_rate"}  # a judge may have no verdict on some
    if not num_rows:
        raise ValueError("it holds no answers")
    return {name: rows for name, rows in columns.items() if len(rows) == num_rows or name in partial}, answers


def _answer_figures(row: Mapping[str, Any]) -> Iterable[tuple[str, float]]:
    for name in (SFT, DPO):
        for key, metric in _ANSWER_FIGURES.items():
            if key in row[name]:
                yield f"{metric}_{name}", row[name][key]
    if "win" in row:
        yield "win_rate", row["win"]
        yield "tie_rate", row["win"] == 0.5
    if "kl" in row:
        yield "kl", row["kl"]


def rows_of_pairs(text: str) -> dict[str, Rows]:
    """Values by metric in pairs.csv.

    Raises:
        ValueError: It is no such file.
    """
    columns: dict[str, dict[str, tuple[str, float]]] = {}
    try:
        for row in csv.DictReader(text.split("\n")):
            margin = float(row["margin"])
            figures = {name: float(row[name]) for name in _PAIR_FIGURES}
            figures["reward_accuracy"] = 0.5 if margin == 0 else float(margin > 0)
            for name, value in figures.items():
                columns.setdefault(f"evaluate.{name}", {})[row["id"]] = (row["prompt"], value)
    except (KeyError, TypeError) as error:
        raise ValueError(f"a row has no {error}") from None
    return dict(columns)


# --- what differs ---------------------------------------------------------------------------


def differing(trees: Sequence[Mapping[str, Scalar]]) -> list[str]:
    """Paths whose values are not the same in all trees, in the order of their first appearance."""
    paths = dict.fromkeys(path for tree in trees for path in tree)
    absent = object()
    return [path for path in paths if any(tree.get(path, absent) != trees[0].get(path, absent) for tree in trees)]


def differing_settings(experiments: Sequence[Experiment]) -> list[str]:
    """Settings that differ, of sections that are known of every experiment: of a model from elsewhere few are."""
    known = set.intersection(*({path.partition(".")[0] for path in each.params} for each in experiments))
    found = differing([experiment.params for experiment in experiments])
    return [path for path in found if path.partition(".")[0] in known]


def main_metrics(experiments: Sequence[Experiment]) -> list[str]:
    """The main metrics that differ; where none does, those that there are."""
    there = [name for name in MAIN_METRICS if any(name in experiment.metrics for experiment in experiments)]
    changed = set(differing([experiment.metrics for experiment in experiments]))
    return [name for name in there if name in changed] or there


def difference(baseline: Experiment, other: Experiment, metric: str, sampling: Sampling) -> Difference:
    """A metric, by its dotted path, of an experiment less the baseline's, with its paired interval where rows allow it.

    Rows are matched by their ids. The interval is a percentile bootstrap over the prompts that both have.
    """
    for experiment in (baseline, other):
        if metric not in experiment.metrics:
            return Difference(None, why=f"{experiment.name} does not have it")
    values = [experiment.metrics[metric] for experiment in (baseline, other)]
    if any(isinstance(value, bool) or not isinstance(value, int | float) for value in values):
        return Difference(None)
    apart = float(values[1]) - float(values[0])  # type: ignore[arg-type]
    for experiment in (baseline, other):
        if why := _no_rows(experiment, metric):
            return Difference(apart, why=why)
    ours, theirs = other.rows[metric], baseline.rows[metric]
    shared = sorted(ours.keys() & theirs.keys())
    prompts = [ours[row][0] for row in shared]
    num_prompts = len(set(prompts))
    num_all = len({prompt for rows in (ours, theirs) for prompt, _ in rows.values()})
    if num_prompts < 2:
        return Difference(apart, why=f"it shares {num_prompts} of {num_all} prompts with {baseline.name}")
    estimate = sampling.interval([ours[row][1] - theirs[row][1] for row in shared], prompts)
    return Difference(estimate.value, estimate.low, estimate.high, num_prompts, num_all - num_prompts)


def source_of(metric: str) -> str | None:
    """The file of reports/evaluate that holds the values behind a metric; None: it is no mean over prompts."""
    stage, _, name = metric.partition(".")
    if stage != "evaluate":
        return None
    if name in (*_PAIR_FIGURES, "reward_accuracy"):
        return OF_PAIRS
    of_answers = {f"{metric}_{model}" for metric in _ANSWER_FIGURES.values() for model in (SFT, DPO)}
    return OF_ANSWERS if name in of_answers.union(_OF_PROMPTS) else None


def _no_rows(experiment: Experiment, metric: str) -> str:
    """Why an experiment has no rows behind a metric; empty where it has."""
    source = source_of(metric)
    if source is None:
        return "no mean over held-out prompts"
    if source in experiment.missing:
        return experiment.missing[source]
    if metric not in experiment.rows:
        return f"{source} of {experiment.name} does not hold it by prompt; evaluate it again"
    values = [value for _, value in experiment.rows[metric].values()]
    expected = float(experiment.metrics[metric])  # type: ignore[arg-type]
    if not math.isclose(math.fsum(values) / len(values), expected, rel_tol=_ANOTHER_RUN, abs_tol=_ANOTHER_RUN):
        return f"{source} of {experiment.name} is of another run than its metrics.json; evaluate it again"
    return ""


# --- what to know of the figures ------------------------------------------------------------


def caveats(experiments: Sequence[Experiment], metrics: Sequence[str]) -> list[str]:
    """What keeps figures from meaning the same in all experiments, one sentence each."""
    found = []
    changed = differing_settings(experiments)
    scales = [path for path in _SCALES if any(name == path or name.startswith(f"{path}.") for name in changed)]
    scaled = [name for name in _SCALED if name in metrics]
    if scales and scaled:
        found.append(
            f"{', '.join(scaled)}: the scale depends on {' and '.join(scales)}, which {_differ(scales)};"
            " a difference alone says nothing of quality"
        )
    baseline = experiments[0]
    if any(source_of(name) == OF_ANSWERS for name in metrics):
        sampled = [path for path in changed if path in _SAMPLED or path.startswith(_JUDGES)]
        if sampled:
            found.append(
                f"answers were sampled or judged otherwise: {', '.join(sampled)} {_differ(sampled)}, so win rates and"
                " rewards do not compare"
            )
        for other in experiments[1:]:
            shared = baseline.answers.keys() & other.answers.keys()
            num_other = sum(baseline.answers[prompt].sft != other.answers[prompt].sft for prompt in shared)
            if num_other:
                found.append(
                    f"{other.name}: its SFT model answers {num_other} of {len(shared)} shared prompts otherwise than"
                    f" that of {baseline.name}, so each win rate is over an opponent of its own"
                )
    return found


def _differ(names: Sequence[str]) -> str:
    return "differ" if len(names) > 1 else "differs"
