"""Stage report: the page and its figures anew from what the other stages left."""

from __future__ import annotations

from dpo_cli.core import paths
from dpo_cli.core.progress import Reporter
from dpo_cli.report.page import write_report


def run(reporter: Reporter) -> None:
    """Write reports/report.html and reports/figures, and say where they are. It reads no settings.

    Raises:
        StaleArtifactError: A stage's report is missing or damaged.
    """
    write_report(paths.REPORT_HTML)
    figures = sorted(paths.FIGURES.glob("*.svg"))
    reporter.say(f"wrote {paths.REPORT_HTML} and {len(figures)} figures in {paths.FIGURES}")
