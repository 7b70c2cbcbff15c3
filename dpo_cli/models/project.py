"""This project's models and their identity: which weights, held how, computed in what.

Opening it checks every artifact that policy and reference are made of; its identity is what a reference cache is kept
under.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_cli.core import paths
from dpo_cli.core.manifest import Manifest, library_versions
from dpo_cli.core.params import EMBEDDED, LoraParams, ModelParams, Params, RuntimeParams
from dpo_cli.core.progress import Reporter
from dpo_cli.data.chat import ChatEncoder
from dpo_cli.data.tokenize import TokenTable, table_digests, tokenize_table
from dpo_cli.models.adapters import (
    ModelPair,
    SftResult,
    load_pair,
    load_policy_at_start,
    load_reference,
    read_sft_result,
)
from dpo_cli.models.device import prepare_machine
from dpo_cli.models.folder import base_folder
from dpo_cli.models.identity import base_digest, read_base_lock, read_lock, refuse_beyond_context, verify_model
from dpo_cli.models.load import context_length, load_model, load_tokenizer, open_encoder
from dpo_cli.models.reward import load_reward_model, load_reward_model_at_start
from dpo_cli.models.workplace import Workplace
from dpo_cli.scoring.scorer import engine_version

if TYPE_CHECKING:  # peft takes seconds to import
    from peft import PeftModel


@dataclass(frozen=True)
class Project(Workplace):
    """This project's models, and everything that a log-probability of the reference depends on, checked.

    Policy and reference share one graph: the same frozen weights, held and computed in one way. Whatever is loaded is
    a new object in memory.

    Attributes:
        base: Directory of the base model.
        sft: What stage sft made of it.
        quantization: ``nf4`` or ``none``.
        max_length: Tokens a prompt with one answer may have.
        policies: What becomes of pairs that fail a check of their tokens.
        tokenizer: The model's tokenizer.
        encoder: Messages to token ids.
        identity: The graph's identity, as a cache's manifest holds it.
    """

    base: Path
    sft: SftResult
    quantization: str
    max_length: int
    policies: Mapping[str, str]
    tokenizer: Any
    encoder: ChatEncoder
    identity: dict[str, Any]

    # --- models -----------------------------------------------------------------------------

    def reference(self) -> Any:
        """The reference model, frozen and in eval mode."""
        return load_reference(self.base, self.sft, self.machine, self.quantization)

    def policy(self, lora: LoraParams | None, seed: int) -> PeftModel:
        """The policy before its first step: equal to the reference, its adapter trainable."""
        return load_policy_at_start(self.base, self.sft, self.machine, self.quantization, lora or LoraParams(), seed)

    def pair(self, adapter: Path = paths.DPO_MODEL) -> ModelPair:
        """A trained policy and its reference, on one set of frozen weights.

        Raises:
            StaleArtifactError: There is no adapter in the folder.
        """
        return load_pair(self.base, self.sft, self.machine, self.quantization, adapter)

    def reward_model(self, folder: Path = paths.REWARD_MODEL) -> PeftModel:
        """The trained reward model of a folder, frozen and in eval mode."""
        return load_reward_model(folder, self.base, self.sft, self.machine, self.quantization)

    def reward_model_at_start(self, lora: LoraParams | None, seed: int) -> PeftModel:
        """The reward model before its first step; adapter and head are trainable."""
        lora = lora or LoraParams()
        return load_reward_model_at_start(self.base, self.sft, self.machine, self.quantization, lora, seed)

    def whole_model(self, folder: Path) -> Any:
        """Any model of a folder, held and computed as the project's."""
        return load_model(folder, self.machine, quantization=self.quantization)

    def check_context(self, max_length: int, name: str) -> None:
        """Refuse a length for which the model knows no positions.

        Raises:
            ParamsError: With both figures.
        """
        check_context(self.base, max_length, name)

    # --- data -------------------------------------------------------------------------------

    def made_of(self) -> dict[str, Any]:
        """What a model that was trained on preferences must have been made of, as its manifest has it."""
        return {"graph": self.identity, "data/preference": table_digests(paths.PREFERENCE_DATA)}

    def manifest(self, params: Params, section: str) -> Manifest:
        """All that an adapter depends on which a section trains on preferences.

        No time and no path is in it, so equal runs give equal bytes.
        """
        settings = {name: getattr(params, name).model_dump() for name in ("model", "reference", section)}
        return Manifest({"base": read_lock(), **self.made_of()}, settings=settings)

    def tokenize_pairs(self, split: str) -> TokenTable:
        """The preference pairs of a split as token groups (chosen, rejected)."""
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
        return tokenize_table(path, columns, self.encoder, self.max_length, self.policies, remedy)


def open_project(params: Params, reporter: Reporter, command: str) -> Project:
    """Check base model and SFT result, and describe what they make.

    Raises:
        StaleArtifactError: The base model is not the locked one, or models/sft is missing,
            damaged or of another base.
        ParamsError: reference.max_length is beyond the model's context.
    """
    reference = params.reference
    base, encoder, tokenizer = open_base(params.model, params.runtime)
    check_context(base, reference.max_length, "reference.max_length")
    machine = prepare_machine(params.runtime, embedded=params.model.name == EMBEDDED)
    digest = base_digest()
    sft = read_sft_result(digest)
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


def check_context(base: Path, max_length: int, name: str) -> None:
    """Refuse a length for which the model knows no positions.

    Raises:
        ParamsError: With both figures.
    """
    refuse_beyond_context(context_length(base), max_length, name)
