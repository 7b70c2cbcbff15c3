"""Where a command computes, and this project's models: which weights, held how, computed in what.

Opening it checks every artifact that policy and reference are made of; its identity is what a reference cache is kept
under.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_cli.core import paths
from dpo_cli.core.errors import Interrupted
from dpo_cli.core.interrupts import graceful_stop
from dpo_cli.core.manifest import SFT, Manifest, library_versions
from dpo_cli.core.params import EMBEDDED, ModelParams, Params, RuntimeParams
from dpo_cli.core.progress import Reporter
from dpo_cli.core.row_store import Keep, RowStore
from dpo_cli.data.chat import ChatEncoder
from dpo_cli.data.checks import TokenView
from dpo_cli.data.tokenize import TokenTable, table_digests, tokenize_table
from dpo_cli.data.tokens import TokenGroup
from dpo_cli.data.unpaired import beside_others, pairs_of
from dpo_cli.models.adapters import FrozenBase, read_sft_result
from dpo_cli.models.device import Machine, prepare_machine, token_budget
from dpo_cli.models.folder import base_folder
from dpo_cli.models.identity import base_digest, read_base_lock, read_lock, refuse_beyond_context, verify_model
from dpo_cli.models.load import context_length, load_tokenizer, open_encoder
from dpo_cli.scoring.budget import TokenBudget
from dpo_cli.scoring.probe import LayoutChoice, open_scorer
from dpo_cli.scoring.reference import score_groups
from dpo_cli.scoring.scorer import Scorer, engine_version


@dataclass(frozen=True)
class Workplace:
    """Where a command computes.

    Attributes:
        command: Who works, for messages.
        reporter: Told of the work.
        runtime: Layout, token budget, minutes of work that a kill may cost.
        machine: Device and compute dtype.
    """

    command: str
    reporter: Reporter
    runtime: RuntimeParams
    machine: Machine

    def scorer(self, model: Any) -> tuple[Scorer, LayoutChoice]:
        """A model's log-probabilities, in the cheapest layout that is right for it.

        Raises:
            MachineError: The layout that is forced, or every layout, gives other numbers than the plain computation.
        """
        return open_scorer(model, self.machine.compute_dtype, self.runtime, self.reporter, self.command)

    def budget(self) -> TokenBudget:
        """Tokens that go through a model at once."""
        return TokenBudget(token_budget(self.runtime, self.machine.device), self.command, self.reporter)

    @contextmanager
    def keeping(self, store: RowStore) -> Iterator[Keep]:
        """A function that takes rows and stores them every few minutes; it ends the work where the user asks for it.

        Raises:
            Interrupted: The user asked to stop; what was computed is kept, as it is after any error.
        """
        with graceful_stop() as stop, store.keeping(self.runtime.checkpoint_minutes) as keep:

            def kept(rows: Sequence[Mapping[str, Any]]) -> None:
                keep(rows)
                if stop.requested:
                    raise Interrupted(f"{self.command}: stopped; what was computed is kept, run it again to resume")

            yield kept

    def score_into(self, store: RowStore, scorer: Scorer, groups: Sequence[TokenGroup], what: str) -> None:
        """Score groups and store the rows of a reference cache as time passes.

        Args:
            store: Where they go.
            scorer: Scores the groups.
            groups: Those that are missing.
            what: What is done, for the meter.

        Raises:
            Interrupted: The user asked to stop; what was computed is stored, as it is after any error.
            MachineError: A single group does not fit into memory.
        """
        total = sum(len(group.completions) for group in groups)
        with self.keeping(store) as keep, self.reporter.meter(f"{self.command}: {what}", total, "answers") as meter:
            for rows in score_groups(scorer, groups, self.budget()):
                keep(rows)
                meter.advance(len(rows))


@dataclass(frozen=True)
class Project(Workplace, FrozenBase):
    """This project's models, and everything that a log-probability of the reference depends on, checked.

    Policy and reference share one graph: the same frozen weights, held and computed in one way.

    Attributes:
        max_length: Tokens a prompt with one answer may have.
        policies: What becomes of pairs that fail a check of their tokens.
        tokenizer: The model's tokenizer.
        encoder: Messages to token ids.
        identity: The graph's identity, as a cache's manifest holds it.
    """

    max_length: int
    policies: Mapping[str, str]
    tokenizer: Any
    encoder: ChatEncoder
    identity: dict[str, Any]

    def check_context(self, max_length: int, name: str) -> None:
        """Refuse a length for which the model knows no positions.

        Raises:
            ParamsError: With both figures.
        """
        refuse_beyond_context(context_length(self.base), max_length, name)

    # --- data -------------------------------------------------------------------------------

    def made_of(self) -> dict[str, Any]:
        """What a model that was trained on preferences must have been made of, as its manifest has it."""
        return {"graph": self.identity, "data/preference": table_digests(paths.PREFERENCE_DATA)}

    def manifest(self, params: Params, section: str) -> Manifest:
        """All that an adapter depends on which a section trains on preferences.

        No time and no path is in it, so equal runs give equal bytes.
        """
        settings = {name: getattr(params, name).model_dump() for name in ("model", "reference", section)}
        rounds = {"rounds": self.sft.rounds} if self.sft.rounds else {}
        return Manifest({"base": read_lock(), **self.made_of(), **rounds}, settings=settings)

    def tokenize_pairs(self, split: str) -> TokenTable:
        """The preference pairs of a split as token groups (chosen, rejected)."""
        return pairs_of(self.tokenize_preferences(split))

    def tokenize_single_answers(self, split: str) -> tuple[TokenTable, dict[str, bool]]:
        """The answers of a split that has single ones, each with another prompt's; and by id which are good."""
        return beside_others(self.tokenize_preferences(split), self.max_length)

    def tokenize_preferences(self, split: str) -> TokenTable:
        """The pairs and single answers of a split as token groups, as the table has them."""
        return self._tokenize(paths.preference_table(split), ("chosen", "rejected"))

    def tokenize_rankings(self, split: str) -> TokenTable:
        """The rankings of a split as token groups, best answer first; an empty table where there are none."""
        path = paths.ranking_table(split)
        return self._tokenize(path, ("completions",)) if path.is_file() else TokenTable([], [])

    def tokenize_instructions(self, split: str) -> TokenTable:
        """The instruction data of a split as token groups of one completion, within the length of pairs."""
        return self._tokenize(paths.SFT_DATA / f"{split}.parquet", ("completion",), "run: dpo-cli convert-sft")

    def _tokenize(
        self, path: Path, columns: Sequence[str], remedy: str = "run: dpo-cli convert-preferences"
    ) -> TokenTable:
        return tokenize_table(path, columns, TokenView(self.encoder, self.max_length, self.policies), remedy)


