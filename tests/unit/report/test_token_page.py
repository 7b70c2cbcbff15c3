"""The page of tokens: safe, offline, and clear about what it leaves out."""

from __future__ import annotations

from pathlib import Path

import pytest

from dpo_cli.evaluation.rewards import ScoredGroup, agreements, summarize_agreements
from dpo_cli.report.style import scale_of, shade_of
from dpo_cli.report.token_page import (
    ROWS_SHOWN,
    AnswerTokens,
    RowTokens,
    TokenPiece,
    choose_rows,
    write_token_page,
)
from dpo_cli.statistics.intervals import Sampling
from tests.report_folder import ATTACK, Elements


def row(outcome: str, text: str = ATTACK, margin: float = 1.0) -> RowTokens:
    pieces = [TokenPiece(text, -1.25, 1, False), TokenPiece("你", 0.5, 3, False), TokenPiece("<|end|>", 0.0, 1, True)]
    answers = [AnswerTokens(name, 1.5, -3.0, -4.0, 5, pieces) for name in ("chosen", "rejected")]
    return RowTokens(f"{text}, row 1", outcome, margin, True, [{"role": "user", "content": text}], answers)


def page_of(folder: Path, rows: list[RowTokens], outcomes: dict[str, int], name: str = ATTACK) -> str:
    ranked = [ScoredGroup("r", "g", (1.0, 0.0), (1, 1), reference=(0.0, 0.0))]
    summary = summarize_agreements(ranked, agreements(ranked), Sampling(100, 0.95, 0))
    path = folder / "heat.html"
    write_token_page(path, rows, outcomes, {name: summary}, beta=0.1, model=name, confidence=0.95)
    return path.read_text(encoding="utf-8")


def test_no_text_becomes_markup_and_nothing_is_loaded(tmp_path: Path) -> None:
    page = page_of(tmp_path, [row("wrong"), row("right")], {"wrong": 1, "right": 5})
    elements = Elements(page)
    names = {tag for tag, _ in elements.elements}
    assert not names & {"script", "img", "link", "iframe", "object", "embed", "base", "form", "a"}
    for _, attributes in elements.elements:
        assert not [name for name in attributes if name.startswith("on") or name in ("src", "href", "style")]
    assert "".join(elements.texts).count(ATTACK) >= 8, "it is all there, as text"
    assert "default-src 'none'" in page
    assert "@import" not in page
    assert "url(" not in page


def test_tokens_have_color_and_number(tmp_path: Path) -> None:
    page = page_of(tmp_path, [row("wrong", "so")], {"wrong": 1})
    tokens = [attributes for tag, attributes in Elements(page).elements if tag == "span" and "data-n" in attributes]
    assert [token["data-n"] for token in tokens[:3]] == ["\N{MINUS SIGN}1.25", "+0.50 over 3 tokens", "+0.00"]
    assert (tokens[0]["class"] or "").split()[1].startswith("n")
    assert (tokens[1]["class"] or "").split()[1].startswith("p")
    assert all(token["tabindex"] == "0" for token in tokens)


def test_what_is_not_shown_is_counted(tmp_path: Path) -> None:
    page = page_of(tmp_path, [row("wrong", "so")], {"wrong": 3, "right": 9, "tie": 0})
    assert "Shown are 1 of 12 rows; the other 11 have better margins" in " ".join(page.split())
    assert "1 of 3" in page
    assert "0 of 9" in page
    assert "only-tie:checked" in page
    assert 'id="only-tie"' not in page


def test_the_worst_margins_come_first_and_the_page_has_an_end() -> None:
    assert choose_rows([1.0, -2.0, 0.5, -2.0], [1, 1, 1, 1]) == [1, 3, 2, 0]
    assert len(choose_rows([0.0] * 1000, [1] * 1000)) == ROWS_SHOWN
    assert choose_rows([0.0, 1.0], [10**7, 1]) == [0], "one at least"
    assert choose_rows([0.0, 1.0], [10, 10**7]) == [0]


@pytest.mark.parametrize(("reach", "scale"), [(0.003, 0.01), (0.4, 0.5), (1.0, 1), (1.2, 2), (7, 10), (30, 50)])
def test_the_scale_is_a_round_number_that_few_go_beyond(reach: float, scale: float) -> None:
    assert scale_of([reach] * 10) == pytest.approx(scale)


def test_shades() -> None:
    assert [shade_of(ratio, 2) for ratio in (0.0, 0.1, 0.25, -1, 2, -9)] == ["", "", "p1", "n4", "p8", "n8"]
