"""A new project folder, with the same pipeline as this repository."""

from __future__ import annotations

import difflib
import io
import json
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq

from dpo_cli.cli.sources import as_options
from dpo_cli.core import paths
from dpo_cli.core.artifacts import atomic_path, write_text
from dpo_cli.core.data_params import AS_PREFERENCES, DataParams, PreferenceSource, SftSource, Source
from dpo_cli.core.errors import DataError, MachineError, ParamsError
from dpo_cli.core.load_params import apply_overrides
from dpo_cli.core.params import Params, ReferenceParams, SftParams
from dpo_cli.core.params_text import EMBEDDED_PRESET, params_yaml
from dpo_cli.core.pipeline import STAGES, dvc_yaml
from dpo_cli.core.progress import Reporter
from dpo_cli.data import world
from dpo_cli.data.formats.detect import UnknownFormatError
from dpo_cli.data.plan import Treatment, plan_of
from dpo_cli.data.reading.base import missing

_DVC_CONFIG = """\
[core]
    analytics = false
    check_update = false
"""
_GITIGNORE = """\
.scratch/
*.tmp
.*.jsonl.lock

# made by the pipeline, kept by DVC
""" + "".join(f"/{path.as_posix()}\n" for stage in STAGES for path in stage.kept_by_dvc)

# Answers are sampled for their divergence and form alone, which need fewer than a win rate does.
NOBODY_JUDGES = {"evaluate.num_prompts": 64}
# The embedded model on data of another world: it spells most texts out in bytes, and sees few pairs.
OWN_SFT_DATA = {"sft.max_length": 2048}
OWN_PREFERENCES = {
    "reference.max_length": 2048,
    "train.learning_rate": 2e-5,
    "train.beta": 0.1,
    "evaluate.num_prompts": 128,
    "evaluate.temperature": 1.0,
    "evaluate.max_new_tokens": 128,
}

_GIVEN_OTHERWISE = ("path", "data.sft.path", "data.preferences.path", "model.name", "runtime.model_path")
"""Settings that init makes of its other options."""


@dataclass(frozen=True)
class ProjectFiles:
    """Files of data and the folder of a base model that the user brings; None stands for the embedded default."""

    sft: Path | None = None
    preferences: Path | None = None
    model: Path | None = None


def create_project(folder: Path, files: ProjectFiles, reporter: Reporter, settings: Sequence[str] = ()) -> None:
    """Make a project folder, or nothing.

    Settings of params.yaml are given as ``section.key=value``; ``key=value`` is meant of the one file that is given.

    Raises:
        ParamsError: A setting is wrong, or has no effect.
        DataError: A given file is missing or cannot be read, or the folder holds a project already.
        MachineError: The model directory is missing or holds no model that can be tuned, or git cannot be run.
    """
    _check(folder, files)
    values, params = apply_overrides(_settings(files), _with_sections(settings, files))
    _look_at(files, params.data, reporter)
    if files.model is not None:
        values |= _model_settings(files.model, params, reporter)
    folder.mkdir(parents=True, exist_ok=True)
    for rows, (source, target) in zip(
        (world.instruction_rows, world.preference_rows), _raw_files(folder, files), strict=True
    ):
        if source is not None and not target.exists():
            with atomic_path(target) as temporary:
                shutil.copyfile(source, temporary)
        elif source is None and not (rows is world.instruction_rows and files.preferences):
            write_text(target, rows_json(rows(0)))
    write_project(folder, values, reporter)
    if files.model is None and (files.sft or files.preferences):
        reporter.warn("no --model is given: using the embedded tiny model, which learns next to nothing from real text")
    reporter.say(f"{folder} is ready. Look at {folder / 'params.yaml'}, then run: dpo-cli -C {folder} repro")


def write_project(folder: Path, values: Mapping[str, Any], reporter: Reporter) -> None:
    """Write the files of a project into a folder that holds its data, and put them into git."""
    for name, text in project_files(values).items():
        if (folder / name).exists():
            reporter.warn(f"{folder / name} is kept as it is; dpo-cli would have written {text.split()!r}")
            continue
        write_text(folder / name, text)
    _ensure_git(folder)


