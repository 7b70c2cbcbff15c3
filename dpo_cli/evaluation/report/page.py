"""The report as one HTML file: verdict, curves, samples side by side, the account of the data, the run.

Equal reports give equal bytes. The page loads nothing, runs no script and forbids both by its
Content-Security-Policy; every text of a model or a data file is escaped by the template.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_cli.core import paths
from dpo_cli.core.artifacts import write_text
from dpo_cli.evaluation.report.account import data_account, run_tables
from dpo_cli.evaluation.report.curves import draw_curves
from dpo_cli.evaluation.report.environment import environment_of
from dpo_cli.evaluation.report.inputs import read_inputs
from dpo_cli.evaluation.verdict import headline, verdict

_SHOWN = 60
_OUTCOMES = {"win": "wins", "tie": "ties", "loss": "losses"}


@dataclass(frozen=True)
class Outcome:
    """How often the tuned model wins, ties or loses.

    Attributes:
        name: win, tie or loss.
        plural: The same for many.
        num_prompts: How many prompts have this outcome.
        num_shown: How many of them are on the page.
    """

    name: str
    plural: str
    num_prompts: int
    num_shown: int


@dataclass(frozen=True)
class Samples:
    """The samples that are shown, and what they are taken from.

    Attributes:
        shown: Samples with their outcome, which is None where no judge compared.
        num_prompts: How many there are in all.
        outcomes: Each outcome that occurs; empty where no judge compared.
        file: Where all samples are.
    """

    shown: list[tuple[Mapping[str, Any], str | None]]
    num_prompts: int
    outcomes: list[Outcome]
    file: str


def write_report(path: Path) -> None:
    """Write the report of what lies under reports/.

    Args:
        path: The HTML file, written whole or not at all.

    Raises:
        StaleArtifactError: A stage's report is missing or damaged.
    """
    inputs = read_inputs()
    evaluated = inputs.metrics["evaluate"]
    text, status = headline(evaluated)
    page = (
        environment_of("dpo_cli.evaluation.report")
        .get_template("page.html.jinja")
        .render(
            headline=text,
            status=status,
            findings=verdict(evaluated),
            curves=draw_curves(inputs),
            samples=choose_samples(inputs.samples),
            account=data_account(inputs.metrics),
            num_leaked=evaluated["num_leaked_prompts"],
            tables=run_tables(inputs.metrics),
        )
    )
    write_text(path, page)


def choose_samples(samples: Sequence[Mapping[str, Any]]) -> Samples:
    """The first samples of each outcome in the order of their ids, so that rare losses are seen too."""
    ordered = [(sample, _outcome(sample)) for sample in sorted(samples, key=lambda sample: sample["id"])]
    names = [name for name in _OUTCOMES if any(outcome == name for _, outcome in ordered)]
    limit = _SHOWN // len(_OUTCOMES) if names else _SHOWN
    counts = dict.fromkeys([*_OUTCOMES, None], 0)
    shown = []
    for sample, outcome in ordered:
        if counts[outcome] < limit:
            shown.append((sample, outcome))
        counts[outcome] += 1
    return Samples(
        shown=shown,
        num_prompts=len(samples),
        outcomes=[Outcome(name, _OUTCOMES[name], counts[name], min(counts[name], limit)) for name in names],
        file=(paths.report_dir("evaluate") / "samples.jsonl").as_posix(),
    )


def _outcome(sample: Mapping[str, Any]) -> str | None:
    if "win" not in sample:
        return None
    return "win" if sample["win"] > 0.5 else "loss" if sample["win"] < 0.5 else "tie"
