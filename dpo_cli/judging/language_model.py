"""A judge that is a local language model: one forward pass a question, read at the token it would answer with.

The answer is constrained to the options, so its distribution is that of the next token restricted to them: a soft
verdict, and nothing to parse. A question that is longer than the model's context has no verdict.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_cli.core.artifacts import digest_json
from dpo_cli.core.errors import MachineError
from dpo_cli.core.manifest import library_versions
from dpo_cli.core.params import HfJudgeParams
from dpo_cli.data.chat import ChatEncoder
from dpo_cli.data.problem import RowProblem
from dpo_cli.data.schema import Messages, assistant, user
from dpo_cli.data.tokens import TokenGroup
from dpo_cli.judging.judge import INVALID, Judgment, Question
from dpo_cli.judging.templates import Template
from dpo_cli.models.folder import check_model_folder
from dpo_cli.models.identity import lock_model
from dpo_cli.models.load import context_length, load_model, load_tokenizer
from dpo_cli.models.project import Workplace
from dpo_cli.scoring.budget import TokenBudget, in_micro_batches
from dpo_cli.scoring.scorer import Scorer, engine_version

_STAND_IN = Question("prompt", "one", "other")


@dataclass(frozen=True)
class HfJudge:
    """Asks a causal language model that is in memory.

    Attributes:
        identity: What its judgments depend on besides the question.
        max_length: Tokens of its context; None: without a limit.
        lead_in: Tokens that every answer begins with.
        option_ids: The token that tells each option from the others.
    """

    scorer: Scorer
    encoder: ChatEncoder
    template: Template
    budget: TokenBudget
    identity: Mapping[str, Any]
    max_length: int | None
    lead_in: Sequence[int]
    option_ids: Sequence[int]
    remedy = "the questions are longer than the judge's context; take a judge with a longer one"

    @classmethod
    def load(
        cls, folder: Path, template: Template, settings: HfJudgeParams, work: Workplace, policy: Path | None = None
    ) -> HfJudge:
        """Load a judge from a directory, as all models are loaded: offline, safetensors only, no code from it.

        It warns where the judge is kin to the base model in ``policy``, of which the judged policy was made.

        Raises:
            MachineError: It cannot be loaded, or its tokenizer does not tell the options apart.
        """
        if not folder.is_dir():
            raise MachineError(f"the judge's model directory {folder} is missing")
        check_model_folder(folder)
        if policy is not None and (kinship := kinship_of(folder, policy)):
            work.reporter.warn(
                f"{work.command}: {kinship}: a judge favors answers like its own; take one of another family"
            )
        encoder = ChatEncoder(load_tokenizer(folder), settings.chat_template)
        scorer, _ = work.scorer(load_model(folder, work.machine, quantization=settings.quantization))
        identity = {
            "judge": "hf",
            "model": _digest_of(folder),
            "quantization": settings.quantization,
            "compute_dtype": work.machine.dtype_name,
            "chat_template": encoder.template,
            "template": template.digest,
            "engine": engine_version(work.machine.compute_dtype),
            **library_versions(),
        }
        options = _option_tokens(encoder, template)
        return cls(scorer, encoder, template, work.budget(), identity, context_length(folder), *options)

    def judge(self, questions: Sequence[Question]) -> Iterator[tuple[int, Judgment]]:
        """Judge questions in micro-batches; those beyond the model's context are invalid."""
        groups = []
        for index, question in enumerate(questions):
            group = self._group(str(index), question)
            if group is None:
                yield index, INVALID
            else:
                groups.append(group)
        with self.scorer:
            for batch, found in in_micro_batches(groups, self.budget, self.scorer.split, self._judge):
                yield from ((int(group.id), judgment) for group, judgment in zip(batch, found, strict=True))

    def _group(self, name: str, question: Question) -> TokenGroup | None:
        try:
            prompt = self.encoder.encode(_messages(self.template, question), _answers(self.template)).prompt
        except RowProblem:
            return None
        ids = (*prompt, *self.lead_in)
        if self.max_length is not None and len(ids) >= self.max_length:
            return None
        return TokenGroup(name, name, ids, ((self.option_ids[0],),))

    def _judge(self, batch: Sequence[TokenGroup]) -> list[Judgment]:
        judgments = []
        for rows in self.scorer.predict(batch).split(self.scorer.max_distribution_rows):  # one a question
            logps = self.scorer.next_token_logps(rows)[:, self.option_ids]
            judgments += [Judgment.of_options(options) for options in logps.tolist()]
        return judgments


def _messages(template: Template, question: Question) -> Messages:
    return [user(template.render(question))]


def _answers(template: Template) -> list[Messages]:
    return [[assistant(option)] for option in template.options]


def _option_tokens(encoder: ChatEncoder, template: Template) -> tuple[list[int], list[int]]:
    """The tokens that all options begin with, and the token in which each of them then differs.

    A chat template may put something before every answer, such as an empty thought; a tokenizer, a space.

    Raises:
        MachineError: An option has no token of its own.
    """
    prompt = _messages(template, _STAND_IN)
    answers = encoder.encode(prompt, _answers(template)).completions
    shared = 0
    while all(shared < len(ids) for ids in answers) and len({ids[shared] for ids in answers}) == 1:
        shared += 1
    firsts = [ids[shared] for ids in answers if shared < len(ids)]
    if len(set(firsts)) != len(answers):
        raise MachineError(
            f"the judge's tokenizer does not tell {', '.join(template.options)} apart by one token; take another judge"
        )
    return answers[0][:shared], firsts


# --- kinship ------------------------------------------------------------------------------


def kinship_of(judge: Path, policy: Path) -> str | None:
    """How a judge in a folder is related to the base model in another; None where it is not."""
    ours, theirs = _config(judge), _config(policy)
    if not ours or not theirs:
        return None
    if _digest_of(judge) == _digest_of(policy):
        return "the judge is the base model of what it judges"
    if ours.get("model_type") != theirs.get("model_type"):
        return None
    if all(ours.get(name) == theirs.get(name) for name in ("vocab_size", "hidden_size", "num_hidden_layers")):
        return f"the judge has the same configuration as the base model of what it judges ({ours['model_type']})"
    return f"the judge is of the same family as the base model of what it judges ({ours.get('model_type')})"


def _config(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _digest_of(folder: Path) -> str:
    """A digest of the model's files, which is the same wherever they lie."""
    return digest_json(lock_model(folder, "", "", lambda _: None)["files"])
