"""One prompt, answered by the SFT model and by the tuned one, side by side."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dpo_cli.core import paths
from dpo_cli.core.errors import DataError
from dpo_cli.core.params import Params
from dpo_cli.core.progress import Reporter
from dpo_cli.core.scratch import stage_scratch
from dpo_cli.data.problem import RowProblem
from dpo_cli.data.schema import Message, content_id, user
from dpo_cli.evaluation.generation import PromptTokens
from dpo_cli.evaluation.model_names import DPO, SFT
from dpo_cli.evaluation.models import open_models
from dpo_cli.evaluation.steps import Steps
from dpo_cli.models.load import quiet_libraries
from dpo_cli.models.project import open_project


@dataclass(frozen=True)
class Tried:
    """What a model answered.

    Attributes:
        model: Whose answer it is.
        text: The answer.
        num_tokens: Its tokens.
        finished: Whether it ended within evaluate.max_new_tokens.
    """

    model: str
    text: str
    num_tokens: int
    finished: bool


def try_prompt(prompt: str, system: str | None, model: Path | None, params: Params, reporter: Reporter) -> list[Tried]:
    """One answer of each model to a prompt, sampled as section evaluate says.

    Args:
        prompt: What the user says.
        system: A system message before it.
        model: The tuned model: an adapter for the project's SFT model, or a whole model; None: models/dpo.
        params: All settings.
        reporter: Shows progress.

    Raises:
        DataError: The chat template refuses the prompt.
        StaleArtifactError: There is no such model, or an earlier stage's result is missing.
        Interrupted: The user asked to stop.
    """
    quiet_libraries()
    settings = params.evaluate
    project = open_project(params, reporter, "try")
    before: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    messages = [*before, user(prompt)]
    try:
        tokens = PromptTokens(content_id(messages), tuple(project.encoder.encode_prompt(messages)), messages)
    except RowProblem as problem:
        raise DataError(f"the prompt: {problem}") from None
    project.check_context(len(tokens.tokens) + settings.max_new_tokens, "evaluate.max_new_tokens + the prompt")
    folder = model or paths.DPO_MODEL
    models = open_models(project, folder)
    names = {SFT: models.reference, folder.resolve().name if model else DPO: models.policy}
    found = []
    with stage_scratch("try", "run") as scratch:
        steps = Steps(project, settings, scratch.folder.parent / "models")
        for name, asked in names.items():
            answer = steps.answers(asked, [tokens], settings.temperature)[tokens.id]
            found.append(Tried(name, answer.text, answer.num_tokens, answer.finished))
    return found


def as_json(prompt: str, found: list[Tried], temperature: float) -> dict[str, Any]:
    """The answers as one JSON value."""
    return {"prompt": prompt, "temperature": temperature, "answers": [asdict(each) for each in found]}
