"""What a run left behind: where DVC keeps experiments in git, and their settings, metrics and rows.

DVC keeps an experiment as a commit on its baseline, under ``refs/exps/<first two digits of the baseline>/<the
rest>/<name>``. The commit holds all tracked files and every output that is not cached, so params.yaml, dvc.lock and
reports/ are read with git alone.
"""

from __future__ import annotations

import csv
import difflib
import functools
import hashlib
import io
import json
import os
import re
import shlex
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from dpo_cli.core import paths
from dpo_cli.core.errors import DataError, MachineError, ParamsError, StaleArtifactError
from dpo_cli.core.pipeline import STAGES
from dpo_cli.data.schema import Messages
from dpo_cli.evaluation import DPO, SFT

WORKSPACE = "workspace"
OF_ANSWERS = paths.SAMPLES
OF_PAIRS = "pairs.csv"
"""Files of reports/evaluate with a value a prompt, and a value a held-out pair."""

ANSWER_FIGURES = {
    "reward": "reward", "well_formed": "well_formed", "finished": "finished", "num_tokens": "answer_tokens"
}  # fmt: skip
"""Metrics of both models' answers, by what a row of samples.json calls them."""
PAIR_FIGURES = ("loss", "margin", "chosen_reward", "rejected_reward")

_REFS = "refs/exps"
_BASELINE_DIGITS = (40, 64)
_NOT_SETTINGS = ("runtime",)
_LOCK = Path("dvc.lock")

Scalar = float | int | bool | str | None
Rows = Mapping[str, tuple[str, float]]
"""Value of each row by the row's id, beside the id of its prompt."""
Read = Callable[[Path], bytes | None]


class Texts(NamedTuple):
    """A prompt and what both models of a run answered."""

    prompt: Messages
    sft: str
    dpo: str


@dataclass(frozen=True)
class Experiment:
    """What one run left behind.

    Attributes:
        name: What the user calls it.
        revision: Its commit; empty for the workspace.
        params: Its settings by dotted path.
        metrics: Its metrics by dotted path, the stage first.
        rows: By metric, the values that the metric is the mean of.
        missing: By file of reports/evaluate, why there are no such values.
        answers: What was asked and answered, by prompt.
    """

    name: str
    revision: str
    params: Mapping[str, Scalar]
    metrics: Mapping[str, Scalar]
    rows: Mapping[str, Rows] = field(default_factory=dict)
    missing: Mapping[str, str] = field(default_factory=dict)
    answers: Mapping[str, Texts] = field(default_factory=dict)


# --- names ----------------------------------------------------------------------------------


class Ref(NamedTuple):
    """An experiment of DVC: its name, the commit that it is based on, and its own."""

    name: str
    baseline: str
    commit: str


def experiment_refs() -> list[Ref]:
    """All experiments of this repository, oldest first.

    Raises:
        MachineError: git cannot be run, or this is no git repository.
    """
    found = []
    listed = _git("for-each-ref", "--sort=committerdate", "--format=%(objectname) %(refname)", _REFS)
    for line in listed.decode().splitlines():
        commit, _, ref = line.partition(" ")
        digits, _, name = ref.removeprefix(f"{_REFS}/").partition("/")
        rest, _, name = name.partition("/")
        # what else DVC keeps there (stash, exec, celery) has other names
        if name and "/" not in name and len(digits + rest) in _BASELINE_DIGITS:
            found.append(Ref(name, digits + rest, commit))
    return found


def head() -> str:
    """The commit that is checked out.

    Raises:
        MachineError: There is none.
    """
    commit = _commit_of("HEAD")
    if commit is None:
        raise MachineError("this git repository has no commit yet; run: git add --all && git commit")
    return commit


def revisions_of(names: Sequence[str], refs: Sequence[Ref]) -> dict[str, str]:
    """The commit behind each name; empty for the workspace and for a folder that ``evaluate --model`` wrote.

    A name is looked for among the experiments first, those based on HEAD before others, then
    among all that git knows.

    Raises:
        ParamsError: There is no such experiment or revision, or more than one.
    """
    found: dict[str, str] = {}
    problems: list[str] = []
    for name in names:
        try:
            found[name] = "" if is_here(name) else _revision_of(name, refs)
        except ParamsError as error:
            problems += error.problems
    if problems:
        raise ParamsError(problems)
    return found


def is_here(name: str) -> bool:
    """Whether a name stands for files of the workspace: its own, or those of a folder."""
    return name == WORKSPACE or (Path(name) / "metrics.json").is_file()


