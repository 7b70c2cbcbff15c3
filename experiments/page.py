"""The page of an experiment: the frontier, what holds, and what each policy writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, FileSystemLoader
from matplotlib.axes import Axes

from dpo_cli.core.artifacts import write_text
from dpo_cli.report.figures import COLOR_NAMES, DASHED, INK, MUTED, A, B, Chart, Key, scale_axes, standalone
from dpo_cli.report.style import page_environment
from experiments.frontier import LABELS, Check, Point, Results

_LINES: Mapping[str, tuple[str, str, Any, str]] = {
    "dpo": ("a eval", A, "-", "o"),
    "ppo": ("b eval", B, "-", "o"),
    "ppo-gt": ("b dash", B, DASHED, "^"),
    "unlikelihood": ("muted eval", MUTED, "-", "s"),
    "preferred-ft": ("muted dot", MUTED, "", "D"),
}


def frontier_chart(results: Results) -> Chart:
    """Reward against KL of all points, with the ideal frontier."""
    shown = [method for method in _LINES if results.of(method)]

    def paint(axes: Axes) -> None:
        axes.plot(*zip(*results.ideal, strict=True), color=INK, linewidth=1, linestyle=(0, (1, 2)))
        best = [(point.kl.value, point.reward.value) for point in results.best_of_n["best-of-n"]]
        axes.plot(*zip(*best, strict=True), color=MUTED, linewidth=0.9, linestyle=DASHED)
        for method in shown:
            _, color, style, marker = _LINES[method]
            points = results.of(method)
            x, y = [point.kl.value for point in points], [point.reward.value for point in points]
            axes.errorbar(
                x, y, xerr=_reach(points, "kl"), yerr=_reach(points, "reward"), color=color, linestyle=style or "none",
                linewidth=0.9, elinewidth=0.6, marker=marker, markersize=3.6,
            )  # fmt: skip
            for point, kl, reward in zip(points, x, y, strict=True):
                if point.value is not None:
                    axes.annotate(
                        f"{point.value:g}", (kl, reward), xytext=(4, -9), textcoords="offset points", color=color,
                        fontsize=7.5,
                    )  # fmt: skip
        axes.margins(x=0.05, y=0.08)
        scale_axes(axes, "KL from the reference, nats an answer")

    keys = [Key(LABELS[method], _LINES[method][0]) for method in shown]
    keys += [Key(LABELS["best-of-n"], "muted dash"), Key("ideal", "ink dash")]
    return Chart(
        "frontier",
        "Reward against KL",
        "Numbers are beta of DPO, the target KL of PPO and alpha of Unlikelihood. Bars are 95% intervals, seed by seed,"
        " then prompt by prompt. The ideal is estimated from the reference's own answers and ends where too few of them"
        " count. Best-of-N is drawn at its bound of the KL.",
        Path("points.csv"),
        keys,
        paint,
        height=3.6,
    )


def curve_chart(results: Results) -> Chart:
    """Reward of dpo and ppo at each measured step, a mean over seeds, each value of its setting."""

    def paint(axes: Axes) -> None:
        for method in ("dpo", "ppo"):
            values = sorted({row["value"] for row in results.curves if row["method"] == method})
            for value in values:
                steps: dict[int, list[float]] = {}
                for row in results.curves:
                    if row["method"] == method and row["value"] == value:
                        steps.setdefault(row["step"], []).append(row["reward"])
                means = [sum(found) / len(found) for _, found in sorted(steps.items())]
                axes.plot(sorted(steps), means, color=_LINES[method][1], linewidth=0.9)
                axes.annotate(
                    f"{value:g}", (max(steps), means[-1]), xytext=(3, -3), textcoords="offset points", fontsize=7.5,
                    color=_LINES[method][1],
                )  # fmt: skip
        scale_axes(axes, "optimizer steps", integer=True)

    keys = [Key("DPO, by beta", "a train"), Key("PPO, learned reward, by target KL", "b train")]
    caption = "Each line is a mean over seeds of the reward on all held-out prompts."
    return Chart("curves", "Reward as training goes on", caption, Path("curves.csv"), keys, paint, height=3.6)


def _reach(points: Sequence[Point], name: str) -> list[list[float]]:
    found = [getattr(point, name) for point in points]
    return [[max(each.value - each.low, 0) for each in found], [max(each.high - each.value, 0) for each in found]]


def write_page(title: str, results: Results, held: Sequence[Check], grid: Mapping[str, Any], folder: Path) -> None:
    """Write index.html and the figures as SVG files to a folder."""
    environment = page_environment()
    environment.loader = ChoiceLoader([environment.loader, FileSystemLoader(Path(__file__).parent)])  # type: ignore[list-item]
    charts = [frontier_chart(results), curve_chart(results)]
    points = [*results.points, *(point for found in results.best_of_n.values() for point in found)]
    page = environment.get_template("experiment.html.jinja").render(
        title=title,
        charts=charts,
        colors=COLOR_NAMES,
        checks=held,
        points=points,
        labels=LABELS,
        prompt=results.prompt,
        seeds=grid["seeds"],
    )
    for chart in charts:
        write_text(folder / f"{chart.slug}.svg", standalone(chart))
    write_text(folder / "index.html", page)
