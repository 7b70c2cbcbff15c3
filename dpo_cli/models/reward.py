"""The reward model: the graph of policy and reference, with a scalar head beside its adapter.

It starts as the SFT model does in :mod:`dpo_cli.models.adapters`, with SFT's adapter or a new one, and a
head of zeros: every reward is 0 at first. Adapter and head are one PEFT adapter of task SEQ_CLS, so
that ``AutoModelForSequenceClassification`` (``num_labels=1``) with PEFT gives the same rewards.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_cli.core import paths
from dpo_cli.core.errors import StaleArtifactError
from dpo_cli.core.manifest import REWARD
from dpo_cli.core.params import LoraParams
from dpo_cli.models.adapters import SftResult, add_adapter, load_adapter, load_backbone
from dpo_cli.models.device import Machine
from dpo_cli.models.load import keep_weights_unpacked

if TYPE_CHECKING:  # peft takes seconds to import: functions do it that use it
    from peft import PeftModel

REWARD_ADAPTER = "reward"
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


def add_value_head(model: PeftModel) -> Any:
    """Put a head of zeros, trainable, on a policy: it gives every state the value 0 at first."""
    causal = _with_head(model.get_base_model())
    return getattr(causal, _HEAD)


def add_reward_adapter(model: PeftModel, folder: Path) -> Any:
    """Put the adapter of a reward model beside those of a policy, frozen, under the name :data:`REWARD_ADAPTER`.

    Returns:
        The reward model's head, float32.
    """
    import torch
    from peft import LoraConfig, TaskType, load_peft_weights, set_peft_model_state_dict

    from dpo_cli.models.lora import use_short_layers

    config = use_short_layers(LoraConfig.from_pretrained(str(folder)))  # type: ignore[arg-type]
    config.task_type, config.inference_mode, config.modules_to_save = TaskType.CAUSAL_LM, True, None
    weights = load_peft_weights(str(folder), device="cpu")
    (name,) = [name for name in weights if name.endswith(f".{_HEAD}.weight")]
    weight = weights.pop(name)
    head = torch.nn.Linear(weight.shape[1], 1, bias=False, device=model.get_input_embeddings().weight.device)
    with torch.no_grad():
        head.weight.copy_(weight)
    model.add_adapter(REWARD_ADAPTER, config)
    set_peft_model_state_dict(model, weights, adapter_name=REWARD_ADAPTER)
    return head.requires_grad_(False)


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


def check_reward_model(folder: Path, made_of: Mapping[str, Any]) -> None:
    """Refuse a reward model that is not there, or was made of something else than what is there now.

    Raises:
        StaleArtifactError: It is missing or damaged, stage reward was off, or the graph or the data is another.
    """
    if REWARD.read(folder).settings["reward"]["loss"] == "none":
        raise StaleArtifactError(
            f"{folder} holds no reward model: set reward.loss in params.yaml, then {REWARD.remedy(folder)}"
        )
    REWARD.check(made_of, folder)
