"""A judge behind an OpenAI-compatible server, such as llama.cpp's, vLLM's or SGLang's.

Each question is one chat completion of one token at temperature 0. What the server can do is tried out first: to
constrain the answer to the options (vLLM's ``structured_outputs`` and, before it, ``guided_choice``; llama.cpp's
``grammar``), and to give log-probabilities, by which the verdict is soft. Without them it is the letter that is
answered; an answer that is none of the options is invalid, and counted.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

from dpo_cli.core.errors import DpoCliError, MachineError
from dpo_cli.core.progress import Reporter
from dpo_cli.core.text import shown
from dpo_cli.judging.judge import INVALID, Judgment, Question
from dpo_cli.judging.server import RefusedError, Server
from dpo_cli.judging.templates import Template

_CONSTRAINTS: Mapping[str, Callable[[Sequence[str]], dict[str, Any]]] = {
    "structured_outputs": lambda options: {"structured_outputs": {"choice": list(options)}},
    "guided_choice": lambda options: {"guided_choice": list(options)},
    "grammar": lambda options: {"grammar": "root ::= " + " | ".join(f'"{option}"' for option in options)},
}
"""Ways to constrain an answer, by name; ``none`` is the one that every server knows."""
_TOP_LOGPROBS = (20, 5, 0)
_TOO_LONG = {400, 413, 422}
"""What servers answer to a single question that is too long, after they took a short one."""
_PROBE = "Reply with the word hello and nothing else."
_LEAST_MASS = 0.5
_ROUNDING = 1e-3
"""A log-probability above 0 by no more than this is 0."""
_VOLATILE = ("created", "permission")
"""What a server says of a model and changes from call to call."""
_LETTER = re.compile(r"[\W_]*([A-Za-z])(?![A-Za-z])")


@dataclass(frozen=True)
class OpenAiJudge:
    """Asks a server; :meth:`connect` finds out how.

    Attributes:
        server: Where it is.
        model: Name of the model.
        about: What the server says of the model.
        template: What it is asked.
        constraint: How answers are constrained: a name in _CONSTRAINTS or ``none``.
        top_logprobs: Most probable tokens that it lists; 0: it gives no log-probabilities.
        parallel: Requests in flight at a time.
        extra: Fields that every request has besides, such as ``{"chat_template_kwargs": {"enable_thinking": false}}``.
    """

    server: Server
    model: str
    about: Mapping[str, Any]
    template: Template
    constraint: str
    top_logprobs: int
    parallel: int
    extra: Mapping[str, Any]
    remedy = (
        "take a server that constrains answers or gives log-probabilities (llama.cpp, vLLM), a model that answers with"
        " one letter at once, without thinking first, a template that asks for it, or a longer context"
    )

    @classmethod
    def connect(
        cls,
        server: Server,
        model: str | None,
        template: Template,
        reporter: Reporter,
        *,
        parallel: int = 4,
        extra: Mapping[str, Any] | None = None,
    ) -> OpenAiJudge:
        """Find out in a few short requests what a server can do, and its only model where none is named.

        Raises:
            MachineError: It does not answer, has no such model, or does not take a plain request.
        """
        name, about = _model_of(server, model)
        probe = _body(name, _PROBE) | dict(extra or {})
        top_logprobs = _find_logprobs(server, probe)
        constraint = _find_constraint(server, probe, template.options)
        read = f"log-probabilities of the {top_logprobs} most probable tokens" if top_logprobs else "its letter"
        how = f"constrained by {constraint}" if constraint != "none" else "not constrained"
        reporter.say(f"judge {name} at {server.url}: answers {how}, read by {read}")
        return cls(server, name, about, template, constraint, top_logprobs, parallel, extra or {})

    @property
    def identity(self) -> dict[str, Any]:
        """What its judgments depend on besides the question."""
        return {
            "judge": "openai",
            "url": self.server.url,
            "model": self.model,
            "about": {name: value for name, value in self.about.items() if name not in _VOLATILE},
            "constraint": self.constraint,
            "top_logprobs": self.top_logprobs,
            "template": self.template.digest,
            "extra": dict(self.extra),
        }

    def judge(self, questions: Sequence[Question]) -> Iterator[tuple[int, Judgment]]:
        """Judge questions, several at once, and yield each as it is answered.

        Raises:
            MachineError: The server is gone; what it had answered was yielded before.
        """
        with ThreadPoolExecutor(self.parallel) as pool:
            futures = {pool.submit(self._judge, question): index for index, question in enumerate(questions)}
            problem: DpoCliError | None = None

            def stop() -> None:
                for future in futures:
                    future.cancel()  # not the pool's shutdown, which would leave us waiting for them

            try:
                for future in as_completed(futures):
                    if future.cancelled():
                        continue
                    try:
                        judgment = future.result()
                    except DpoCliError as error:
                        problem = problem or error
                        stop()
                    else:
                        yield futures[future], judgment
            finally:
                stop()
            if problem is not None:
                raise problem

    def _judge(self, question: Question) -> Judgment:
        options = self.template.options
        body = _body(self.model, self.template.render(question)) | dict(self.extra) | _logprobs(self.top_logprobs)
        if self.constraint != "none":
            body |= _CONSTRAINTS[self.constraint](options)
        try:
            choice = _choice(self.server.post("/chat/completions", body))
        except RefusedError as error:
            if error.status in _TOO_LONG:
                return INVALID
            raise
        return read_answer(choice, options, self.top_logprobs, constrained=self.constraint != "none")


def _body(model: str, text: str) -> dict[str, Any]:
    return {
        "model": model,
        "messages": [{"role": "user", "content": text}],
        "max_tokens": 1,
        "temperature": 0,
        "stream": False,
    }


def _logprobs(number: int) -> dict[str, Any]:
    return {"logprobs": True, "top_logprobs": number} if number else {}


# --- reading an answer --------------------------------------------------------------------


def _choice(answer: Any) -> dict[str, Any]:
    try:
        choice = answer["choices"][0]
        is_answer = isinstance(choice["message"].get("content"), str | None)
    except (TypeError, KeyError, IndexError, AttributeError):
        is_answer, choice = False, {}
    if not is_answer:
        raise MachineError("the judge's server gives no choices with messages: it is not OpenAI-compatible")
    return choice


def read_answer(choice: Mapping[str, Any], options: Sequence[str], top_logprobs: int, *, constrained: bool) -> Judgment:
    """The judgment in one choice of a chat completion.

    With log-probabilities it is soft: the options' shares among themselves, a token with white space around it
    counting as the same. An option that is not among those listed is taken to be as probable as the last of them,
    which it is at most; where fewer are listed than were asked for, those were all, and it has none.

    Args:
        choice: One of ``choices``.
        options: What may be answered.
        top_logprobs: How many tokens were asked for; 0: no log-probabilities.
        constrained: Whether nothing but an option could be answered; else log-probabilities count only where the
            options have half of the probability among themselves, and otherwise what was answered does.
    """
    listed = _listed(choice) if top_logprobs else []
    masses: dict[str, float] = {}
    for token, logp in listed:
        masses[token] = masses.get(token, 0.0) + math.exp(logp)
    mass = sum(masses.get(option, 0.0) for option in options)
    if mass > 0 and (constrained or mass >= _LEAST_MASS):
        least = math.exp(min(logp for _, logp in listed)) if len(listed) >= top_logprobs else 0.0
        shares = [masses.get(option, least) for option in options]
        return Judgment.of_options([math.log(share) if share else -math.inf for share in shares])
    letter = _LETTER.match(choice["message"].get("content") or "")
    answered = letter[1] if letter else ""
    if answered not in options:
        return INVALID
    return Judgment.of_options([0.0 if option == answered else -math.inf for option in options])


def _listed(choice: Mapping[str, Any]) -> list[tuple[str, float]]:
    """The most probable first tokens, stripped, with their log-probabilities, nats; nothing where there are none.

    Raises:
        MachineError: One of them is no log-probability.
    """
    try:
        top = choice["logprobs"]["content"][0]["top_logprobs"]
        listed = [(str(each["token"]).strip(), float(each["logprob"])) for each in top]
    except (TypeError, KeyError, IndexError, ValueError):
        return []
    for token, logp in listed:
        if math.isnan(logp) or logp > _ROUNDING:
            raise MachineError(
                f"the judge's server gives {logp} as the log-probability of {shown(token)}: its model is broken, or the"
                " server is"
            )
    return [(token, min(0.0, logp)) for token, logp in listed]


# --- finding out what a server can do -----------------------------------------------------


def _model_of(server: Server, model: str | None) -> tuple[str, dict[str, Any]]:
    """The name of the model, and what the server says of it; a server that cannot list its models is believed."""
    try:
        listed = server.get("/models")["data"]
        models = {str(each["id"]): dict(each) for each in listed}
    except (RefusedError, TypeError, KeyError):
        models = {}
    except MachineError:
        if model is None:
            raise
        models = {}
    if model is None and len(models) != 1:
        found = ", ".join(models) or "none that it names"
        raise MachineError(f"the judge's model must be named: {server.url} has {found}")
    if model is None:
        model = next(iter(models))
    if models and model not in models:
        raise MachineError(f"{server.url} has no model {model!r}; it has {', '.join(models)}")
    return model, models.get(model, {})


def _find_logprobs(server: Server, probe: dict[str, Any]) -> int:
    """How many log-probabilities the server lists: the most that it takes; 0 where it lists none.

    Raises:
        MachineError: It does not take a plain request either.
    """
    for number in _TOP_LOGPROBS:
        try:
            choice = _choice(server.post("/chat/completions", probe | _logprobs(number)))
        except RefusedError:
            if not number:
                raise
            continue
        return min(number, len(_listed(choice)))
    return 0


def _find_constraint(server: Server, probe: dict[str, Any], options: Sequence[str]) -> str:
    """The first way to constrain an answer that works: asked for another word, the model says one of the options."""
    for name, fields in _CONSTRAINTS.items():
        try:
            choice = _choice(server.post("/chat/completions", probe | fields(options)))
        except RefusedError:
            continue
        if (choice["message"].get("content") or "").strip() in options:
            return name
    return "none"
