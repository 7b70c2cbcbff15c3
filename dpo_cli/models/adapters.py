"""LoRA adapters, and the graph that reference and policy share.

The reference model is the base with what SFT made of it: an adapter on it, or whole weights
of its own, or nothing. The policy starts as exactly that: it goes on with SFT's adapter, or
with a new one whose update is zero.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_cli.core import paths
from dpo_cli.core.artifacts import digest_json, write_json
from dpo_cli.core.errors import MachineError, ParamsError, StaleArtifactError
from dpo_cli.core.manifest import DPO, SFT
from dpo_cli.core.text import shown
from dpo_cli.core.training_params import LoraParams
from dpo_cli.models.device import Machine
from dpo_cli.models.folder import ADAPTER_FILES
from dpo_cli.models.heads import go_on_with_head, with_head
from dpo_cli.models.load import keep_weights_unpacked, load_model

if TYPE_CHECKING:  # peft takes seconds to import: functions do it that use it
    from peft import PeftModel

POLICY, REFERENCE = "default", "reference"


def add_adapter(
    model: Any, lora: LoraParams, seed: int, task: str = "CAUSAL_LM", setting: str = "sft.lora"
) -> PeftModel:
    """Put a fresh LoRA adapter with a zero update on a model (Hu et al. 2021, section 4.1).

    ``task`` is PEFT's name for what it is for: with SEQ_CLS the head named ``score`` is trained and saved with it.
    ``setting`` is where its shape stands in params.yaml, for messages.

    Raises:
        ParamsError: The model has no layer of a given name, or one that another layer shares its weights with.
        MachineError: PEFT cannot put it on the model.
    """
    import torch
    from peft import LoraConfig, TaskType, get_peft_model

    from dpo_cli.models.lora import use_short_layers

    names = lora.target_modules
    refuse_targets(names, *adaptable_layers(model), setting)
    torch.manual_seed(seed)
    config = use_short_layers(
        LoraConfig(
            task_type=TaskType(task),
            r=lora.r,
            lora_alpha=lora.alpha,  # type: ignore[arg-type]
            lora_dropout=lora.dropout,
            use_rslora=lora.rslora,
            use_dora=lora.dora,
            target_modules="all-linear" if names == ["all-linear"] else sorted(names),
        )
    )
    try:
        return get_peft_model(model, config)  # type: ignore[return-value]
    except ValueError as error:
        raise MachineError(f"the adapter does not fit the model: {str(error).splitlines()[0]}") from error


def adaptable_layers(model: Any) -> tuple[list[str], list[str]]:
    """Names of the layers that can have an adapter, and of those among them that share their weights."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    modules = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Embedding | Conv1D)
    }
    uses = Counter(id(module.weight) for module in modules.values())
    return [*modules], [name for name, module in modules.items() if uses[id(module.weight)] > 1]


def refuse_targets(names: Sequence[str], layers: Sequence[str], tied: Sequence[str], setting: str) -> None:
    """Refuse names of layers that would be passed over, or that cannot be merged.

    Args:
        names: Those to have an adapter; each stands for all layers of that name, or whose name ends with it.
        layers: All that can have one.
        tied: Those among them that share their weights.
        setting: Where the names stand in params.yaml.

    Raises:
        ParamsError: With the names there are.
    """
    where = f"params.yaml: {setting}.target_modules"
    if list(names) == ["all-linear"]:
        return
    if "all-linear" in names:
        raise ParamsError(f"{where}: all-linear stands for every linear layer but the head; drop the other names")
    found = {name: [layer for layer in layers if f".{layer}".endswith(f".{name}")] for name in names}
    if unknown := [name for name, matching in found.items() if not matching]:
        known = ", ".join(sorted({layer.rpartition(".")[2] for layer in layers}))
        raise ParamsError([f"{where}: the model has no layer {shown(name)}; there are {known}" for name in unknown])
    for name, matching in found.items():
        if shared := [layer for layer in matching if layer in tied]:
            raise ParamsError(
                f"{where}: {name} shares its weights with another layer ({', '.join(sorted(tied))}): merging the"
                f" adapter into {shared[0]} would change that one, too, and move log-probabilities; leave it out"
            )


