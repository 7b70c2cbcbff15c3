"""Answers with their tokens colored by log(pi / pi_ref), as one HTML file.

It loads nothing, runs no script and forbids both; all texts are escaped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dpo_cli.core.artifacts import write_text
from dpo_cli.data.schema import Messages
from dpo_cli.evaluation.rewards import RewardSummary
from dpo_cli.report.style import page_environment, scale_of, shade_of, shades_of

ROWS_SHOWN, _TOKENS_SHOWN = 200, 150_000
_OUTCOMES = {"wrong": "wrong", "tie": "ties", "right": "right"}


@dataclass(frozen=True)
class TokenPiece:
    """Tokens that are shown together: one, or the several that a character is split over.

    Attributes:
        text: Their text, with all in it visible.
        ratio: Sum of log(pi / pi_ref) over them, nats.
        num_tokens: How many they are.
        special: Whether it is a special token, such as the one that ends the turn.
    """

    text: str
    ratio: float
    num_tokens: int
    special: bool


@dataclass(frozen=True)
class AnswerTokens:
    """An answer, its name chosen, rejected or its rank; all figures in nats.

    Attributes:
        reward: beta log(pi / pi_ref).
        logp: Under the policy.
        ref_logp: Under the reference.
        num_tokens: Its tokens, end of turn included.
    """

    name: str
    reward: float
    logp: float
    ref_logp: float
    num_tokens: int
    pieces: Sequence[TokenPiece]


@dataclass(frozen=True)
class RowTokens:
    """A row on the page.

    Attributes:
        place: Where it comes from: file and row.
        outcome: right, wrong or tie.
        margin: Mean over its compared answers, nats.
        answers: Best first.
    """

    place: str
    outcome: str
    margin: float
    in_training: bool
    prompt: Messages
    answers: Sequence[AnswerTokens]


def choose_rows(margins: Sequence[float], num_tokens: Sequence[int]) -> list[int]:
    """Which rows are shown: those with the worst margins, until the page has enough rows or tokens; at least one.

    Args:
        margins: Of each row, nats.
        num_tokens: Tokens of each row's answers.

    Returns:
        Their places, the worst first.
    """
    shown: list[int] = []
    total = 0
    for index in sorted(range(len(margins)), key=lambda index: (margins[index], index))[:ROWS_SHOWN]:
        total += num_tokens[index]
        if shown and total > _TOKENS_SHOWN:
            break
        shown.append(index)
    return shown


def write_token_page(
    path: Path,
    rows: Sequence[RowTokens],
    outcomes: Mapping[str, int],
    summaries: Mapping[str, RewardSummary],
    *,
    beta: float,
    model: str,
    confidence: float,
) -> None:
    """Write the page, whole or not at all.

    Args:
        path: The HTML file.
        rows: Those that are shown, in order.
        outcomes: How many rows there are in all by their outcome.
        summaries: Figures by the name of what they are of; all rows first.
        beta: Of the rewards.
        model: The adapter's name.
        confidence: Of the intervals.
    """
    scale = scale_of([piece.ratio for row in rows for answer in row.answers for piece in answer.pieces])
    shown = Counter(row.outcome for row in rows)
    page = (
        page_environment()
        .get_template("tokens.html.jinja")
        .render(
            rows=rows,
            num_rows=sum(outcomes.values()),
            outcomes=[
                (name, plural, shown[name], outcomes[name])
                for name, plural in _OUTCOMES.items()
                if outcomes.get(name, 0)
            ],
            summaries=summaries,
            beta=f"{beta:g}",
            model=model,
            confidence=f"{confidence:.0%}",
            scale=scale,
            shades=shades_of(scale),
            shade=lambda ratio: shade_of(ratio, scale),
        )
    )
    write_text(path, page)
