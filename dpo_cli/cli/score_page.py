"""What ``dpo-cli score`` found: as a page, and as tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dpo_cli.core.progress import Reporter
from dpo_cli.core.text import visible, visible_token
from dpo_cli.data.tokens import pieces_of
from dpo_cli.evaluation.implicit_reward import RewardSummary
from dpo_cli.evaluation.log_ratios import ScoredAnswers
from dpo_cli.evaluation.score import Scored, ScoredRow
from dpo_cli.evaluation.score_rows import InputRow
from dpo_cli.report.token_page import AnswerTokens, RowTokens, TokenPiece, choose_rows, write_token_page

_NAMED = 5


def _names(row: InputRow) -> list[str]:
    return ["chosen", "rejected"] if row.is_pair else [f"rank {rank}" for rank in row.ranks]


def write_page(path: Path, found: Scored) -> None:
    """Write the page with the tokens of the rows whose margins are worst."""
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
    given, answers = row.input, row.answers
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
                row.logps[place],
                answers.reference[place],
                answers.num_tokens[place],
                _token_pieces(tokenizer, given.tokens.completions[place], row.ratios[place]),
            )
            for place, name in enumerate(_names(given))
        ],
    )


def _token_pieces(tokenizer: Any, ids: Sequence[int], ratios: Sequence[float]) -> list[TokenPiece]:
    pieces, begin = [], 0
    for piece in pieces_of(tokenizer, ids):
        end = begin + len(piece.ids)
        pieces.append(TokenPiece(visible_token(piece.text), sum(ratios[begin:end]), end - begin, piece.special))
        begin = end
    return pieces


def _told(summaries: Mapping[str, RewardSummary]) -> dict[str, RewardSummary]:
    """Without the sum where there is one source."""
    return {name: one for name, one in summaries.items() if name != "all" or len(summaries) > 2}


def print_figures(found: Scored, out: Path | None, html: Path | None, reporter: Reporter) -> None:
    """Print what became of the rows, and the figures by source.

    Args:
        found: What to print.
        out: Where the rows were written.
        html: Where the page was written.
        reporter: Prints it.
    """
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
