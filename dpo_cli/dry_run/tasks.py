"""What ``dpo-cli plan`` plans: the trainings of a project with its own data, or of any model with random pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_cli.core import paths
from dpo_cli.core.errors import DataError
from dpo_cli.core.params import Params
from dpo_cli.core.training_params import LoraParams
from dpo_cli.data.checks import TokenView
from dpo_cli.data.tokenize import tokenize_table
from dpo_cli.data.tokens import TokenGroup
from dpo_cli.data.unpaired import pairs_of
from dpo_cli.dry_run.plan import Task
from dpo_cli.models.folder import check_model_folder, read_object, total_size, weight_files
from dpo_cli.models.project import open_base
from dpo_cli.models.shapes import SHAPES, random_pairs


@dataclass(frozen=True)
class Subject:
    """What is planned.

    Attributes:
        name: The model, in words.
        config: Its configuration.
        folder: Its directory; None for random weights of ``shape``.
        shape: Of :data:`~dpo_cli.models.shapes.SHAPES`.
        data: The data, in words.
        tasks: The trainings, in their order.
        held_out: Groups that each measures beside training, by stage.
        file_bytes: What the weights take on the disk; 0 where there are none.
    """

    name: str
    config: dict[str, Any]
    folder: Path | None
    shape: str | None
    data: str
    tasks: tuple[Task, ...]
    held_out: dict[str, Sequence[TokenGroup]]
    file_bytes: int


def project_subject(params: Params) -> Subject:
    """The trainings of the project in the working directory.

    Raises:
        StaleArtifactError: Stages base or convert have not run.
        DataError: There is no row to train on.
    """
    folder, encoder, _ = open_base(params.model, params.runtime)
    sft, reference = params.sft, params.reference
    tasks: list[Task] = []
    held_out: dict[str, Sequence[TokenGroup]] = {}

    def read(folder_: Path, columns: tuple[str, ...], length: int, checks: Any, remedy: str) -> list[Any]:
        view = TokenView(encoder, length, checks.model_dump())
        return [tokenize_table(folder_ / f"{split}.parquet", columns, view, remedy) for split in ("train", "eval")]

    if sft.method in ("lora", "qlora"):
        tables = read(paths.SFT_DATA, ("completion",), sft.max_length, sft.checks, "run: dpo-cli convert-sft")
        quantization = "nf4" if sft.method == "qlora" else "none"
        tasks.append(Task("sft", tables[0].groups, sft, sft.lora, quantization, "sft.max_length", "sft.lora.r"))
        held_out["sft"] = tables[1].groups
    sides = ("chosen", "rejected")
    remedy = "run: dpo-cli convert-preferences"
    tables = [
        pairs_of(table) for table in read(paths.PREFERENCE_DATA, sides, reference.max_length, reference.checks, remedy)
    ]
    by_sft = sft.method in ("lora", "qlora")
    lora, rank = (sft.lora, "sft.lora.r") if by_sft else (params.train.lora or LoraParams(), "train.lora.r")
    length = "reference.max_length"
    tasks.append(Task("train", tables[0].groups, params.train, lora, reference.quantization, length, rank))
    held_out["train"] = tables[1].groups
    for task in tasks:
        if not task.groups:
            raise DataError(f"{task.stage}: no row is within {task.length}; raise it")
    config = read_object(folder / "config.json")
    size = total_size(weight_files(folder))
    return Subject(params.model.name, config, folder, None, "the project's data", tuple(tasks), held_out, size)


def other_subject(shape: str | None, folder: Path | None, regime: str, num_pairs: int, params: Params) -> Subject:
    """DPO of another model on random pairs: of one of SHAPES, or of a model directory."""
    config = dict(SHAPES[shape]) if shape is not None else read_object(_checked(folder) / "config.json")
    groups = random_pairs(regime, num_pairs, int(config["vocab_size"]))
    lora = params.train.lora or LoraParams()
    task = Task(
        "train", groups, params.train, lora, params.reference.quantization, "reference.max_length", "train.lora.r"
    )
    size = 0 if folder is None else total_size(weight_files(folder))
    name = shape or str(folder)
    return Subject(name, config, folder, shape, f"{num_pairs} random pairs, {regime}", (task,), {}, size)


def _checked(folder: Path | None) -> Path:

    assert folder is not None
    check_model_folder(folder)
    return folder