def _with_sections(settings: Sequence[str], files: ProjectFiles) -> list[str]:
    """Settings under their whole names.

    Raises:
        ParamsError: It is not clear which file is meant, or one has no place here.
    """
    given = {"data.sft": files.sft, "data.preferences": files.preferences}
    sections = [section for section, file in given.items() if file is not None]
    whole = []
    for setting in settings:
        key = setting.partition("=")[0].strip()
        if key in _GIVEN_OTHERWISE:
            raise ParamsError(f"--set {key} has no place here: files are given with --sft, --preferences and --model")
        known = {*SftSource.model_fields, *PreferenceSource.model_fields}
        name = re.split(r"[.:]", key)[0]
        is_of_a_file = name in known
        if name not in {*known, *Params.model_fields} and (close := difflib.get_close_matches(name, known, n=1)):
            raise ParamsError(f"--set {name} is not a setting; did you mean {close[0]}?")
        if is_of_a_file and len(sections) != 1:
            raise ParamsError(f"--set {key}: of which file? say data.sft.{key} or data.preferences.{key}")
        if is_of_a_file and (advice := as_options(setting)) != setting:
            raise ParamsError(f"--set takes key=value, got {setting!r}; write {advice}")
        whole.append(f"{sections[0]}.{setting.strip()}" if is_of_a_file else setting)
    return whole


def _look_at(files: ProjectFiles, data: DataParams, reporter: Reporter) -> None:
    """Say as what each file will be read.

    Raises:
        DataError: One cannot be read; the message says what to give as options.
    """
    problems: list[str] = []
    for path, option, sources in (
        (files.sft, "data.sft.", data.sft_sources[:1]),
        (files.preferences, "data.preferences.", [data.preferences, *([] if files.sft else data.sft_sources[:1])]),
    ):
        if path is None:
            continue
        try:
            read = [plan_of(source, path, Treatment({}, 0.5))[1] for source in sources]
        except DataError as error:
            section = option if files.sft and files.preferences else ""
            hint = _mistaken(path, files) if path == files.preferences and isinstance(error, UnknownFormatError) else ""
            problems += [f"{as_options(problem, section)}{hint}" for problem in error.problems]
        else:
            reporter.say(f"{path.name}: {read[0]}")
    if problems:
        *others, last = problems
        raise DataError([*others, f"{last}; no project was created: fix the file or say how to read it, and try again"])
    if files.preferences and not files.sft:
        reporter.say("instructions: none are given, so SFT learns the preferred answers of your preferences")
    if files.sft and not files.preferences:
        reporter.warn("preferences: none are given, so those of the embedded world are used")


def _mistaken(path: Path, files: ProjectFiles) -> str:
    """What to say where a file that is no preferences holds instructions."""

    def reads(source: Source, path: Path) -> bool:
        try:
            plan_of(source, path, Treatment({}, 0.5))
        except DataError:
            return False
        return True

    if not reads(SftSource(path=str(path)), path):
        return ""
    if files.sft is not None and reads(PreferenceSource(path=str(files.sft)), files.sft):
        named = f"{files.sft.name} contains preferences, and the other file instructions"
        return f"; --sft and --preferences look swapped: {named}"
    return "; as instructions it can be read: then give it with --sft"


def _model_settings(given: Path, params: Params, reporter: Reporter) -> dict[str, Any]:
    """Verify a model directory as stage base does, but for its numbers, and say what its settings must be.

    Raises:
        MachineError: It cannot be tuned.
    """
    # here: they take seconds, and only --model needs them
    from dpo_cli.models.load import quiet_libraries
    from dpo_cli.models.verify import verify_template, verify_tokenizer, verify_vocabulary, verify_weights

    quiet_libraries()
    folder = given.resolve()
    facts = verify_weights(folder).facts
    tokenizer = verify_tokenizer(folder)
    values: dict[str, Any] = {}
    model = params.model
    if not tokenizer.chat_template and model.chat_template == "auto":
        model = model.model_copy(update={"chat_template": "plain"})
        values["model.chat_template"] = model.chat_template
        reporter.say(f"{folder.name} has no chat template: model.chat_template is plain")
    try:
        encoder = verify_template(folder, tokenizer, model)
    except MachineError as error:
        reporter.warn(f"{error}; do so in params.yaml, before you go on")
    else:
        for note in verify_vocabulary(folder, tokenizer, encoder, facts.num_rows):
            reporter.warn(note)
    for name, section, default in (
        ("sft", params.sft, SftParams().max_length),
        ("reference", params.reference, ReferenceParams().max_length),
    ):
        if facts.context_length is not None and facts.context_length < section.max_length == default:
            values[f"{name}.max_length"] = facts.context_length
            reporter.say(f"{folder.name} knows {facts.context_length} positions: {name}.max_length is that")
    return values


