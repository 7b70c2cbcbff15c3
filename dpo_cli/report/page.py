"""The report as one HTML file, and its figures as SVG files.

Equal reports give equal bytes. The page loads nothing and forbids it by its Content-Security-Policy, which lets one
script run, the page's own, known by its digest. Texts of models and data are escaped by the templates, or lie in a
block of JSON from which the script makes text nodes.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from markupsafe import Markup

from dpo_cli.core import paths
from dpo_cli.core.artifacts import write_text
from dpo_cli.evaluation.verdict import headline, verdict
from dpo_cli.report.browser import make_browser
from dpo_cli.report.curves import training_charts
from dpo_cli.report.figures import COLOR_NAMES, Chart, standalone
from dpo_cli.report.inputs import read_inputs
from dpo_cli.report.pairs import pair_charts
from dpo_cli.report.style import page_environment, shades_of
from dpo_cli.report.tables import data_account, judge_rows, round_rows, run_tables
from dpo_cli.report.win_rates import judge_charts, missing_win_rates, win_rate_charts

_SCRIPTS = ("answers.js", "browser.js")


def write_report(path: Path) -> None:
    """Write the report of what lies under reports/, whole or not at all, and reports/figures.

    Raises:
        StaleArtifactError: A stage's report is missing or damaged.
    """
    inputs = read_inputs()
    evaluated = inputs.metrics["evaluate"]
    charts = {
        name: [chart for chart in found if chart is not None]
        for name, found in {
            "curves": training_charts(inputs),
            "win-rates": win_rate_charts(inputs),
            "pairs": pair_charts(inputs),
            "judge": judge_charts(inputs),
        }.items()
    }
    text, status = headline(evaluated)
    browser = make_browser(inputs.samples)
    script = page_script()
    page = (
        page_environment()
        .get_template("page.html.jinja")
        .render(
            headline=text,
            status=status,
            findings=verdict(evaluated),
            rounds=round_rows(inputs.metrics),
            charts=charts,
            missing=missing_win_rates(inputs),
            judge=judge_rows(evaluated),
            is_agreement_known=any(chart.slug.startswith("agreement") for chart in charts["judge"]),
            tasks=inputs.capability["tasks"] if inputs.capability else {},
            browser=browser,
            browser_data=Markup(browser.data),
            shades=shades_of(browser.scale or 1.0),
            colors=COLOR_NAMES,
            account=data_account(inputs.metrics),
            num_leaked=evaluated["num_leaked_prompts"],
            tables=run_tables(inputs.metrics),
            script=Markup(script),
            script_digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        )
    )
    _write_figures([chart for group in charts.values() for chart in group])
    write_text(path, page)


def page_script() -> str:
    """The page's one script, as it stands between its tags."""
    folder = resources.files("dpo_cli.report").joinpath("templates")
    return '"use strict";\n' + "\n".join(folder.joinpath(name).read_text(encoding="utf-8") for name in _SCRIPTS)


def _write_figures(charts: Sequence[Chart]) -> None:
    """Each chart as an SVG file; what an earlier report left and this one has not goes."""
    written = {paths.FIGURES / f"{chart.slug}.svg": chart for chart in charts}
    for path, chart in written.items():
        write_text(path, standalone(chart))
    for path in set(paths.FIGURES.glob("*.svg")) - set(written):
        path.unlink()
