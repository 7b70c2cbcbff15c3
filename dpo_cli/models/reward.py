"""The reward model: the graph of policy and reference, with a scalar head beside its adapter.

It starts as the SFT model does in :mod:`dpo_cli.models.adapters`, with SFT's adapter or a new one, and a
head of zeros: every reward is 0 at first. Adapter and head are one PEFT adapter of task SEQ_CLS, so
that ``AutoModelForSequenceClassification`` (``num_labels=1``) with PEFT gives the same rewards.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_cli.core import paths
from dpo_cli.core.artifacts import digest_files, read_json, write_json
from dpo_cli.core.errors import StaleArtifactError
from dpo_cli.core.params import LoraParams
from dpo_cli.models.adapters import ADAPTER_FILES, SftResult, add_adapter, load_adapter, load_backbone
from dpo_cli.models.device import Machine
from dpo_cli.models.load import keep_weights_unpacked

if TYPE_CHECKING:  # peft takes seconds to import: functions do it that use it
    from peft import PeftModel

REWARD_MANIFEST = "reward.json"
_REMEDY = "run: dpo-cli reward"
_HEAD = "score"
"""The head's name in transformers' sequence classifiers."""


def load_reward_model_at_start(
    base: Path, sft: SftResult, machine: Machine, quantization: str, lora: LoraParams, seed: int
) -> PeftModel:
    """The reward model before its first step; adapter and head are trainable."""
    model = _with_head(load_backbone(base, sft, machine, quantization))
    model = (
        _go_on(model, paths.SFT_MODEL) if sft.has_adapter else add_adapter(model, lora, seed, "SEQ_CLS", "reward.lora")
    )
    keep_weights_unpacked(model)
    return model


def load_reward_model(folder: Path, base: Path, sft: SftResult, machine: Machine, quantization: str) -> PeftModel:
    """The trained reward model of a folder, frozen and in eval mode."""
    model = _with_head(load_backbone(base, sft, machine, quantization))
    model = load_adapter(model, folder, trainable=False)
    keep_weights_unpacked(model)
    return model.eval()


def _with_head(causal: Any) -> Any:
    """A causal language model with a head of zeros beside its own, where PEFT looks for one to train."""
    import torch

    embedding = causal.get_input_embeddings().weight
    head = torch.nn.Linear(causal.config.get_text_config().hidden_size, 1, bias=False, device=embedding.device)
    torch.nn.init.zeros_(head.weight)
    setattr(causal, _HEAD, head)
    return causal


def _go_on(model: Any, folder: Path) -> PeftModel:
    """A saved adapter of a causal language model on one with a head, both trainable."""
    from peft import LoraConfig, TaskType, get_peft_model, load_peft_weights, set_peft_model_state_dict

    from dpo_cli.models.lora import use_short_layers

    config = use_short_layers(LoraConfig.from_pretrained(str(folder)))  # type: ignore[arg-type]
    config.task_type, config.inference_mode, config.base_model_name_or_path = TaskType.SEQ_CLS, False, None
    adapted: PeftModel = get_peft_model(model, config)  # type: ignore[assignment]
    weights = load_peft_weights(str(folder), device="cpu")
    weights[f"base_model.model.{_HEAD}.weight"] = reward_head(adapted).weight.detach().cpu()  # the file has none
    set_peft_model_state_dict(adapted, weights)
    return adapted


def reward_head(model: PeftModel) -> Any:
    """The head of a reward model, float32."""
    return getattr(model.get_base_model(), _HEAD)


def write_reward_manifest(folder: Path, loss: str, provenance: dict[str, Any]) -> None:
    """Write the manifest of models/reward; its last file, so that its presence means complete.

    Args:
        folder: The folder that is being built.
        loss: ``none`` where there is no reward model.
        provenance: Everything that the reward model depends on.
    """
    digest = digest_files(folder, ADAPTER_FILES) if loss != "none" else None
    write_json(folder / REWARD_MANIFEST, {"loss": loss, "digest": digest, **provenance})


def check_reward_model(folder: Path, graph: dict[str, Any], data: dict[str, str]) -> None:
    """Refuse a reward model that is not there, or was made of something else than what is there now.

    Raises:
        StaleArtifactError: It is missing or damaged, stage reward was off, or the graph or the data is another.
    """
    manifest = read_json(folder / REWARD_MANIFEST, _REMEDY)
    if manifest["loss"] == "none":
        raise StaleArtifactError(f"{folder} holds no reward model: set reward.loss in params.yaml, then {_REMEDY}")
    if manifest["graph"] != graph:
        raise StaleArtifactError(f"{folder}: trained on another graph than models/sft is now; {_REMEDY}")
    if manifest["data"] != data:
        raise StaleArtifactError(f"{folder}: trained on other data than data/preference is now; {_REMEDY}")
    try:
        digest = digest_files(folder, ADAPTER_FILES)
    except FileNotFoundError as error:
        raise StaleArtifactError(f"{error.filename} is missing; {_REMEDY}") from None
    if digest != manifest["digest"]:
        raise StaleArtifactError(f"{folder} has changed since it was made; {_REMEDY}")
