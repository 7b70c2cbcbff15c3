"""What an export is held against: held-out pairs, and what the trained model says of them and answers to them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dpo_cli.core.errors import DataError
from dpo_cli.core.params import EvaluateParams
from dpo_cli.data.schema import Messages
from dpo_cli.data.tokenize import explain_rejects
from dpo_cli.data.tokens import TokenGroup
from dpo_cli.evaluation import DPO
from dpo_cli.evaluation.generation import PromptTokens
from dpo_cli.evaluation.models import EvaluatedModel, LoadedModel, adapter_models
from dpo_cli.evaluation.steps import ScoredAnswers, Steps
from dpo_cli.models.device import release_memory
from dpo_cli.models.project import Project
from dpo_cli.statistics.intervals import Estimate, Sampling, with_interval

ENGINE, LLAMA_CPP = "dpo-cli", "llama.cpp"
"""Who read an export back and computed its log-probabilities."""
_MAX_ANSWERED, _MAX_NEW_TOKENS = 16, 48

TokenLogps = Mapping[str, Sequence[float | None]]
"""The log-probability of each token of an answer by the answer's key, nats; None where whoever read it tells none."""


@dataclass(frozen=True)
class Survival:
    """What is left of the trained model in an export, over the held-out pairs.

    Attributes:
        read_by: Who computed the export's numbers: :data:`ENGINE` or :data:`LLAMA_CPP`.
        mean_nats: Mean over all tokens of |log p of the export - log p of the trained model|.
        worst_nats: The same mean over the tokens of the answer where it is largest.
        margin_kept: Least-squares slope of the export's margins on the trained model's, where a margin is
            log(pi / pi_ref) of the chosen answer less that of the rejected one: 1 is all of the tuning, 0 none.
        same_order: Share of pairs whose margin has the same sign.
        same_answers: Share of prompts whose greedy answers are the same, token by token.
        num_pairs: Pairs that were scored.
        num_answered: Prompts that were answered.
    """

    read_by: str
    mean_nats: float
    worst_nats: float
    margin_kept: Estimate
    same_order: Estimate
    same_answers: Estimate
    num_pairs: int
    num_answered: int

    def figures(self) -> dict[str, Any]:
        """As metrics."""
        return {
            "read_by": self.read_by,
            "mean_nats": self.mean_nats,
            "worst_nats": self.worst_nats,
            **with_interval("margin_kept", self.margin_kept),
            **with_interval("same_order", self.same_order),
            **with_interval("same_answers", self.same_answers),
            "num_pairs": self.num_pairs,
            "num_answered": self.num_answered,
        }

    def rows(self) -> list[tuple[str, str]]:
        """As a table."""
        return [
            ("margin kept", f"{in_percent(self.margin_kept)} of the tuned margin, over {self.num_pairs} pairs"),
            ("nats a token", f"{self.mean_nats:.4f} on average, {self.worst_nats:.4f} in the worst answer"),
            ("ranked the same", f"{in_percent(self.same_order)} of the pairs"),
            ("the same answers", f"{in_percent(self.same_answers)} of {self.num_answered} greedy ones"),
            ("read back by", self.read_by),
        ]


def in_percent(estimate: Estimate) -> str:
    """An estimate as ``93% [90, 96]``."""
    if math.isnan(estimate.low):
        return f"{100 * estimate.value:.0f}%"
    return f"{100 * estimate.value:.0f}% [{100 * estimate.low:.0f}, {100 * estimate.high:.0f}]"


