"""What is voted on: pairs of answers to a prompt, all its answers to be ranked, or each of them alone."""

from __future__ import annotations

import itertools
import random
import tempfile
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import orjson

from dpo_cli.core.artifacts import digest_bytes
from dpo_cli.core.errors import DataError
from dpo_cli.data.formats.base import Reading, optional_number
from dpo_cli.data.formats.prompts import read_prompt
from dpo_cli.data.formats.rankings import read_completions
from dpo_cli.data.problem import RowProblem, kind_of
from dpo_cli.data.reading.files import read_records
from dpo_cli.data.schema import Messages, assistant, content_id, text_of
from dpo_cli.evaluation import DPO, SFT
from dpo_cli.judging.templates import transcript
from dpo_cli.judging.votes import FIRST, SECOND, item_id

Mode = Literal["pair", "ranking", "thumbs"]
MOST_RANKED = 9
"""Answers that are ranked at a time: there is a key for each."""
_MOST_PROBLEMS = 5


@dataclass(frozen=True)
class Item:
    """One thing that is voted on.

    Attributes:
        id: Hash of the prompt and the answers' texts, whatever the file and its order.
        prompt_id: Of the prompt.
        prompt: Its messages.
        completions: The answers: two of a pair, the method's before the baseline's; one for thumbs.
        authors: Of a pair, who wrote them; first and second where nobody is compared. No rater is told.
        counts: How often each answer was sampled.
        margin: Between the best reward and the worst one, or NaN: near 0 there is most to learn from a vote.
        round: Of a prompt's pairs the first has 0, the next one 1: no prompt's second is asked before another's first.
    """

    id: str
    prompt_id: str
    prompt: Messages
    completions: list[Messages]
    authors: tuple[str, str] = (FIRST, SECOND)
    counts: list[int] = field(default_factory=list)
    margin: float = float("nan")
    round: int = 0

    @property
    def texts(self) -> list[str]:
        """The answers as texts."""
        return [text_of(each) for each in self.completions]


@dataclass
class Account:
    """What became of the rows of a file: rows, items, identical answers that were merged, and what was left out."""

    num_rows: int = 0
    num_items: int = 0
    num_merged: int = 0
    left_out: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class _Answer:
    completion: Messages
    count: int
    score: float | None

    @property
    def text(self) -> str:
        return text_of(self.completion)


def read_items(path: Path, mode: Mode, pairs: int, seed: int, account: Account) -> Iterator[Item]:
    """The items of a file: what ``dpo-cli sample`` wrote, any rows with prompt and completions, or evaluate's samples.

    Args:
        path: The file.
        mode: What is asked of each.
        pairs: Most pairs of one prompt; which of them is drawn.
        seed: Of that draw.
        account: Counts what is read.

    Raises:
        DataError: The file cannot be read, or a row has no prompt or no answers; it names the first of them.
    """
    problems: list[str] = []
    known: set[bytes] = set()
    for record in read_records(path):
        account.num_rows += 1
        try:
            if not isinstance(record.value, dict):
                raise RowProblem(
                    "bad_row", f"must be an object with a prompt and completions, got {kind_of(record.value)}"
                )
            found = list(_items_in(record.value, mode, pairs, seed, account))
        except (RowProblem, UnicodeEncodeError) as error:
            problem = error if isinstance(error, RowProblem) else "holds half of a character (a lone surrogate)"
            problems.append(f"{path}, row {record.row} {problem}; correct the row, or take it out")
            continue
        for item in found:
            if (key := bytes.fromhex(item.id)) in known:
                account.left_out["the same answers again"] += 1
                continue
            known.add(key)
            account.num_items += 1
            yield item
    if problems:
        more = len(problems) - _MOST_PROBLEMS
        raise DataError([*problems[:_MOST_PROBLEMS], *([f"{path}: {more} more such rows"] if more > 0 else [])])


