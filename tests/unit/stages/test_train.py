"""What stage train reads of the data besides tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest

from dpo_cli.core import paths
from dpo_cli.core.errors import DataError
from dpo_cli.core.params import TrainParams
from dpo_cli.data.tokens import TokenGroup
from dpo_cli.stages.train import _scores


@pytest.mark.parametrize(
    ("loss", "last", "problem"),
    [
        ("rpo_bwd_kl", (1.0, -2.0), None),
        ("soft_label", (1.0, 0.0), None),
        ("soft_label", (1.0, -2.0), r"scores of pair c are 1 and -2, which cannot be .* votes; .* rpo_bwd_kl any"),
        ("soft_label", (0.0, 0.0), r"scores of pair c are 0 and 0, which cannot be numbers of votes"),
        (
            "rpo_bwd_kl",
            (1.0, None),
            r"1 of 3 pairs have no scores.* the first is c; .* train\.loss rpo_bwd_kl reads them",
        ),
        ("rpo_bwd_kl", (1.0, float("inf")), r"1 of 3 pairs have no scores, or none with a finite difference"),
    ],
)
def test_a_loss_that_reads_scores_wants_them_of_every_pair(
    loss: Any, last: tuple[Any, Any], problem: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = {"train": [("a", 3.0, 1.0), ("b", 2.0, 0.0)], "eval": [("c", *last)]}
    for split, scores in rows.items():
        paths.preference_table(split).parent.mkdir(parents=True, exist_ok=True)
        pl.DataFrame(scores, ("id", "chosen_score", "rejected_score"), orient="row").write_parquet(
            paths.preference_table(split)
        )
    groups = [TokenGroup(name, name, (0,), ((1,), (2,))) for name in "abc"]
    if problem is None:
        assert _scores(TrainParams(loss=loss), groups) == {"a": (3.0, 1.0), "b": (2.0, 0.0), "c": last}
        return
    with pytest.raises(DataError, match=problem):
        _scores(TrainParams(loss=loss), groups)
