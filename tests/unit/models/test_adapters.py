"""Adapters: the policy starts as its reference, and what SFT left is checked before it is used."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from dpo_cli.core import paths
from dpo_cli.core.errors import ParamsError, StaleArtifactError
from dpo_cli.core.manifest import SFT, Manifest
from dpo_cli.core.training_params import LoraParams
from dpo_cli.models.adapters import (
    ADAPTER_FILES,
    FrozenBase,
    SftResult,
    adapter_size,
    add_adapter,
    is_dora,
    read_sft_result,
    save_adapter,
    size_in_words,
)
from dpo_cli.models.load import load_model
from dpo_cli.scoring.scorer import Scorer

Make = Callable[..., Any]

LORA = LoraParams(r=4, alpha=8.0)
NONE, QLORA, FULL = (SftResult(method, "digest") for method in ("none", "qlora", "full"))


def randomise(model: Any, seed: int, *, magnitudes: bool = False) -> Any:
    """Give an adapter an update that is not zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1, generator=generator)
        if "magnitude" in name and magnitudes:
            parameter.data *= 1 + 0.2 * torch.rand(parameter.shape, generator=generator)
    return model


@pytest.fixture
def tuned(tiny_folder: Path, cpu: Any) -> Callable[..., Any]:
    """``tuned(seed)``: the tiny model with an adapter that does something."""

    def make(seed: int = 0, lora: LoraParams = LORA) -> Any:
        return randomise(add_adapter(load_model(tiny_folder, cpu, quantization="none"), lora, seed), seed)

    return make


def write_manifest(method: str, base: str) -> None:
    SFT.write(paths.SFT_MODEL, Manifest({"base": base}, settings={"sft": {"method": method}}), ADAPTER_FILES)


@pytest.fixture
def sft(project: Path, tuned: Make) -> Path:
    """models/sft with an adapter in it."""
    save_adapter(tuned(1), paths.SFT_MODEL, "embedded")
    write_manifest("qlora", "base-digest")
    return paths.SFT_MODEL


@pytest.fixture
def logps(make_groups: Make) -> Callable[[Any], torch.Tensor]:
    groups = make_groups(6)

    def score(model: Any) -> torch.Tensor:
        with torch.no_grad():
            return Scorer(model, torch.float32).score(groups).logps_BK

    return score


# --- fresh adapters -----------------------------------------------------------------------


def test_a_fresh_adapter_changes_nothing_and_alone_is_trained(tiny_folder: Path, cpu: Any, logps: Make) -> None:
    model = load_model(tiny_folder, cpu, quantization="none")
    before = logps(model)
    adapted = add_adapter(model, LORA, seed=0)
    assert torch.equal(logps(adapted), before)
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    assert not any("lm_head" in name or "embed" in name for name in trained)


def test_the_seed_decides_the_start(tuned: Make) -> None:
    def start(seed: int) -> list[torch.Tensor]:
        torch.manual_seed(123)
        return [p.detach().clone() for name, p in tuned(seed).named_parameters() if "lora_A" in name]

    assert all(map(torch.equal, start(3), start(3)))
    assert not any(map(torch.equal, start(3), start(4)))


def test_the_shape_is_that_of_the_params(tuned: Make) -> None:
    model = tuned(0, LoraParams(r=3, alpha=6.0, dropout=0.25, target_modules=["v_proj", "q_proj"]))
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (3, 6.0, 0.25)
    layers = {name.split(".lora_")[0].rpartition(".")[2] for name, _ in model.named_parameters() if "lora_" in name}
    assert layers == {"q_proj", "v_proj"}
    assert {p.shape[0] for name, p in model.named_parameters() if "lora_A" in name} == {3}


