"""``dpo-cli score``: the implicit reward r = beta log(pi / pi_ref) of any pairs and rankings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import polars as pl

from dpo_cli.cli.score_output import ScoredRow, ScoreOptions, print_figures, write_page, write_rows
from dpo_cli.cli.score_rows import InputRow, read_rows
from dpo_cli.core import paths
from dpo_cli.core.artifacts import read_json
from dpo_cli.core.errors import ParamsError, StaleArtifactError
from dpo_cli.core.objectives import learns_log_ratio
from dpo_cli.core.params import Params, Source
from dpo_cli.core.progress import Reporter
from dpo_cli.data.plan import find_files
from dpo_cli.data.tokenise import prompt_ids
from dpo_cli.evaluation.implicit_reward import (
    RankedAnswers,
    RewardSummary,
    agreements,
    summarise_rewards,
)
from dpo_cli.models.load import quiet_libraries
from dpo_cli.reference.cache import group_keys
from dpo_cli.reference.graph import Graph, open_graph, table_digests
from dpo_cli.reference.log_ratios import Answers, score_both

OUTPUTS = (".parquet", ".jsonl")
_MAX_BETA = 1e6
_SECTIONS = ("data", "model", "sft", "reference", "train", "evaluate", "runtime")
_READ = (
    *(
        f"runtime.{name}"
        for name in (
            "device", "workers", "threads", "max_tokens_per_microbatch", "layout", "head_mib", "checkpoint_minutes",
            "model_path",
        )
    ),
    "reference.max_length",
    *(f"evaluate.{name}" for name in ("bootstrap_draws", "confidence", "seed")),
)  # fmt: skip
# --- options ------------------------------------------------------------------------------


def split_settings(settings: Sequence[str]) -> tuple[list[str], list[str]]:
    """``--set`` as overrides of params.yaml and as settings of the files.

    Raises:
        ParamsError: A setting of params.yaml has no effect here.
    """
    overrides, of_files, problems = [], [], []
    for setting in settings:
        key = setting.partition("=")[0].strip()
        section = key.partition(".")[0]
        if section not in _SECTIONS or "." not in key or key.startswith("data.preferences."):
            of_files.append(setting)
        elif key in _READ:
            overrides.append(setting)
        else:
            problems.append(f"--set {setting} has no effect on score, which reads {', '.join(_READ)}")
    if problems:
        raise ParamsError(problems)
    return overrides, of_files


def refuse_options(options: ScoreOptions, sources: Sequence[Source]) -> None:
    """Refuse what cannot be meant: unknown suffixes, and outputs that would overwrite something read.

    Raises:
        ParamsError: With every problem.
    """
    problems = []
    if options.beta is not None and not 0 < options.beta <= _MAX_BETA:
        problems.append(f"--beta must be > 0 and at most {_MAX_BETA:g}, got {options.beta:g}")
    if options.out is not None and options.out.suffix not in OUTPUTS:
        problems.append(f"--out must end with {' or '.join(OUTPUTS)}, got {options.out}")
    if options.html is not None and options.html.suffix not in (".html", ".htm"):
        problems.append(f"--html must end with .html, got {options.html}")
    inputs = [path for source in sources for path in find_files(source)]
    for path in filter(None, (options.out, options.html)):
        if any(path.exists() and path.samefile(given) for given in inputs if given.exists()):
            problems.append(f"{path} is a file that is read; name another one to write")
    if problems:
        raise ParamsError(problems)


# --- the command --------------------------------------------------------------------------


def score_files(sources: Sequence[Source], options: ScoreOptions, params: Params, reporter: Reporter) -> dict[str, Any]:
    """Score the rows of some files with policy and reference, and print what their implicit reward says.

    Args:
        sources: The files.
        options: What is asked for.
        params: All settings.
        reporter: Hears of progress, and gets the tables.

    Returns:
        The figures.

    Raises:
        ParamsError: An option has no effect.
        DataError: A file cannot be read, or no row of it can be scored.
        StaleArtifactError: The model or its reference is missing, damaged, or of another graph.
        Interrupted: The user asked to stop; what was scored is kept.
    """
    quiet_libraries()
    provenance = _read_provenance(options.model)
    beta = _beta(options, provenance)
    graph = open_graph(params.model, params.reference, params.runtime)
    if provenance["graph"] != graph.identity:
        raise StaleArtifactError(
            f"{options.model.as_posix()}: trained on another graph than models/sft is now; run: dpo-cli train"
        )
    given = read_rows(sources, options.max_rows, params, graph, reporter)
    policy, reference = score_both(
        graph, options.model, [row.tokens for row in given.rows], params.runtime, reporter, "score"
    )
    rows = _scored(given.rows, policy, reference, beta, _trained_prompts(given.rows, graph))
    knobs = params.evaluate
    summaries = _summaries(rows, draws=knobs.bootstrap_draws, confidence=knobs.confidence, seed=knobs.seed)
    if options.out is not None:
        write_rows(options.out, rows)
    if options.html is not None:
        write_page(options, rows, summaries, beta, knobs.confidence, graph)
    print_figures(options, given, policy, reference, summaries, beta, knobs.confidence, reporter)
    _warn(rows, provenance, graph, options.model, reporter)
    return {
        "model": options.model.as_posix(),
        "beta": beta,
        "num_read": given.num_read,
        "num_scored": given.num_scored,
        "num_in_training": sum(row.in_training for row in rows),
        "reference": {"num_cached": reference.num_cached, "num_computed": reference.num_computed},
        "policy": {"num_cached": policy.num_cached, "num_computed": policy.num_computed},
        "all": asdict(summaries["all"]),
        "sources": {name: asdict(one) for name, one in summaries.items() if name != "all"},
        "left_out": given.left_out,
    }


def _read_provenance(model: Path) -> Mapping[str, Any]:
    remedy = (
        "run: dpo-cli train"
        if model == paths.DPO_MODEL
        else "name a folder that dpo-cli train made, such as models/dpo"
    )
    path = model / "provenance.json"
    provenance = read_json(path, remedy)
    try:
        float(provenance["params"]["train"]["beta"])
        dict(provenance["graph"])
    except (KeyError, TypeError, ValueError):
        raise StaleArtifactError(f"{path.as_posix()} is damaged: it has no beta or no graph; {remedy}") from None
    return provenance


def _beta(options: ScoreOptions, provenance: Mapping[str, Any]) -> float:
    trained = float(provenance["params"]["train"]["beta"])
    if options.beta == trained:
        raise ParamsError(
            f"--beta {trained:g} has no effect: {options.model.as_posix()} was trained with it; leave it out"
        )
    return trained if options.beta is None else options.beta


def _scored(
    rows: Sequence[InputRow], policy: Answers, reference: Answers, beta: float, trained: set[str]
) -> list[ScoredRow]:
    keys = [group_keys(row.tokens) for row in rows]
    ranked = [
        RankedAnswers(
            group=row.tokens.group,
            ranks=row.ranks,
            rewards=tuple(beta * (policy.logps[key] - reference.logps[key]) for key in mine),
            reference=tuple(reference.logps[key] for key in mine),
            num_tokens=tuple(map(len, row.tokens.completions)),
        )
        for row, mine in zip(rows, keys, strict=True)
    ]
    return [
        ScoredRow(
            row,
            answers,
            agreement,
            [policy.logps[key] for key in mine],
            [_differences(policy.token_logps[key], reference.token_logps[key]) for key in mine],
            row.tokens.group in trained,
        )
        for row, answers, agreement, mine in zip(rows, ranked, agreements(ranked), keys, strict=True)
    ]


def _differences(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    return [mine - other for mine, other in zip(ours, theirs, strict=True)]


def _summaries(rows: Sequence[ScoredRow], **bootstrap: Any) -> dict[str, RewardSummary]:
    """Figures of all rows, then of each source."""
    sources = list(dict.fromkeys(row.input.source for row in rows))
    found = {}
    for name in ["all", *sources]:
        mine = [row for row in rows if name == "all" or row.input.source == name]
        found[name] = summarise_rewards([row.answers for row in mine], [row.agreement for row in mine], **bootstrap)
    return found


# --- what was trained on ------------------------------------------------------------------


def _trained_prompts(rows: Sequence[InputRow], graph: Graph) -> set[str]:
    """Those of the rows' prompts that are in the training data as it lies there now."""
    wanted = {row.tokens.group for row in rows}
    found: set[str] = set()
    for path in (paths.preference_table("train"), paths.ranking_table("train")):
        if path.is_file():
            found |= wanted & set(pl.read_parquet(path, columns=["group"], glob=False)["group"].to_list())
    path = paths.SFT_DATA / "train.parquet"
    if graph.sft.data is not None and path.is_file():
        found |= wanted & prompt_ids(path)
    return found


