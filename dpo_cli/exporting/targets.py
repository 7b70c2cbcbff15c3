"""The forms that a model is exported in: how each is built in an empty folder, and how it is reloaded and checked."""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from dpo_cli.core import paths
from dpo_cli.core.artifacts import digest_files
from dpo_cli.core.errors import MachineError
from dpo_cli.exporting.faults import deltas_of, name_faults
from dpo_cli.exporting.held_out import HeldOut, Survival, held
from dpo_cli.models.describe import license_files
from dpo_cli.models.folder import ADAPTER_FILES, read_object
from dpo_cli.models.identity import model_files
from dpo_cli.models.importing import DTYPES
from dpo_cli.models.load import load_model, load_tokenizer, open_encoder, save_tokenizer
from dpo_cli.models.project import Project


@dataclass
class Found:
    """What was found of a target that was reloaded.

    Attributes:
        survival: What is left of the trained model; None where it could not be scored.
        problems: Why it is not the trained model, one sentence each.
        notes: What to know of it, one sentence each.
    """

    survival: Survival | None = None
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Trained:
    """The model that is exported.

    Attributes:
        project: Its project.
        name: The base model's.
        adapter: Its folder.
        held_out: What exports are held against.
        dtype: Of merged weights: a name in DTYPES.
        work: An empty folder for what is needed meanwhile.
    """

    project: Project
    name: str
    adapter: Path
    held_out: HeldOut
    dtype: str
    work: Path

    @property
    def is_4bit(self) -> bool:
        """Whether it was trained on nf4 weights."""
        return self.project.quantization == "nf4"

    def frozen(self, *, rounded: bool) -> Any:
        """The weights under the adapter, held plainly: as they are in the file, or rounded to nf4 as in training."""
        project = self.project
        if rounded and self.is_4bit:
            return project.backbone().dequantize()
        folder = paths.SFT_MODEL if project.sft.method == "full" else project.base
        return load_model(folder, project.machine, quantization="none")

    def adapted(self, folder: Path, *, rounded: bool) -> Any:
        """An adapter on those weights, by plain PEFT."""
        from peft import PeftModel

        return PeftModel.from_pretrained(self.frozen(rounded=rounded), str(folder))

    def merged(self, *, rounded: bool) -> Any:
        """The adapter merged into those weights."""
        return self.adapted(self.adapter, rounded=rounded).merge_and_unload()

    @cached_property
    def texts(self) -> list[str]:
        """The held-out prompts as the template writes them."""
        encoder = self.project.encoder
        rendered = [encoder.render(each, add_generation_prompt=True) for each in self.held_out.prompts.values()]
        return [text + encoder.opener for text in rendered]

    def faults(self, found: Mapping[str, Any], *, rounded: bool) -> list[str]:
        """What the weights of a merged export show."""
        model = self.adapted(self.adapter, rounded=rounded)
        deltas = deltas_of(model)
        return name_faults(found, model.unload().state_dict(), deltas)


class Target(ABC):
    """A form of export.

    Args:
        trained: The model.
        name: As ``--to`` has it.
    """

    def __init__(self, trained: Trained, name: str) -> None:
        self.trained = trained
        self.name = name

    @property
    @abstractmethod
    def what(self) -> str:
        """What it is and what it is loaded on, one sentence."""

    @abstractmethod
    def build(self, folder: Path) -> list[str]:
        """Write it into an empty folder; gives what to know of it, one sentence each."""

    @abstractmethod
    def check(self, folder: Path) -> Found:
        """Reload it from the folder and hold it against the trained model."""

    def name_weights(self, folder: Path) -> list[str]:
        """What its weights show, where its numbers are wrong."""
        return []