def test_layers_that_the_model_has_not_are_named(tiny_folder: Path, cpu: Any) -> None:
    names = "down_proj, embed_tokens, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj"
    problem = f"params.yaml: sft.lora.target_modules: the model has no layer 'Wqkv'; there are {names}"
    for quantization in ("none", "nf4"):
        model = load_model(tiny_folder, cpu, quantization=quantization)
        with pytest.raises(ParamsError) as caught:
            add_adapter(model, LoraParams(target_modules=["q_proj", "Wqkv"]), 0)
        assert str(caught.value) == problem


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        (["q_proj", "lm_head"], "lm_head shares its weights with another layer .* would change that one, too"),
        (["embed_tokens"], "embed_tokens shares its weights with another layer"),
        (["norm"], "the model has no layer 'norm'"),
        (["layers.7.mlp.up_proj"], "the model has no layer 'layers.7.mlp.up_proj'"),
        (["all-linear", "lm_head"], "all-linear stands for every linear layer but the head; drop the other names"),
    ],
)
def test_layers_that_cannot_have_an_adapter_are_named(
    tiny_folder: Path, cpu: Any, names: list[str], problem: str
) -> None:
    model = load_model(tiny_folder, cpu, quantization="none")
    with pytest.raises(ParamsError, match=rf"params.yaml: train.lora.target_modules: {problem}"):
        add_adapter(model, LoraParams(target_modules=names), 0, setting="train.lora")


def test_what_is_trained_is_counted(tuned: Make) -> None:
    model = tuned(0, LoraParams(r=3, target_modules=["v_proj", "layers.0.mlp.up_proj"]))
    size = adapter_size(model)
    assert size == {"num_adapted_layers": 3, "num_trained_parameters": 3 * (2 * (64 + 32) + (64 + 128))}
    assert size_in_words(size) == "1,152 parameters in 3 layers"


# --- rsLoRA and DoRA ----------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Could not find a config file")  # of the base model, named and not there
@pytest.mark.parametrize(
    ("variant", "quantization"),
    [({"rslora": True}, "none"), ({"dora": True}, "nf4"), ({"rslora": True, "dora": True}, "none")],
)
@pytest.mark.usefixtures("project")
def test_a_variant_starts_as_the_reference_trains_and_is_what_peft_loads(
    variant: dict[str, bool], quantization: str, tiny_folder: Path, cpu: Any, logps: Make
) -> None:
    lora = LORA.model_copy(update=variant)
    frozen = load_model(tiny_folder, cpu, quantization=quantization)
    fresh = add_adapter(load_model(tiny_folder, cpu, quantization=quantization), lora, seed=0)
    assert (logps(fresh) - logps(frozen)).abs().max() <= 1e-5
    trained = {name for name, parameter in fresh.named_parameters() if parameter.requires_grad}
    assert any("magnitude" in name for name in trained) == bool(variant.get("dora"))

    save_adapter(randomise(fresh, 3, magnitudes=True), paths.SFT_MODEL, "mine")
    expected = logps(fresh)
    assert (expected - logps(frozen)).abs().max() > 0.1
    loaded = PeftModel.from_pretrained(frozen, str(paths.SFT_MODEL))
    assert (logps(loaded) - expected).abs().max() <= 1e-4
    assert (logps(FrozenBase(tiny_folder, QLORA, cpu, quantization).reference()) - expected).abs().max() <= 1e-5
    policy = FrozenBase(tiny_folder, QLORA, cpu, quantization).policy(LORA, 0)
    assert {name for name, parameter in policy.named_parameters() if parameter.requires_grad} == trained
    assert (logps(policy.train()) - expected).abs().max() <= 1e-5
    save_adapter(policy, paths.DPO_MODEL, "mine")
    assert is_dora(paths.DPO_MODEL) == bool(variant.get("dora"))
    pair = FrozenBase(tiny_folder, QLORA, cpu, quantization).pair()
    assert (logps(pair.use_policy()) - expected).abs().max() <= 1e-5
    assert (logps(pair.use_reference()) - expected).abs().max() <= 1e-5


def test_rslora_divides_by_the_root_of_the_rank(tuned: Make) -> None:
    layers = [m for m in tuned(0, LORA.model_copy(update={"rslora": True})).modules() if isinstance(m, LoraLayer)]
    assert {layer.scaling["default"] for layer in layers} == {8.0 / 2.0}  # alpha / sqrt(4)


