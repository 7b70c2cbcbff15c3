"""Answers to prompts of one's own: several to each prompt of some files, as a table.

A prompt's k-th answer has a random stream of its own, so it depends on the seed, the prompt, k and the model alone:
more answers to a prompt leave those that are there as they are. The table can be read as preference data of format
``kwise`` where its answers have scores.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dpo_cli.core.artifacts import atomic_path
from dpo_cli.core.errors import ParamsError
from dpo_cli.core.params import Params
from dpo_cli.core.progress import Reporter
from dpo_cli.core.scratch import stage_scratch
from dpo_cli.data.chat import ChatEncoder
from dpo_cli.data.problem import RowProblem
from dpo_cli.data.prompt_files import PromptFile, read_prompts, refuse_rows
from dpo_cli.data.schema import MESSAGES, Messages, assistant, table_of
from dpo_cli.data.world import task_of
from dpo_cli.evaluation.generation import PromptTokens
from dpo_cli.evaluation.models import open_models, reference_model
from dpo_cli.evaluation.steps import Steps
from dpo_cli.judging.answers import Answer
from dpo_cli.judging.known_reward import RewardJudge, known_reward, world_reward
from dpo_cli.models.load import quiet_libraries
from dpo_cli.models.project import open_project

SCHEMA = pa.schema(
    [
        ("prompt", MESSAGES),
        ("completions", MESSAGES),  # a turn of the assistant each
        ("scores", pa.list_(pa.float64())),
        ("counts", pa.list_(pa.int32())),
        ("token_ids", pa.list_(pa.list_(pa.int32()))),
        ("logps", pa.list_(pa.float64())),
    ]
)
"""A row a prompt: its different answers with their rewards, how often each came, its token ids as sampled, and the sum
of their log-probabilities under the model that sampled it, at temperature 1, in nats; the token that ends it counts."""


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
                problems.append((*file.rows[id], problem))
    refuse_rows(problems)
    messages = {id: prompt for file in files for id, prompt in file.prompts.items()}
    return [
        PromptTokens(_answer_id(id, number), tokens[id], messages[id]) for id in tokens for number in range(num_answers)
    ]


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
        num_unscored: Prompts of whose answers the judge does not know the reward.
        reward: Mean reward of all scored answers, those that were cut off among them; None where there is none.
    """

    rows: list[dict[str, Any]]
    num_answers: int
    num_cut_off: int = 0
    num_repeated: int = 0
    num_without: int = 0
    num_tied: int = 0
    num_unscored: int = 0
    reward: float | None = None

    def metrics(self) -> dict[str, Any]:
        """What is counted."""
        return {name: value for name, value in vars(self).items() if name != "rows"} | {"num_rows": len(self.rows)}


