"""Experiments side by side: settings that differ beside metrics that differ, with paired intervals by prompt.

Two models that answer the same prompts are compared prompt by prompt: the mean of the differences has a far narrower
interval than the difference of two means with intervals of their own. No torch.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_cli.core.artifacts import write_csv_table
from dpo_cli.core.errors import ParamsError, StaleArtifactError
from dpo_cli.core.judges import JUDGES
from dpo_cli.evaluation import DPO, SFT
from dpo_cli.evaluation.experiments import (
    ANSWER_FIGURES,
    OF_ANSWERS,
    OF_PAIRS,
    PAIR_FIGURES,
    WORKSPACE,
    Experiment,
    Scalar,
    experiment_refs,
    head,
    is_here,
    read_experiment,
    revisions_of,
)
from dpo_cli.statistics.intervals import Sampling

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

_OF_PROMPTS = ("win_rate", "tie_rate", "kl")
_SCALED = tuple(
    f"evaluate.{name}"
    for name in ("loss", "margin", "chosen_reward", "rejected_reward", "kto_loss", "good_reward", "bad_reward")
)
_SCALES = ("train.beta", "train.loss", "train.divergence", "train.divergence_alpha", "train.ld_alpha")
"""What decides which reward a training learns, and so the scale of a margin; entries of a mapping go with it."""
_SAMPLED = ("evaluate.judge", "evaluate.temperature", "evaluate.max_new_tokens")
_JUDGES = tuple(setting for kind in JUDGES.values() for setting in kind.settings)
_ANOTHER_RUN = 1e-6

_NAMED = 6
_ROWS = {OF_ANSWERS: "answers", OF_PAIRS: "held-out pairs"}


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


@dataclass(frozen=True)
class ExperimentComparison:
    """Experiments side by side.

    Attributes:
        experiments: The baseline first.
        params: Settings that differ.
        metrics: The metrics that are shown.
        differences: By metric, one for each experiment but the baseline.
        sampling: How the intervals were drawn.
        notes: What to know of the figures.
    """

    experiments: list[Experiment]
    params: list[str]
    metrics: list[str]
    differences: dict[str, list[Difference]]
    sampling: Sampling
    notes: list[str]


def compare(names: Sequence[str], baseline: str | None, metrics: Sequence[str], *, every: bool) -> ExperimentComparison:
    """Read experiments and compare each of them with the baseline.

    Args:
        names: Experiments, git revisions, or ``workspace``; none: the workspace and all experiments based on HEAD.
        baseline: What they are compared with; None: the first of them.
        metrics: Metrics to show, by full or last name; none: the main ones that differ.
        every: Show every metric.

    Raises:
        ParamsError: A name is unknown or ambiguous, or there are fewer than two.
        StaleArtifactError: An experiment that was named has no reports.
        DataError: A file of an experiment is damaged.
        MachineError: git cannot be run.
    """
    given = [*names, *([baseline] if baseline else [])]
    refs = experiment_refs() if not names or not all(map(is_here, given)) else []  # git is asked where it is needed
    based = [] if names else [ref.name for ref in refs if ref.baseline == head()]
    first = [baseline] if baseline else [] if names else [WORKSPACE]
    wanted = list(dict.fromkeys([*first, *names, *based]))
    if len(wanted) < 2:
        raise ParamsError(_too_few(wanted, bool(names), bool(refs)))
    experiments: list[Experiment] = []
    notes: list[str] = []
    for name, revision in revisions_of(wanted, refs).items():
        try:
            experiment, odd = read_experiment(name, revision)
        except StaleArtifactError as error:
            if name not in based or name == baseline:
                raise
            notes += [f"left out: {problem}" for problem in error.problems]
            continue
        experiments.append(experiment)
        notes += odd
    if len(experiments) < 2:
        raise StaleArtifactError("no experiment but the baseline has reports; run: dvc exp run")
    shown = _metrics_of(experiments, metrics, every=every)
    settings = experiments[0].params
    sampling = Sampling(
        max(MIN_DRAWS, int(settings.get("evaluate.bootstrap_draws") or 0)),
        float(settings.get("evaluate.confidence") or 0.95),
        int(settings.get("evaluate.seed") or 0),
    )
    baseline_run, *others = experiments
    differences = {name: [difference(baseline_run, other, name, sampling) for other in others] for name in shown}
    params = differing_settings(experiments)
    notes += [*caveats(experiments, shown), *_without_intervals(differences), *_prompts(experiments, differences)]
    return ExperimentComparison(experiments, params, shown, differences, sampling, notes)


def _too_few(wanted: Sequence[str], named: bool, any_refs: bool) -> str:
    if named:
        [name] = wanted
        other = "HEAD" if name == WORKSPACE else WORKSPACE
        return f"two experiments are needed, got {name} alone; name another, as in: dpo-cli compare {other} {name}"
    others = "; there are some on other commits: dvc exp list --all" if any_refs else ""
    return f"no experiment is based on HEAD{others}; make one: dvc exp run -S train.beta=0.5, or name two revisions"


def _metrics_of(experiments: Sequence[Experiment], names: Sequence[str], *, every: bool) -> list[str]:
    known = list(dict.fromkeys(path for experiment in experiments for path in experiment.metrics))
    if every:
        main = [name for name in main_metrics(experiments) if name in known]
        return list(dict.fromkeys([*main, *known]))
    if not names:
        return main_metrics(experiments)
    found: list[str] = []
    problems: list[str] = []
    for name in (part.strip() for given in names for part in given.split(",")):
        matches = [path for path in known if name == path] or [path for path in known if path.endswith(f".{name}")]
        if len(matches) == 1:
            found.append(matches[0])
        elif matches:
            problems.append(f"--metric {name} names {len(matches)} metrics: {', '.join(matches)}")
        else:
            near = difflib.get_close_matches(name, [*known, *(path.split(".")[-1] for path in known)], n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else "--all shows what there is"
            problems.append(f"--metric {name}: no experiment has it; {hint}")
    if problems:
        raise ParamsError(problems)
    return list(dict.fromkeys(found))


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
    if name in (*PAIR_FIGURES, "reward_accuracy"):
        return OF_PAIRS
    of_answers = {f"{metric}_{model}" for metric in ANSWER_FIGURES.values() for model in (SFT, DPO)}
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


def _without_intervals(differences: dict[str, list[Difference]]) -> list[str]:
    """Why metrics have no interval, each reason once."""
    reasons: dict[str, list[str]] = {}
    for metric, found in differences.items():
        for why in dict.fromkeys(each.why for each in found if each.why):
            reasons.setdefault(why, []).append(metric)
    lines = []
    for why, metrics in reasons.items():
        rest = f" and {len(metrics) - _NAMED} more" if len(metrics) > _NAMED else ""
        lines.append(f"no interval for {', '.join(metrics[:_NAMED])}{rest}: {why}")
    return lines


def _prompts(experiments: Sequence[Experiment], differences: dict[str, list[Difference]]) -> list[str]:
    """How many prompts are shared, by file; one line where it is the same for all experiments."""
    lines = []
    for source, label in _ROWS.items():
        counts: dict[tuple[int, int], list[str]] = {}
        for number, other in enumerate(experiments[1:]):
            mine = [found[number] for metric, found in differences.items() if source_of(metric) == source]
            for each in mine:
                if each.num_prompts is not None and each.num_left_out is not None:
                    names = counts.setdefault((each.num_prompts, each.num_left_out), [])
                    if other.name not in names:
                        names.append(other.name)
        for (shared, left_out), names in counts.items():
            of = "" if len(counts) == 1 else f" ({', '.join(names)})"
            lines.append(
                f"{label}{of}: {shared} prompts are shared with {experiments[0].name},"
                f" {left_out or 'none'} {'is' if left_out == 1 else 'are'} left out"
            )
    return lines


# --- as files ---------------------------------------------------------------------------


def as_json(found: ExperimentComparison) -> dict[str, Any]:
    """The comparison as one JSON value."""
    return {
        "baseline": found.experiments[0].name,
        "confidence": found.sampling.confidence,
        "draws": found.sampling.draws,
        "experiments": [
            {
                "name": experiment.name,
                "revision": experiment.revision or None,
                "params": {path: experiment.params.get(path) for path in found.params},
                "metrics": {
                    name: {"value": experiment.metrics.get(name), **_figures(found, name, number)}
                    for name in found.metrics
                },
            }
            for number, experiment in enumerate(found.experiments)
        ],
        "notes": found.notes,
    }


def write_csv(found: ExperimentComparison, path: Path) -> None:
    """Write the comparison as CSV: one line an experiment and metric, its settings beside them."""
    columns = ["value", "difference", "low", "high", "num_prompts", "num_left_out", "why"]
    rows = [
        [entry["name"], entry["revision"], *map(entry["params"].get, found.params), metric, *map(figures.get, columns)]
        for entry in as_json(found)["experiments"]
        for metric, figures in entry["metrics"].items()
    ]
    write_csv_table(path, ["experiment", "revision", *found.params, "metric", *columns], rows)


def _figures(found: ExperimentComparison, metric: str, number: int) -> dict[str, Any]:
    if number == 0:
        return {}
    each = found.differences[metric][number - 1]
    interval = {"low": each.low, "high": each.high, "num_prompts": each.num_prompts, "num_left_out": each.num_left_out}
    return {"difference": each.value, **({"why": each.why} if each.why else interval)}