# --- saving -------------------------------------------------------------------------------


def test_the_same_adapter_is_saved_as_the_same_bytes(tuned: Make, tmp_path: Path) -> None:
    for name in ("one", "two"):
        save_adapter(tuned(5), tmp_path / name, "mine")
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == sorted(ADAPTER_FILES)
    for name in ADAPTER_FILES:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_saved_adapter_names_its_base_model_and_no_path(tuned: Make, tmp_path: Path, tiny_folder: Path) -> None:
    save_adapter(tuned(5), tmp_path, "mine")
    text = (tmp_path / "adapter_config.json").read_text()
    assert json.loads(text)["base_model_name_or_path"] == "mine"
    assert str(tiny_folder) not in text
    assert json.loads(text)["target_modules"] == sorted(json.loads(text)["target_modules"])


# --- what SFT left ------------------------------------------------------------------------


def test_the_digest_is_of_method_base_and_files(project: Path, sft: Path) -> None:
    digests = {read_sft_result("base-digest").digest}
    write_manifest("lora", "base-digest")
    digests.add(read_sft_result("base-digest").digest)
    write_manifest("lora", "other")
    digests.add(read_sft_result("other").digest)
    (sft / ADAPTER_FILES[0]).write_text("{}")
    write_manifest("lora", "other")
    digests.add(read_sft_result("other").digest)
    assert len(digests) == 4


def test_another_base_model_is_refused(sft: Path) -> None:
    with pytest.raises(
        StaleArtifactError, match=r"made of another base: it is 'another' now, was 'base-digest'; run: dpo-cli sft"
    ):
        read_sft_result("another")


def test_before_stage_sft_there_is_nothing(project: Path) -> None:
    with pytest.raises(StaleArtifactError, match=r"sft.json is missing; run: dpo-cli sft"):
        read_sft_result("base-digest")


# --- policy and reference -----------------------------------------------------------------


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_the_policy_starts_as_the_reference(
    sft: Path, tiny_folder: Path, cpu: Any, logps: Make, quantization: str
) -> None:
    for result in (NONE, QLORA):
        reference = logps(FrozenBase(tiny_folder, result, cpu, quantization).reference())
        policy = FrozenBase(tiny_folder, result, cpu, quantization).policy(LORA, 0)
        assert (logps(policy.eval()) - reference).abs().max() <= 1e-5
        assert (logps(policy.train()) - reference).abs().max() <= 1e-5
    assert (logps(FrozenBase(tiny_folder, NONE, cpu, quantization).reference()) - reference).abs().max() > 0.1


def test_the_reference_is_frozen_and_the_policy_trains_its_adapter_alone(
    sft: Path, tiny_folder: Path, cpu: Any
) -> None:
    reference = FrozenBase(tiny_folder, QLORA, cpu, "none").reference()
    assert not reference.training
    assert not any(parameter.requires_grad for parameter in reference.parameters())
    for result in (QLORA, NONE):
        policy = FrozenBase(tiny_folder, result, cpu, "none").policy(LORA, 0)
        trained = [name for name, parameter in policy.named_parameters() if parameter.requires_grad]
        assert len(trained) == 2 * 2 * 7
        assert all("lora_" in name for name in trained)


def test_whole_weights_of_sft_take_the_place_of_the_base(
    project: Path, tiny_folder: Path, cpu: Any, tuned: Make, logps: Make
) -> None:
    merged = tuned(2).merge_and_unload()
    merged.save_pretrained(paths.SFT_MODEL)
    reference = logps(FrozenBase(tiny_folder, FULL, cpu, "none").reference())
    assert (reference - logps(merged)).abs().max() <= 1e-5
    policy = FrozenBase(tiny_folder, FULL, cpu, "none").policy(LORA, 0)
    assert torch.equal(logps(policy), reference)