def _problems_of_tokenizer(trained: Trained, folder: Path) -> list[str]:
    """Whether the tokenizer of a folder writes prompts and ends answers as in training."""
    ours = trained.project.encoder
    theirs = open_encoder(folder, load_tokenizer(folder))
    found = []
    if lost := sorted(set(ours.stop_ids) - set(theirs.stop_ids)):
        texts = ", ".join(repr(ours.tokenizer.convert_ids_to_tokens(token)) for token in lost)
        found.append(f"the end token is lost: nothing in {folder.name} names {texts}, so answers would not end")
    for prompt in trained.held_out.prompts.values():
        if ours.encode_prompt(prompt) != theirs.encode_prompt(prompt):
            found.append(
                "the chat template or the tokenizer is another: they make other tokens of the prompt"
                f" {prompt[-1]['content'][:60]!r}"
            )
            break
    return found


class Adapter(Target):
    """The adapter as it is, in PEFT's layout."""

    @property
    def what(self) -> str:
        """What it is loaded on."""
        project = self.trained.project
        base = (
            "the whole model in models/sft" if project.sft.method == "full" else f"the base model {self.trained.name}"
        )
        held_as = "in 4-bit nf4, as README.md says" if self.trained.is_4bit else f"in {project.machine.dtype_name}"
        return f"an adapter for plain peft, on {base} {held_as}"

    def build(self, folder: Path) -> list[str]:
        """Copy it with its tokenizer and its card."""
        shutil.copytree(self.trained.adapter, folder, dirs_exist_ok=True)
        return []

    def check(self, folder: Path) -> Found:
        """Load it by plain PEFT on the weights that it was trained on."""
        from peft import PeftModel

        trained = self.trained
        found = Found(problems=_problems_of_tokenizer(trained, folder))
        was, now = (read_object(place / ADAPTER_FILES[0]) for place in (trained.adapter, folder))
        for key in sorted({*was, *now}):
            if was.get(key) != now.get(key):
                found.problems.append(
                    f"{ADAPTER_FILES[0]} says {key} {now.get(key)}, and it was trained with {was.get(key)}"
                )
        base = trained.project.backbone()
        digest = digest_files(folder, ADAPTER_FILES)
        found.survival = held(
            trained.held_out, lambda: PeftModel.from_pretrained(base, str(folder)).eval(), self.name, digest
        )
        return found


class Merged(Target):
    """A whole model in Hugging Face's layout, the adapter merged in."""

    @property
    def is_rounded(self) -> bool:
        """Whether it is merged into the weights that it was trained on, rounded to nf4."""
        return self.name == "merged-nf4"

    @property
    def what(self) -> str:
        """What it is."""
        onto = "nf4 weights that it was trained on, held plainly" if self.is_rounded else "full-precision weights"
        return f"a whole model in {self.trained.dtype} for transformers or vLLM, the adapter merged into the {onto}"

    def build(self, folder: Path) -> list[str]:
        """Merge, round, and write."""
        project = self.trained.project
        model = self.trained.merged(rounded=self.is_rounded).to(DTYPES[self.trained.dtype])
        if not all(bool(torch.isfinite(weight).all()) for weight in model.parameters()):
            raise MachineError(f"{self.name}: a weight is beyond {self.trained.dtype}; say --dtype bfloat16")
        model.generation_config = GenerationConfig()
        model.save_pretrained(folder)
        save_tokenizer(project.tokenizer, project.encoder, folder, project.base)
        copy_license(project, folder)
        return []

    def check(self, folder: Path) -> Found:
        """Load it as anybody would."""
        trained = self.trained
        digest = digest_files(folder, model_files(folder))
        survival = held(trained.held_out, lambda: self._load(folder), self.name, digest)
        return Found(survival, _problems_of_tokenizer(trained, folder))

    def name_weights(self, folder: Path) -> list[str]:
        """Compare tensor by tensor."""
        return self.trained.faults(self._load(folder).state_dict(), rounded=self.is_rounded)

    def _load(self, folder: Path) -> Any:
        return load_model(folder, self.trained.project.machine, quantization="none")


def copy_license(project: Project, folder: Path) -> None:
    """Put the base model's license beside an export."""
    for path in license_files(project.base):
        if path.name != "README.md":
            shutil.copyfile(path, folder / path.name)
