"""Experiments side by side: settings that differ beside metrics that differ, with paired intervals by prompt."""

from __future__ import annotations

import csv
import difflib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_cli.core.artifacts import write_text
from dpo_cli.core.errors import ParamsError, StaleArtifactError
from dpo_cli.evaluation.differences import (
    MIN_DRAWS,
    OF_ANSWERS,
    OF_PAIRS,
    Difference,
    Experiment,
    caveats,
    difference,
    differing_settings,
    main_metrics,
    source_of,
)
from dpo_cli.evaluation.experiments import WORKSPACE, experiment_refs, head, is_here, read_experiment, revisions_of
from dpo_cli.statistics.bootstrap import Sampling

_NAMED = 6
_ROWS = {OF_ANSWERS: "answers", OF_PAIRS: "held-out pairs"}


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


# --- notes ----------------------------------------------------------------------------------


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
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["experiment", "revision", *found.params, "metric", *columns])
    for entry in as_json(found)["experiments"]:
        for metric, figures in entry["metrics"].items():
            settings = [entry["params"][name] for name in found.params]
            writer.writerow([entry["name"], entry["revision"], *settings, metric, *map(figures.get, columns)])
    write_text(path, stream.getvalue())


def _figures(found: ExperimentComparison, metric: str, number: int) -> dict[str, Any]:
    if number == 0:
        return {}
    each = found.differences[metric][number - 1]
    interval = {"low": each.low, "high": each.high, "num_prompts": each.num_prompts, "num_left_out": each.num_left_out}
    return {"difference": each.value, **({"why": each.why} if each.why else interval)}
