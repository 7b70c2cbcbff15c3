"""docs/objectives.md and its picture, from the table of objectives and the losses themselves."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dpo_cli.core.params import TrainParams
from dpo_cli.losses.catalogue import LOSSES, SETTINGS, readers
from dpo_cli.losses.pairwise import Pairs

PICTURE = "images/objectives.svg"

_MARGINS = torch.linspace(-5, 5, 401, dtype=torch.float64)
_ON_MARGIN: tuple[tuple[str, dict[str, Any], str], ...] = (
    ("sigmoid", {}, "#1f5fa8"),
    ("cdpo", {"label_smoothing": 0.1}, "#c2571a"),
    ("robust", {"label_smoothing": 0.1}, "#2f7d4f"),
    ("hinge", {}, "#8a3ea8"),
    ("ipo_sum", {}, "#8c6d1f"),
    ("exo_pair", {"label_smoothing": 0.1}, "#b02a4c"),
    ("discopop", {}, "#4d4d4d"),
)
_ON_REWARDS: tuple[tuple[str, dict[str, Any], str], ...] = (
    ("sigmoid", {}, "#1f5fa8"),
    ("nca_pair", {}, "#c2571a"),
    ("bco_pair", {}, "#2f7d4f"),
    ("sppo_hard", {}, "#8a3ea8"),
    ("apo_zero", {}, "#8c6d1f"),
    ("apo_down", {}, "#b02a4c"),
)
_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)), (0, (3, 2)), (0, (8, 2)), (0, (2, 2)))

_TEMPLATE = Path(__file__).with_name("objectives.template.md")


def objectives_md(generated: str) -> str:
    """docs/objectives.md.

    Args:
        generated: The line that says where it comes from.
    """
    rows = ["| `train.loss` | formula | paper | when | reads beside beta |", "|---|---|---|---|---|"]
    for name, info in LOSSES.items():
        reads = ", ".join(f"`{setting}`" + (" (needed)" if setting in info.needs else "") for setting in info.reads)
        reference = "" if info.has_reference else "; no reference"
        cells = [f"`{name}`", info.formula, info.source + reference, info.use, reads or "-"]
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    named = {setting: ", ".join(readers(setting)) for setting in SETTINGS}
    return _TEMPLATE.read_text(encoding="utf-8").format(generated=generated, table="\n".join(rows), **named)


def objectives_svg() -> str:
    """The picture: equal code gives equal bytes."""
    with matplotlib.rc_context({"svg.hashsalt": "objectives", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(9.6, 6.4), layout="constrained")
        axes = figure.subplots(2, 2, sharex=True)
        for row, losses in zip(axes, (_ON_MARGIN, _ON_REWARDS), strict=True):
            _draw(row, losses)
        axes[0][0].set_title("loss", loc="left")
        axes[0][1].set_title("gradient weight, -dL/dm", loc="left")
        for one in axes[1]:
            one.set_xlabel("margin m = r_w - r_l")
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n"


def _draw(row: Sequence[Axes], losses: Sequence[tuple[str, dict[str, Any], str]]) -> None:
    for (name, settings, color), dashes in zip(losses, _DASHES, strict=False):
        policy = torch.stack([_MARGINS / 2, -_MARGINS / 2], dim=1).requires_grad_()
        pairs = Pairs(policy, torch.zeros_like(policy), torch.ones_like(policy))
        loss = LOSSES[name].of(pairs, TrainParams(loss=name, beta=1.0, **settings))
        (gradient,) = torch.autograd.grad(loss.sum(), policy)
        # along r_w = -r_l = m / 2
        weight = -(gradient[:, 0] - gradient[:, 1]) / 2
        for axes, values in zip(row, (loss.detach(), weight), strict=True):
            axes.plot(_MARGINS, values, color=color, linestyle=dashes, linewidth=1.5, label=name)
    for axes, limits in zip(row, ((-1.2, 6.5), (-1.2, 1.6)), strict=True):
        axes.set_ylim(*limits)
        axes.set_xlim(-5, 5)
        axes.axhline(0, color="#999999", linewidth=0.6)
        axes.axvline(0, color="#999999", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    row[1].legend(frameon=False, fontsize=8, loc="upper right")
