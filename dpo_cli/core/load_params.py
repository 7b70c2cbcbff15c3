"""Read params.yaml and ``--set``: every problem of a file in one go, one line each."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from dpo_cli.core.errors import ParamsError
from dpo_cli.core.params import Params, iter_settings
from dpo_cli.core.params_checks import contradictions
from dpo_cli.core.text import in_one_line, shown

_LARGEST_FILE = 1 << 20
_MOST_VALUES = 10_000
_MOST_PROBLEMS = 20
_LONGEST_TEXT = 10_000
_LONGEST_NAME = 255
_PATHS = (".path", "_path", ".file", ".template")


def load_params(path: Path, overrides: Sequence[str] = ()) -> Params:
    """Read params.yaml and apply ``section.key=value`` overrides.

    Raises:
        ParamsError: The file is missing or not YAML, or any value in it is wrong; the message
            lists every problem.
    """
    if not path.is_file():
        raise ParamsError(f"{path} is missing; run the command in a project folder, or make one: dpo-cli init DIR")
    if path.stat().st_size > _LARGEST_FILE:
        raise ParamsError(f"{path} is larger than {_LARGEST_FILE >> 20} MiB: too large for a settings file; rewrite it")
    try:
        tree = read_yaml(path.read_text(encoding="utf-8-sig"), str(path))
    except UnicodeDecodeError as error:
        raise ParamsError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise ParamsError(f"{path} must hold sections (data, model, ...), got {type(tree).__name__}")
    for override in overrides:
        _apply_override(tree, override)
    return parse_params(tree, source=path.name)


def parse_overrides(overrides: Sequence[str]) -> Params:
    """The defaults with ``section.key=value`` overrides, where there is no params.yaml.

    Raises:
        ParamsError: A value is wrong.
    """
    tree: dict[str, Any] = {}
    for override in overrides:
        _apply_override(tree, override)
    return parse_params(tree, source="--set")


def apply_overrides(values: Mapping[str, Any], overrides: Sequence[str]) -> tuple[dict[str, Any], Params]:
    """Settings by dotted path with ``section.key=value`` overrides of them, and all settings that they make.

    Raises:
        ParamsError: A value is wrong; the message lists every problem.
    """
    tree: dict[str, Any] = {}
    for setting, value in values.items():
        node = tree
        *parents, name = setting.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    for override in overrides:
        _apply_override(tree, override)
    params = parse_params(tree, source="--set")
    given = [path for path, _ in iter_settings() if path in values or _value_at(tree, path) is not None]
    return {path: _value_at(params.model_dump(), path) for path in given}, params


def changed_settings(params: Params) -> dict[str, Any]:
    """The settings that differ from their defaults, by dotted path."""
    tree = params.model_dump(exclude_defaults=True)
    values = {path: _value_at(tree, path) for path, _ in iter_settings()}
    return {path: value for path, value in values.items() if value is not None}


def _value_at(tree: Any, path: str) -> Any:
    for part in path.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


def parse_params(tree: Mapping[str, Any], source: str = "params.yaml") -> Params:
    """Validate a mapping of sections.

    Raises:
        ParamsError: With one line for every problem.
    """
    try:
        params = Params.model_validate(tree)
    except ValidationError as error:
        found = [problem for problem in error.errors() if not _is_of_another_type(problem)]
        problems = list(dict.fromkeys(f"{source}: {explain(problem)}" for problem in found))
        more = len(problems) - _MOST_PROBLEMS
        raise ParamsError([*problems[:_MOST_PROBLEMS], *([f"{source}: and {more} more"] if more > 0 else [])]) from None
    impossible = [f"{source}: {problem}" for problem in _impossible_texts(params.model_dump(), "")]
    if impossible:
        raise ParamsError(impossible[:_MOST_PROBLEMS])
    dead = [f"{source}: {problem}" for problem in contradictions(params)]
    if dead:
        raise ParamsError(dead)
    return params


def read_yaml(text: str, where: str) -> Any:
    """What a YAML text says; ``where`` is what an error begins with.

    Raises:
        ParamsError: It is not valid, or its aliases spell out too much.
    """
    try:
        if "&" in text:  # anchors: what a few lines of aliases spell out may fill any memory
            num_values = _count_values(YAML(typ="safe", pure=True).compose(text), {})
            if num_values > _MOST_VALUES:
                raise ParamsError(
                    f"{where}: with its aliases spelled out it holds more than {_MOST_VALUES} values; write them out"
                )
        return YAML(typ="safe").load(text)
    except (YAMLError, ValueError, RecursionError, OverflowError) as error:
        raise ParamsError(f"{where}{_yaml_place(error)}") from error


def _count_values(node: Any, counts: dict[int, float]) -> float:
    """Values under a YAML node, those of an alias each time that it is used; infinite where it holds itself."""
    if id(node) not in counts:
        counts[id(node)] = math.inf  # while it is being counted
        inner = getattr(node, "value", None)
        parts = (
            [part for entry in inner for part in (entry if isinstance(entry, tuple) else (entry,))]
            if (isinstance(inner, list))
            else []
        )
        counts[id(node)] = 1 + sum(_count_values(part, counts) for part in parts)
    return counts[id(node)]


def _yaml_place(error: Exception) -> str:
    if isinstance(error, MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f", line {mark.line + 1}, column {mark.column + 1}: not valid YAML: {error.problem}"
    return f": not valid YAML: {in_one_line((str(error) or type(error).__name__).splitlines()[0])}"


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    parts = key.strip().split(".")
    if not separator or len(parts) < 2 or not all(parts):
        meant = [path for path, _ in iter_settings() if separator and path.rpartition(".")[2] == key.strip()]
        hint = f"; did you mean {' or '.join(f'{path}={text}' for path in meant[:3])}?" if meant else ""
        raise ParamsError(f"--set takes section.key=value, got {shown(override)}{hint}")
    set_value(tree, key, text)


def set_value(tree: dict[str, Any], key: str, text: str) -> None:
    """Set a value, given as YAML, by its dotted key.

    Raises:
        ParamsError: It is not YAML, or the key goes through a value.
    """
    value = read_yaml(text, f"--set {key}")
    parts = key.strip().split(".")
    node = tree
    for part in parts[:-1]:
        if node.get(part) is None:
            node[part] = {}
        node = node[part]
        if not isinstance(node, dict):
            raise ParamsError(f"--set {key}: {part} is a value, not a section")
    node[parts[-1]] = value


_BOUNDS = {
    "greater_than": (">", "gt"),
    "greater_than_equal": (">=", "ge"),
    "less_than": ("<", "lt"),
    "less_than_equal": ("<=", "le"),
}
_TYPES = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "text",
    "bool_type": "true or false",
    "list_type": "a list",
    "model_type": "a section",
    "model_attributes_type": "a section",
    "dict_type": "a section",
}


_NOISE = ("LoraParams", "str", "list[str]", "[key]")
"""What pydantic adds to the place of a problem where a value may be of several types."""


def _is_type(part: str | int) -> bool:
    return isinstance(part, str) and part.startswith(("literal[", "dict["))


def _is_of_another_type(problem: Any) -> bool:
    """Whether a problem of a name or a mapping is that it is not the other one of them."""
    kinds = [str(part) for part in problem["loc"] if _is_type(part)]
    is_mapping = isinstance(problem["input"], dict)
    return bool(kinds) and problem["loc"][-1] == kinds[-1] and kinds[-1].startswith("dict[") != is_mapping


def bound_text(bound: float) -> str:
    """A bound of a setting as a user would write it: whole numbers in full."""
    return str(int(bound)) if float(bound).is_integer() and abs(bound) < 1e15 else f"{bound:g}"


def explain(problem: Any, section: type[BaseModel] | None = None) -> str:
    """One pydantic problem of a section as *where must what, got what*."""
    location = [part for part in problem["loc"] if part not in _NOISE and not _is_type(part)]
    where = ".".join(str(part) for part in location)
    kind, context, got = problem["type"], problem.get("ctx", {}), problem["input"]
    if "columns" in location and kind in ("string_type", "list_type"):
        return f"{where} must be text or a list of texts, got {shown(got)}"
    if kind == "missing":
        return f"{where} is missing"
    if kind == "extra_forbidden":
        return _unknown_key(location, section or Params)
    if kind in _BOUNDS:
        sign, name = _BOUNDS[kind]
        return f"{where} must be {sign} {bound_text(context[name])}, got {shown(got)}"
    if kind == "literal_error":
        return f"{where} must be one of {context['expected']}, got {shown(got)}"
    if kind in _TYPES:
        return f"{where} must be {_TYPES[kind]}, got {shown(got)}"
    return f"{where}: {problem['msg'][0].lower()}{problem['msg'][1:]}, got {shown(got)}"


def _unknown_key(location: Sequence[Any], model: type[BaseModel]) -> str:
    *parents, name = (str(part) for part in location)
    for parent in parents:
        if parent.isdigit():  # a place in a list of sections
            continue
        model = _section_in(model.model_fields[parent].annotation)
    prefix = "".join(f"{parent}." for parent in parents)
    elsewhere = [f"{path}" for path, _ in iter_settings() if path.rpartition(".")[2] == name]
    if elsewhere:
        return f"{prefix}{name} is not a setting; did you mean {elsewhere[0]}?"
    close = difflib.get_close_matches(name, model.model_fields, n=1, cutoff=0.5)
    if close:
        return f"{prefix}{name} is not a setting; did you mean {prefix}{close[0]}?"
    return f"{prefix}{name} is not a setting; there are {', '.join(prefix + field for field in model.model_fields)}"


def _section_in(annotation: Any) -> type[BaseModel]:
    """The section in the type of a field: itself, one that may be null, or a list of them."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(argument for argument in get_args(annotation) if issubclass(argument, BaseModel))


def _impossible_texts(value: Any, where: str) -> Iterator[str]:
    """Texts that no file, name or column can have, in any setting."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _impossible_texts(key, f"{where} (a key)") if isinstance(key, str) else ()
            yield from _impossible_texts(inner, f"{where}.{key}" if where else str(key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _impossible_texts(inner, f"{where}.{index}")
    elif isinstance(value, str):
        if "\0" in value:
            yield f"{where} holds a NUL byte, got {shown(value)}"
        elif len(value) > _LONGEST_TEXT:
            yield f"{where} must have at most {_LONGEST_TEXT} characters, got {len(value)}"
        elif max(len(part.encode(errors="replace")) for part in value.split("/")) > _LONGEST_NAME and where.endswith(
            _PATHS
        ):
            yield f"{where} holds a name that is longer than the {_LONGEST_NAME} bytes of a file's, got {shown(value)}"
