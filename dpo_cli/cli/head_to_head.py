"""``dpo-cli compare --judge``: the answers of experiments judged against each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dpo_cli.cli.console import open_console
from dpo_cli.core import paths
from dpo_cli.core.errors import DataError, ParamsError
from dpo_cli.core.params import load_params
from dpo_cli.core.progress import Reporter
from dpo_cli.evaluation.comparison import Experiment
from dpo_cli.evaluation.findings import percent, percent_interval
from dpo_cli.evaluation.head_to_head import HeadToHead, answers_by_model, meet
from dpo_cli.evaluation.metrics import ends
from dpo_cli.judging.opening import Candidate, prepare_judge
from dpo_cli.models.load import quiet_libraries
from dpo_cli.reference.graph import open_graph
from dpo_cli.statistics.bootstrap import Estimate, Sampling

_READ = (
    "model.", "reference.", "runtime.",
    *(f"evaluate.{name}" for name in ("judge=", "hf.", "openai.", "bootstrap_draws=", "confidence=", "seed=")),
)  # fmt: skip


def judge_experiments(experiments: Sequence[Experiment], overrides: Sequence[str], reporter: Reporter) -> HeadToHead:
    """Judge the answers of experiments, and of their SFT model, by section evaluate of params.yaml.

    Raises:
        ParamsError: There is no judge, or one that judges other answers.
        StaleArtifactError: Something that the judge needs is missing.
        DataError: The experiments share no prompt, or the judge has no verdict on too many comparisons.
    """
    quiet_libraries()
    idle = [override for override in overrides if not override.strip().startswith(_READ)]
    if idle:
        raise ParamsError([f"--set {override} has no effect on compare --judge" for override in idle])
    params = load_params(paths.PARAMS, overrides)
    knobs = params.evaluate
    if knobs.judge in ("none", "votes"):
        raise ParamsError(
            f"--judge has no effect with evaluate.judge {knobs.judge}; set another one, as in --set evaluate.judge=hf"
        )
    models, prompts = answers_by_model(experiments)
    if not prompts:
        raise DataError("the experiments share no prompt; evaluate them on the same data")
    num_all = len({id for experiment in experiments for id in experiment.answers})
    graph = open_graph(params.model, params.reference, params.runtime)
    memory = paths.scratch_root() / "evaluate" / "judgments"
    opener = prepare_judge(knobs, graph, ("", ""), params.runtime, reporter, "compare", memory)
    assert opener is not None

    def candidate(id: str, text: str) -> Candidate:
        return Candidate(id, prompts[id], text, 0)  # lengths are not looked at

    every = [candidate(id, text) for answers in models.values() for id, text in answers.items()]
    judge = opener(every)
    sampling = Sampling(knobs.bootstrap_draws, knobs.confidence, knobs.seed)
    return meet(models, candidate, judge, num_all - len(prompts), reporter, sampling)


def print_head_to_head(found: HeadToHead, console: Console | None = None) -> None:
    """Print win rates of rows over columns, and strengths."""
    console = console or open_console()
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold", show_edge=False)
    table.add_column(Text("win rate of"), overflow="fold")
    for name in found.models:
        table.add_column(Text(f"over {name}"), overflow="fold")
    if found.strengths is not None:
        table.add_column("strength, logits")
    for first in found.models:
        cells = [
            "-" if first == second else f"{percent(rate.value)}\n{percent_interval([rate.low, rate.high])}"
            for second in found.models
            for rate in ([found.win_rate(first, second)] if first != second else [_SAME])
        ]
        if found.strengths is not None:
            strength = found.strengths.strengths[first]
            anchor = first == found.models[0]
            interval = "" if anchor or ends(strength) is None else f"\n[{strength.low:+.2f}, {strength.high:+.2f}]"
            cells.append("0" if anchor else f"{strength.value:+.2f}{interval}")
        table.add_row(Text(first), *map(Text, cells))
    console.print()
    console.print(table)
    console.print()
    left_out = f", {found.num_left_out} that not all have are left out" if found.num_left_out else ""
    orders = ", in both orders," if found.reads else ""
    console.print(Text(f"Judged by {found.judge}{orders} on {found.num_prompts} prompts{left_out}."))
    console.print(
        Text(
            f"Strengths by Bradley-Terry, {found.models[0]} being 0."
            if found.strengths is not None
            else f"No strengths: {found.why}."
        )
    )


_SAME = Estimate(0.5, 0.5, 0.5)


def head_to_head_json(found: HeadToHead) -> dict[str, Any]:
    """The same as one JSON value."""
    strengths = None
    if found.strengths is not None:
        fitted = found.strengths.strengths.items()
        strengths = {name: {"value": each.value, "ci": ends(each)} for name, each in fitted}
    return {
        "judge": found.judge,
        "num_prompts": found.num_prompts,
        "num_left_out": found.num_left_out,
        "win_rates": [
            {
                "model": ours,
                "opponent": theirs,
                "value": match.win_rate.value,
                "ci": ends(match.win_rate),
                "tie_rate": match.tie_rate,
            }
            for (ours, theirs), match in found.matches.items()
        ],
        "strengths": strengths,
        **({"why": found.why} if found.why else {}),
    }