def without_numbers(layer: str) -> str:
    """A layer's name with ``*`` for numbers, so that one stands for all of its kind."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", layer)


def adapter_size(model: Any) -> dict[str, Any]:
    """How much of a model is trained, as metrics: parameters, and layers with an adapter where there is one."""
    from peft.tuners.lora import LoraLayer

    adapted = sum(isinstance(module, LoraLayer) for module in model.modules())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return ({"num_adapted_layers": adapted} if adapted else {}) | {"num_trained_parameters": trained}


def size_in_words(metrics: Mapping[str, Any]) -> str:
    """The same for a table."""
    trained = f"{metrics['num_trained_parameters']:,} parameters"
    return f"{trained} in {metrics['num_adapted_layers']} layers" if "num_adapted_layers" in metrics else trained


def save_adapter(model: PeftModel, folder: Path, base_name: str) -> None:
    """Write the policy's adapter in PEFT's layout, the same bytes for the same adapter."""
    model.save_pretrained(str(folder), selected_adapters=[POLICY])
    (folder / "README.md").unlink(missing_ok=True)
    config_path = folder / ADAPTER_FILES[0]
    config = json.loads(config_path.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = base_name
    for key, value in config.items():
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            config[key] = sorted(value)
    write_json(config_path, config)


@dataclass(frozen=True)
class SftResult:
    """What stage sft left in models/sft.

    Attributes:
        method: none, adapter, full, lora or qlora.
        digest: One digest of everything in it that the graph depends on.
        data: SHA-256 of the tables it was trained on, by split; None where it was not trained.
        rounds: Those that made it, where an earlier project did (:mod:`dpo_cli.models.rounds`).
    """

    method: str
    digest: str
    data: dict[str, str] | None = None
    rounds: Sequence[Mapping[str, Any]] = ()

    @property
    def has_adapter(self) -> bool:
        """Whether SFT made an adapter."""
        return self.method in ("adapter", "lora", "qlora")


def read_sft_result(base: str) -> SftResult:
    """Check models/sft against the base model's digest and say what it is.

    Raises:
        StaleArtifactError: It is missing, damaged, or made of another base model.
    """
    manifest = SFT.check({"base": base})
    method = manifest.settings["sft"]["method"]
    digest = digest_json({"method": method, "base": base, "files": digest_json(manifest.files)})
    made_of = manifest.made_of
    return SftResult(method, digest, made_of.get("data/sft"), made_of.get("rounds", ()))


@dataclass(frozen=True)
class ModelPair:
    """Policy and reference as one model in memory; only the adapter changes."""

    model: PeftModel
    reference_adapter: str | None

    def use_policy(self) -> Any:
        """The model as the policy."""
        self.model.enable_adapter_layers()  # type: ignore[operator]
        self.model.set_adapter(POLICY)
        return self.model.eval()

    @contextmanager
    def scaled_policy(self, scale: float) -> Iterator[Any]:
        """The model with so many times what training changed: weights W_ref + scale (W_policy - W_ref).

        Not for DoRA (:func:`is_dora`), whose adapters do not add up.
        """
        from peft.tuners.lora import LoraLayer

        shares = {POLICY: scale}
        if self.reference_adapter is not None:
            shares[self.reference_adapter] = 1 - scale
        layers = [module for module in self.model.modules() if isinstance(module, LoraLayer)]
        whole = [dict(layer.scaling) for layer in layers]
        self.model.enable_adapter_layers()  # type: ignore[operator]
        self.model.base_model.set_adapter(list(shares))  # type: ignore[operator]
        try:
            for layer, factors in zip(layers, whole, strict=True):
                layer.scaling.update({name: share * factors[name] for name, share in shares.items() if name in factors})
            yield self.model.eval()
        finally:
            for layer, factors in zip(layers, whole, strict=True):
                layer.scaling.update(factors)
            self.use_policy()

    def use_reference(self) -> Any:
        """The model as the reference."""
        if self.reference_adapter is None:
            return self.use_frozen()
        self.model.enable_adapter_layers()  # type: ignore[operator]
        self.model.set_adapter(self.reference_adapter)
        return self.model.eval()

    def use_frozen(self) -> Any:
        """The frozen weights without any adapter: the base, or what SFT made of all of it."""
        self.model.disable_adapter_layers()  # type: ignore[operator]
        return self.model.eval()


def load_adapter(model: Any, folder: Path, *, trainable: bool) -> PeftModel:
    """Put a saved adapter on a model, as its policy."""
    from peft import LoraConfig, PeftModel

    from dpo_cli.models.lora import use_short_layers

    config = use_short_layers(LoraConfig.from_pretrained(str(folder)))  # type: ignore[arg-type]
    return PeftModel.from_pretrained(model, str(folder), adapter_name=POLICY, is_trainable=trainable, config=config)


def is_dora(folder: Path) -> bool:
    """Whether a saved adapter trains lengths apart from directions, so that its change of the weights is not B A."""
    return bool(json.loads((folder / ADAPTER_FILES[0]).read_text(encoding="utf-8")).get("use_dora"))


# --- policy, reference and reward model -----------------------------------------------------


@dataclass(frozen=True)
class FrozenBase:
    """The frozen weights that policy, reference and reward model stand on; whatever is loaded is new in memory.

    Attributes:
        base: Directory of the base model.
        sft: What stage sft made of it.
        machine: Device and compute dtype.
        quantization: ``nf4`` or ``none``.
    """

    base: Path
    sft: SftResult
    machine: Machine
    quantization: str

    def backbone(self) -> Any:
        """The weights under the adapter: the base, or what SFT made of all of it."""
        folder = paths.SFT_MODEL if self.sft.method == "full" else self.base
        return load_model(folder, self.machine, quantization=self.quantization)

    def reference(self) -> Any:
        """The reference model, frozen and in eval mode."""
        model = self.backbone()
        if self.sft.has_adapter:
            model = load_adapter(model, paths.SFT_MODEL, trainable=False)
            keep_weights_unpacked(model)
        return model.eval()

    def policy(self, lora: LoraParams | None, seed: int) -> PeftModel:
        """The policy before its first step: equal to the reference, its adapter trainable."""
        model = self.backbone()
        policy = (
            load_adapter(model, paths.SFT_MODEL, trainable=True)
            if self.sft.has_adapter
            else add_adapter(model, lora or LoraParams(), seed, setting="train.lora")
        )
        keep_weights_unpacked(policy)
        return policy

    def pair_at_start(self, lora: LoraParams | None, seed: int) -> ModelPair:
        """The policy before its first step, and its reference, on one set of weights."""
        policy = self.policy(lora, seed)
        if self.sft.has_adapter:
            policy.load_adapter(str(paths.SFT_MODEL), adapter_name=REFERENCE)
        return ModelPair(policy, REFERENCE if self.sft.has_adapter else None)

    def pair(self, adapter: Path = paths.DPO_MODEL) -> ModelPair:
        """A trained policy, of a folder, and its reference, on one set of weights.

        Raises:
            StaleArtifactError: There is no adapter in the folder.
        """
        for name in ADAPTER_FILES:
            if not (adapter / name).is_file():
                raise StaleArtifactError(f"{adapter / name} is missing; {DPO.remedy(adapter)}")
        pair = load_adapter(self.backbone(), adapter, trainable=False)
        if self.sft.has_adapter:
            pair.load_adapter(str(paths.SFT_MODEL), adapter_name=REFERENCE)
        keep_weights_unpacked(pair)
        return ModelPair(pair, REFERENCE if self.sft.has_adapter else None)

    def reward_model(self, folder: Path = paths.REWARD_MODEL) -> PeftModel:
        """The trained reward model of a folder, frozen and in eval mode."""
        model = load_adapter(with_head(self.backbone()), folder, trainable=False)
        keep_weights_unpacked(model)
        return model.eval()

    def reward_model_at_start(self, lora: LoraParams | None, seed: int) -> PeftModel:
        """The reward model before its first step; adapter and head are trainable."""
        model = with_head(self.backbone())
        model = (
            go_on_with_head(model, paths.SFT_MODEL)
            if self.sft.has_adapter
            else add_adapter(model, lora or LoraParams(), seed, "SEQ_CLS", "reward.lora")
        )
        keep_weights_unpacked(model)
        return model

    def whole_model(self, folder: Path) -> Any:
        """Any model of a folder, held and computed as these."""
        return load_model(folder, self.machine, quantization=self.quantization)
