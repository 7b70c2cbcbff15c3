"""Local tasks of lm-evaluation-harness (the extra ``lm-eval``), run on a model that is loaded already.

A task is a YAML file of the harness with local data. It asks, shows examples, takes answers and scores
each item; what is ours is which model answers, that nothing is fetched, and that a metric is one
which can be compared item by item.

Importing this module imports the harness.
"""

from __future__ import annotations

import contextlib
import difflib
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partialmethod
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import torch
import tqdm
from lm_eval import simple_evaluate
from lm_eval.api.metrics import mean
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from dpo_cli.core.errors import DataError, ParamsError, first_line
from dpo_cli.core.progress import Meter
from dpo_cli.models.device import Machine
from dpo_cli.models.load import context_length
from dpo_cli.models.project import Project

_DEFAULT_ANSWER_TOKENS = 256
# their decorators hide their types
_Harness: Any = HFLM
_simple_evaluate: Any = simple_evaluate


class HarnessTask(NamedTuple):
    """A task that can be compared item by item, by the first of its metrics that is a mean over items.

    Attributes:
        task: The harness's own object.
    """

    name: str
    metric: str
    higher_is_better: bool
    task: Any


# --- tasks --------------------------------------------------------------------------------


def load_tasks(folder: Path, names: Sequence[str]) -> list[HarnessTask]:
    """The tasks of a folder, with their data.

    Args:
        folder: Where their YAML files lie; relative paths to data files are relative to it.
        names: Tasks, groups or tags to load; none: all tasks.

    Raises:
        DataError: The folder has no task, a YAML file or its data cannot be read, data would have to be
            downloaded, no metric of a task is a mean over items, or it runs what a model writes.
        ParamsError: A name is unknown.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder; name one with YAML files of lm-evaluation-harness")
    homes = _check_files(folder)
    manager = TaskManager(include_path=str(folder.resolve()), include_defaults=False)
    if unread := [
        f"{path}: the harness cannot read it; is there all that it includes?"
        for name, path in homes.items()
        if name not in manager.all_tasks
    ]:
        raise DataError(unread)
    if not manager.all_subtasks:
        raise DataError(f"{folder} has YAML files, but none of them is a task: none has a key task")
    problems: list[str] = []
    for name in (name for name in names if name not in manager.all_tasks):
        near = difflib.get_close_matches(name, manager.all_tasks, n=1)
        hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(manager.all_tasks)}"
        problems.append(f"--tasks: {folder} has no task {name}; {hint}")
    if problems:
        raise ParamsError(problems)
    loaded: dict[str, Any] = {}
    with contextlib.chdir(folder):
        for name in dict.fromkeys(names or manager.all_subtasks):
            loaded |= _load(manager, folder, name)
    tasks = []
    for name, task in loaded.items():
        metric = next((metric for metric, total in task.aggregation().items() if total is mean), None)
        if getattr(task, "UNSAFE_CODE", False):
            problems.append(f"task {name}: it runs what a model writes (unsafe_code), which is refused")
        elif getattr(task, "MULTIMODAL", False):
            problems.append(f"task {name}: it shows images or plays sounds, and the model reads text")
        elif metric is None:
            has = ", ".join(task.aggregation()) or "none"
            problems.append(
                f"task {name}: its metrics ({has}) are computed of all items at once, so models cannot be compared item"
                " by item; add one that is a mean over items, such as acc or exact_match, to its metric_list"
            )
        else:
            tasks.append(HarnessTask(name, metric, bool(task.higher_is_better()[metric]), task))
    if problems:
        raise DataError(problems)
    return tasks


def _check_files(folder: Path) -> dict[str, Path]:
    """Where each task is; refuses what the harness would leave out without a word: no YAML, and tasks named twice."""
    files = sorted(folder.rglob("*.yaml"))
    if not files:
        raise DataError(f"{folder} has no YAML file (*.yaml) of lm-evaluation-harness")
    problems = []
    homes: dict[str, Path] = {}
    for path in files:
        try:
            content = YAML().load(path)
        except (YAMLError, UnicodeDecodeError) as error:
            problems.append(f"{path} is no YAML: {' '.join(str(error).split())}")
            continue
        name = content.get("task") if isinstance(content, Mapping) else None
        if not isinstance(name, str):
            continue
        if name in homes:
            problems.append(f"{path}: task {name} is in {homes[name]}, too; give it another name")
        homes.setdefault(name, path)
    if problems:
        raise DataError(problems)
    return homes


def _load(manager: Any, folder: Path, name: str) -> dict[str, Any]:
    """A task, or those of a group or tag; in the folder, to which paths of data files are relative."""
    try:
        return manager.load([name])["tasks"]
    except Exception as error:
        if _wants_the_net(error):
            raise DataError(
                f"{folder}: task {name} needs data that is not on this machine, and nothing is downloaded; save it as"
                " JSON lines beside the task, and name it: dataset_path: json, dataset_kwargs: {data_files: {test:"
                f" FILE}}}} ({first_line(error, None)})"
            ) from error
        raise DataError(
            f"{folder}: task {name} cannot be loaded; paths are relative to that folder:"
            f" {type(error).__name__}: {first_line(error, None)}"
        ) from error


def _wants_the_net(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, ConnectionError) or "Offline" in type(error).__name__ or "on the Hub" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


# --- answers ------------------------------------------------------------------------------


class _LoadedModel(_Harness):
    """The harness's way to ask a model, for one that is in memory; says how far it is and draws no bars."""

    def __init__(self, model: Any, tokenizer: Any, machine: Machine, context: int | None, rows: int) -> None:
        low = machine.compute_dtype != torch.float32
        super().__init__(
            model,
            backend="causal",
            tokenizer=tokenizer,
            max_length=context,
            batch_size=rows,
            softmax_dtype=torch.float32,
            mixed_precision_dtype=machine.compute_dtype if low else None,
        )

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=True)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        return super().generate_until(requests, disable_tqdm=True)