def sample_table(
    prompts: Mapping[str, Messages],
    answers: Mapping[str, Answer],
    logps: Mapping[str, float],
    num_answers: int,
    reward: Callable[[str, str], float | None] | None,
) -> SampleTable:
    """Put the answers to some prompts together.

    Those with the same text are one, and those that were cut off are left out.

    Args:
        prompts: The prompts by id.
        answers: By the ids of :func:`repeated`.
        logps: Of each answer, by its key, nats.
        num_answers: Answers to each prompt.
        reward: From prompt and answer to its known reward, None of a prompt of which it is not known.
    """
    table = SampleTable([], len(prompts) * num_answers)
    rewards: list[float] = []
    for id, messages in prompts.items():
        mine = [answers[_answer_id(id, number)] for number in range(num_answers)]
        scored = [] if reward is None else [reward(answer.asked, answer.text) for answer in mine]
        is_scored = reward is not None and None not in scored
        rewards += [score for score in scored if score is not None]
        table.num_unscored += reward is not None and not is_scored
        finished = [answer for answer in mine if answer.finished]
        counts = Counter(answer.text for answer in finished)
        table.num_cut_off += num_answers - len(finished)
        table.num_repeated += len(finished) - len(counts)
        if not finished:
            table.num_without += 1
            continue
        first = {answer.text: answer for answer in reversed(finished)}
        by_text = dict(zip((answer.text for answer in mine), scored, strict=False))
        scores = [by_text[text] for text in counts] if is_scored else None
        table.num_tied += scores is not None and len(set(scores)) == 1
        table.rows.append(
            {
                "prompt": messages,
                "completions": [assistant(text) for text in counts],
                "scores": scores,
                "counts": list(counts.values()),
                "token_ids": [list(first[text].tokens) for text in counts],
                "logps": [logps[first[text].keys[0]] for text in counts],
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
    files: Sequence[Path],
    num_answers: int,
    model: Path | None,
    out: Path,
    params: Params,
    reporter: Reporter,
    top_p: float = 1.0,
) -> dict[str, Any]:
    """Sample so many answers to each prompt of some files, as section evaluate says, and write a table for each file.

    Args:
        files: Each with prompts.
        num_answers: Answers to each prompt.
        model: An adapter for the project's SFT model, or a whole model; None: the SFT model itself.
        out: Folder of the tables, which go by the names of the files.
        params: All settings.
        reporter: Shows progress, and what is counted of each file.
        top_p: Each token is drawn from the likeliest ones that together have this probability.

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
    if settings.temperature == 0 and top_p < 1:
        raise ParamsError("top_p has no effect with evaluate.temperature 0, the likeliest token; leave it out")
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
        answers = steps.answers(asked_model, asked, settings.temperature, top_p)
        logps = steps.scored(asked_model, [*answers.values()], f"answers under {asked_model}").logps
    judge = known_reward(settings)
    made_by = {
        "model": asked_model.digest,
        **settings.model_dump(include={"temperature", "max_new_tokens", "seed"}),
        "top_p": top_p,
        "num_answers": num_answers,
        "score": judge.name if judge else "",
    }
    schema = SCHEMA.with_metadata({name: str(value) for name, value in made_by.items()})
    figures = {}
    for one in found:
        table = sample_table(one.prompts, answers, logps, num_answers, _reward(judge))
        with atomic_path(tables[one.path]) as temporary:
            pq.write_table(table_of(table.rows, schema), temporary)
        title = f"{one.path}: {asked_model} at T = {settings.temperature:g}"
        reporter.table(title, [*_lines(one, table), ("file", tables[one.path].as_posix())])
        figures[one.path.as_posix()] = {"num_read": one.num_read, "num_prompts": len(one.prompts)} | table.metrics()
    return figures


def _reward(judge: RewardJudge | None) -> Callable[[str, str], float | None] | None:
    """The reward that a judge knows; that of the embedded world is of its own prompts alone."""
    if judge is None or judge.reward is not world_reward:
        return None if judge is None else judge.reward
    return lambda prompt, answer: None if (task := task_of(prompt)) is None else task.reward(answer)


def _lines(file: PromptFile, table: SampleTable) -> list[tuple[str, str]]:
    num_same = file.num_read - len(file.left_out) - len(file.prompts)
    lines = [
        ("prompts", f"{len(file.prompts)}" + (f" ({num_same} more rows repeat one)" if num_same > 0 else "")),
        ("answers", str(table.num_answers)),
        ("left out", f"{table.num_cut_off} did not end within evaluate.max_new_tokens" if table.num_cut_off else ""),
        ("the same as another", f"{table.num_repeated}, merged and counted" if table.num_repeated else ""),
        ("prompts without an answer", str(table.num_without or "")),
        ("not scored", f"{table.num_unscored} prompts, which the judge does not know" if table.num_unscored else ""),
    ]
    if file.left_out:
        path, row, problem = file.left_out[0]
        lines.append(
            ("rows without a prompt", f"{len(file.left_out)}; the first is {path}, row {row}, which {problem}")
        )
    if table.reward is not None:
        lines.append(("mean reward", f"{table.reward:.3f} of all answers, those that did not end among them"))
        lines.append(("no pair", f"{table.num_tied} prompts, whose answers all have one reward"))
    return [(name, value) for name, value in lines if value]
