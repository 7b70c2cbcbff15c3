"""The graph that reference and policy share: which weights, held how, computed in what.

Opening it checks every artifact it is made of; its identity is what a reference cache is kept
under.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from dpo_cli.core import paths
from dpo_cli.core.artifacts import sha256_file
from dpo_cli.core.errors import DataError
from dpo_cli.core.manifest import library_versions
from dpo_cli.core.params import EMBEDDED, ModelParams, ReferenceParams, RuntimeParams
from dpo_cli.data.chat import ChatEncoder
from dpo_cli.data.tokenise import TokenGroup, TokenTable, explain_rejects, tokenise_table
from dpo_cli.losses.ranking import MAX_TIED, Ties
from dpo_cli.models.adapters import SftResult, read_sft_result
from dpo_cli.models.device import Machine, prepare_machine
from dpo_cli.models.folder import base_folder
from dpo_cli.models.identity import base_digest, read_base_lock, refuse_beyond_context, verify_model
from dpo_cli.models.load import context_length, load_tokenizer, open_encoder
from dpo_cli.scoring.scorer import engine_version

SPLITS = ("train", "eval")


@dataclass(frozen=True)
class Graph:
    """Everything that a log-probability of the reference depends on, checked.

    Attributes:
        base: Directory of the base model.
        sft: What stage sft made of it.
        machine: Device and compute dtype.
        quantization: ``nf4`` or ``none``.
        max_length: Tokens a prompt with one answer may have.
        policies: What becomes of pairs that fail a check of their tokens.
        tokenizer: The model's tokenizer.
        encoder: Messages to token ids.
        identity: The graph's identity, as a cache's manifest holds it.
    """

    base: Path
    sft: SftResult
    machine: Machine
    quantization: str
    max_length: int
    policies: Mapping[str, str]
    tokenizer: Any
    encoder: ChatEncoder
    identity: dict[str, Any]

    def made_of(self) -> dict[str, Any]:
        """What a model that was trained on preferences must have been made of, as its manifest has it."""
        return {"graph": self.identity, "data/preference": table_digests(paths.PREFERENCE_DATA)}

    def tokenise_pairs(self, split: str) -> TokenTable:
        """The preference pairs of a split as token groups (chosen, rejected)."""
        return self._tokenise(paths.preference_table(split), ("chosen", "rejected"))

    def tokenise_rankings(self, split: str) -> TokenTable:
        """The rankings of a split as token groups, best answer first; an empty table where there are none."""
        path = paths.ranking_table(split)
        return self._tokenise(path, ("completions",)) if path.is_file() else TokenTable([], {}, [])

    def tokenise_instructions(self, split: str) -> TokenTable:
        """The instruction data of a split as token groups of one completion, within the length of pairs."""
        return self._tokenise(paths.SFT_DATA / f"{split}.parquet", ("completion",), "run: dpo-cli convert-sft")

    def _tokenise(
        self, path: Path, columns: Sequence[str], remedy: str = "run: dpo-cli convert-preferences"
    ) -> TokenTable:
        return tokenise_table(path, columns, self.encoder, self.max_length, self.policies, remedy)


def open_graph(model: ModelParams, reference: ReferenceParams, runtime: RuntimeParams) -> Graph:
    """Check base model and SFT result, and describe the graph that they make.

    Raises:
        StaleArtifactError: The base model is not the locked one, or models/sft is missing,
            damaged or of another base.
        ParamsError: reference.max_length is beyond the model's context.
    """
    base, encoder, tokenizer = open_base(model, runtime)
    check_context(base, reference.max_length, "reference.max_length")
    machine = prepare_machine(runtime, embedded=model.name == EMBEDDED)
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
    return Graph(
        base,
        sft,
        machine,
        reference.quantization,
        reference.max_length,
        reference.checks.model_dump(),
        tokenizer,
        encoder,
        identity,
    )


def refuse_empty(tables: Sequence[TokenTable], max_length: int, *, section: str, ranked: bool) -> None:
    """Refuse preference data of which nothing is left to train on, or nothing to hold out.

    Args:
        tables: Those of :data:`SPLITS`.
        max_length: reference.max_length, for the message.
        section: Whose loss asks for them.
        ranked: Whether they are rankings.

    Raises:
        DataError: A table has no group.
    """
    for split, table in zip(SPLITS, tables, strict=True):
        if table.groups:
            continue
        path = paths.ranking_table(split) if ranked else paths.preference_table(split)
        if not table.rejects:
            loss = f"params.yaml: {section}.loss plackett_luce learns from rankings of several answers, and "
            raise DataError(
                f"{loss if ranked else ''}{path.as_posix()} {'has no rows' if path.is_file() else 'is missing'}"
            )
        raise DataError(f"{path.as_posix()}: {explain_rejects([table], 'reference.max_length', max_length)}")


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


def read_columns(path: Path, *names: str) -> dict[str, tuple[Any, ...]]:
    """Some columns of a canonical table by row id; nothing where the table is not there."""
    if not path.is_file():
        return {}
    frame = pl.read_parquet(path, columns=["id", *names], glob=False)
    return {row[0]: row[1:] for row in frame.select("id", *names).iter_rows()}


def read_ranks(groups: Sequence[TokenGroup], ties: Ties, section: str) -> dict[str, list[int]]:
    """The ranks of the rankings of both splits by row id, ascending.

    Args:
        groups: Those that are trained with.
        ties: What tied answers are taken for.
        section: Whose settings they are, for the message.

    Raises:
        DataError: More answers are tied than can be averaged over.
    """
    ranks = {id: row[0] for split in SPLITS for id, row in read_columns(paths.ranking_table(split), "ranks").items()}
    for group in groups:
        tied = max(Counter(ranks[group.id]).values())
        if ties == "average" and tied > MAX_TIED:
            raise DataError(
                f"data/preference: the ranking {group.id} has {tied} tied answers, and {section}.ties average takes at"
                f" most {MAX_TIED}; set it to groups"
            )
    return ranks


def table_digests(folder: Path) -> dict[str, str]:
    """SHA-256 of each table in data/sft or data/preference, by its name without the suffix."""
    return {path.name.removesuffix(".parquet"): sha256_file(path) for path in sorted(folder.glob("*.parquet"))}


def all_rejects(tables: Sequence[TokenTable]) -> list[dict[str, Any]]:
    """The rows that some tables left out."""
    return [reject for table in tables for reject in table.rejects]
