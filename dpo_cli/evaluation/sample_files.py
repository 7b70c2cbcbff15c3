"""Several answers of a model of this project to each prompt of some files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpo_cli.core.errors import ParamsError
from dpo_cli.core.params import Params
from dpo_cli.core.progress import Reporter
from dpo_cli.core.scratch import stage_scratch
from dpo_cli.evaluation.models import open_models, reference_model
from dpo_cli.evaluation.sampling import (
    PromptFile,
    SampleTable,
    read_prompts,
    refuse_foreign,
    repeated,
    sample_table,
    write_samples,
)
from dpo_cli.evaluation.steps import Steps
from dpo_cli.judging.known_reward import known_reward
from dpo_cli.models.load import quiet_libraries
from dpo_cli.models.project import open_project


def sample_files(
    files: Sequence[Path], num_answers: int, model: Path | None, out: Path, params: Params, reporter: Reporter
) -> dict[str, Any]:
    """Sample answers to the prompts of some files, and write a table for each file.

    Args:
        files: Each with prompts.
        num_answers: Answers to each prompt.
        model: An adapter for the project's SFT model, or a whole model; None: the SFT model itself.
        out: Folder of the tables, which go by the names of the files.
        params: All settings; section evaluate says how answers are sampled.
        reporter: Shows progress, and a table for each file.

    Returns:
        What is counted, by file.

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
        "temperature": settings.temperature,
        "max_new_tokens": settings.max_new_tokens,
        "seed": settings.seed,
        "num_answers": num_answers,
        "score": judge.name if judge else "",
    }
    figures = {}
    for one in found:
        reward = judge.reward if judge else None
        table = sample_table(one.prompts, answers, num_answers, reward)
        write_samples(tables[one.path], table.rows, made_by)
        title = f"{one.path}: {asked_model} at T = {settings.temperature:g}"
        reporter.table(title, [*_lines(one, table), ("file", tables[one.path].as_posix())])
        figures[one.path.as_posix()] = {"num_read": one.num_read, "num_prompts": len(one.prompts)} | table.metrics()
    return figures


def _lines(file: PromptFile, table: SampleTable) -> list[tuple[str, str]]:
    num_same = file.num_read - len(file.prompts)
    lines = [("prompts", f"{len(file.prompts)}" + (f" ({num_same} more rows repeat one)" if num_same else ""))]
    lines.append(("answers", str(table.num_answers)))
    if table.num_cut_off:
        lines.append(("left out", f"{table.num_cut_off} did not end within evaluate.max_new_tokens"))
    if table.num_repeated:
        lines.append(("the same as another", f"{table.num_repeated}, merged and counted"))
    if table.num_without:
        lines.append(("prompts without an answer", str(table.num_without)))
    if table.reward is not None:
        lines.append(("mean reward", f"{table.reward:.3f} of all answers, those that did not end among them"))
        lines.append(("no pair", f"{table.num_tied} prompts, whose answers all have one reward"))
    return lines
