"""Data files and models as the user names them on the command line, or in params.yaml."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dpo_cli.core import paths
from dpo_cli.core.data_params import PreferenceSource, SftSource, Source
from dpo_cli.core.errors import DataError, MachineError, ParamsError
from dpo_cli.core.load_params import explain, load_params, set_value
from dpo_cli.core.params import EMBEDDED, ModelParams, Params
from dpo_cli.data.chat import ChatEncoder
from dpo_cli.data.checks import TokenView
from dpo_cli.data.formats.detect import UnknownFormatError
from dpo_cli.data.plan import Treatment, find_files, plan_of
from dpo_cli.data.templates import NAMED_TEMPLATES
from dpo_cli.models.folder import holds_weights

_ADVICE = re.compile(r"\b((?:say|with|or) )?(columns|labels|format|records|unwrap): (\{[^{}]*\}|[\w.-]+)")
"""Settings of a source in a message; one without braces is told from other words by what stands before it."""

_TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model")

KINDS = {"sft": SftSource, "preferences": PreferenceSource}


def project_params() -> Params:
    """The settings of the project in the working directory; the defaults where it is none."""
    return load_params(paths.PARAMS) if paths.PARAMS.is_file() else Params()


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
    data, known = project_params().data, []
    if paths.PARAMS.is_file():
        known = [
            source
            for source in (*data.sft_sources, *data.preference_sources)
            if kind is None or isinstance(source, KINDS[kind])
        ]
    elif not files:
        raise ParamsError("name a file, or run this in a project folder, whose params.yaml names them")
    found: list[Source] = [_updated(source, given) for source in known if not files]
    problems: list[str] = []
    for file in files:
        try:
            mine = next((source for source in known if _stands_for(source, Path(file))), None)
            found.append(_told(file, kind, given) if mine is None else _updated(mine, {"path": file, **given}))
        except DataError as error:
            problems += error.problems
    if problems:
        raise DataError(problems)
    return found


def _stands_for(source: Source, file: Path) -> bool:
    try:
        return Path(source.path) == file or file in find_files(source)
    except DataError:  # a pattern without a file; the stage says so
        return False


def _told(file: str, kind: str | None, given: dict[str, Any]) -> Source:
    """A file as a source of the kind that it is told to be, or the first one whose formats its rows fit."""
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
    given: dict[str, Any] = {}
    for setting in settings:
        key, separator, text = setting.partition("=")
        if not separator:
            advice = as_options(setting)
            hint = f"; write {advice}" if advice != setting else ""
            raise ParamsError(f"--set takes key=value, got {setting!r}{hint}")
        key = key.strip().removeprefix("data.sft.").removeprefix("data.preferences.")
        if key in ("path", "also"):
            raise ParamsError(f"--set {key} has no place here: the files are named one by one")
        set_value(given, key, text)
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


# --- models, of which no weights are read ---------------------------------------------------


def encoder_of(model: str, template: str | None) -> ChatEncoder:
    """A model's tokenizer with its chat template; no weights are read.

    Args:
        model: The model's folder, or ``embedded``.
        template: ``auto`` or a template's name; None: what the project's params.yaml says.

    Raises:
        ParamsError: There is no template of that name.
        MachineError: The folder is missing, or its tokenizer cannot be used.
    """
    names = ("auto", *NAMED_TEMPLATES)
    if template is not None and template not in names:
        raise ParamsError(f"--template must be one of {', '.join(names)}, got {template!r}")
    settings = ModelParams(name=model) if model == EMBEDDED else project_params().model
    if template is not None:
        settings = settings.model_copy(update={"chat_template": template})
    folder = Path(model).expanduser().resolve()
    if model != EMBEDDED and not folder.is_dir():
        raise MachineError(
            f"--model {model}: there is no such folder; name a model in Hugging Face layout, or embedded"
        )
    if model != EMBEDDED and not any(next(folder.glob(pattern), None) for pattern in _TOKENIZER_FILES):
        raise MachineError(f"--model {model}: no tokenizer is there, such as tokenizer.json; fetch the whole model")
    # here: it takes seconds, and only --model needs it
    from dpo_cli.models.load import quiet_libraries
    from dpo_cli.models.verify import verify_template, verify_tokenizer, verify_vocabulary, verify_weights

    quiet_libraries()
    num_rows: int | None = None
    if model == EMBEDDED:
        from dpo_cli.models.embedded import build_tokenizer

        tokenizer: Any = build_tokenizer()
    else:
        if holds_weights(folder):
            num_rows = verify_weights(folder).facts.num_rows
        tokenizer = verify_tokenizer(folder)
    try:
        encoder = verify_template(folder, tokenizer, settings)
    except MachineError as error:
        raise MachineError([f"{problem}; here with --template" for problem in error.problems]) from None
    if num_rows is not None:
        verify_vocabulary(folder, tokenizer, encoder, num_rows)
        encoder.num_rows = num_rows
    return encoder


def token_view(model: str, template: str | None, max_length: int | None, source: Source) -> TokenView:
    """How a model sees the rows of a source, with the limits of the project or the defaults.

    Raises:
        ParamsError: There is no template of that name.
        MachineError: The folder is missing, or its tokenizer cannot be used.
    """
    params = project_params()
    section = params.sft if isinstance(source, SftSource) else params.reference
    encoder = encoder_of(model, template)
    return TokenView(encoder, max_length or section.max_length, section.checks.model_dump(), model)
