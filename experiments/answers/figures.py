"""The figures: win rates by temperature, and in and out of distribution."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from dpo_cli.report.figures import DASHED, MUTED, A, B, Chart, Key, level_line, scale_axes
from experiments.answers.measure import HELD_OUT
from experiments.answers.tables import DPO, SFT, TRUTH, Measured, groups_of

_LINES: Mapping[str, tuple[str, str, str, Any]] = {
    DPO: ("DPO", "a eval", A, "-"),
    "best-of-8": ("Best of 8", "a dash", A, DASHED),
    "ppo": ("PPO", "b eval", B, "-"),
    "rloo": ("PPO, leave-one-out", "b dash", B, DASHED),
    "preferred-ft": ("Preferred-FT", "muted eval", MUTED, "-"),
    SFT: ("SFT", "muted dash", MUTED, DASHED),
}
"""Name, mark, color and line of the methods that are drawn."""


def temperature_chart(measured: Measured, against: str) -> Chart:
    """Win rate against the ground truth or SFT at each temperature."""
    drawn = [method for method in _LINES if method in measured.methods]

    def paint(axes: Axes) -> None:
        level_line(axes, 50)
        for place, method in enumerate(drawn):
            _, mark, color, line = _LINES[method]
            temperatures = measured.temperatures(HELD_OUT, method)
            found = [measured.win_rate([HELD_OUT], method, temperature, against) for temperature in temperatures]
            axes.errorbar(
                [temperature + 0.008 * (place - 2.5) for temperature in temperatures],
                [100 * each.value for each in found],
                yerr=[
                    [100 * (each.value - each.low) for each in found],
                    [100 * (each.high - each.value) for each in found],
                ],
                color=color,
                linestyle=line,
                linewidth=1.1,
                elinewidth=0.7,
                marker="o" if "eval" in mark else None,
                markersize=3.4,
            )
        scale_axes(axes, "temperature")

    is_truth = against == TRUTH
    return Chart(
        "win-rate-truth" if is_truth else "win-rate-sft",
        f"Win rate against {'the ground truth' if is_truth else 'SFT'}, %",
        "Bars are 95% intervals over seeds and prompts."
        + (
            " The known reward is the judge: a good answer ties with the ground truth, so 50 is the most."
            if is_truth
            else ""
        ),
        Path("win_rates.csv"),
        [Key(_LINES[method][0], _LINES[method][1]) for method in drawn],
        paint,
        height=3.2,
    )


def shift_chart(measured: Measured, temperature: float) -> Chart:
    """Win rate against the ground truth of DPO, PPO and SFT on each kind of prompts."""
    groups = groups_of(measured)
    drawn = {DPO: ("a dot", A), "ppo": ("b dot", B), SFT: ("muted dot", MUTED)}

    def paint(axes: Axes) -> None:
        level_line(axes, 50)
        for place, (method, (_, color)) in enumerate(drawn.items()):
            found = [measured.win_rate(prompts, method, temperature) for prompts in groups.values()]
            axes.errorbar(
                [x + 0.16 * (place - 1) for x in range(len(groups))],
                [100 * each.value for each in found],
                yerr=[
                    [100 * (each.value - each.low) for each in found],
                    [100 * (each.high - each.value) for each in found],
                ],
                color=color,
                linestyle="none",
                elinewidth=0.9,
                marker="o",
                markersize=4,
            )
        scale_axes(axes, "prompts")
        axes.set_xticks(range(len(groups)), [*groups])

    return Chart(
        "out-of-distribution",
        f"Win rate against the ground truth at T = {temperature:g}, %",
        "Held-out prompts are like those of training; the others have what no training prompt has. Bars are 95%"
        " intervals.",
        Path("out_of_distribution.csv"),
        [Key(_LINES[method][0], mark) for method, (mark, _) in drawn.items()],
        paint,
        height=2.8,
    )