def _revision_of(name: str, refs: Sequence[Ref]) -> str:
    named = [ref for ref in refs if ref.name == name]
    if len(named) > 1:
        named = [ref for ref in named if ref.baseline == head()] or named
    if len(named) > 1:
        commits = ", ".join(f"{ref.commit[:10]} (on {ref.baseline[:10]})" for ref in named)
        raise ParamsError(f"{name} names {len(named)} experiments; give the commit of one: {commits}")
    if named:
        return named[0].commit
    commit = _commit_of(name)
    if commit is None:
        heads = _git("for-each-ref", "--format=%(refname:short)", "refs/heads", "refs/tags").decode().split()
        known = [*dict.fromkeys(ref.name for ref in refs), *heads, WORKSPACE]
        near = difflib.get_close_matches(name, known, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "dvc exp list --all names what there is"
        raise ParamsError(f"{name} is neither an experiment nor a git revision; {hint}")
    return commit


# --- what it left behind ---------------------------------------------------------------------


def flatten(tree: Mapping[str, Any], prefix: str = "", *, lists: bool = True) -> dict[str, Scalar]:
    """A tree as values by dotted path; a list, or a mapping that is empty, is one value, as text, or left out."""
    flat: dict[str, Scalar] = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{path}.", lists=lists)
        elif not isinstance(value, list | Mapping):
            flat[path] = value
        elif lists:
            flat[path] = json.dumps(value, ensure_ascii=False)
    return flat


def rows_of_answers(text: str) -> tuple[dict[str, Rows], dict[str, Texts]]:
    """Values by metric in samples.json, and the texts by prompt.

    A metric is left out where not every row has it.

    Raises:
        ValueError: It is no such file.
    """
    columns: dict[str, dict[str, tuple[str, float]]] = {}
    answers: dict[str, Texts] = {}
    num_rows = 0
    try:
        for row in json.loads(text):
            num_rows += 1
            prompt = row["id"]
            answers[prompt] = Texts(row["prompt"], row["sft"]["text"], row["dpo"]["text"])
            for metric, value in _answer_figures(row):
                columns.setdefault(f"evaluate.{metric}", {})[prompt] = (prompt, float(value))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"a row has no {error}") from None
    partial = {"evaluate.win_rate", "evaluate.tie_rate"}  # a judge may have no verdict on some
    if not num_rows:
        raise ValueError("it holds no answers")
    return {name: rows for name, rows in columns.items() if len(rows) == num_rows or name in partial}, answers


def _answer_figures(row: Mapping[str, Any]) -> Iterable[tuple[str, float]]:
    for name in (SFT, DPO):
        for key, metric in ANSWER_FIGURES.items():
            if key in row[name]:
                yield f"{metric}_{name}", row[name][key]
    if "win" in row:
        yield "win_rate", row["win"]
        yield "tie_rate", row["win"] == 0.5
    if "kl" in row:
        yield "kl", row["kl"]


def rows_of_pairs(text: str) -> dict[str, Rows]:
    """Values by metric in pairs.csv.

    Raises:
        ValueError: It is no such file.
    """
    columns: dict[str, dict[str, tuple[str, float]]] = {}
    try:
        for row in csv.DictReader(text.split("\n")):
            margin = float(row["margin"])
            figures = {name: float(row[name]) for name in PAIR_FIGURES}
            figures["reward_accuracy"] = 0.5 if margin == 0 else float(margin > 0)
            for name, value in figures.items():
                columns.setdefault(f"evaluate.{name}", {})[row["id"]] = (row["prompt"], value)
    except (KeyError, TypeError) as error:
        raise ValueError(f"a row has no {error}") from None
    return dict(columns)


def read_experiment(name: str, revision: str) -> tuple[Experiment, list[str]]:
    """What an experiment left behind, and what is odd about it, one sentence each.

    Args:
        name: What the user calls it.
        revision: Its commit; empty for the workspace, or where the name is a folder that ``evaluate --model`` wrote.

    Raises:
        StaleArtifactError: It has no metrics of stage evaluate.
        DataError: A file of it is damaged.
    """
    read = _reader(revision)
    folder = Path(name) if not revision and name != WORKSPACE else None
    reports = folder or paths.report_dir("evaluate")
    metrics: dict[str, Any] = {}
    for path in [paths.metrics_file(stage.name) for stage in STAGES if stage.metrics] if folder is None else []:
        if (content := read(path)) is not None:
            metrics |= _json(content, f"{name}: {path}")
    if folder is not None:
        metrics = _json(read(folder / "metrics.json") or b"", f"{folder / 'metrics.json'}")
    if "evaluate" not in metrics:
        remedy = "commit reports/ of a run, or make one: dvc exp run" if revision else "run: dpo-cli repro"
        raise StaleArtifactError(f"{name}: {paths.metrics_file('evaluate')} is missing; {remedy}")
    if folder is None:
        params = _yaml(read(paths.PARAMS), f"{name}: {paths.PARAMS}")
    else:
        params = _json(read(folder / paths.MODEL_SETTINGS) or b"{}", f"{folder / paths.MODEL_SETTINGS}")
    rows: dict[str, Rows] = {}
    missing: dict[str, str] = {}
    answers: dict[str, Texts] = {}
    for path in (reports / OF_ANSWERS, reports / OF_PAIRS):
        content = read(path)
        if content is None:
            missing[path.name] = f"{name} has no {path}; evaluate it again"
            continue
        try:
            if path.name == OF_PAIRS:
                rows |= rows_of_pairs(content.decode())
            else:
                found, answers = rows_of_answers(content.decode())
                rows |= found
        except ValueError as error:
            raise DataError(f"{name}: {path} is damaged ({error}); evaluate it again") from None
    settings = {key: value for key, value in params.items() if key not in _NOT_SETTINGS}
    experiment = Experiment(name, revision, flatten(settings), flatten(metrics, lists=False), rows, missing, answers)
    return experiment, [] if folder is not None else _oddities(name, params, read)


