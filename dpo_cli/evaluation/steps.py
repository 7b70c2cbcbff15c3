"""The steps of an evaluation that need the models: log-probabilities, answers, divergences.

Each keeps its rows in the scratch area under what they depend on (the model, the prompt's and the answer's
tokens, how they were sampled), so a run that was stopped goes on where it was, and one with more prompts,
another temperature or another judge computes only what is new.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl

from dpo_cli.core.artifacts import digest_bytes, digest_json
from dpo_cli.core.params import EvaluateParams
from dpo_cli.core.row_store import RowStore, forget_other_stores
from dpo_cli.data.tokens import TokenGroup
from dpo_cli.evaluation.decoding import Decoding
from dpo_cli.evaluation.generation import GENERATION_VERSION, PromptTokens, sample_answers
from dpo_cli.evaluation.kl import SequenceKl, sequence_kl
from dpo_cli.evaluation.models import EvaluatedModel
from dpo_cli.judging.answers import Answer
from dpo_cli.models.project import Project
from dpo_cli.scoring.budget import in_micro_batches
from dpo_cli.scoring.reference import SCHEMA as LOGP_SCHEMA
from dpo_cli.scoring.reference import missing_groups

_ANSWERS = {"key": pl.String, "tokens": pl.List(pl.Int32), "finished": pl.Boolean}
_DIVERGENCES = {
    "key": pl.String,
    **dict.fromkeys(("exact", "k1", "k3", "entropy", "reference_entropy", "variance"), pl.Float64),
    "num_tokens": pl.Int32,
}
_MODELS_KEPT = 32


@dataclass(frozen=True)
class ScoredAnswers:
    """What one model says of some answers.

    Attributes:
        logps: Sum over the answer's tokens by key, nats.
        token_logps: Of each token by key, nats.
        num_cached: Different answers that were known.
        num_computed: Those that were not.
    """

    logps: dict[str, float]
    token_logps: dict[str, list[float]]
    num_cached: int
    num_computed: int


def score_answers(
    project: Project,
    model: EvaluatedModel,
    groups: Sequence[TokenGroup],
    store: RowStore,
    what: str,
    cached: pl.DataFrame | None = None,
) -> ScoredAnswers:
    """All completions of some groups under a model, which is loaded only where something is missing.

    Args:
        project: Whose model it is.
        model: The model.
        groups: Prompts with their completions.
        store: Has what was computed before, and keeps the rest.
        what: What is done, for the meter.
        cached: Rows that are known from elsewhere.

    Raises:
        Interrupted: The user asked to stop; what was scored is kept.
    """
    wanted = {key for group in groups for key in group.keys}
    known = wanted & (store.keys() | (set() if cached is None else set(cached["key"])))
    if missing := missing_groups(groups, known, project.budget().max_tokens):
        with model.use() as loaded, loaded.scorer as scorer:
            project.score_into(store, scorer, missing, what)
    rows = store.rows(wanted)
    if cached is not None:
        rows = pl.concat([cached, rows]).unique("key", keep="first", maintain_order=True)
    logps, token_logps = (
        dict(zip(rows["key"].to_list(), rows[column].to_list(), strict=True)) for column in ("logp", "token_logps")
    )
    return ScoredAnswers(logps, token_logps, len(known), len(wanted) - len(known))


class Steps:
    """What models say to prompts, remembered.

    Args:
        project: Whose models they are.
        settings: How answers are sampled.
        folder: Where rows are kept, in the scratch area.
    """

    def __init__(self, project: Project, settings: EvaluateParams, folder: Path) -> None:
        self.project = project
        self.evaluate = settings
        self._folder = folder
        self._stores: dict[Path, RowStore] = {}

    def scored(self, model: EvaluatedModel, groups: Sequence[TokenGroup], what: str) -> ScoredAnswers:
        """The log-probabilities of the groups' completions."""
        return score_answers(self.project, model, groups, self._store(model, "logps", LOGP_SCHEMA), what)

    def answers(
        self, model: EvaluatedModel, prompts: Sequence[PromptTokens], temperature: float, top_p: float = 1.0
    ) -> dict[str, Answer]:
        """One answer to each prompt by prompt id.

        Raises:
            Interrupted: The user asked to stop; what was sampled is kept.
        """
        project, settings = self.project, self.evaluate
        stop_ids = tuple(project.encoder.stop_ids)
        decoding = Decoding(temperature, settings.max_new_tokens, stop_ids, settings.seed, model.name, top_p)
        how = digest_json(
            {"version": GENERATION_VERSION, **vars(decoding), "seed": settings.seed if temperature else 0}
        )
        keys = {prompt.id: _prompt_key(how, prompt) for prompt in prompts}
        store = self._store(model, "answers", _ANSWERS)
        known = store.keys()
        if missing := [prompt for prompt in prompts if keys[prompt.id] not in known]:
            label = f"{project.command}: {model} answers at T = {temperature:g}"
            with (
                project.keeping(store) as keep,
                model.use() as loaded,
                project.reporter.meter(label, len(missing), "prompts") as meter,
            ):
                sample_answers(
                    loaded.model,
                    missing,
                    decoding,
                    budget=project.budget(),
                    autocast_dtype=project.machine.compute_dtype,
                    meter=meter,
                    keep=lambda new: keep(
                        [{"key": keys[id], "tokens": list(a.tokens), "finished": a.finished} for id, a in new.items()]
                    ),
                )
        rows = store.rows(keys.values())
        columns = zip(*(rows[name].to_list() for name in _ANSWERS), strict=True)
        found = {key: (tuple(tokens), finished) for key, tokens, finished in columns}
        answers = {}
        for prompt in prompts:
            tokens, finished = found[keys[prompt.id]]
            text = project.encoder.decode(list(tokens))
            answers[prompt.id] = Answer(prompt.id, prompt.id, prompt.tokens, (tokens,), prompt.messages, text, finished)
        return answers

    def divergences(
        self, policy: EvaluatedModel, reference: EvaluatedModel, answers: Mapping[str, Answer]
    ) -> dict[str, SequenceKl]:
        """KL of the policy from the reference along the policy's own answers, by prompt id, nats.

        Raises:
            Interrupted: The user asked to stop; what was computed is kept.
        """
        keys = {id: answer.keys[0] for id, answer in answers.items()}
        store = self._store(policy, f"divergences-{reference.digest}", _DIVERGENCES)
        known = store.keys()
        if missing := [answer for id, answer in answers.items() if keys[id] not in known]:
            with self.project.keeping(store) as keep:
                for batch, found in self._both(policy, reference, missing):
                    keep([{"key": keys[group.id], **vars(kl)} for group, kl in zip(batch, found, strict=True)])
        rows = store.rows(keys.values()).select(list(_DIVERGENCES))
        kls = {key: SequenceKl(*row) for key, *row in rows.iter_rows()}
        return {id: kls[key] for id, key in keys.items()}

    def _both(
        self, policy: EvaluatedModel, reference: EvaluatedModel, groups: Sequence[TokenGroup]
    ) -> Iterator[tuple[list[TokenGroup], list[SequenceKl]]]:
        """Groups in micro-batches, each with its divergences."""
        with policy.use() as loaded:
            scorer = loaded.scorer

        def work(batch: Sequence[TokenGroup]) -> list[SequenceKl]:
            predicted = []
            for model in (policy, reference):
                with model.use() as loaded, loaded.scorer as scorer:
                    predicted.append(scorer.predict(batch))
            parts: list[list[SequenceKl]] = [[] for _ in batch]
            for piece in _pieces(batch, scorer.max_distribution_rows):
                sizes = [len(part.tokens) for part in piece]
                rows = slice(piece[0].row, piece[0].row + sum(sizes))
                logps = []
                for model, found in zip((policy, reference), predicted, strict=True):
                    with model.use() as loaded:
                        logps.append(loaded.scorer.next_token_logps(found[rows]).split(sizes))
                for part, ours, theirs in zip(piece, *logps, strict=True):
                    parts[part.place].append(sequence_kl(ours, theirs, part.tokens))
            return [SequenceKl.add_up(found) for found in parts]

        label = f"{self.project.command}: KL along the answers of {policy}"
        with self.project.reporter.meter(label, len(groups), "prompts") as meter:
            for batch, found in in_micro_batches(groups, self.project.budget(), scorer.split, work):
                meter.advance(len(batch))
                yield batch, found

    def _store(self, model: EvaluatedModel, name: str, schema: Mapping[str, Any]) -> RowStore:
        folder = self._folder / model.digest
        place = folder / name
        if place not in self._stores:
            self._stores[place] = RowStore(place, schema)
            forget_other_stores(self._folder, folder, _MODELS_KEPT + len(self._stores))
        return self._stores[place]


class _Part(NamedTuple):
    """Tokens of a group's answer that are looked at together.

    Attributes:
        place: The group's place in its batch.
        row: The first one's place among all tokens of the batch.
        tokens: Their ids.
    """

    place: int
    row: int
    tokens: tuple[int, ...]


def _pieces(batch: Sequence[TokenGroup], max_rows: int) -> list[list[_Part]]:
    """The tokens of a batch's answers in pieces of at most so many, each with the answers that it is of."""
    pieces: list[list[_Part]] = []
    row, room = 0, 0
    for place, group in enumerate(batch):
        tokens = group.completions[0]
        while tokens:
            if not room:
                pieces.append([])
                room = max_rows
            part = _Part(place, row, tokens[:room])
            pieces[-1].append(part)
            taken = len(part.tokens)
            tokens, row, room = tokens[taken:], row + taken, room - taken
    return pieces


def _prompt_key(how: str, prompt: PromptTokens) -> str:
    return digest_bytes(how.encode(), prompt.id.encode(), array("i", prompt.tokens).tobytes())