@pytest.mark.parametrize("result", [NONE, QLORA])
def test_a_pair_is_policy_reference_or_frozen_weights_as_asked(
    sft: Path, tiny_folder: Path, cpu: Any, tuned: Make, logps: Make, result: SftResult
) -> None:
    trained = tuned(7)
    save_adapter(trained, paths.DPO_MODEL, "mine")
    reference = logps(FrozenBase(tiny_folder, result, cpu, "none").reference())
    frozen = logps(FrozenBase(tiny_folder, NONE, cpu, "none").reference())
    pair = FrozenBase(tiny_folder, result, cpu, "none").pair()
    for _ in range(2):
        assert (logps(pair.use_policy()) - logps(trained)).abs().max() <= 1e-5
        assert (logps(pair.use_frozen()) - frozen).abs().max() <= 1e-5
        assert (logps(pair.use_reference()) - reference).abs().max() <= 1e-5
    assert not pair.use_policy().training
    assert (logps(trained) - reference).abs().max() > 0.1


@pytest.mark.parametrize("has_adapter", [True, False])
@pytest.mark.usefixtures("project", "sft")
def test_a_scaled_policy_has_so_much_of_what_training_changed(
    has_adapter: bool, tiny_folder: Path, cpu: Any, tuned: Make, logps: Make
) -> None:
    """W_ref + scale (W_policy - W_ref), made by hand on plain weights."""
    save_adapter(tuned(2), paths.DPO_MODEL, "embedded")
    pair = FrozenBase(tiny_folder, QLORA if has_adapter else NONE, cpu, "none").pair()
    policy, reference = logps(pair.use_policy()), logps(pair.use_reference())
    for scale, expected in ((1.0, policy), (0.0, reference)):
        with pair.scaled_policy(scale) as model:
            torch.testing.assert_close(logps(model), expected, rtol=0, atol=2e-4)
    merged = {}
    for name, folder in (("policy", paths.DPO_MODEL), ("reference", paths.SFT_MODEL)):
        whole = load_model(tiny_folder, cpu, quantization="none")
        if name == "policy" or has_adapter:
            whole = PeftModel.from_pretrained(whole, str(folder)).merge_and_unload()
        merged[name] = {key: value.clone() for key, value in whole.state_dict().items()}
    for scale in (0.3, 1.7):
        by_hand = load_model(tiny_folder, cpu, quantization="none")
        by_hand.load_state_dict(
            {key: value + scale * (merged["policy"][key] - value) for key, value in merged["reference"].items()}
        )
        with pair.scaled_policy(scale) as model:
            torch.testing.assert_close(logps(model), logps(by_hand), rtol=0, atol=2e-4)
    torch.testing.assert_close(logps(pair.use_policy()), policy, rtol=0, atol=0)
    torch.testing.assert_close(logps(pair.use_reference()), reference, rtol=0, atol=0)


def test_a_pair_needs_a_trained_policy(sft: Path, tiny_folder: Path, cpu: Any, tuned: Make) -> None:
    name = ADAPTER_FILES[1]
    save_adapter(tuned(7), paths.DPO_MODEL, "mine")
    (paths.DPO_MODEL / name).unlink()
    with pytest.raises(StaleArtifactError, match=rf"{name} is missing; run: dpo-cli train"):
        FrozenBase(tiny_folder, QLORA, cpu, "none").pair()


def test_no_way_to_load_leaves_a_layer_to_the_trap(
    sft: Path, tiny_folder: Path, cpu: Any, tuned: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: True)
    save_adapter(tuned(7), paths.DPO_MODEL, "mine")
    for result in (NONE, QLORA):
        models = [
            FrozenBase(tiny_folder, result, cpu, "nf4").reference(),
            FrozenBase(tiny_folder, result, cpu, "nf4").policy(LORA, 0),
            FrozenBase(tiny_folder, result, cpu, "nf4").pair().model,
        ]
        for model in models:
            layers = [module for module in model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
            assert len(layers) >= 14
            assert not any(layer.support_avx512bf16_for_cpu for layer in layers)