def _oddities(name: str, params: dict[str, Any], read: Read) -> list[str]:
    """Where params.yaml or reports/ are not those of the run that dvc.lock recorded."""
    stages = _yaml(read(_LOCK), f"{name}: {_LOCK}").get("stages") or {}
    found = []
    ran: dict[str, Scalar] = {}
    for stage in STAGES:
        ran |= flatten(stages.get(stage.name, {}).get("params", {}).get(paths.PARAMS.name, {}))
    now = flatten({section: values for section, values in params.items() if section not in _NOT_SETTINGS})
    changed = [path for path in ran if path in now and now[path] != ran[path]]
    if changed:
        path = changed[0]
        rest = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        found.append(
            f"{name}: params.yaml says {path} = {now[path]}, but its last run had {ran[path]}{rest};"
            " bring it up to date: dpo-cli repro"
        )
    other = []
    for stage in ("train", "evaluate"):
        for out in stages.get(stage, {}).get("outs", []):
            path = Path(out["path"])
            content = read(path) if path.suffix in (".json", ".jsonl", ".csv") else None
            if content is not None and hashlib.md5(content, usedforsecurity=False).hexdigest() != out.get("md5"):
                other.append(path.as_posix())
    if other:
        found.append(
            f"{name}: {', '.join(other)} {'are' if len(other) > 1 else 'is'} not what dvc.lock recorded: made by hand,"
            " perhaps with --set, so params.yaml need not be what made it"
        )
    return found


def _reader(revision: str) -> Read:
    """Reads a file of the project as it is at a revision; None where it has none."""

    @functools.cache
    def read(path: Path) -> bytes | None:
        if not revision:
            return path.read_bytes() if path.is_file() else None
        shown = _run_git("show", f"{revision}:./{path.as_posix()}")
        return None if shown.returncode else shown.stdout

    return read


def _commit_of(name: str) -> str | None:
    result = _run_git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}")
    return None if result.returncode else result.stdout.decode().strip()


def _git(*arguments: str) -> bytes:
    result = _run_git(*arguments)
    if result.returncode:
        raise MachineError(f"git {arguments[0]}: {_fatal(result.stderr)}")
    return result.stdout


def _run_git(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    try:
        result = subprocess.run(["git", *arguments], env=os.environ | {"LC_ALL": "C"}, capture_output=True, check=False)
    except OSError as error:
        raise MachineError(f"git cannot be run ({error}); experiments are kept in git") from None
    if result.returncode and b"dubious ownership" in result.stderr:
        found = re.search(r"in repository at '(.*)'", result.stderr.decode(errors="replace"))
        place = found[1] if found else str(Path.cwd())
        raise MachineError(
            f"git: the repository {place} belongs to another user; if you trust it, run: git config --global --add"
            f" safe.directory {shlex.quote(place)}"
        )
    return result


def _fatal(stderr: bytes) -> str:
    """What git says is wrong: the line that begins with fatal or error, and not the last one, which may be a remedy."""
    lines = [line.strip() for line in stderr.decode(errors="replace").splitlines() if line.strip()]
    said = [line for line in lines if line.startswith(("fatal: ", "error: "))] or lines or ["no word of what is wrong"]
    return said[0].partition(": ")[2] or said[0]


def _json(content: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except ValueError as error:
        raise DataError(f"{where} is damaged ({error})") from None
    if not isinstance(value, dict):
        raise DataError(f"{where} is damaged (it is no JSON object)")
    return value


def _yaml(content: bytes | None, where: str) -> dict[str, Any]:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    if content is None:
        return {}
    try:
        value = YAML(typ="safe").load(io.BytesIO(content))
    except (YAMLError, ValueError) as error:
        raise DataError(f"{where} is not valid YAML: {str(error).splitlines()[0]}") from None
    return value if isinstance(value, dict) else {}
