"""``dpo-cli report``: the page and its figures anew from what the stages left, and a look at them."""

from __future__ import annotations

import os
import sys
import webbrowser

from dpo_cli.core import paths
from dpo_cli.core.progress import Reporter
from dpo_cli.report.page import write_report


def make_report(*, is_opened: bool, reporter: Reporter) -> None:
    """Write reports/report.html and reports/figures, say where they are, and open the page.

    Args:
        is_opened: Whether to open the page in the default browser, where there is a screen for one.
        reporter: Says where the page is.

    Raises:
        StaleArtifactError: A stage's report is missing or damaged.
    """
    write_report(paths.REPORT_HTML)
    figures = sorted(paths.FIGURES.glob("*.svg"))
    reporter.say(f"wrote {paths.REPORT_HTML} and {len(figures)} figures in {paths.FIGURES}")
    if is_opened and has_screen() and not webbrowser.open(paths.REPORT_HTML.resolve().as_uri()):
        reporter.say("no browser could be started; open the page by hand")


def has_screen() -> bool:
    """Whether a browser would have a display, and somebody who looks at it."""
    if os.environ.get("CI") or "DVC_STAGE" in os.environ:
        return False
    if sys.platform in ("win32", "darwin"):
        return True
    return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
