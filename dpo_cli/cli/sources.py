"""Data files as the user names them on the command line, or in params.yaml."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dpo_cli.core import paths
from dpo_cli.core.data_params import DataParams, PreferenceSource, SftSource, Source
from dpo_cli.core.errors import DataError, ParamsError
from dpo_cli.core.load_params import explain, load_params
from dpo_cli.core.params import Params
from dpo_cli.data.formats.detect import UnknownFormatError
from dpo_cli.data.plan import Treatment, find_files, plan_of

_ADVICE = re.compile(r"\b((?:say|with|or) )?(columns|labels|format|records|unwrap): (\{[^{}]*\}|[\w.-]+)")
"""Settings of a source in a message; one without braces is told from other words by what stands before it."""

_MAPPINGS = ("columns", "roles", "labels")
"""Settings of a source whose members --set may name one by one: columns.chosen=good."""

KINDS = {"sft": SftSource, "preferences": PreferenceSource}


def project_params() -> Params | None:
    """The settings of the project in the working directory, if it is one."""
    return load_params(paths.PARAMS) if paths.PARAMS.is_file() else None


def sources_of(files: Sequence[str], kind: str | None, settings: Sequence[str]) -> list[Source]:
    """The sources that the user means.

    A file that is a source in params.yaml has the settings it has there, and those given beside.

    Raises:
        ParamsError: A setting is wrong, or no file is given outside a project.
        DataError: A file cannot be read, or fits no format.
    """
    if kind is not None and kind not in KINDS:
        raise ParamsError(f"--as must be sft or preferences, got {kind!r}")
    given = _parse(settings)
    if any(all(key not in mine.model_fields for mine in KINDS.values()) for key in given):
        _made(KINDS[kind or "preferences"], {"path": "a file", **given})  # which says what there is
    params = project_params()
    data = params.data if params else None
    if not files:
        if data is None:
            raise ParamsError("name a file, or run this in a project folder, whose params.yaml names them")
        known = _known(data)
        return [_updated(source, given) for source in known if kind is None or isinstance(source, KINDS[kind])]
    found: list[Source] = []
    problems: list[str] = []
    for file in files:
        try:
            found.append(_source_of(file, kind, given, data))
        except DataError as error:
            problems += error.problems
    if problems:
        raise DataError(problems)
    return found


def project_data() -> DataParams:
    """Section data of the project in the working directory; the defaults where it is none."""
    params = project_params()
    return params.data if params else DataParams()


def _known(data: DataParams) -> list[Source]:
    return [*data.sft_sources, *data.preference_sources]


def _files_of(source: Source) -> list[Path]:
    try:
        return find_files(source)
    except DataError:  # a pattern without a file; the stage says so
        return []


def _source_of(file: str, kind: str | None, given: dict[str, Any], data: DataParams | None) -> Source:
    for source in _known(data) if data else []:
        mine = Path(source.path) == Path(file) or any(path == Path(file) for path in _files_of(source))
        if mine and (kind is None or isinstance(source, KINDS[kind])):
            return _updated(source, {"path": file, **given})
    problem: DataError | None = None
    for name in [kind] if kind else ["preferences", "sft"]:
        mine = {key: value for key, value in given.items() if key in KINDS[name].model_fields}
        source = _made(KINDS[name], {"path": file, **mine})
        try:
            for path in find_files(source)[:1]:
                # who reads on says which lines are broken
                plan_of(source, path, Treatment({}, 0.5), before_broken=True)
        except UnknownFormatError as error:  # as the next kind, perhaps
            problem = problem or error
        except ParamsError as error:  # columns of the other kind
            problem = problem or DataError(error.problems)
        else:
            return _made(KINDS[name], {"path": file, **given})
    assert problem is not None
    hint = "; instructions are read with --as sft" if kind is None and "unknown format" in str(problem) else ""
    raise DataError([f"{as_options(text)}{hint}" for text in problem.problems])


def as_options(advice: str, section: str = "") -> str:
    """What a message says to write into params.yaml, as options to write behind a command.

    Args:
        advice: The message.
        section: The section that an option must name, with a dot behind it; empty: none.
    """

    def option(match: re.Match[str]) -> str:
        before, key, value = match[1] or "", match[2], match[3]
        is_setting = before or value.startswith("{") or (key, value) == ("unwrap", "true")
        return f"{before}--set {shlex.quote(f'{section}{key}={value}')}" if is_setting else match[0]

    return _ADVICE.sub(option, advice)


def _parse(settings: Sequence[str]) -> dict[str, Any]:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    given: dict[str, Any] = {}
    for setting in settings:
        key, separator, text = setting.partition("=")
        if not separator:
            advice = as_options(setting)
            hint = f"; write {advice}" if advice != setting else ""
            raise ParamsError(f"--set takes key=value, got {setting!r}{hint}")
        for section in ("data.sft.", "data.preferences."):
            key = key.removeprefix(section)
        if key.strip() in ("path", "also"):
            raise ParamsError(f"--set {key.strip()} has no place here: the files are named one by one")
        try:
            value = YAML(typ="safe").load(text)
        except YAMLError as error:
            raise ParamsError(f"--set {key}: not valid YAML: {str(error).splitlines()[0]}") from None
        name, dot, member = key.strip().partition(".")
        if dot and name in _MAPPINGS and isinstance(given.setdefault(name, {}), dict):
            given[name][member] = value
        else:
            given[key.strip()] = value
    return given


def _updated(source: Source, given: dict[str, Any]) -> Source:
    return _made(type(source), {**source.model_dump(), **given}) if given else source


def _made(kind: type[Source], values: dict[str, Any]) -> Source:
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ParamsError(
            list(dict.fromkeys(f"--set {explain(problem, kind)}" for problem in error.errors()))
        ) from None