def _warn(
    rows: Sequence[ScoredRow], provenance: Mapping[str, Any], graph: Graph, model: Path, reporter: Reporter
) -> None:
    num_trained = sum(row.in_training for row in rows)
    if num_trained:
        reporter.warn(
            f"score: {num_trained} of {len(rows)} rows ({num_trained / len(rows):.0%}) have prompts that were trained"
            " on: what they say of new prompts is too good"
        )
    changed = [
        folder.as_posix()
        for folder, digests in ((paths.PREFERENCE_DATA, provenance.get("data")), (paths.SFT_DATA, graph.sft.data))
        if digests is not None and digests != table_digests(folder)
    ]
    if changed:
        reporter.warn(
            f"score: {' and '.join(changed)} differ from what {model.as_posix()} was trained on, so more of the prompts"
            " may be"
        )
    trained = provenance["params"]["train"]
    loss = trained.get("loss", "sigmoid")
    names = list(loss) if isinstance(loss, dict) else [loss]
    if not learns_log_ratio(names, trained.get("divergence", "reverse_kl"), trained.get("ld_alpha")):
        reporter.warn(
            f"score: {model.as_posix()} was trained with {', '.join(names)} and its settings, whose reward is another"
            " than beta log(pi / pi_ref) (docs/objectives.md)"
        )