class _ToMeter:
    """Called with every request that is done, where the harness would cache it."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter

    def add_partial(self, kind: str, request: Any, result: Any) -> None:
        self._meter.advance(1)


class Requests(NamedTuple):
    """What a task asks a model.

    Attributes:
        num: Requests.
        longest: Tokens of the longest one, the room for an answer included.
        num_too_long: Requests beyond the model's context.
    """

    num: int
    longest: int
    num_too_long: int


def measure_requests(task: HarnessTask, tokenizer: Any, context: int | None, limit: int | None) -> Requests:
    """Build a task's requests and see how long they are.

    Args:
        task: The task.
        tokenizer: The model's.
        context: Tokens the model knows positions for, where that is known.
        limit: The first so many items; None: all.

    Raises:
        DataError: Its items do not fit its templates, or it leaves no room for a prompt.
    """
    try:
        with _no_bars():
            task.task.build_all_requests(limit=limit)
        lengths = [_length(request, tokenizer) for request in task.task.instances]
    except Exception as error:
        raise DataError(
            f"task {task.name}: its items do not fit it: {type(error).__name__}: {first_line(error, None)}"
        ) from error
    room = max(answer for _, answer in lengths)
    if context is not None and room >= context:
        raise DataError(
            f"task {task.name}: generation_kwargs: max_gen_toks must be < {context}, the model's context, got {room}"
        )
    totals = [prompt + answer for prompt, answer in lengths]
    return Requests(len(totals), max(totals), sum(context is not None and total > context for total in totals))


def _length(request: Any, tokenizer: Any) -> tuple[int, int]:
    """Tokens of the text, and tokens an answer may have."""
    texts = [part for part in request.args if isinstance(part, str)]
    answer = 0
    if request.request_type == "generate_until":
        given = request.args[1]
        answer = int(next((given[k] for k in ("max_gen_toks", "max_new_tokens") if k in given), _DEFAULT_ANSWER_TOKENS))
    return len(tokenizer.encode("".join(texts))), answer


def answer_items(
    model: Any, task: HarnessTask, requests: Requests, project: Project, *, label: str, limit: int | None
) -> dict[int, float]:
    """The score of each item of a task, or of the first so many, by the item's number.

    Raises:
        DataError: The metric of some item is no number, or an item cannot be scored.
    """
    batch_size = max(1, project.budget().max_tokens // requests.longest)
    lm = _LoadedModel(model, project.tokenizer, project.machine, context_length(project.base), batch_size)
    with project.reporter.meter(label, requests.num, "requests") as meter, _no_bars():
        lm.set_cache_hook(_ToMeter(meter))
        found = _simple_evaluate(
            lm,
            tasks=[task.task],
            task_manager=TaskManager(include_defaults=False),  # none given, it would read all of the harness's own
            limit=limit,
            bootstrap_iters=0,
            log_samples=True,
        )
    samples = found["samples"][task.name]
    first = samples[0]["filter"]
    scores: dict[int, float] = {}
    for sample in samples:
        if sample["filter"] != first or task.metric not in sample:
            continue
        try:
            score = float(sample[task.metric])
        except (TypeError, ValueError):
            score = math.nan
        if not math.isfinite(score):
            raise DataError(
                f"task {task.name}: {task.metric} of item {sample['doc_id']} must be a number, got"
                f" {sample[task.metric]!r}; its items cannot be compared"
            )
        scores[int(sample["doc_id"])] = score
    return scores


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """The harness draws bars that no option turns off; the reporter has its own."""
    drawing = tqdm.tqdm.__init__
    tqdm.tqdm.__init__ = partialmethod(drawing, disable=True)  # type: ignore[method-assign]
    try:
        yield
    finally:
        tqdm.tqdm.__init__ = drawing  # type: ignore[method-assign]
