"""``dpo-cli report``: the page and its figures anew from what the stages left, and a look at them."""

from __future__ import annotations

import os
import sys
import webbrowser
from typing import Annotated

import typer

from dpo_cli.cli.command import command_app, examples
from dpo_cli.cli.console import ConsoleReporter
from dpo_cli.cli.exits import errors_as_exit_codes
from dpo_cli.cli.stage import PANEL, HandRun
from dpo_cli.core import paths
from dpo_cli.core.pipeline import STAGES
from dpo_cli.core.progress import Reporter

app = command_app()


@app.command(
    "report",
    rich_help_panel=PANEL,
    epilog=examples("dpo-cli report", "dpo-cli -C mine report --no-open"),
)
def report_command(
    no_open: Annotated[
        bool, typer.Option("--no-open", help="Open no browser. None is opened in CI or without a display, either.")
    ] = False,
) -> None:
    """Write reports/report.html and reports/figures again from the other files under reports/, and open the page.

    It is the last stage of `dpo-cli repro`, loads no model and takes seconds; run it again after `dpo-cli agreement
    --save` and `dpo-cli capability`, whose results are part of the page.
    """
    with errors_as_exit_codes(as_json=False):
        reporter = ConsoleReporter()
        by_hand = HandRun(STAGES[-1], [], reporter)
        make_report(is_opened=not no_open, reporter=reporter)
        by_hand.record()


def make_report(*, is_opened: bool, reporter: Reporter) -> None:
    """Make the page, say where it is, and open it in the default browser, where there is a screen for one.

    Raises:
        StaleArtifactError: A stage's report is missing or damaged.
    """
    from dpo_cli.stages import report  # here, so that --help does not wait for it

    report.run(reporter)
    if is_opened and has_screen() and not webbrowser.open(paths.REPORT_HTML.resolve().as_uri()):
        reporter.say("no browser could be started; open the page by hand")


def has_screen() -> bool:
    """Whether a browser would have a display, and somebody who looks at it."""
    if os.environ.get("CI") or "DVC_STAGE" in os.environ:
        return False
    if sys.platform in ("win32", "darwin"):
        return True
    return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
