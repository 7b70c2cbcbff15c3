"""Curves of a training as a page: written again while it runs, and loaded again by the browser."""

from __future__ import annotations

import time
from pathlib import Path

from dpo_cli.core.artifacts import write_text
from dpo_cli.report.curves import curve_charts
from dpo_cli.report.figures import COLOR_NAMES
from dpo_cli.report.readings import readings, worst
from dpo_cli.report.steps import CURVES, points_of
from dpo_cli.report.style import page_environment
from dpo_cli.report.watched import Watched


def write_watch_page(path: Path, watched: Watched, refresh_s: int) -> None:
    """Write the page, whole or not at all.

    Args:
        path: The HTML file.
        watched: What it shows.
        refresh_s: Seconds after which the browser loads it again, while the training runs.
    """
    start = next((loss for _, loss in points_of(watched.steps, "eval_loss")), None)
    charts = curve_charts(CURVES[watched.stage], watched.steps, watched.source, start)
    findings = readings(watched.stage, watched.steps)
    page = (
        page_environment()
        .get_template("watch.html.jinja")
        .render(
            headline=watched.headline,
            status=worst(findings),
            findings=findings,
            charts=[chart for chart in charts if chart is not None],
            colors=COLOR_NAMES,
            refresh_s=refresh_s if watched.state == "running" else 0,
            time=time.strftime("%H:%M:%S"),
        )
    )
    write_text(path, page)
