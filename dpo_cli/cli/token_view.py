"""How a model sees data, for the commands that look at it: its tokenizer and chat template; no weights are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dpo_cli.cli.sources import project_params
from dpo_cli.core.data_params import SftSource, Source
from dpo_cli.core.errors import MachineError, ParamsError
from dpo_cli.core.params import EMBEDDED, ModelParams, ReferenceParams, SftParams
from dpo_cli.data.chat import ChatEncoder
from dpo_cli.data.inspect import TokenView
from dpo_cli.data.templates import NAMED_TEMPLATES
from dpo_cli.models.folder import holds_weights

_TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model")


def encoder_of(model: str, template: str | None) -> tuple[Any, ChatEncoder]:
    """A model's tokenizer, and with it the chat template; no weights are read.

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
    params = project_params()
    settings = params.model if params is not None and model != EMBEDDED else ModelParams(name=model)
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
    return tokenizer, encoder


def token_view(model: str, template: str | None, max_length: int | None, source: Source) -> TokenView:
    """How a model sees the rows of a source, with the limits of the project or the defaults.

    Raises:
        ParamsError: There is no template of that name.
        MachineError: The folder is missing, or its tokenizer cannot be used.
    """
    params = project_params()
    if isinstance(source, SftSource):
        section: SftParams | ReferenceParams = params.sft if params else SftParams()
    else:
        section = params.reference if params else ReferenceParams()
    tokenizer, encoder = encoder_of(model, template)
    return TokenView(model, tokenizer, encoder, max_length or section.max_length, section.checks.model_dump())
