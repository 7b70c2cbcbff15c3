"""The judge: what it is, how steady it is, and how far it agrees with people."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from dpo_cli.core import paths
from dpo_cli.report.account import RunTable
from dpo_cli.report.figures import HEIGHT_INCHES, INK, MUTED, A, Chart, draw, short_label

_MOST_METHODS = 6
_MOST_KINDS = 8
_CELL_INCHES, _HEAD_INCHES = 0.6, 0.3
_PALEST, _FULL = 0.04, 0.6

_KINDS: Mapping[str, str] = {
    "world": "the embedded world's known reward",
    "rule": "a rule that is checked exactly",
    "reward-model": "the reward model of stage reward",
    "hf": "a language model on this machine",
    "openai": "a language model behind a server",
    "votes": "people's votes",
}
_COEFFICIENTS = {"cohen_kappa": "Cohen's κ", "fleiss_kappa": "Fleiss' κ", "krippendorff_alpha": "Krippendorff's α"}


def judge_table(metrics: Mapping[str, Any]) -> RunTable | None:
    """What is known of the judge; None where there was none."""
    kind = metrics.get("judge", "none")
    if kind == "none":
        return None
    rows = [("judge", _KINDS.get(kind, kind))]
    if kind in ("rule", "hf", "openai") and (name := metrics.get("judge_name")):
        rows.append(("name", name))
    rows += [
        (label, f"{metrics[key]:,}")
        for key, label in (("num_judged", "judged against SFT"), ("num_judged_chosen", "judged against chosen"))
        if metrics.get(key) is not None
    ]
    rows += [
        (label, f"{100 * metrics[key]:.1f}%")
        for key, label in (
            ("judge_consistency", "same winner in both orders"),
            ("judge_first_position_rate", "prefers the first answer"),
            ("judge_invalid_rate", "without a verdict"),
        )
        if metrics.get(key) is not None
    ]
    if (count := metrics.get("num_identical")) is not None:
        rows.append(("identical answers, so ties", f"{count:,}"))
    if (agreement := metrics.get("judge_agreement")) is not None:
        low, high = metrics.get("judge_agreement_ci") or (None, None)
        interval = "" if low is None or high is None else f" [{100 * low:.1f}%, {100 * high:.1f}%]"
        rows.append(("agrees with the data", f"{100 * agreement:.1f}%{interval}"))
        if (count := metrics.get("num_judge_agreement")) is not None:
            rows.append(("on held-out pairs", f"{count:,}"))
    return RunTable("Judge", [(name, value, "") for name, value in rows])


def draw_agreement(agreement: Mapping[str, Any] | None) -> list[Chart]:
    """Kinds of raters against each other, a heat map for each method and baseline."""
    methods = [method for method in (agreement or {}).get("methods", []) if method["pairs"]]
    return [_heat_map(number, method) for number, method in enumerate(methods[:_MOST_METHODS], 1)]


def _heat_map(number: int, method: Mapping[str, Any]) -> Chart:
    kinds = list(method["win_rates"])[:_MOST_KINDS]
    cells: dict[tuple[int, int], Mapping[str, Any]] = {}
    for pair in method["pairs"]:
        if pair["first"] in kinds and pair["second"] in kinds:
            first, second = kinds.index(pair["first"]), kinds.index(pair["second"])
            cells[first, second] = cells[second, first] = pair

    def paint(axes: Axes) -> None:
        for row, column in itertools.product(range(len(kinds)), repeat=2):
            _cell(axes, row, column, cells.get((row, column)))
        axes.set_xlim(-0.5, len(kinds) - 0.5)
        axes.set_ylim(len(kinds) - 0.5, -0.5)
        labels = [short_label(kind) for kind in kinds]
        axes.set_xticks(range(len(kinds)), [_narrow(label, len(kinds)) for label in labels])
        axes.set_yticks(range(len(kinds)), labels)
        axes.tick_params(labelcolor=INK)
        axes.spines["bottom"].set_visible(False)
        axes.grid(visible=False)

    slug = f"agreement-{number}"
    names = f"{short_label(method['method'])} against {short_label(method['baseline'])}"
    return Chart(
        slug,
        f"Agreement, {names}, %",
        "Share of pairs of votes on the same answers that agree, with its interval and the coefficient that corrects"
        " for chance; on the diagonal the raters of one kind with each other.",
        paths.metrics_file("agreement").as_posix(),
        [],
        draw(slug, paint, max(HEIGHT_INCHES, _HEAD_INCHES + _CELL_INCHES * len(kinds))),
    )


def _cell(axes: Axes, row: int, column: int, pair: Mapping[str, Any] | None) -> None:
    if pair is None:
        axes.annotate("\N{EN DASH}", (column, row), ha="center", va="center", color=MUTED)
        return
    value = pair["agreement"]["value"]
    # one half is what two raters reach who know nothing; below it the cell stays pale
    strength = _PALEST + (_FULL - _PALEST) * max(0.0, 2 * value - 1)
    axes.add_patch(Rectangle((column - 0.47, row - 0.45), 0.94, 0.9, color=A, alpha=strength, linewidth=0))
    axes.annotate(f"{100 * value:.0f}", (column, row - 0.14), ha="center", va="bottom", color=INK, weight="bold")
    low, high = pair["agreement"]["low"], pair["agreement"]["high"]
    lines = [f"[{100 * low:.0f}, {100 * high:.0f}]"] if low is not None and high is not None else []
    for name, label in _COEFFICIENTS.items():
        if (pair.get(name) or {}).get("value") is not None:
            lines.append(f"{label.rpartition(' ')[2]} {pair[name]['value']:.2f}")
    text = "\n".join(lines).replace("-", "\N{MINUS SIGN}")
    axes.annotate(text, (column, row - 0.1), ha="center", va="top", color=INK, fontsize=8)


def _narrow(label: str, num_columns: int) -> str:
    limit = max(5, 44 // num_columns)
    return label if len(label) <= limit else f"{label[: limit - 1]}\N{HORIZONTAL ELLIPSIS}"
