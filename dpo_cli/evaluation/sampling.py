"""Answers to prompts of one's own: several to each prompt of some files, as a table, or one of each model to a prompt.

A prompt's k-th answer has a random stream of its own, so it depends on the seed, the prompt, k and the model alone:
more answers to a prompt leave those that are there as they are. The table can be read as preference data of format
``kwise`` where its answers have scores.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dpo_cli.core import paths
from dpo_cli.core.artifacts import atomic_path
from dpo_cli.core.errors import DataError, ParamsError
from dpo_cli.core.params import Params
from dpo_cli.core.progress import Reporter
from dpo_cli.core.scratch import stage_scratch
from dpo_cli.data.chat import ChatEncoder
from dpo_cli.data.formats.base import Reading
from dpo_cli.data.formats.content import read_tools
from dpo_cli.data.formats.prompts import read_prompt, tools_of
from dpo_cli.data.problem import RowProblem, kind_of
from dpo_cli.data.reading.files import read_records
from dpo_cli.data.schema import MESSAGES, Message, Messages, assistant, content_id, table_of, user, with_tools
from dpo_cli.evaluation import DPO, SFT
from dpo_cli.evaluation.generation import PromptTokens
from dpo_cli.evaluation.models import open_models, reference_model
from dpo_cli.evaluation.steps import Steps
from dpo_cli.judging.answers import Answer
from dpo_cli.judging.known_reward import known_reward
from dpo_cli.models.load import quiet_libraries
from dpo_cli.models.project import open_project

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
    """The prompts of a file, each once, in its order, by content id; the row of each, from 0; and rows in all."""

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
    problems: list[tuple[Path, int, RowProblem]] = []
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
            problems.append((path, record.row, problem))
            continue
        id = content_id(messages)
        found.prompts.setdefault(id, messages)
        found.rows.setdefault(id, record.row)
    _refuse(problems)
    if not found.prompts:
        raise DataError(f"{path} has no rows: there is nothing to answer")
    return found


def repeated(files: Sequence[PromptFile], num_answers: int, encoder: ChatEncoder) -> list[PromptTokens]:
    """Every prompt so many times, each time under an id, and so with a random stream, of its own.

    Raises:
        DataError: The chat template refuses a prompt; it names the first of them.
    """
    tokens: dict[str, tuple[int, ...]] = {}
    problems: list[tuple[Path, int, RowProblem]] = []
    for file in files:
        for id, messages in file.prompts.items():
            try:
                tokens[id] = tuple(encoder.encode_prompt(messages))
            except RowProblem as problem:
                problems.append((file.path, file.rows[id], problem))
    _refuse(problems)
    messages = {id: prompt for file in files for id, prompt in file.prompts.items()}
    return [
        PromptTokens(_answer_id(id, number), tokens[id], messages[id]) for id in tokens for number in range(num_answers)
    ]


def _refuse(problems: Sequence[tuple[Path, int, RowProblem]]) -> None:
    """Refuse files by their first bad rows."""
    lines = [f"{path}, row {row} {problem}; correct the row, or take it out" for path, row, problem in problems]
    more = len(lines) - _MOST_PROBLEMS
    if lines:
        raise DataError([*lines[:_MOST_PROBLEMS], *([f"{more} more rows are like that"] if more > 0 else [])])


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
    num_cut_off: int = 0
    num_repeated: int = 0
    num_without: int = 0
    num_tied: int = 0
    reward: float | None = None

    def metrics(self) -> dict[str, Any]:
        """What is counted."""
        return {name: value for name, value in vars(self).items() if name != "rows"} | {"num_rows": len(self.rows)}


def sample_table(
    prompts: Mapping[str, Messages],
    answers: Mapping[str, Answer],
    num_answers: int,
    reward: Callable[[str, str], float] | None,
) -> SampleTable:
    """Put the answers, by the ids of :func:`repeated`, to some prompts together.

    Those with the same text are one, and those that were cut off are left out. A known reward is of prompt and answer.
    """
    table = SampleTable([], len(prompts) * num_answers)
    rewards: list[float] = []
    for id, messages in prompts.items():
        mine = [answers[_answer_id(id, number)] for number in range(num_answers)]
        if reward is not None:
            rewards += [reward(answer.asked, answer.text) for answer in mine]
        finished = [answer for answer in mine if answer.finished]
        counts = Counter(answer.text for answer in finished)
        table.num_cut_off += num_answers - len(finished)
        table.num_repeated += len(finished) - len(counts)
        if not finished:
            table.num_without += 1
            continue
        first = {answer.text: answer for answer in reversed(finished)}
        scores = None if reward is None else [reward(mine[0].asked, text) for text in counts]
        table.num_tied += scores is not None and len(set(scores)) == 1
        table.rows.append(
            {
                "prompt": messages,
                "completions": [assistant(text) for text in counts],
                "scores": scores,
                "counts": list(counts.values()),
                "token_ids": [list(first[text].tokens) for text in counts],
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


def sample_files(
    files: Sequence[Path], num_answers: int, model: Path | None, out: Path, params: Params, reporter: Reporter
) -> dict[str, Any]:
    """Sample so many answers to each prompt of some files, as section evaluate says, and write a table for each file.

    Args:
        files: Each with prompts.
        num_answers: Answers to each prompt.
        model: An adapter for the project's SFT model, or a whole model; None: the SFT model itself.
        out: Folder of the tables, which go by the names of the files.
        params: All settings.
        reporter: Shows progress, and what is counted of each file.

    Returns:
        The same, by file.

    Raises:
        ParamsError: Two files would make one table, a file is there that would be written over, or a setting has no
            effect.
        DataError: A file cannot be read, has no rows, or has a row without a prompt or one that the template refuses.
        StaleArtifactError: There is no such model, or an earlier stage's result is missing.
        Interrupted: The user asked to stop; what was sampled is kept.
    """
    quiet_libraries()
    settings = params.evaluate
    tables = {path: out / f"{path.name.split('.')[0]}.parquet" for path in files}
    if len(set(tables.values())) < len(files):
        raise ParamsError("two of the files have one name, and would make one table; rename one, or sample one by one")
    if settings.temperature == 0 and num_answers > 1:
        raise ParamsError(f"evaluate.temperature 0 gives one answer {num_answers} times; raise it, or say --answers 1")
    for table in tables.values():
        refuse_foreign(table)
    found = [read_prompts(path) for path in files]
    project = open_project(params, reporter, "sample")
    asked = repeated(found, num_answers, project.encoder)
    longest = max(len(each.tokens) for each in asked)
    project.check_context(longest + settings.max_new_tokens, "evaluate.max_new_tokens + the longest prompt")
    asked_model = reference_model(project) if model is None else open_models(project, model).policy
    with stage_scratch("sample", "run") as scratch:
        steps = Steps(project, settings, scratch.folder.parent / "models")
        answers = steps.answers(asked_model, asked, settings.temperature)
    judge = known_reward(settings)
    made_by = {
        "model": asked_model.digest,
        **settings.model_dump(include={"temperature", "max_new_tokens", "seed"}),
        "num_answers": num_answers,
        "score": judge.name if judge else "",
    }
    schema = SCHEMA.with_metadata({name: str(value) for name, value in made_by.items()})
    figures = {}
    for one in found:
        table = sample_table(one.prompts, answers, num_answers, judge.reward if judge else None)
        with atomic_path(tables[one.path]) as temporary:
            pq.write_table(table_of(table.rows, schema), temporary)
        title = f"{one.path}: {asked_model} at T = {settings.temperature:g}"
        reporter.table(title, [*_lines(one, table), ("file", tables[one.path].as_posix())])
        figures[one.path.as_posix()] = {"num_read": one.num_read, "num_prompts": len(one.prompts)} | table.metrics()
    return figures


def _lines(file: PromptFile, table: SampleTable) -> list[tuple[str, str]]:
    num_same = file.num_read - len(file.prompts)
    lines = [
        ("prompts", f"{len(file.prompts)}" + (f" ({num_same} more rows repeat one)" if num_same else "")),
        ("answers", str(table.num_answers)),
        ("left out", f"{table.num_cut_off} did not end within evaluate.max_new_tokens" if table.num_cut_off else ""),
        ("the same as another", f"{table.num_repeated}, merged and counted" if table.num_repeated else ""),
        ("prompts without an answer", str(table.num_without or "")),
    ]
    if table.reward is not None:
        lines.append(("mean reward", f"{table.reward:.3f} of all answers, those that did not end among them"))
        lines.append(("no pair", f"{table.num_tied} prompts, whose answers all have one reward"))
    return [(name, value) for name, value in lines if value]


# --- one prompt -----------------------------------------------------------------------------


def try_prompt(
    prompt: str, system: str | None, model: Path | None, params: Params, reporter: Reporter
) -> dict[str, Answer]:
    """One answer of each model, by what it is called, to a prompt, sampled as section evaluate says.

    Args:
        prompt: What the user says.
        system: A system message before it.
        model: The tuned model: an adapter for the project's SFT model, or a whole model; None: models/dpo.
        params: All settings.
        reporter: Shows progress.

    Raises:
        DataError: The chat template refuses the prompt.
        StaleArtifactError: There is no such model, or an earlier stage's result is missing.
        Interrupted: The user asked to stop.
    """
    quiet_libraries()
    settings = params.evaluate
    project = open_project(params, reporter, "try")
    before: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    messages = [*before, user(prompt)]
    try:
        tokens = PromptTokens(content_id(messages), tuple(project.encoder.encode_prompt(messages)), messages)
    except RowProblem as problem:
        raise DataError(f"the prompt: {problem}") from None
    project.check_context(len(tokens.tokens) + settings.max_new_tokens, "evaluate.max_new_tokens + the prompt")
    folder = model or paths.DPO_MODEL
    models = open_models(project, folder)
    names = {SFT: models.reference, folder.resolve().name if model else DPO: models.policy}
    with stage_scratch("try", "run") as scratch:
        steps = Steps(project, settings, scratch.folder.parent / "models")
        return {name: steps.answers(each, [tokens], settings.temperature)[tokens.id] for name, each in names.items()}


def tried_json(prompt: str, answers: Mapping[str, Answer], temperature: float) -> dict[str, Any]:
    """The answers as one JSON value."""
    rows = [
        {"model": name, "text": each.text, "num_tokens": each.num_tokens, "finished": each.finished}
        for name, each in answers.items()
    ]
    return {"prompt": prompt, "temperature": temperature, "answers": rows}
