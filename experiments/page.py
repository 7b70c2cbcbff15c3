"""The files of an experiment's results: tables, figures, and a page with both and what each policy writes."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, FileSystemLoader
from matplotlib.axes import Axes

from dpo_cli.core.artifacts import atomic_path, write_text
from dpo_cli.report.figures import COLOR_NAMES, DASHED, INK, MUTED, A, B, Chart, Key, scale_axes, standalone
from dpo_cli.report.style import page_environment
from dpo_cli.statistics.intervals import Estimate
from experiments.frontier import LABELS, Check, Point, Results, checks, read_results

_LINES: Mapping[str, tuple[str, str, Any, tuple[float, float]]] = {
    "dpo": ("a eval", A, "-", (4, -9)),
    "ppo": ("b eval", B, "-", (4, -9)),
    "ppo-gt": ("b dash", B, DASHED, (-8, 5)),
    "unlikelihood": ("muted eval", MUTED, "-", (-8, 5)),
    "preferred-ft": ("muted dot", MUTED, "", (4, -9)),
}
"""Of each method its mark in the key, color, line, and where its labels stand, points."""


def frontier_chart(results: Results) -> Chart:
    """Reward against KL of all points, with the ideal frontier."""
    shown = [method for method in _LINES if results.of(method)]

    def paint(axes: Axes) -> None:
        sure, curve = results.ideal.num_sure, results.ideal.curve
        axes.plot(*zip(*curve[: sure + 1], strict=True), color=INK, linewidth=1)
        axes.plot(*zip(*curve[sure:], strict=True), color=INK, linewidth=0.7, linestyle=(0, (1, 2)))
        for name, style in (("best-of-n", DASHED), ("best-of-n-gt", "-")):
            best = [(point.kl.value, point.reward.value) for point in results.best_of_n[name]]
            axes.plot(*zip(*best, strict=True), color=MUTED, linewidth=0.7, linestyle=style)
        for method in shown:
            _, color, style, (right, up) = _LINES[method]
            points = sorted(results.of(method), key=lambda point: point.kl.value)
            x, y = [point.kl.value for point in points], [point.reward.value for point in points]
            axes.errorbar(
                x, y, xerr=_reach(points, "kl"), yerr=_reach(points, "reward"), color=color, linestyle=style or "none",
                linewidth=0.9, elinewidth=0.6, marker="o", markersize=3.6,
            )  # fmt: skip
            for place, (point, kl, reward) in enumerate(zip(points, x, y, strict=True)):
                if (
                    point.value is not None and point.method != "preferred-ft"
                ):  # beside its point, on one side and on the other in turn
                    axes.annotate(
                        f"{point.value:g}", (kl, reward), xytext=(right, -9 - up if place % 2 else up),
                        textcoords="offset points", color=color, fontsize=7.5,
                    )  # fmt: skip
        axes.margins(x=0.05, y=0.08)
        scale_axes(axes, "KL from the reference, nats an answer")

    keys = [Key(LABELS[method], _LINES[method][0]) for method in shown]
    keys += [Key(LABELS["best-of-n"], "muted dash"), Key(LABELS["best-of-n-gt"], "muted train")]
    keys += [Key("ideal", "ink train"), Key("ideal, estimated too low", "ink dash")]
    return Chart(
        "frontier",
        "Reward against KL",
        "Numbers are beta of DPO, the target KL of PPO and alpha of Unlikelihood. Preferred-FT may have several"
        " learning rates. Bars are 95% intervals, seed by seed, then prompt by prompt. The ideal is estimated from"
        " the reference's own answers; it is dotted where too few of them count for one prompt in 20, and really"
        " higher there. Best-of-N is drawn at its bound of the KL.",
        Path("points.csv"),
        keys,
        paint,
        height=3.6,
    )


def curve_chart(results: Results) -> Chart:
    """Reward of dpo and ppo at each measured step, a mean over seeds, each value of its setting."""

    def paint(axes: Axes) -> None:
        ends: list[tuple[float, int, str, str]] = []
        for method in ("dpo", "ppo"):
            values = sorted({row["value"] for row in results.curves if row["method"] == method})
            for value in values:
                steps: dict[int, list[float]] = {}
                for row in results.curves:
                    if row["method"] == method and row["value"] == value:
                        steps.setdefault(row["step"], []).append(row["reward"])
                means = [sum(found) / len(found) for _, found in sorted(steps.items())]
                axes.plot(sorted(steps), means, color=_LINES[method][1], linewidth=0.9)
                ends.append((means[-1], max(steps), f"{value:g}", _LINES[method][1]))
        lowest, (bottom, top) = -math.inf, axes.get_ylim()
        for reward, step, label, color in sorted(ends):  # labels at the ends of lines, none on another one
            lowest = max(reward, lowest + 0.045 * (top - bottom))
            axes.annotate(
                label, (step, lowest), xytext=(3, -3), textcoords="offset points", fontsize=7.5, color=color
            )  # fmt: skip
        scale_axes(axes, "optimizer steps", integer=True)

    keys = [Key("DPO, by beta", "a train"), Key("PPO, learned reward, by target KL", "b train")]
    caption = "Each line is a mean over seeds of the reward on all held-out prompts."
    return Chart("curves", "Reward as training goes on", caption, Path("curves.csv"), keys, paint, height=3.6)


def _reach(points: Sequence[Point], name: str) -> list[list[float]]:
    found = [getattr(point, name) for point in points]
    return [[max(each.value - each.low, 0) for each in found], [max(each.high - each.value, 0) for each in found]]


def write_results(title: str, work: Path, grid: Mapping[str, Any], folder: Path) -> list[Check]:
    """Write points.csv, ideal.csv, curves.csv, checks.csv, the figures and index.html to a folder.

    Raises:
        StaleArtifactError: A cell has not been run to its end.
        DataError: Something was measured on other prompts.
    """
    results = read_results(work, grid)
    held = checks(results)
    points = [*results.points, *(point for found in results.best_of_n.values() for point in found)]
    folder.mkdir(parents=True, exist_ok=True)
    _write_csv(folder / "points.csv", [_row(point) for point in points])
    _write_csv(folder / "curves.csv", results.curves)
    ideal = results.ideal
    rows = zip((math.inf, *ideal.betas), ideal.curve, strict=True)
    _write_csv(
        folder / "ideal.csv",
        [
            {"beta": f"{beta:.4g}", "kl": kl, "reward": reward, "enough_answers": place <= ideal.num_sure}
            for place, (beta, (kl, reward)) in enumerate(rows)
        ],
    )
    _write_csv(
        folder / "checks.csv",
        [
            {"verdict": check.verdict, "statement": check.statement}
            | _with_ends("difference", check.difference)
            | ({} if check.kl is None else _with_ends("kl_difference", check.kl))
            for check in held
        ],
    )
    charts = [frontier_chart(results), curve_chart(results)]
    for chart in charts:
        write_text(folder / f"{chart.slug}.svg", standalone(chart))
    environment = page_environment()
    assert environment.loader is not None
    environment.loader = ChoiceLoader([environment.loader, FileSystemLoader(Path(__file__).parent)])
    template = environment.get_template("experiment.html.jinja")
    shown: dict[str, Any] = {
        "charts": charts,
        "colors": COLOR_NAMES,
        "checks": held,
        "points": points,
        "ideal": ideal,
    }
    page = template.render(**shown, title=title, labels=LABELS, prompt=results.prompt, seeds=grid["seeds"])
    write_text(folder / "index.html", page)
    return held


def _row(point: Point) -> dict[str, Any]:
    return {
        "method": point.method,
        "value": "" if point.value is None else f"{point.value:g}",
        **_with_ends("reward", point.reward),
        **_with_ends("kl", point.kl),
        "steps": " ".join(str(run.step) for run in point.runs),
        "text": point.text,
    }


def _with_ends(name: str, estimate: Estimate) -> dict[str, float]:
    return dict(zip((name, f"{name}_low", f"{name}_high"), vars(estimate).values(), strict=True))


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    def shown(value: Any) -> Any:
        if not isinstance(value, float):
            return value
        return "" if math.isnan(value) else f"{value:.4f}"

    names = list(dict.fromkeys(name for row in rows for name in row))
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: shown(value) for name, value in row.items()} for row in rows)