def _items_in(row: dict[str, Any], mode: Mode, pairs: int, seed: int, account: Account) -> Iterator[Item]:
    prompt = read_prompt(row, Reading())
    prompt_id = str(row["id"]) if _is_evaluated(row) else content_id(prompt)
    asked = transcript(prompt)
    answers, authors = _answers_of(row, prompt, account)
    if mode == "thumbs":
        for each in answers:
            id = digest_bytes(asked.encode(), each.text.encode())
            yield Item(id, prompt_id, prompt, [each.completion], counts=[each.count])
        return
    if len(answers) < 2:
        account.left_out["prompts with fewer than two different answers"] += 1
        return
    if mode == "ranking":
        if len(answers) > MOST_RANKED:
            account.left_out[f"answers beyond the first {MOST_RANKED} of a prompt"] += len(answers) - MOST_RANKED
        shown = sorted(answers[:MOST_RANKED], key=lambda each: each.text)
        id = digest_bytes(asked.encode(), *(each.text.encode() for each in shown))
        yield Item(id, prompt_id, prompt, **_columns(shown))
        return
    found = list(itertools.combinations(answers, 2))
    random.Random(f"{seed} {prompt_id}").shuffle(found)
    for number, pair in enumerate(found[:pairs]):
        chosen = list(pair) if authors else sorted(pair, key=lambda each: each.text)
        id = item_id(asked, chosen[0].text, chosen[1].text)
        yield Item(id, prompt_id, prompt, **_columns(chosen), authors=authors or (FIRST, SECOND), round=number)


def _columns(answers: Sequence[_Answer]) -> dict[str, Any]:
    scores = [each.score for each in answers if each.score is not None]
    return {
        "completions": [each.completion for each in answers],
        "counts": [each.count for each in answers],
        "margin": max(scores) - min(scores) if len(scores) == len(answers) else float("nan"),
    }


def _is_evaluated(row: dict[str, Any]) -> bool:
    """Whether a row is of the samples.json that stage evaluate writes."""
    return all(isinstance(row.get(name), dict) and "text" in row[name] for name in (SFT, DPO)) and "id" in row


def _answers_of(
    row: dict[str, Any], prompt: Messages, account: Account
) -> tuple[list[_Answer], tuple[str, str] | None]:
    """The different answers in a row, in its order, and who wrote them, where that is what is asked."""
    authors = (DPO, SFT) if _is_evaluated(row) else None
    if authors:
        completions = [[assistant(row[name]["text"])] for name in authors]
        counts, scores = [1, 1], [None, None]
    else:
        completions = read_completions(row, prompt, Reading(), fewest=1)
        counts, scores = (
            values if isinstance(values := row.get(name), list) and len(values) == len(completions) else None
            for name in ("counts", "scores")
        )
        counts, scores = counts or [1] * len(completions), scores or [None] * len(completions)
    found: dict[str, _Answer] = {}
    for completion, count, score in zip(completions, counts, scores, strict=True):
        text = text_of(completion)
        if (before := found.get(text)) is not None:
            account.num_merged += 1
            found[text] = _Answer(before.completion, before.count + int(count), before.score)
        else:
            found[text] = _Answer(completion, int(count), optional_number({"score": score}, "score"))
    return list(found.values()), authors


class ItemStore:
    """Items on disk, of which memory holds a few numbers each; their texts are read where they are asked for.

    Attributes:
        ids: Of all items.
        margins: float32 [items], NaN where there is none.
        rounds: int32 [items].
        sizes: int32 [items], answers of each.
        are_compared: Whether the answers of pairs have authors, of whom one may be the better one.
    """

    def __init__(self, items: Iterable[Item], folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (it lives as long as the store)
        self._starts = array("q", [0])
        self.ids: list[str] = []
        self.are_compared = False
        margins, rounds, sizes = array("f"), array("i"), array("i")
        for item in items:
            data = orjson.dumps(asdict(item))
            self._file.write(data)
            self._starts.append(self._starts[-1] + len(data))
            self.ids.append(item.id)
            self.are_compared |= item.authors != (FIRST, SECOND)
            margins.append(item.margin)
            rounds.append(item.round)
            sizes.append(len(item.completions))
        self.margins, self.rounds, self.sizes = np.array(margins), np.array(rounds), np.array(sizes)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Item:
        """Read an item."""
        self._file.seek(self._starts[index])
        row = orjson.loads(self._file.read(self._starts[index + 1] - self._starts[index]))
        return Item(**row | {"authors": tuple(row["authors"]), "margin": float(self.margins[index])})
