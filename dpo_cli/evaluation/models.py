"""The models of an evaluation: the policy that is judged, its reference, and what lies between and beyond them.

They are loaded when the first of them is needed, and not at all where everything is known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_cli.core import paths
from dpo_cli.core.artifacts import digest_files, digest_json
from dpo_cli.core.errors import DataError, MachineError, StaleArtifactError
from dpo_cli.core.manifest import DPO as DPO_MODEL
from dpo_cli.core.manifest import PPO as PPO_MODEL
from dpo_cli.core.manifest import Manifest
from dpo_cli.core.params import TrainParams
from dpo_cli.core.progress import Reporter
from dpo_cli.core.text import in_one_line
from dpo_cli.data.tokenize import prompt_ids
from dpo_cli.evaluation import BASE, DPO, SFT
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


@dataclass(frozen=True)
class EvaluatedModels:
    """Policy and reference.

    Attributes:
        policy: The model that is judged.
        reference: The SFT model.
        close: Forgets the models; their memory is the judge's.
        base: The model before SFT; None where it is not in memory with the others.
        scaled: The model with so many times what training changed; None where that is not known.
    """

    policy: EvaluatedModel
    reference: EvaluatedModel
    close: Callable[[], None]
    base: EvaluatedModel | None = None
    scaled: Callable[[float], EvaluatedModel] | None = None


def open_models(project: Project, folder: Path) -> EvaluatedModels:
    """The models of an evaluation of a folder: an adapter for the project's SFT model, or a whole model.

    Raises:
        StaleArtifactError: There is nothing in the folder, or models/dpo or models/ppo is damaged or of another graph.
        MachineError: A whole model cannot be loaded, or the adapter is for another model.
        DataError: A whole model's tokenizer makes other tokens.
    """
    for artifact in (DPO_MODEL, PPO_MODEL):
        if folder == artifact.folder:
            if artifact is PPO_MODEL and PPO_MODEL.read().settings["ppo"]["reward"] == "none":
                raise StaleArtifactError(
                    f"{folder} holds no model: set ppo.reward in params.yaml, then run: dpo-cli ppo"
                )
            artifact.check({"graph": project.identity})
    if all((folder / name).is_file() for name in ADAPTER_FILES):
        return adapter_models(project, folder)
    if (folder / "config.json").is_file():
        return _whole_models(project, folder)
    if not folder.is_dir():
        raise StaleArtifactError(
            f"{folder} is missing; run: dpo-cli train, or name a folder with an adapter or a model"
        )
    if (folder / ADAPTER_FILES[0]).is_file():
        raise MachineError(f"{folder} has no {ADAPTER_FILES[1]}: pickled adapters are not loaded")
    raise StaleArtifactError(
        f"{folder} holds neither an adapter ({ADAPTER_FILES[0]}) nor a model (config.json); run: dpo-cli train"
    )


def adapter_models(project: Project, adapter: Path) -> EvaluatedModels:
    """A trained adapter on the frozen weights of its reference.

    Raises:
        StaleArtifactError: There is no adapter in the folder.
    """
    try:
        policy = digest_json({"graph": project.identity, "adapter": digest_files(adapter, ADAPTER_FILES)})
    except FileNotFoundError as error:
        raise StaleArtifactError(f"{error.filename} is missing; {DPO_MODEL.remedy(adapter)}") from None
    loaded: list[tuple[ModelPair, Scorer]] = []

    def load() -> tuple[ModelPair, Scorer]:
        if not loaded:
            try:
                pair = project.pair(adapter)
            except (RuntimeError, ValueError, KeyError, TypeError) as error:
                raise MachineError(
                    f"{adapter}: no adapter for the project's model: {_misfit(error)}; give one that was trained on it"
                ) from error
            loaded.append((pair, project.scorer(pair.use_policy())[0]))
        return loaded[0]

    def model(
        name: str, digest: str, switch: Callable[[ModelPair], AbstractContextManager[Any]], called: str = ""
    ) -> EvaluatedModel:
        @contextmanager
        def use() -> Iterator[LoadedModel]:
            pair, scorer = load()
            with switch(pair) as switched:
                yield LoadedModel(switched, scorer)

        return EvaluatedModel(name, digest, use, called)

    def scaled(scale: float) -> EvaluatedModel:
        for folder in (adapter, *([paths.SFT_MODEL] if project.sft.has_adapter else [])):
            if is_dora(folder):
                raise DataError(
                    f"evaluate.scales cannot go with {folder}: a multiple of what DoRA changed is no such adapter; set"
                    " it to []"
                )
        digest = digest_json([policy, scale])
        return model(DPO, digest, lambda pair: pair.scaled_policy(scale), f"{DPO} x {scale:g}")

    def close() -> None:
        loaded.clear()
        release_memory()

    base = None
    if project.sft.has_adapter:
        digest = digest_json(["base", project.identity])
        base = model(BASE, digest, lambda pair: nullcontext(pair.use_frozen()))
    return EvaluatedModels(
        model(DPO, policy, lambda pair: nullcontext(pair.use_policy())),
        model(SFT, digest_json(project.identity), lambda pair: nullcontext(pair.use_reference())),
        close,
        base,
        scaled,
    )


def _misfit(error: Exception) -> str:
    """What PyTorch says of weights that do not fit: the first of them, below its headline, and how many there are."""
    _, *misfits = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    if not misfits:
        return words_of(error)
    more = f" ({len(misfits)} misfits in all)" if len(misfits) > 1 else ""
    return f"{in_one_line(misfits[0].rstrip('.'))}{more}"


def _whole_models(project: Project, folder: Path) -> EvaluatedModels:
    """A whole model of one's own beside the reference: two sets of weights in memory."""
    check_model_folder(folder)
    if load_tokenizer(folder).get_vocab() != project.tokenizer.get_vocab():
        raise DataError(
            f"{folder} has another vocabulary than the project's model, so their probabilities cannot be compared;"
            " make a project of its own for it: dpo-cli init DIR --model"
        )
    digest = digest_json({"graph": project.identity, "model": digest_files(folder, model_files(folder))})
    loaded: dict[str, LoadedModel] = {}

    def close() -> None:
        loaded.clear()
        release_memory()

    policy = _by_itself(project, DPO, digest, lambda: project.whole_model(folder), loaded)
    return EvaluatedModels(policy, reference_model(project, loaded), close)


