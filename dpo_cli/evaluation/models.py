"""The models of an evaluation: the policy that is judged, its reference, and what lies between and beyond them.

They are loaded when the first of them is needed, and not at all where everything is known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from dpo_cli.core import paths
from dpo_cli.core.artifacts import digest_files, digest_json
from dpo_cli.core.errors import DataError, MachineError, StaleArtifactError
from dpo_cli.core.manifest import DPO as DPO_MODEL
from dpo_cli.core.text import in_one_line
from dpo_cli.evaluation.model_names import BASE, DPO, SFT
from dpo_cli.models.adapters import ADAPTER_FILES, ModelPair, is_dora
from dpo_cli.models.device import release_memory
from dpo_cli.models.folder import check_model_folder, words_of
from dpo_cli.models.identity import model_files
from dpo_cli.models.load import load_tokenizer
from dpo_cli.models.project import Project
from dpo_cli.scoring.scorer import Scorer


@dataclass(frozen=True)
class LoadedModel:
    """A model that is in memory and switched on.

    Attributes:
        model: In eval mode; it generates.
        scorer: Its log-probabilities.
    """

    model: Any
    scorer: Scorer


@dataclass(frozen=True)
class EvaluatedModel:
    """A model of the evaluation.

    Attributes:
        name: Of its random stream: those of one name draw the same uniforms.
        digest: Of all that its answers and log-probabilities depend on besides the prompt.
        use: Loads it where need be, and switches it on within the block.
        called: What it is called in messages, if not by its name.
    """

    name: str
    digest: str
    use: Callable[[], AbstractContextManager[LoadedModel]]
    called: str = ""

    def __str__(self) -> str:
        """What it is called in messages."""
        return self.called or self.name


class EvaluatedModels(Protocol):
    """Policy and reference."""

    @property
    def policy(self) -> EvaluatedModel:
        """The model that is judged."""
        ...

    @property
    def reference(self) -> EvaluatedModel:
        """The SFT model."""
        ...

    @property
    def base(self) -> EvaluatedModel | None:
        """The model before SFT; None where it is not in memory with the others."""
        ...

    def scaled(self, scale: float) -> EvaluatedModel | None:
        """The model with so many times what training changed; None where that cannot be made of two models."""
        ...

    def close(self) -> None:
        """Forget the models; their memory is the judge's."""
        ...


class AdapterModels:
    """A trained adapter on the frozen weights of its reference.

    Args:
        project: Has the models.
        adapter: Folder of the adapter.

    Raises:
        StaleArtifactError: There is no adapter in the folder.
    """

    def __init__(self, project: Project, adapter: Path) -> None:
        self._project = project
        self._adapter = adapter
        self._digest = _policy_digest(project, adapter)
        self._reference_digest = digest_json(project.identity)
        self._loaded: tuple[ModelPair, Scorer] | None = None

    @property
    def policy(self) -> EvaluatedModel:
        """The base with the adapter."""
        return EvaluatedModel(DPO, self._digest, self._use_policy)

    @property
    def reference(self) -> EvaluatedModel:
        """The base with what SFT made of it."""
        return EvaluatedModel(SFT, self._reference_digest, self._use_reference)

    @property
    def base(self) -> EvaluatedModel | None:
        """The base without any adapter, where SFT made one."""
        if not self._project.sft.has_adapter:
            return None
        return EvaluatedModel(BASE, digest_json(["base", self._project.identity]), self._use_base)

    def scaled(self, scale: float) -> EvaluatedModel:
        """The base with so many times what training changed of the reference.

        Raises:
            DataError: An adapter is DoRA.
        """
        for folder in (self._adapter, *([paths.SFT_MODEL] if self._project.sft.has_adapter else [])):
            if is_dora(folder):
                raise DataError(
                    f"evaluate.scales cannot go with {folder}: a multiple of what DoRA changed is no such adapter; set"
                    " it to []"
                )
        digest = digest_json([self._digest, scale])
        return EvaluatedModel(DPO, digest, lambda: self._use_scaled(scale), f"{DPO} x {scale:g}")

    def close(self) -> None:
        """Forget the models."""
        self._loaded = None
        release_memory()

    def _load(self) -> tuple[ModelPair, Scorer]:
        if self._loaded is None:
            try:
                pair = self._project.pair(self._adapter)
            except (RuntimeError, ValueError, KeyError, TypeError) as error:
                raise MachineError(
                    f"{self._adapter}: no adapter for the project's model: {_misfit(error)}; give one that was trained"
                    " on it"
                ) from error
            self._loaded = pair, self._project.scorer(pair.use_policy())[0]
        return self._loaded

    @contextmanager
    def _use_policy(self) -> Iterator[LoadedModel]:
        pair, scorer = self._load()
        yield LoadedModel(pair.use_policy(), scorer)

    @contextmanager
    def _use_reference(self) -> Iterator[LoadedModel]:
        pair, scorer = self._load()
        yield LoadedModel(pair.use_reference(), scorer)

    @contextmanager
    def _use_base(self) -> Iterator[LoadedModel]:
        pair, scorer = self._load()
        yield LoadedModel(pair.use_frozen(), scorer)

    @contextmanager
    def _use_scaled(self, scale: float) -> Iterator[LoadedModel]:
        pair, scorer = self._load()
        with pair.scaled_policy(scale) as model:
            yield LoadedModel(model, scorer)


