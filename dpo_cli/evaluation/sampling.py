"""Several answers to each prompt of some files, and how a table of them is made.

A prompt's k-th answer has a random stream of its own, so it depends on the seed, the prompt, k and the model alone:
more answers to a prompt leave those that are there as they are. The table can be read as preference data of format
``kwise`` where its answers have scores.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dpo_cli.core.artifacts import atomic_path
from dpo_cli.core.errors import DataError, ParamsError
from dpo_cli.data.chat import ChatEncoder
from dpo_cli.data.formats.base import Reading
from dpo_cli.data.formats.content import read_tools
from dpo_cli.data.formats.prompts import read_prompt, tools_of
from dpo_cli.data.problem import RowProblem, kind_of
from dpo_cli.data.reading.files import read_records
from dpo_cli.data.schema import MESSAGES, Messages, assistant, content_id, table_of, with_tools
from dpo_cli.evaluation.generation import PromptTokens
from dpo_cli.judging.answers import Answer

SCHEMA = pa.schema(
    [
        ("prompt", MESSAGES),
        ("completions", MESSAGES),  # a turn of the assistant each
        ("scores", pa.list_(pa.float64())),
        ("counts", pa.list_(pa.int32())),
        ("token_ids", pa.list_(pa.list_(pa.int32()))),
    ]
)
"""A row a prompt: its different answers with their rewards, how often each came, and its token ids as sampled."""

_MOST_PROBLEMS = 5


@dataclass
class PromptFile:
    """The prompts of a file.

    Attributes:
        path: The file.
        prompts: Each once, in the order of the file, by content id.
        rows: The row of each, from 0, by content id.
        num_read: Rows of the file.
    """

    path: Path
    prompts: dict[str, Messages] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    num_read: int = 0


def read_prompts(path: Path) -> PromptFile:
    """The prompts of a file: rows with ``prompt`` (text or messages), or ``instruction`` and perhaps ``input``.

    Raises:
        DataError: The file cannot be read or has no rows, or a row of it has no prompt; it names the first of them.
    """
    found = PromptFile(path)
    problems: list[str] = []
    for record in read_records(path):
        found.num_read += 1
        try:
            if not isinstance(record.value, dict):
                raise RowProblem("bad_row", f"must be an object with a 'prompt', got {kind_of(record.value)}")
            messages = read_prompt(record.value, Reading())
            if tools := read_tools(tools_of(record.value)):
                messages = with_tools(messages, tools)
            if not any(message["content"].strip() for message in messages):
                raise RowProblem("empty_prompt", "asks nothing: 'prompt' is empty")
        except RowProblem as problem:
            problems.append(_problem_in(path, record.row, problem))
            continue
        id = content_id(messages)
        found.prompts.setdefault(id, messages)
        found.rows.setdefault(id, record.row)
    if problems:
        raise DataError(_first_of(problems))
    if not found.prompts:
        raise DataError(f"{path} has no rows: there is nothing to answer")
    return found


def repeated(files: Sequence[PromptFile], num_answers: int, encoder: ChatEncoder) -> list[PromptTokens]:
    """Every prompt so many times, each time under an id, and so with a random stream, of its own.

    Raises:
        DataError: The chat template refuses a prompt; it names the first of them.
    """
    tokens: dict[str, tuple[int, ...]] = {}
    problems: list[str] = []
    for file in files:
        for id, messages in file.prompts.items():
            try:
                tokens[id] = tuple(encoder.encode_prompt(messages))
            except RowProblem as problem:
                problems.append(_problem_in(file.path, file.rows[id], problem))
    if problems:
        raise DataError(_first_of(problems))
    messages = {id: prompt for file in files for id, prompt in file.prompts.items()}
    return [
        PromptTokens(_answer_id(id, number), tokens[id], messages[id]) for id in tokens for number in range(num_answers)
    ]


def _problem_in(path: Path, row: int, problem: RowProblem) -> str:
    return f"{path}, row {row} {problem}; correct the row, or take it out"


def _first_of(problems: Sequence[str]) -> list[str]:
    more = len(problems) - _MOST_PROBLEMS
    return [*problems[:_MOST_PROBLEMS], *([f"{more} more rows are like that"] if more > 0 else [])]


def _answer_id(prompt: str, number: int) -> str:
    return f"{prompt}-{number}"


@dataclass
class SampleTable:
    """The answers to the prompts of a file, and what was left out of them.

    Attributes:
        rows: Those of :data:`SCHEMA`.
        num_answers: Answers that were sampled.
        num_cut_off: Answers that did not end within the limit; they are left out, as a pair would teach that they end
            there.
        num_repeated: Answers that say what another one to the same prompt says; they are counted in its ``counts``.
        num_without: Prompts of which no answer is left.
        num_tied: Prompts whose answers all have the same reward, so that no pair can be made of them.
        reward: Mean reward of all sampled answers, those that were cut off among them; None where it is not known.
    """

    rows: list[dict[str, Any]]
    num_answers: int
    num_cut_off: int
    num_repeated: int
    num_without: int
    num_tied: int
    reward: float | None

    def metrics(self) -> dict[str, Any]:
        """What is counted."""
        return {name: value for name, value in vars(self).items() if name != "rows"} | {"num_rows": len(self.rows)}


def sample_table(
    prompts: Mapping[str, Messages],
    answers: Mapping[str, Answer],
    num_answers: int,
    reward: Callable[[str, str], float] | None,
) -> SampleTable:
    """Put the answers to some prompts together: those with the same text once, those that were cut off left out.

    Args:
        prompts: By content id.
        answers: By the ids of :func:`repeated`.
        num_answers: Answers to each prompt.
        reward: From prompt and answer to a known reward.
    """
    table = SampleTable([], len(prompts) * num_answers, 0, 0, 0, 0, None)
    rewards: list[float] = []
    for id, messages in prompts.items():
        by_text: dict[str, Answer] = {}
        counts: dict[str, int] = {}
        for number in range(num_answers):
            answer = answers[_answer_id(id, number)]
            text = answer.text
            if reward is not None:
                rewards.append(reward(answer.asked, text))
            if not answer.finished:
                table.num_cut_off += 1
                continue
            by_text.setdefault(text, answer)
            counts[text] = counts.get(text, 0) + 1
        table.num_repeated += sum(counts.values()) - len(counts)
        if not by_text:
            table.num_without += 1
            continue
        scores = None if reward is None else [reward(answer.asked, text) for text, answer in by_text.items()]
        table.num_tied += scores is not None and len(set(scores)) == 1
        table.rows.append(
            {
                "prompt": messages,
                "completions": [assistant(text) for text in by_text],
                "scores": scores,
                "counts": list(counts.values()),
                "token_ids": [list(answer.tokens) for answer in by_text.values()],
            }
        )
    if rewards:
        table.reward = sum(rewards) / len(rewards)
    return table


def refuse_foreign(path: Path) -> None:
    """Refuse to write over a file that is no table of samples, such as the prompts themselves.

    Raises:
        ParamsError: There is such a file.
    """
    if not path.exists():
        return
    try:
        found = pq.read_schema(path).metadata or {}
    except (OSError, pa.ArrowException):
        found = {}
    if not found.keys() >= {b"model", b"num_answers"}:
        raise ParamsError(f"{path} is there, and dpo-cli sample did not write it; name another folder: --out DIR")


def write_samples(path: Path, rows: Sequence[Mapping[str, Any]], made_by: Mapping[str, Any]) -> None:
    """Write a table as parquet, whole or not at all; ``made_by`` is kept with it: model and sampling."""
    schema = SCHEMA.with_metadata({name: str(value) for name, value in made_by.items()})
    with atomic_path(path) as temporary:
        pq.write_table(table_of(rows, schema), temporary)