def reference_model(project: Project, loaded: dict[str, LoadedModel] | None = None) -> EvaluatedModel:
    """The SFT model with weights of its own; ``loaded`` holds what is in memory."""
    return _by_itself(project, SFT, digest_json(project.identity), project.reference, {} if loaded is None else loaded)


def _by_itself(
    project: Project, name: str, digest: str, load: Callable[[], Any], loaded: dict[str, LoadedModel]
) -> EvaluatedModel:
    def use() -> AbstractContextManager[LoadedModel]:
        if name not in loaded:
            model = load()
            loaded[name] = LoadedModel(model, project.scorer(model)[0])
        return nullcontext(loaded[name])

    return EvaluatedModel(name, digest, use)


# --- what is known of a model -----------------------------------------------------------------


@dataclass(frozen=True)
class Evaluated:
    """What is judged, and what is known of it.

    Attributes:
        folder: An adapter for the project's SFT model, or a whole model.
        name: Of the policy as a method in a votes file.
        train: The settings of its training: beta, and whether a log-ratio was learned.
        out: Where its files go.
        is_of_this_data: Whether it is known to have been trained on this project's data.
        trained: How long it was trained; None where it was not trained by DPO, or nothing is known of it.
        has_beta: Whether beta is more than a unit: a policy of reinforcement learning has none.
    """

    folder: Path
    name: str
    train: TrainParams
    out: Path
    is_of_this_data: bool = True
    trained: Mapping[str, int] | None = None
    has_beta: bool = True


def settings_of(manifest: Manifest, folder: Path) -> TrainParams:
    """The settings that a model was trained with.

    Raises:
        StaleArtifactError: This version does not know them.
    """
    try:
        return TrainParams.model_validate(manifest.settings["train"])
    except ValueError:
        raise StaleArtifactError(
            f"{folder / DPO_MODEL.name} has settings of another version of dpo-cli; {DPO_MODEL.remedy(folder)}"
        ) from None


def training_of(
    folder: Path, default: TrainParams, project: Project, reporter: Reporter
) -> tuple[TrainParams, Mapping[str, int] | None, bool]:
    """How a model was trained, how long (None: not known, or not by DPO), and whether on this project's graph and data.

    Raises:
        StaleArtifactError: It is not as its training left it.
    """
    artifact = next((one for one in (DPO_MODEL, PPO_MODEL) if (folder / one.name).is_file()), None)
    if artifact is None:
        reporter.warn(
            f"evaluate: {folder} does not say what it was trained on; its held-out figures mean nothing if it has read"
            " the held-out prompts"
        )
        return default, None, False
    try:
        manifest = artifact.read(folder)
        train = settings_of(manifest, folder) if artifact is DPO_MODEL else default
    except StaleArtifactError:
        reporter.warn(
            f"evaluate: {folder / artifact.name} is not one of this version, and is not read; beta is train.beta's"
        )
        return default, None, False
    artifact.refuse_changed(manifest, folder)
    is_ours = all(manifest.made_of.get(name) == now for name, now in project.made_of().items())
    if not is_ours:
        reporter.warn(
            f"evaluate: {folder} was trained on another graph or other data than the project's: it may have read the"
            " held-out prompts"
        )
    if artifact is DPO_MODEL:
        return train, manifest.facts, is_ours
    reporter.say(
        f"evaluate: {folder} was tuned by reinforcement and has no beta: margins and held-out loss are in the unit of"
        f" train.beta, {default.beta:g}"
    )
    return train, None, is_ours


def count_leaked_prompts(held_out: Iterable[str]) -> int:
    """Held-out prompts, by their ids, that are in any training data.

    Raises:
        StaleArtifactError: There is none.
    """
    seen: set[str] = set()
    for path in (paths.SFT_DATA / "train.parquet", paths.PREFERENCE_DATA / "train.parquet"):
        if not path.is_file():
            raise StaleArtifactError(f"{path} is missing; run: dpo-cli repro")
        seen |= prompt_ids(path)
    return sum(group in seen for group in held_out)