def open_project(params: Params, reporter: Reporter, command: str, *, any_data: bool = False) -> Project:
    """Check base model and SFT result, and describe what they make.

    With ``any_data`` models/sft may have been trained on other data than data/sft holds now.

    Raises:
        StaleArtifactError: The base model is not the locked one, or models/sft is missing, damaged, or of another base
            or other data.
        ParamsError: reference.max_length is beyond the model's context.
    """
    reference = params.reference
    base, encoder, tokenizer = open_base(params.model, params.runtime)
    refuse_beyond_context(context_length(base), reference.max_length, "reference.max_length")
    machine = prepare_machine(params.runtime, embedded=params.model.name == EMBEDDED)
    digest = base_digest()
    sft = read_sft_result(digest)
    if sft.data is not None and not any_data and paths.SFT_DATA.is_dir():
        SFT.refuse_other(SFT.read(), {"data/sft": table_digests(paths.SFT_DATA)}, SFT.folder)
    identity = {
        "base": digest,
        "sft": sft.digest,
        "quantization": reference.quantization,
        "compute_dtype": machine.dtype_name,
        "engine": engine_version(machine.compute_dtype),
        **library_versions(),
    }
    return Project(
        command=command,
        reporter=reporter,
        runtime=params.runtime,
        base=base,
        sft=sft,
        machine=machine,
        quantization=reference.quantization,
        max_length=reference.max_length,
        policies=reference.checks.model_dump(),
        tokenizer=tokenizer,
        encoder=encoder,
        identity=identity,
    )


def open_base(model: ModelParams, runtime: RuntimeParams) -> tuple[Path, ChatEncoder, Any]:
    """The checked base model: its directory, its chat encoder and its tokenizer."""
    lock = read_base_lock()
    folder = base_folder(model, runtime)
    verify_model(folder, lock.identity)
    tokenizer = load_tokenizer(folder)
    encoder = open_encoder(folder, tokenizer, model)
    encoder.num_rows = lock.facts.num_rows
    return folder, encoder, tokenizer
