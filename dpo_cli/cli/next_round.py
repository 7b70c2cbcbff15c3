"""A new project that goes on from the model which another one tuned: the next round."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_cli.cli.new_project import refuse_project, write_project
from dpo_cli.core import paths
from dpo_cli.core.artifacts import atomic_path
from dpo_cli.core.data_params import AS_PREFERENCES, PreferenceSource
from dpo_cli.core.errors import DataError, DpoCliError, MachineError
from dpo_cli.core.load_params import apply_overrides, changed_settings, load_params
from dpo_cli.core.manifest import DPO
from dpo_cli.core.params import EMBEDDED, Params
from dpo_cli.core.progress import Reporter
from dpo_cli.data.plan import find_files

_ADAPTERS = ("train.lora", "reward.lora", "ppo.lora")
"""Shapes of adapters that are not made: all of them go on with SFT's."""


@dataclass(frozen=True)
class _Earlier:
    """What a project hands on.

    Attributes:
        params: Its settings.
        number: Which round the next one is; the first project is 1.
        is_whole: Whether its SFT tuned all weights, so that its adapter stands on models/sft.
        files: What the settings name, relative to the project.
        is_evaluated: Whether the tuned model was.
    """

    params: Params
    number: int
    is_whole: bool
    files: list[Path]
    is_evaluated: bool


def create_round(folder: Path, earlier: Path, reporter: Reporter, *, reuse: bool, settings: Sequence[str]) -> None:
    """Make a project that starts from the tuned model of an earlier one, or make nothing.

    Its SFT model is the adapter of the earlier models/dpo, on the same base model. Settings and raw data are carried
    over. Votes are expected in a folder of their own; the preferences of before are trained on again with ``reuse``,
    and else only what of them is held out anyway (``split: eval``).

    Args:
        folder: Of the new project.
        earlier: Of the earlier one.
        reporter: Is told what was made, and what comes next.
        reuse: Whether earlier preferences stay training data.
        settings: Of params.yaml, as ``section.key=value``.

    Raises:
        ParamsError: A setting is wrong, or has no effect.
        DataError: There is no such project, or the folder holds one already.
        StaleArtifactError: The earlier project's models/dpo is missing, damaged, or made of something else than what
            is there now.
        MachineError: A file cannot be copied, or git cannot be run.
    """
    if not (earlier / paths.PARAMS).is_file():
        raise DataError(
            f"{earlier} is no project: it has no {paths.PARAMS}; name the folder of one, as in: --from round1"
        )
    refuse_project(folder)
    folder, home = folder.absolute(), earlier.resolve()
    try:
        with chdir(home):
            found = _look_at()
    except DpoCliError as error:
        raise type(error)([f"{earlier}: {problem}" for problem in error.problems]) from None
    votes = paths.RAW / f"votes-{found.number}"
    values, params = apply_overrides(_settings(found, home, votes, reuse=reuse), settings)
    copies = [*found.files]
    if params.model.name == EMBEDDED:  # built in the earlier project, and found unchanged by stage base
        copies += [path.relative_to(home) for path in sorted((home / paths.BASE).rglob("*")) if path.is_file()]
    for path in copies:
        if (folder / path).exists() and not (folder / path).samefile(home / path):
            raise DataError(f"{folder / path} exists already; move it away")
    for path in copies:
        try:
            with atomic_path(folder / path) as temporary:
                shutil.copyfile(home / path, temporary)
        except OSError as error:
            raise MachineError(f"{home / path} cannot be copied: {error.strerror}") from None
    write_project(folder, values, reporter)
    if not found.is_evaluated:
        reporter.warn(f"{earlier} has not been evaluated, so the report will not show what came of it")
    if not any(source.split != "eval" for source in params.data.preference_sources[1:]):
        reporter.say(
            "earlier preferences are not trained on again; to do so, name them in data.preferences.also, or say --reuse"
        )
    prompts = "" if params.sample.prompts else f"sample {found.params.data.preferences.path}"
    steps = ["repro sft", prompts or "repro sample", f"label data/samples/FILE --out {votes.as_posix()}", "repro"]
    reporter.say(
        f"{folder.name} is ready: round {found.number}, from {earlier / paths.DPO_MODEL}. In {folder} run: "
        + "; ".join(f"dpo-cli {step}" for step in steps)
    )


def _look_at() -> _Earlier:
    """What the project in the working directory hands on, checked."""
    # here: torch takes seconds, and only --from needs it
    from dpo_cli.data.tokenize import table_digests
    from dpo_cli.models.adapters import read_sft_result
    from dpo_cli.models.identity import base_digest, read_lock

    params = load_params(paths.PARAMS)
    manifest = DPO.read()
    digest = base_digest()
    sft = read_sft_result(digest)
    now: dict[str, Any] = {"base": read_lock()}
    now["graph"] = {**manifest.made_of["graph"], "base": digest, "sft": sft.digest}
    if paths.PREFERENCE_DATA.is_dir():
        now["data/preference"] = table_digests(paths.PREFERENCE_DATA)
    DPO.check(now)
    return _Earlier(
        params,
        len(sft.rounds) + 2,
        sft.method == "full",
        sorted({*_named_files(params)}),
        paths.metrics_file("evaluate").is_file(),
    )


def _named_files(params: Params) -> Iterator[Path]:
    """The files of the project that the settings name: data, prompts, and templates of judges."""
    evaluate = params.evaluate
    prompts = [PreferenceSource(path=path) for path in params.sample.prompts]
    for source in (*params.data.sft_sources, *params.data.preference_sources, *prompts):
        yield from (path for path in find_files(source) if _is_ours(path))
    yield from (path for path in (Path(evaluate.hf.template), Path(evaluate.openai.template)) if _is_ours(path))


def _is_ours(path: Path) -> bool:
    return not path.is_absolute() and ".." not in path.parts and path.is_file()


def _settings(found: _Earlier, home: Path, votes: Path, *, reuse: bool) -> dict[str, Any]:
    """The new project's settings that differ from their defaults, by dotted path."""
    params = found.params
    values = changed_settings(params)
    adapter = {"sft.method": "adapter", "runtime.adapter_path": (home / paths.DPO_MODEL).as_posix()}
    for name in [name for name in values if name in _ADAPTERS or name.startswith("data.preferences.")]:
        del values[name]
    if found.is_whole:
        for name in ("revision", "seed", "pretrain_steps"):  # of another model than the new base
            values.pop(f"model.{name}", None)
        values |= {"model.name": f"{home.name}-sft", "runtime.model_path": (home / paths.SFT_MODEL).as_posix()}
    for name in ("runtime.model_path", "runtime.judge_path"):
        if name in values:
            values[name] = (home / Path(values[name]).expanduser()).as_posix()
    if params.evaluate.judge == "votes":  # on other answers
        values = {name: value for name, value in values.items() if not name.startswith("evaluate.votes.")}
        values["evaluate.judge"] = "none"
    if params.data.sft.path == AS_PREFERENCES:  # those of before, since those to come are not there yet
        first, *rest = (source.model_dump(exclude_defaults=True) for source in params.data.sft_sources)
        values |= {f"data.sft.{name}": value for name, value in first.items()} | (
            {"data.sft.also": rest} if rest else {}
        )
    kept = [source for source in params.data.preference_sources if reuse or source.split == "eval"]
    if kept:
        also = [{"path": each.path, **each.model_dump(exclude_defaults=True, exclude={"also"})} for each in kept]
        values["data.preferences.also"] = also
    return {**values, **adapter, "data.preferences.path": votes.as_posix()}
