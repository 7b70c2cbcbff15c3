"""Judgments that are kept: a question that a judge has answered is never asked again.

A judgment is found by a hash of the judge's identity (the model, the template, how the answer is constrained), the
prompt and both answers in their order. Neither prompts nor answers are written. Where the judge had no verdict it is
asked again: that may have been the server's fault.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import polars as pl

from dpo_cli.core.artifacts import digest_bytes, digest_json
from dpo_cli.core.row_store import RowStore
from dpo_cli.judging.judge import IdentifiedJudge, Judgment, Question

SCHEMA = {"key": pl.String, "p_a": pl.Float64, "verdict": pl.String}


class CachedJudge:
    """A judge with a memory.

    Args:
        judge: Who is asked where nothing is remembered.
        folder: Where judgments are kept, in the scratch area; several judges may share it.
        minutes: Judging that a kill may cost. An error of the judge costs none.

    Attributes:
        num_asked: Questions that the judge has answered itself.
    """

    def __init__(self, judge: IdentifiedJudge, folder: Path, minutes: float) -> None:
        self._judge = judge
        self._identity = digest_json(dict(judge.identity)).encode()
        self._store = RowStore(folder, SCHEMA)
        self._minutes = minutes
        self.num_asked = 0

    @property
    def remedy(self) -> str:
        """The judge's own."""
        return self._judge.remedy

    def judge(self, questions: Sequence[Question]) -> Iterator[tuple[int, Judgment]]:
        """First what is remembered, then what is asked; equal questions are asked once."""
        asked = [self._key(question) for question in questions]
        rows = self._store.rows(asked).select(list(SCHEMA)).iter_rows()
        known = {key: Judgment(p_a, verdict) for key, p_a, verdict in rows}
        waiting: dict[str, list[int]] = {}
        for index, key in enumerate(asked):
            if key in known:
                yield index, known[key]
            else:
                waiting.setdefault(key, []).append(index)
        if not waiting:
            return
        keys = list(waiting)
        with self._store.keeping(self._minutes) as keep:
            for number, judgment in self._judge.judge([questions[waiting[key][0]] for key in keys]):
                self.num_asked += 1
                if judgment.verdict != "invalid":
                    keep([{"key": keys[number], "p_a": judgment.p_a, "verdict": judgment.verdict}])
                for index in waiting[keys[number]]:
                    yield index, judgment

    def _key(self, question: Question) -> str:
        return digest_bytes(self._identity, question.prompt.encode(), question.a.encode(), question.b.encode())