def _misfit(error: Exception) -> str:
    """What PyTorch says of weights that do not fit: the first of them, below its headline, and how many there are."""
    _, *misfits = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    if not misfits:
        return words_of(error)
    more = f" ({len(misfits)} misfits in all)" if len(misfits) > 1 else ""
    return f"{in_one_line(misfits[0].rstrip('.'))}{more}"


def _policy_digest(project: Project, adapter: Path) -> str:
    """One digest of all that the policy's log-probabilities depend on.

    Raises:
        StaleArtifactError: There is no adapter in the folder.
    """
    try:
        return digest_json({"graph": project.identity, "adapter": digest_files(adapter, ADAPTER_FILES)})
    except FileNotFoundError as error:
        raise StaleArtifactError(f"{error.filename} is missing; run: dpo-cli train") from None


class WholeModels:
    """A whole model of one's own beside the reference: two sets of weights in memory.

    Args:
        project: Has the reference.
        folder: Directory of the model, in Hugging Face layout.

    Raises:
        MachineError: It cannot be loaded.
        DataError: Its tokenizer makes other tokens than the reference's.
    """

    base: EvaluatedModel | None = None

    def __init__(self, project: Project, folder: Path) -> None:
        check_model_folder(folder)
        if load_tokenizer(folder).get_vocab() != project.tokenizer.get_vocab():
            raise DataError(
                f"{folder} has another vocabulary than the project's model, so their probabilities cannot be compared;"
                " make a project of its own for it: dpo-cli init DIR --model"
            )
        self._project = project
        self._folder = folder
        self._digest = digest_json({"graph": project.identity, "model": digest_files(folder, model_files(folder))})
        self._loaded: dict[str, LoadedModel] = {}

    @property
    def policy(self) -> EvaluatedModel:
        """The model of the folder."""
        return EvaluatedModel(DPO, self._digest, lambda: nullcontext(self._load(DPO)))

    @property
    def reference(self) -> EvaluatedModel:
        """The base with what SFT made of it."""
        return EvaluatedModel(SFT, digest_json(self._project.identity), lambda: nullcontext(self._load(SFT)))

    def scaled(self, scale: float) -> None:
        """Nothing: which of its weights training changed is not known."""

    def close(self) -> None:
        """Forget the models."""
        self._loaded.clear()
        release_memory()

    def _load(self, name: str) -> LoadedModel:
        if name not in self._loaded:
            project = self._project
            model = project.reference() if name == SFT else project.whole_model(self._folder)
            self._loaded[name] = LoadedModel(model, project.scorer(model)[0])
        return self._loaded[name]


def reference_model(project: Project) -> EvaluatedModel:
    """The SFT model alone, where nothing is compared with it."""
    loaded: list[LoadedModel] = []

    def use() -> AbstractContextManager[LoadedModel]:
        if not loaded:
            model = project.reference()
            loaded.append(LoadedModel(model, project.scorer(model)[0]))
        return nullcontext(loaded[0])

    return EvaluatedModel(SFT, digest_json(project.identity), use)


def open_models(project: Project, folder: Path) -> EvaluatedModels:
    """The models of an evaluation of a folder: an adapter for the project's SFT model, or a whole model.

    Raises:
        StaleArtifactError: There is nothing in the folder, or models/dpo is damaged or of another graph.
        MachineError: A whole model cannot be loaded, or the adapter is for another model.
        DataError: A whole model's tokenizer makes other tokens.
    """
    if folder == paths.DPO_MODEL:
        DPO_MODEL.check({"graph": project.identity})
    if all((folder / name).is_file() for name in ADAPTER_FILES):
        return AdapterModels(project, folder)
    if (folder / "config.json").is_file():
        return WholeModels(project, folder)
    if not folder.is_dir():
        raise StaleArtifactError(
            f"{folder} is missing; run: dpo-cli train, or name a folder with an adapter or a model"
        )
    if (folder / ADAPTER_FILES[0]).is_file():
        raise MachineError(f"{folder} has no {ADAPTER_FILES[1]}: pickled adapters are not loaded")
    raise StaleArtifactError(
        f"{folder} holds neither an adapter ({ADAPTER_FILES[0]}) nor a model (config.json); run: dpo-cli train"
    )
