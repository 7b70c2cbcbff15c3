"""Scalar heads on a causal language model: a reward model's, and the value head of a policy.

A reward model is the graph of policy and reference, with a head beside its adapter. It starts as the SFT model does,
with a head of zeros: every reward is 0 at first. Adapter and head are one PEFT adapter of task SEQ_CLS, so that
AutoModelForSequenceClassification (num_labels=1) with PEFT gives the same rewards.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_cli.core.errors import StaleArtifactError
from dpo_cli.core.manifest import REWARD

if TYPE_CHECKING:  # peft takes seconds to import: functions do it that use it
    from peft import PeftModel

REWARD_ADAPTER = "reward"
_HEAD = "score"
"""The head's name in transformers' sequence classifiers."""


def add_value_head(model: PeftModel) -> Any:
    """Put a head of zeros, trainable, on a policy: it gives every state the value 0 at first."""
    return getattr(with_head(model.get_base_model()), _HEAD)


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


def with_head(causal: Any) -> Any:
    """A causal language model with a head of zeros beside its own, where PEFT looks for one to train."""
    import torch

    embedding = causal.get_input_embeddings().weight
    head = torch.nn.Linear(causal.config.get_text_config().hidden_size, 1, bias=False, device=embedding.device)
    torch.nn.init.zeros_(head.weight)
    setattr(causal, _HEAD, head)
    return causal


def go_on_with_head(model: Any, folder: Path) -> PeftModel:
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