@dataclass(frozen=True)
class HeldOut:
    """Held-out pairs with what the trained model and its reference say of them.

    Attributes:
        groups: The pairs, chosen answer first.
        prompts: All of their prompts as messages, by the prompt's id.
        asked: The prompts that are answered greedily.
        trained: Log-probabilities of the trained model.
        reference: Those of its reference.
        answers: The trained model's greedy answers, as token ids without what ends them, by prompt id.
    """

    project: Project
    steps: Steps
    groups: Sequence[TokenGroup]
    prompts: Mapping[str, Messages]
    asked: Sequence[PromptTokens]
    trained: ScoredAnswers
    reference: ScoredAnswers
    answers: Mapping[str, tuple[int, ...]]

    @property
    def num_context(self) -> int:
        """Tokens of the longest text that has to be read or written."""
        asked = max(len(prompt.tokens) for prompt in self.asked) + self.steps.evaluate.max_new_tokens
        return max(asked, *(group.longest for group in self.groups)) + 8

    def hold(self, model: Any, called: str, digest: str) -> Survival:
        """Score a model that is in memory with the engine, and let it answer."""
        scorer = self.project.scorer(model)[0]

        @contextmanager
        def use() -> Iterator[LoadedModel]:
            yield LoadedModel(model, scorer)

        exported = EvaluatedModel(DPO, digest, use, called)
        scored = self.steps.scored(exported, self.groups, f"answers under {called}")
        return self.compare(scored.token_logps, self._answers(exported), ENGINE)

    def compare(self, found: TokenLogps, answers: Mapping[str, tuple[int, ...]], read_by: str) -> Survival:
        """What is left in an export whose log-probabilities and greedy answers are known."""
        settings = self.steps.evaluate
        sampling = Sampling(settings.bootstrap_draws, settings.confidence, settings.seed)
        ours, base = self.trained.token_logps, self.reference.token_logps
        errors, margins = [], []
        for group in self.groups:
            ratios = []
            for key in group.keys:
                rows = [
                    (now, was, at_start)
                    for now, was, at_start in zip(found[key], ours[key], base[key], strict=True)
                    if now is not None
                ]
                now, was, at_start = np.array(rows, dtype=np.float64).reshape(-1, 3).T
                errors.append(np.abs(now - was))
                ratios.append(((now - at_start).sum(), (was - at_start).sum()))
            (now_chosen, was_chosen), (now_rejected, was_rejected) = ratios
            margins.append((now_chosen - now_rejected, was_chosen - was_rejected))
        clusters = [group.group for group in self.groups]
        now, was = np.array(margins).T

        def slope(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
            return np.divide(sums[:, 0], sums[:, 1], out=np.full(len(sums), np.nan), where=sums[:, 1] > 0)

        same = [float(answers[prompt.id] == self.answers[prompt.id]) for prompt in self.asked]
        return Survival(
            read_by,
            float(np.concatenate(errors).mean()),
            max(float(each.mean()) for each in errors if len(each)),
            sampling.of_sums(slope, np.stack([now * was, was * was], axis=-1), clusters),
            sampling.rate((np.sign(now) == np.sign(was)).astype(float).tolist(), clusters),
            sampling.rate(same, [prompt.id for prompt in self.asked]),
            len(self.groups),
            len(self.asked),
        )

    def _answers(self, model: EvaluatedModel) -> dict[str, tuple[int, ...]]:
        return _greedy(self.steps, model, self.asked)


def _greedy(steps: Steps, model: EvaluatedModel, asked: Sequence[PromptTokens]) -> dict[str, tuple[int, ...]]:
    stops = set(steps.project.encoder.stop_ids)
    found = steps.answers(model, asked, temperature=0.0)
    return {id: without_end(answer.completions[0], stops) for id, answer in found.items()}


def without_end(tokens: Sequence[int], stops: set[int]) -> tuple[int, ...]:
    """An answer's tokens up to the first that ends it."""
    end = next((place for place, token in enumerate(tokens) if token in stops), len(tokens))
    return tuple(tokens[:end])


def open_held_out(project: Project, adapter: Path, num_pairs: int, settings: EvaluateParams, folder: Path) -> HeldOut:
    """Score so many held-out pairs with the trained model and its reference, and let the former answer.

    Args:
        project: Whose model it is.
        adapter: Folder of the adapter.
        num_pairs: Pairs to take, by the order of their ids, which is random.
        settings: How intervals are drawn, and how long answers may be: 48 tokens at most.
        folder: Where rows are kept, in the scratch area.

    Raises:
        DataError: No pair is held out.
        Interrupted: The user asked to stop; what was computed is kept.
    """
    table = project.tokenize_pairs("eval")
    if not table.groups:
        raise DataError(
            "data/preference/eval.parquet: no pair is held out, so nothing says whether an export is right:"
            f" {explain_rejects([table], 'reference.max_length', project.max_length)}"
        )
    groups = sorted(table.groups, key=lambda group: group.id)[:num_pairs]
    by_id = {group.group: group for group in reversed(groups)}
    prompts = {id: table.prompts[id] for id in sorted(by_id)}
    asked = [PromptTokens(id, by_id[id].prompt, prompts[id]) for id in list(prompts)[:_MAX_ANSWERED]]
    new_tokens = min(settings.max_new_tokens, _MAX_NEW_TOKENS)
    longest = max(len(prompt.tokens) for prompt in asked)
    project.check_context(longest + new_tokens, "evaluate.max_new_tokens + the longest prompt")
    steps = Steps(project, settings.model_copy(update={"max_new_tokens": new_tokens}), folder)
    models = adapter_models(project, adapter)
    trained = steps.scored(models.policy, groups, "answers under the trained model")
    reference = steps.scored(models.reference, groups, "answers under its reference")
    answers = _greedy(steps, models.policy, asked)
    models.close()
    return HeldOut(project, steps, groups, prompts, asked, trained, reference, answers)


def held(held_out: HeldOut, load: Callable[[], Any], called: str, digest: str) -> Survival:
    """Load a model, hold it against the trained one, and give its memory back."""
    found = held_out.hold(load(), called, digest)
    release_memory()
    return found