def _settings(files: ProjectFiles) -> dict[str, Any]:
    """Settings that differ from their defaults, by dotted path."""
    values: dict[str, Any] = {}
    if files.model is None:
        values |= EMBEDDED_PRESET
    else:
        folder = files.model.resolve()
        values |= {"model.name": folder.name, "runtime.model_path": folder.as_posix()}
    values["evaluate.judge"] = "none" if files.preferences else "world"
    if files.preferences:
        values |= NOBODY_JUDGES
        for setting in ("opponents", "judge_pairs", "temperatures", "scales"):  # nobody judges
            values.pop(f"evaluate.{setting}", None)
    if files.model is None:
        values |= OWN_SFT_DATA if files.sft or files.preferences else {}
        values |= OWN_PREFERENCES if files.preferences else {}
    for key, file in (("data.sft.path", files.sft), ("data.preferences.path", files.preferences)):
        if file is not None:
            values[key] = (paths.RAW / file.name).as_posix()
    if files.preferences and not files.sft:
        values["data.sft.path"] = AS_PREFERENCES
    return values


def rows_json(rows: list[dict[str, str]]) -> str:
    """Rows as a JSON array, one row a line."""
    return "[\n" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n]\n"


def project_files(values: Mapping[str, Any]) -> dict[str, str]:
    """The files of every project by their names, params.yaml with these values."""
    stream = io.StringIO()
    yaml = YAML()
    yaml.width = 120
    yaml.indent(mapping=2, sequence=2, offset=0)
    yaml.dump(_in_lines(dvc_yaml()), stream)
    return {
        ".dvc/config": _DVC_CONFIG,
        ".dvc/.gitignore": "/config.local\n/tmp\n/cache\n",
        ".dvcignore": "__pycache__/\n*.py[co]\n*.tmp\n.scratch/\n",
        ".gitattributes": "* text=auto eol=lf\n",
        ".gitignore": _GITIGNORE,
        "dvc.yaml": f"# Written by dpo-cli; settings are in params.yaml.\n{stream.getvalue()}",
        "params.yaml": params_yaml(values),
    }


def _in_lines(value: Any) -> Any:
    """A tree of YAML in which what holds no list or mapping stands on one line, if it fits there."""
    if not isinstance(value, dict | list):
        return value
    inner = list(value.values()) if isinstance(value, dict) else value
    styled = CommentedMap(value) if isinstance(value, dict) else CommentedSeq(value)
    for key in styled if isinstance(value, dict) else range(len(value)):
        styled[key] = _in_lines(value[key])
    if not any(isinstance(each, dict | list) for each in inner) and len(str(value)) <= 96:
        styled.fa.set_flow_style()
    return styled


def _check(folder: Path, files: ProjectFiles) -> None:
    for path in (files.sft, files.preferences):
        if path is not None and not path.is_file():
            raise missing(path)
    if files.sft is not None and files.preferences is not None and files.sft.name == files.preferences.name:
        raise DataError(f"both files are named {files.sft.name}; they are copied into one folder, so rename one")
    refuse_project(folder)
    for source, target in _raw_files(folder, files):
        if target.exists() and not (source and target.samefile(source)):
            raise DataError(f"{target} exists already; name it with --sft or --preferences, or move it away")


def refuse_project(folder: Path) -> None:
    """Refuse a folder that is a project already.

    Raises:
        DataError: It is one.
    """
    for name in ("params.yaml", "dvc.yaml", ".dvc"):
        if (folder / name).exists():
            raise DataError(f"{folder / name} exists already; give a new folder, or delete it first")


def _raw_files(folder: Path, files: ProjectFiles) -> list[tuple[Path | None, Path]]:
    """Instruction and preference data: the given file, and where it goes."""
    names = ((files.sft, "instructions.json"), (files.preferences, "preferences.json"))
    return [(source, folder / paths.RAW / (source.name if source else name)) for source, name in names]


def _ensure_git(folder: Path) -> None:
    """DVC's experiments and diffs need a git repository with a commit; one that is there already is left alone."""
    try:
        inside = subprocess.run(
            ["git", "-C", str(folder), "rev-parse", "--is-inside-work-tree"], capture_output=True, check=False
        )
        if inside.returncode:
            git = ["git", "-C", str(folder)]
            named = subprocess.run([*git, "config", "user.email"], capture_output=True, check=False).returncode == 0
            author = [] if named else ["-c", "user.name=dpo-cli", "-c", "user.email=dpo-cli@localhost"]
            for arguments in (
                ["init", "-q", "-b", "main"],
                ["add", "--all"],
                [*author, "commit", "-q", "--no-gpg-sign", "-m", "A new dpo-cli project"],
            ):
                subprocess.run([*git, *arguments], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise MachineError(f"git cannot be run ({error}); DVC needs it") from None
