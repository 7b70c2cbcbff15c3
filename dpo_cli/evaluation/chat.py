"""A conversation with several models: what each of them answers, as it comes.

An answer is sampled as an evaluation samples it, from the prompt's own random stream: the same conversation gets the
same answer, and another try at it another stream.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from dpo_cli.core import paths
from dpo_cli.core.errors import DataError
from dpo_cli.core.params import Params
from dpo_cli.core.progress import Reporter, SilentReporter
from dpo_cli.data.problem import RowProblem
from dpo_cli.data.schema import Messages, content_id
from dpo_cli.evaluation import BASE, DPO, SFT
from dpo_cli.evaluation.decoding import Decoding
from dpo_cli.evaluation.generation import PromptTokens, sample_answers
from dpo_cli.evaluation.models import open_models
from dpo_cli.judging.answers import Answer
from dpo_cli.models.load import quiet_libraries
from dpo_cli.models.project import open_project

Hear = Callable[[str], bool]
"""Hears an answer's text so far, and says whether that is enough."""


class Chat:
    """The models of a conversation.

    Args:
        params: All settings.
        model: The tuned model: an adapter for the project's SFT model, or a whole model; None: models/dpo.
        reporter: Shows progress.

    Attributes:
        names: What the models are called: the base model, where it is in memory with the others, the SFT model and the
            tuned one.
        max_new_tokens: Tokens after which an answer is cut off.

    Raises:
        StaleArtifactError: There is no such model, or an earlier stage's result is missing.
    """

    def __init__(self, params: Params, model: Path | None, reporter: Reporter) -> None:
        quiet_libraries()
        self._project = open_project(params, reporter, "chat")
        self._seed = params.evaluate.seed
        self.max_new_tokens = params.evaluate.max_new_tokens
        folder = model or paths.DPO_MODEL
        opened = open_models(self._project, folder)
        self._models = {} if opened.base is None else {BASE: opened.base}
        self._models |= {SFT: opened.reference, folder.resolve().name if model else DPO: opened.policy}
        self.names: Sequence[str] = [*self._models]

    def load(self) -> None:
        """Load the models, which the first answer would do otherwise."""
        for model in self._models.values():
            with model.use():
                pass

    def answer(
        self, name: str, messages: Messages, temperature: float, number: int = 0, hear: Hear = lambda _: False
    ) -> Answer:
        """What a model says.

        Args:
            name: Of the model.
            messages: The conversation so far, which a turn of the user ends.
            temperature: 0 takes the likeliest token each time.
            number: Of the try, from 0.
            hear: Hears it as it comes.

        Raises:
            DataError: The chat template refuses the conversation.
            ParamsError: With an answer it is longer than the model's context.
        """
        project, model = self._project, self._models[name]
        try:
            tokens = tuple(project.encoder.encode_prompt(messages))
        except RowProblem as problem:
            raise DataError(f"the prompt: {problem}") from None
        project.check_context(len(tokens) + self.max_new_tokens, "evaluate.max_new_tokens + the prompt")
        stop_ids = tuple(project.encoder.stop_ids)
        id = content_id(messages)
        prompt = PromptTokens(f"{id}-{number}" if number else id, tokens, messages)

        def listen(rows: list[list[int]]) -> bool:
            return hear(project.encoder.decode(rows[0]).rstrip("\N{REPLACEMENT CHARACTER}"))

        with model.use() as loaded, SilentReporter().meter("", 1, "") as meter:
            found = sample_answers(
                loaded.model,
                [prompt],
                Decoding(temperature, self.max_new_tokens, stop_ids, self._seed, model.name),
                budget=project.budget(),
                autocast_dtype=project.machine.compute_dtype,
                meter=meter,
                listener=listen,
            )[prompt.id]
        text = project.encoder.decode(list(found.tokens))
        return Answer(id, id, tokens, (found.tokens,), messages, text, found.finished)
