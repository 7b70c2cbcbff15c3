"""The reward model: starts where SFT ended, knows nothing at first, and is saved as others load it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from dpo_cli.core import paths
from dpo_cli.core.errors import StaleArtifactError
from dpo_cli.core.manifest import REWARD, SFT, Manifest
from dpo_cli.core.training_params import LoraParams
from dpo_cli.data.tokens import TokenGroup
from dpo_cli.models.adapters import ADAPTER_FILES, FrozenBase, SftResult, add_adapter, save_adapter
from dpo_cli.models.heads import check_reward_model, reward_head
from dpo_cli.models.load import load_model
from dpo_cli.scoring.reward_scorer import RewardScorer
from dpo_cli.scoring.scorer import Scorer

Make = Callable[..., Any]

LORA = LoraParams(r=4, alpha=8.0)
RESULTS = {method: SftResult(method, "digest") for method in ("none", "qlora", "full")}


def randomise(model: Any, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "score" in name:
            parameter.data.normal_(std=0.1, generator=generator)
    return model


@pytest.fixture
def sft(project: Path, tiny_folder: Path, cpu: Any) -> None:
    """models/sft with an adapter that does something."""
    model = randomise(add_adapter(load_model(tiny_folder, cpu, quantization="none"), LORA, 1), 1)
    save_adapter(model, paths.SFT_MODEL, "embedded")
    SFT.write(paths.SFT_MODEL, Manifest({"base": "b"}, settings={"sft": {"method": "qlora"}}), ADAPTER_FILES)


def start(tiny_folder: Path, cpu: Any, quantization: str = "none", method: str = "qlora") -> Any:
    return FrozenBase(tiny_folder, RESULTS[method], cpu, quantization).reward_model_at_start(LORA, 0)


def rewards(model: Any, groups: list[TokenGroup]) -> torch.Tensor:
    with torch.no_grad(), Scorer(model, torch.float32, "shared") as scorer:
        return RewardScorer(scorer, reward_head(model)).score(groups).rewards_BK


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("method", ["qlora", "none"])
def test_it_starts_as_the_sft_model_with_a_head_of_zeros(
    method: str, quantization: str, sft: None, tiny_folder: Path, cpu: Any, make_groups: Make
) -> None:
    groups = make_groups(4)
    model = start(tiny_folder, cpu, quantization, method)
    with torch.no_grad():
        theirs = Scorer(FrozenBase(tiny_folder, RESULTS[method], cpu, quantization).reference(), torch.float32).score(
            groups
        )
        ours = Scorer(model, torch.float32).score(groups)
    assert (ours.logps_BK - theirs.logps_BK).abs().max() <= 1e-4
    assert not rewards(model, groups).any()
    trained = [name for name, value in model.named_parameters() if value.requires_grad]
    assert sum("score" in name for name in trained) == 1
    assert all("lora_" in name or "score" in name for name in trained)
    assert len(trained) == 1 + 2 * 7 * 2
    assert reward_head(model).weight.dtype == torch.float32


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_saved_and_loaded_it_gives_the_same_rewards(
    quantization: str, sft: None, tiny_folder: Path, cpu: Any, tmp_path: Path, make_groups: Make
) -> None:
    groups = make_groups(6)
    model = randomise(start(tiny_folder, cpu, quantization), 2)
    for folder in ("a", "b"):
        save_adapter(model, tmp_path / folder, "embedded")
    for name in ADAPTER_FILES:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    again = FrozenBase(tiny_folder, RESULTS["qlora"], cpu, quantization).reward_model(tmp_path / "a")
    assert not [name for name, value in again.named_parameters() if value.requires_grad]
    found = rewards(again, groups)
    assert torch.equal(found, rewards(model.eval(), groups))
    assert found.std() > 0.1


@pytest.mark.parametrize("method", ["qlora", "none"])
def test_transformers_and_peft_alone_give_the_same_rewards(
    method: str, sft: None, tiny_folder: Path, cpu: Any, tmp_path: Path, make_groups: Make
) -> None:
    """As the model card says: a sequence classifier of one label, and the adapter on it."""
    groups = make_groups(6)
    model = randomise(start(tiny_folder, cpu, method=method), 3)
    save_adapter(model, tmp_path / "saved", "embedded")
    base = AutoModelForSequenceClassification.from_pretrained(tiny_folder, num_labels=1, dtype=torch.float32)
    other = PeftModel.from_pretrained(base, str(tmp_path / "saved")).eval()
    with torch.no_grad():
        theirs = [
            [other(torch.tensor([group.prompt + completion])).logits.item() for completion in group.completions]
            for group in groups
        ]
    assert (rewards(model.eval(), groups) - torch.tensor(theirs, dtype=torch.float64)).abs().max() <= 1e-5


def test_a_reward_model_of_something_else_is_refused(sft: None, tiny_folder: Path, cpu: Any, project: Path) -> None:
    folder, made_of = paths.REWARD_MODEL, {"graph": {"sft": "a"}, "data/preference": {"train": "1"}}
    with pytest.raises(StaleArtifactError, match=r"reward\.json is missing; run: dpo-cli reward"):
        check_reward_model(folder, made_of)
    save_adapter(start(tiny_folder, cpu), folder, "embedded")
    REWARD.write(folder, Manifest(made_of, settings={"reward": {"loss": "bradley_terry"}}), ADAPTER_FILES)
    check_reward_model(folder, made_of)
    with pytest.raises(StaleArtifactError, match="made of another graph: sft is 'b' now, was 'a'; run: dpo-cli reward"):
        check_reward_model(folder, made_of | {"graph": {"sft": "b"}})
    with pytest.raises(StaleArtifactError, match="made of another data/preference: train is"):
        check_reward_model(folder, made_of | {"data/preference": {"train": "2"}})
    weights = folder / ADAPTER_FILES[1]
    kept = weights.read_bytes()
    weights.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    with pytest.raises(StaleArtifactError, match="has changed since it was made"):
        check_reward_model(folder, made_of)
    weights.unlink()
    with pytest.raises(StaleArtifactError, match="is missing; run: dpo-cli reward"):
        check_reward_model(folder, made_of)
    REWARD.write(folder, Manifest(settings={"reward": {"loss": "none"}}))
    with pytest.raises(StaleArtifactError, match=r"holds no reward model: set reward\.loss in params\.yaml"):
        check_reward_model(folder, made_of)
