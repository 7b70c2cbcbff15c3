"""``dpo-cli score``: the implicit reward r = beta log(pi / pi_ref) of any pairs and rankings."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from dpo_cli.cli.score_rows import InputRow, InputRows, read_rows
from dpo_cli.cli.show import pieces_of
from dpo_cli.cli.show_page import visible_token
from dpo_cli.core import paths
from dpo_cli.core.artifacts import atomic_path, read_json, write_json_lines
from dpo_cli.core.errors import ParamsError, StaleArtifactError
from dpo_cli.core.objectives import OBJECTIVES
from dpo_cli.core.params import Params, Source
from dpo_cli.core.progress import Reporter
from dpo_cli.data.convert import find_files
from dpo_cli.data.schema import MESSAGES, content_id
from dpo_cli.evaluation.heat.page import HeatAnswer, HeatPiece, HeatRow, choose_rows, write_heat_page
from dpo_cli.evaluation.implicit_reward import (
    Agreement,
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
_NAMED = 5
_COMPLETION = pa.struct(
    [
        ("side", pa.string()),
        ("rank", pa.int32()),
        ("messages", MESSAGES),
        ("reward", pa.float64()),
        ("logp", pa.float64()),
        ("ref_logp", pa.float64()),
        ("num_tokens", pa.int32()),
        ("token_ids", pa.list_(pa.int32())),
        ("token_log_ratios", pa.list_(pa.float32())),
    ]
)
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("file", pa.string()),
        ("row", pa.int64()),
        ("part", pa.string()),
        ("source", pa.string()),
        ("kind", pa.string()),
        ("in_training", pa.bool_()),
        ("accuracy", pa.float64()),
        ("margin", pa.float64()),
        ("prompt", MESSAGES),
        ("completions", pa.list_(_COMPLETION)),
    ]
)
"""Columns of ``--out``. Rewards, log-probabilities (``logp``, ``ref_logp``) and margin are in nats."""


@dataclass(frozen=True)
class ScoreOptions:
    """What is asked for.

    Attributes:
        model: Folder of the adapter.
        beta: Of the reward; None: what the adapter was trained with.
        max_rows: Rows to read of each file; None: all.
        out: Where the rows go, as .parquet or .jsonl.
        html: Where the page with token heat goes.
    """

    model: Path = paths.DPO_MODEL
    beta: float | None = None
    max_rows: int | None = None
    out: Path | None = None
    html: Path | None = None


@dataclass(frozen=True)
class _Row:
    """A scored row.

    Attributes:
        input: The row.
        answers: Its answers' figures.
        agreement: How their rewards agree with their ranks.
        logps: Under the policy, of each answer.
        ratios: log(pi / pi_ref) of each token of each answer, nats.
        in_training: Whether its prompt was trained on.
    """

    input: InputRow
    answers: RankedAnswers
    agreement: Agreement
    logps: list[float]
    ratios: list[list[float]]
    in_training: bool


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
    if options.beta is not None and not (math.isfinite(options.beta) and options.beta > 0):
        problems.append(f"--beta must be > 0, got {options.beta:g}")
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
        _write_rows(options.out, rows)
    if options.html is not None:
        _write_page(options, rows, summaries, beta, knobs.confidence, graph)
    _print(options, given, policy, reference, summaries, beta, knobs.confidence, reporter)
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
) -> list[_Row]:
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
        _Row(
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


def _summaries(rows: Sequence[_Row], **bootstrap: Any) -> dict[str, RewardSummary]:
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
        prompts = pl.read_parquet(path, columns=["prompt"], glob=False)
        found |= wanted & {content_id(prompt) for (prompt,) in prompts.iter_rows()}
    return found


def _warn(rows: Sequence[_Row], provenance: Mapping[str, Any], graph: Graph, model: Path, reporter: Reporter) -> None:
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
    loss = provenance["params"]["train"].get("loss", "sigmoid")
    names = list(loss) if isinstance(loss, dict) else [loss]
    if all(name in OBJECTIVES and not OBJECTIVES[name].has_reference for name in names):
        reporter.warn(
            f"score: {model.as_posix()} was trained with {', '.join(names)}, which knows no reference: beta"
            " log(pi / pi_ref) is not the reward that it learned"
        )


# --- output -------------------------------------------------------------------------------


def _names(row: InputRow) -> list[str]:
    return ["chosen", "rejected"] if row.is_pair else [f"rank {rank}" for rank in row.ranks]


def _write_rows(path: Path, rows: Sequence[_Row]) -> None:
    entries = (_entry(row) for row in rows)
    if path.suffix == ".jsonl":
        write_json_lines(path, entries)
        return
    with atomic_path(path) as temporary:
        pq.write_table(pa.Table.from_pylist(list(entries), schema=SCHEMA), temporary, compression="zstd")


def _entry(row: _Row) -> dict[str, Any]:
    """A row as ``--out`` has it (:data:`SCHEMA`)."""
    given, answers = row.input, row.answers
    return {
        "id": given.tokens.id,
        "file": given.file,
        "row": given.row,
        "part": given.part,
        "source": given.source,
        "kind": "pair" if given.is_pair else "ranking",
        "in_training": row.in_training,
        "accuracy": row.agreement.accuracy,
        "margin": row.agreement.margin,
        "prompt": given.prompt,
        "completions": [
            {
                "side": ("chosen", "rejected")[place] if given.is_pair else None,
                "rank": given.ranks[place],
                "messages": messages,
                "reward": answers.rewards[place],
                "logp": row.logps[place],
                "ref_logp": answers.reference[place],
                "num_tokens": answers.num_tokens[place],
                "token_ids": list(given.tokens.completions[place]),
                "token_log_ratios": row.ratios[place],
            }
            for place, messages in enumerate(given.completions)
        ],
    }


def _write_page(
    options: ScoreOptions,
    rows: Sequence[_Row],
    summaries: Mapping[str, RewardSummary],
    beta: float,
    confidence: float,
    graph: Graph,
) -> None:
    assert options.html is not None
    shown = choose_rows([row.agreement.margin for row in rows], [sum(row.answers.num_tokens) for row in rows])
    write_heat_page(
        options.html,
        [_heat_row(rows[index], graph.tokenizer) for index in shown],
        Counter(row.agreement.outcome for row in rows),
        _told(summaries),
        beta=beta,
        model=options.model.as_posix(),
        confidence=confidence,
    )


def _heat_row(row: _Row, tokenizer: Any) -> HeatRow:
    given, answers = row.input, row.answers
    return HeatRow(
        place=f"{given.source}, row {given.row}{f', {given.part}' if given.part else ''}",
        outcome=row.agreement.outcome,
        margin=row.agreement.margin,
        in_training=row.in_training,
        prompt=given.prompt,
        answers=[
            HeatAnswer(
                name,
                answers.rewards[place],
                row.logps[place],
                answers.reference[place],
                answers.num_tokens[place],
                _heat_pieces(tokenizer, given.tokens.completions[place], row.ratios[place]),
            )
            for place, name in enumerate(_names(given))
        ],
    )


def _heat_pieces(tokenizer: Any, ids: Sequence[int], ratios: Sequence[float]) -> list[HeatPiece]:
    pieces, begin = [], 0
    for piece in pieces_of(tokenizer, ids):
        end = begin + len(piece.ids)
        pieces.append(HeatPiece(visible_token(piece.text), sum(ratios[begin:end]), end - begin, piece.special))
        begin = end
    return pieces


def _told(summaries: Mapping[str, RewardSummary]) -> dict[str, RewardSummary]:
    """Without the sum where there is one source."""
    return {name: one for name, one in summaries.items() if name != "all" or len(summaries) > 2}


def _print(
    options: ScoreOptions,
    given: InputRows,
    policy: Answers,
    reference: Answers,
    summaries: Mapping[str, RewardSummary],
    beta: float,
    confidence: float,
    reporter: Reporter,
) -> None:
    rows = [("file", f"{file}: {why}") for file, why in given.formats.items()]
    rows.append(
        ("rows", f"{given.num_read} read, {given.num_scored} scored, {given.num_read - given.num_scored} left out")
    )
    rows += [("", f"{file} was not read beyond --max-rows") for file in given.stopped]
    reasons = Counter(entry["reason"] for entry in given.left_out)
    for reason, count in reasons.most_common():
        entries = [entry for entry in given.left_out if entry["reason"] == reason]
        rows.append((f"left out: {reason.replace('_', ' ')}", f"{count}; {_named(entries)}"))
    rows.append(("reference", _cached_text(reference)))
    rows.append(("policy", _cached_text(policy)))
    rows += [(name, path.as_posix()) for name, path in (("rows in", options.out), ("page", options.html)) if path]
    reporter.table("score: what there is", rows)
    lines = [("", f"{'rows':>7} {'accuracy, %':>20} {'margin, nats':>24} {'ref':>6} {'longer':>6}")]
    for name, one in _told(summaries).items():
        lines += [("", name), ("", _figures(one))]
    reporter.table(f"score: {options.model.as_posix()}, r = {beta:g} log(pi / pi_ref)", lines)
    whole = summaries["all"]
    reporter.table(
        "score: how to read it",
        [
            ("accuracy", "answers in the right order by their reward; of a ranking (Kendall's tau + 1) / 2"),
            ("margin", "reward of the better answer less that of the other"),
            ("ref", "accuracy of the reference's log-probability alone"),
            ("longer", "accuracy of picking the longer answer: a baseline that reads nothing"),
            ("ties", f"{whole.num_ties} of {whole.num_compared} compared pairs of answers, counted one half"),
            ("intervals", f"{confidence:.0%}, clustered by prompt ({whole.num_prompts})"),
        ],
    )


def _named(entries: Sequence[Mapping[str, Any]]) -> str:
    """The first rows that are left out for a reason, and what is said of the first."""
    first = entries[0]
    part = f", {first['part']}" if first.get("part") else ""
    rest = "".join(f"; {entry['file']}, row {entry['row']}" for entry in entries[1:_NAMED])
    more = f"; {len(entries) - _NAMED} more (--json names all)" if len(entries) > _NAMED else ""
    return f"{first['file']}, row {first['row']}{part}: {first['detail']}{rest}{more}"


def _cached_text(answers: Answers) -> str:
    return f"{answers.num_cached} answers taken from the cache, {answers.num_computed} computed"


def _figures(one: RewardSummary) -> str:
    low, high = 100 * one.accuracy.low, 100 * one.accuracy.high
    accuracy = f"{100 * one.accuracy.value:.1f} [{low:.1f}, {high:.1f}]"
    margin = f"{one.margin.value:+.2f} [{one.margin.low:+.2f}, {one.margin.high:+.2f}]"
    baselines = f"{100 * one.reference_accuracy:>6.1f} {100 * one.longer_accuracy:>6.1f}"
    return f"{one.num_rows:>7} {accuracy:>20} {margin:>24} {baselines}"
