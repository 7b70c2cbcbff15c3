"""``dpo-cli score``: the implicit reward r = beta log(pi / pi_ref) of any pairs and rankings."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dpo_cli.cli.command import command_app, examples
from dpo_cli.cli.console import ConsoleReporter
from dpo_cli.cli.exits import errors_as_exit_codes
from dpo_cli.core import paths
from dpo_cli.core.errors import ParamsError
from dpo_cli.core.progress import Reporter
from dpo_cli.core.text import visible, visible_token

if TYPE_CHECKING:
    from dpo_cli.core.data_params import Source
    from dpo_cli.evaluation.rewards import RewardSummary
    from dpo_cli.evaluation.score import Scored, ScoredRow
    from dpo_cli.evaluation.score_rows import InputRow
    from dpo_cli.evaluation.steps import ScoredAnswers
    from dpo_cli.report.token_page import RowTokens

_OUTPUTS = (".parquet", ".jsonl")
_NAMED = 5
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

app = command_app()


@app.command(
    "score",
    rich_help_panel="Measurements",
    epilog=examples(
        "dpo-cli score new_pairs.jsonl",
        "dpo-cli score new_pairs.jsonl --html tokens.html --out rewards.parquet",
        "dpo-cli score answers.csv --set columns='{prompt: question, chosen: good, rejected: bad}' --max-rows 1000",
        "dpo-cli score data/preference/eval.parquet --beta 0.5 --json",
    ),
)
def score_command(
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="FILE", help="Pairs or rankings in any format, or tables such as data/preference/eval.parquet."
        ),
    ],
    model: Annotated[
        Path, typer.Option("--model", metavar="DIR", help="Folder of an adapter that `dpo-cli train` made.")
    ] = paths.DPO_MODEL,
    beta: Annotated[
        float | None,
        typer.Option("--beta", metavar="X", help="Beta of the reward; left out: what the adapter was trained with."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="Write the rows, token by token, as .parquet or .jsonl."),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option("--html", metavar="FILE", help="Write a page with the tokens colored by log(pi / pi_ref)."),
    ] = None,
    max_rows: Annotated[
        int | None, typer.Option("--max-rows", metavar="N", min=1, help="Read at most this many rows of each file.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="How the files are read, as under data.preferences: `format=hh`, `columns='{prompt: q}'`;"
            " `reference.max_length=N`; or a setting of runtime, such as `runtime.device=cpu`. May be repeated.",
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the figures as one JSON object, and no tables.")
    ] = False,
) -> None:
    """Score pairs or rankings with the implicit reward r = beta log(pi / pi_ref) of the tuned model.

    Prints by source how often the reward orders the answers as the data does, and the margin. Files are read
    as the conversion reads them; rows left out are counted and named. What was scored before is not scored again.
    """
    with errors_as_exit_codes(as_json=as_json):
        # here, so that --help does not wait for them
        from dpo_cli.cli.sources import sources_of
        from dpo_cli.core.load_params import load_params
        from dpo_cli.evaluation.score_rows import refuse_idle_settings

        overrides, of_files = _split_settings(settings or [])
        params = load_params(paths.PARAMS, overrides)
        refuse_idle_settings(of_files)
        sources = sources_of(files, "preferences", of_files)
        _refuse_options(beta, out, html, sources)
        from dpo_cli.evaluation.score import score_sources, write_rows

        reporter = ConsoleReporter(show_tables=not as_json)
        found, warnings = score_sources(sources, model, beta, max_rows, params, reporter)
        if out is not None:
            write_rows(out, found.rows)
        if html is not None:
            _write_page(html, found)
        _print_figures(found, out, html, reporter)
        for warning in warnings:
            reporter.warn(f"score: {warning}")
    if as_json:
        typer.echo(json.dumps(found.figures(), ensure_ascii=False))


def _split_settings(settings: Sequence[str]) -> tuple[list[str], list[str]]:
    """``--set`` as overrides of params.yaml and as settings of the files."""
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


def _refuse_options(beta: float | None, out: Path | None, html: Path | None, sources: Sequence[Source]) -> None:
    """Refuse what cannot be meant: unknown suffixes, and outputs that would overwrite something read."""
    from dpo_cli.data.plan import find_files

    problems = []
    if beta is not None and not 0 < beta <= _MAX_BETA:
        problems.append(f"--beta must be > 0 and at most {_MAX_BETA:g}, got {beta:g}")
    if out is not None and out.suffix not in _OUTPUTS:
        problems.append(f"--out must end with {' or '.join(_OUTPUTS)}, got {out}")
    if html is not None and html.suffix not in (".html", ".htm"):
        problems.append(f"--html must end with .html, got {html}")
    inputs = [path for source in sources for path in find_files(source)]
    for path in filter(None, (out, html)):
        if any(path.exists() and path.samefile(given) for given in inputs if given.exists()):
            problems.append(f"{path} is a file that is read; name another one to write")
    if problems:
        raise ParamsError(problems)


# --- what is shown ----------------------------------------------------------------------------


def _write_page(path: Path, found: Scored) -> None:
    """Write the page with the tokens of the rows whose margins are worst."""
    from dpo_cli.report.token_page import choose_rows, write_token_page

    rows = found.rows
    shown = choose_rows([row.agreement.margin for row in rows], [sum(row.answers.num_tokens) for row in rows])
    write_token_page(
        path,
        [_row_tokens(rows[index], found.tokenizer) for index in shown],
        Counter(row.agreement.outcome for row in rows),
        _told(found.summaries),
        beta=found.beta,
        model=found.model.as_posix(),
        confidence=found.confidence,
    )


def _row_tokens(row: ScoredRow, tokenizer: Any) -> RowTokens:
    from dpo_cli.data.tokens import pieces_of
    from dpo_cli.report.token_page import AnswerTokens, RowTokens, TokenPiece

    given, answers = row.input, row.answers

    def pieces(ids: Sequence[int], ratios: Sequence[float]) -> list[TokenPiece]:
        found, begin = [], 0
        for piece in pieces_of(tokenizer, ids):
            end = begin + len(piece.ids)
            found.append(TokenPiece(visible_token(piece.text), sum(ratios[begin:end]), end - begin, piece.special))
            begin = end
        return found

    return RowTokens(
        place=f"{given.source}, row {given.row}{f', {given.part}' if given.part else ''}",
        outcome=row.agreement.outcome,
        margin=row.agreement.margin,
        in_training=row.in_training,
        prompt=[{**message, "content": visible(message["content"])} for message in given.prompt],
        answers=[
            AnswerTokens(
                name,
                answers.rewards[place],
                answers.policy[place],
                answers.reference[place],
                answers.num_tokens[place],
                pieces(given.tokens.completions[place], row.ratios[place]),
            )
            for place, name in enumerate(_names(given))
        ],
    )


def _names(row: InputRow) -> list[str]:
    return ["chosen", "rejected"] if row.is_pair else [f"rank {rank}" for rank in row.ranks]


def _told(summaries: Mapping[str, RewardSummary]) -> dict[str, RewardSummary]:
    """Without the sum where there is one source."""
    return {name: one for name, one in summaries.items() if name != "all" or len(summaries) > 2}


def _print_figures(found: Scored, out: Path | None, html: Path | None, reporter: Reporter) -> None:
    """Print what became of the rows, where they were written, and the figures by source."""
    given = found.given
    rows = [("file", f"{file}: {why}") for file, why in given.formats.items()]
    rows.append(
        ("rows", f"{given.num_read} read, {given.num_scored} scored, {given.num_read - given.num_scored} left out")
    )
    rows += [("", f"{file} was not read beyond --max-rows") for file in given.stopped]
    reasons = Counter(entry["reason"] for entry in given.left_out)
    for reason, count in reasons.most_common():
        entries = [entry for entry in given.left_out if entry["reason"] == reason]
        rows.append(
            (f"left out: {reason.replace('_', ' ')}", f"{count}; {_named(entries, with_file=len(given.formats) > 1)}")
        )
    rows.append(("reference", _cached_text(found.reference)))
    rows.append(("policy", _cached_text(found.policy)))
    rows += [(name, path.as_posix()) for name, path in (("rows in", out), ("page", html)) if path]
    reporter.table("score: what there is", rows)
    lines = [("", f"{'rows':>7} {'accuracy, %':>20} {'margin, nats':>24} {'ref':>6} {'longer':>6}")]
    for name, one in _told(found.summaries).items():
        lines += [("", name), ("", _figures(one))]
    reporter.table(f"score: {found.model.as_posix()}, r = {found.beta:g} log(pi / pi_ref)", lines)
    whole = found.summaries["all"]
    reporter.table(
        "score: how to read it",
        [
            ("rows", "pairs and rankings; each counts once in the means"),
            ("accuracy", "answers in the right order by their reward; of a ranking (Kendall's tau + 1) / 2"),
            ("margin", "reward of the better answer less that of the other"),
            ("ref", "accuracy of the reference's log-probability alone"),
            ("longer", "accuracy of picking the longer answer: a baseline that reads nothing"),
            ("ties", f"{whole.num_ties} of {whole.num_compared} compared pairs of answers, counted one half"),
            ("intervals", f"{found.confidence:.0%}, clustered by prompt ({whole.num_prompts})"),
        ],
    )


def _named(entries: Sequence[Mapping[str, Any]], *, with_file: bool) -> str:
    """The first rows that are left out for a reason, and what is said of the first."""

    def place(entry: Mapping[str, Any]) -> str:
        part = f", {entry['part']}" if entry.get("part") else ""
        file = f"{Path(entry['file']).name}, " if with_file else ""
        return f"{file}row {entry['row']}{part}"

    remedy = "; longer ones are scored with --set reference.max_length=N" if entries[0]["reason"] == "over_long" else ""
    rest = "".join(f"; {place(entry)}" for entry in entries[1:_NAMED])
    more = f"; {len(entries) - _NAMED} more (--json names all)" if len(entries) > _NAMED else ""
    return f"{place(entries[0])}: {entries[0]['detail']}{rest}{more}{remedy}"


def _cached_text(answers: ScoredAnswers) -> str:
    return f"{answers.num_cached} answers taken from the cache, {answers.num_computed} computed"


def _figures(one: RewardSummary) -> str:
    low, high = 100 * one.accuracy.low, 100 * one.accuracy.high
    accuracy = f"{100 * one.accuracy.value:.1f} [{low:.1f}, {high:.1f}]"
    margin = f"{one.margin.value:+.2f} [{one.margin.low:+.2f}, {one.margin.high:+.2f}]"
    baselines = f"{100 * one.reference_accuracy:>6.1f} {100 * one.longer_accuracy:>6.1f}"
    return f"{one.num_rows:>7} {accuracy:>20} {margin:>24} {baselines}"
