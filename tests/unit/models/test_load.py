"""Loading: safetensors only, no code from the directory, and 4-bit weights that stay what they are."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from dpo_cli.core import paths
from dpo_cli.core.errors import MachineError, ParamsError
from dpo_cli.core.params import ModelParams, RuntimeParams
from dpo_cli.core.training_params import LoraParams
from dpo_cli.models import load
from dpo_cli.models.adapters import add_adapter
from dpo_cli.models.folder import base_folder, check_model_folder
from dpo_cli.models.load import context_length, load_model, load_tokenizer, open_encoder, save_tokenizer
from dpo_cli.scoring.scorer import Scorer

Make = Callable[..., Any]


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may change."""
    return shutil.copytree(tiny_folder, tmp_path / "model")


# --- memory -------------------------------------------------------------------------------

_QUANTIZE, _COPY = "bitsandbytes.functional.quantize_4bit", "transformers.core_model_loading._materialize_copy"


@pytest.mark.parametrize(
    ("error", "quantization", "place", "remedy"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), "nf4", _QUANTIZE, "take a smaller one"),
        (RuntimeError("HIP out of memory"), "nf4", _COPY, "take a smaller one"),
        (torch.OutOfMemoryError("CUDA out of memory."), "none", _COPY, r"hold it in 4 bits \(quantization nf4\)"),
    ],
)
def test_memory_that_runs_out_while_loading_is_said(
    error: Exception,
    quantization: str,
    place: str,
    remedy: str,
    tiny_folder: Path,
    cpu: Any,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """transformers catches what quantizing raises, and raises something else that does not name it."""

    def full(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(place, full)
    load.quiet_libraries()
    said = f"^{tiny_folder}: the model does not fit into the memory of cpu; free some, or {remedy}$"
    with pytest.raises(MachineError, match=said):
        load_model(tiny_folder, cpu, quantization=quantization)
    assert capfd.readouterr().err == ""
    error.args = ("blocks of another size",)
    if quantization == "nf4" and type(error) is RuntimeError:
        with pytest.raises(MachineError, match="the model cannot be loaded"):
            load_model(tiny_folder, cpu, quantization=quantization)


# --- which directory ----------------------------------------------------------------------

OWN = ModelParams(name="mine")


def test_the_environment_goes_before_params(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert base_folder(OWN, RuntimeParams(model_path=str(folder))) == folder
    monkeypatch.setenv("DPO_MODEL_PATH", str(folder))
    assert base_folder(OWN, RuntimeParams(model_path="elsewhere")) == folder
    with pytest.raises(ParamsError, match="reads no directory; give the model a name of its own"):
        base_folder(ModelParams(), RuntimeParams())
    monkeypatch.delenv("DPO_MODEL_PATH")
    assert base_folder(ModelParams(), RuntimeParams()) == paths.BASE
    with pytest.raises(ParamsError, match="must be the directory of model 'mine'"):
        base_folder(OWN, RuntimeParams())


# --- directories that are refused ---------------------------------------------------------


def test_a_folder_that_holds_no_model_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(MachineError, match=r"model directory .*nothing is missing"):
        check_model_folder(tmp_path / "nothing")
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    with pytest.raises(MachineError, match=r"is a Git LFS pointer, not weights; fetch them with: git lfs pull"):
        check_model_folder(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(MachineError, match="has no weights"):
        check_model_folder(folder)
    (folder / "config.json").unlink()
    with pytest.raises(MachineError, match=r"has no config.json"):
        check_model_folder(folder)


def test_pickled_weights_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(MachineError, match=r"only pickled weights \(pytorch_model.bin\), which can run code"):
        check_model_folder(folder)
    with pytest.raises(MachineError, match="only pickled weights"):
        load_model(folder, None, quantization="none")  # type: ignore[arg-type]


@pytest.mark.parametrize("model_type", ["llama", "no_such_model"])
def test_code_in_the_directory_never_runs(folder: Path, cpu: Any, tmp_path: Path, model_type: str) -> None:
    marker = tmp_path / "ran"
    code = f"open({str(marker)!r}, 'w')\nfrom transformers import LlamaConfig as Own, LlamaForCausalLM as OwnModel\n"
    (folder / "own.py").write_text(code)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": model_type, "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.OwnModel"}}
    (folder / "config.json").write_text(json.dumps(config))
    if model_type == "llama":
        load_model(folder, cpu, quantization="none")
    else:
        with pytest.raises(MachineError, match=r"config.json cannot be used"):
            load_model(folder, cpu, quantization="none")
    assert not marker.exists()


def test_weights_that_lack_a_tensor_are_refused(folder: Path, cpu: Any) -> None:
    """transformers would draw the missing tensor at random and only log it."""
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MachineError):
        load_model(folder, cpu, quantization="none")


def test_a_missing_tokenizer_is_named(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(MachineError, match="the tokenizer cannot be loaded"):
        load_tokenizer(folder)


# --- what is loaded -----------------------------------------------------------------------


def test_plain_weights_follow_the_machine_unless_they_are_trained(tiny_folder: Path) -> None:
    machine = load.Machine(torch.device("cpu"), torch.bfloat16)
    frozen = load_model(tiny_folder, machine, quantization="none")
    trained = load_model(tiny_folder, machine, quantization="none", trainable=True)
    assert {parameter.dtype for parameter in frozen.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in trained.parameters()} == {torch.float32}


def test_the_configurations_dropout_is_off(tmp_path: Path, cpu: Any) -> None:
    """The reference is scored in eval mode and the policy trained: dropout would part them."""
    from transformers import GPT2Config, GPT2LMHeadModel

    dropout = {"attn_pdrop": 0.5, "embd_pdrop": 0.5, "resid_pdrop": 0.5}
    config = GPT2Config(vocab_size=50, n_embd=32, n_layer=1, n_head=2, bos_token_id=None, eos_token_id=1, **dropout)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    model = load_model(tmp_path, cpu, quantization="none")
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(model.eval()(input_ids=tokens).logits, model.train()(input_ids=tokens).logits)


def test_the_context_length_is_the_configurations(tiny_folder: Path, folder: Path) -> None:
    assert context_length(tiny_folder) == 256
    (folder / "config.json").write_text(json.dumps({"model_type": "bloom"}))
    assert context_length(folder) is None


def test_a_model_whose_positions_change_for_a_whole_batch_ends_where_they_are_fixed(folder: Path) -> None:
    """Longrope turns all texts of a batch by its long factors once one of them is beyond the original length."""
    factors = {"short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
    config = {
        "model_type": "phi3",
        "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096,
        "rope_scaling": {"type": "longrope", **factors},
    }
    (folder / "config.json").write_text(json.dumps(config))
    assert context_length(folder) == 4096
    del config["rope_scaling"]
    (folder / "config.json").write_text(json.dumps(config))
    assert context_length(folder) == 131072


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_a_4_bit_model_on_the_cpu_keeps_no_hold_of_the_files_it_came_from(folder: Path, cpu: Any) -> None:
    model = load_model(folder, cpu, quantization="nf4")
    assert str(folder) not in Path("/proc/self/maps").read_text(encoding="utf-8")
    assert torch.equal(
        model.get_input_embeddings().weight, load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    )


def test_nf4_holds_the_linear_layers_in_4_bits_and_stays_near(tiny_folder: Path, cpu: Any, make_groups: Make) -> None:
    plain = load_model(tiny_folder, cpu, quantization="none")
    quantized = load_model(tiny_folder, cpu, quantization="nf4")
    layers = [module for module in quantized.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    assert len(layers) == 2 * 7
    assert {layer.weight.dtype for layer in layers} == {torch.uint8}
    assert {layer.weight.quant_state.quant_type for layer in layers} == {"nf4"}
    assert all(layer.weight.quant_state.nested for layer in layers)
    assert not any(parameter.requires_grad for parameter in quantized.parameters())
    groups = make_groups(10)
    with torch.no_grad():
        exact, rough = (Scorer(model, torch.float32).score(groups).logps_BK for model in (plain, quantized))
    assert 1e-3 < (exact - rough).abs().mean() < 0.15 * exact.abs().mean()


# --- the trap: bitsandbytes repacks 4-bit weights on CPUs with AVX512-BF16 ------------------------

_repacks = bitsandbytes.functional.has_avx512bf16()
needs_the_trap = pytest.mark.skipif(
    not _repacks, reason="this CPU has no AVX512-BF16, so bitsandbytes does not repack weights here"
)


@dataclass
class Observed:
    """What a model says and learns."""

    logps: torch.Tensor
    gradients: dict[str, torch.Tensor]
    weights: list[bytes]


@dataclass
class Trap:
    """A 4-bit LoRA model seen in training, then once in eval mode without gradients, then in training again."""

    before: Observed
    eval_logps: torch.Tensor
    after: Observed


@pytest.fixture
def spring(tiny_folder: Path, cpu: Any, make_groups: Make, monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], Trap]:
    groups = make_groups(6)

    def observe(model: Any, scorer: Scorer) -> Observed:
        model.train()
        model.zero_grad()
        scores = scorer.score(groups)
        (scores.logps_BK[:, 0] - scores.logps_BK[:, 1]).sum().backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        layers = [module for module in model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
        weights = [layer.weight.detach().numpy().tobytes() for layer in layers]
        return Observed(scores.logps_BK.detach(), gradients, weights)

    def run(remedy: bool) -> Trap:
        if not remedy:
            monkeypatch.setattr(load, "keep_weights_unpacked", lambda model: None)
        model = add_adapter(load_model(tiny_folder, cpu, quantization="nf4"), LoraParams(r=4), seed=0)
        load.keep_weights_unpacked(model)
        generator = torch.Generator().manual_seed(0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.1, generator=generator)
        # the scorer's own look at the head, in eval mode without gradients, would spring the trap before its time
        monkeypatch.setattr(Scorer, "_find_head", lambda self: "linear")
        # and a merged weight is made from the packed one by dequantize_4bit, which does not repack it
        monkeypatch.setattr("dpo_cli.models.lora.merging_pays", lambda *arguments: False)
        scorer = Scorer(model, torch.float32)
        before = observe(model, scorer)
        model.eval()
        with torch.no_grad():
            eval_logps = scorer.score(groups).logps_BK
        return Trap(before, eval_logps, observe(model, scorer))

    return run


@needs_the_trap
def test_evaluating_a_4_bit_model_changes_nothing(spring: Callable[[bool], Trap]) -> None:
    trap = spring(True)
    assert trap.after.weights == trap.before.weights
    assert (trap.eval_logps - trap.before.logps).abs().max() <= 1e-4
    assert torch.equal(trap.after.logps, trap.before.logps)
    assert trap.before.gradients.keys() == trap.after.gradients.keys()
    for name, gradient in trap.before.gradients.items():
        assert gradient.abs().max() > 0, name
        assert torch.equal(trap.after.gradients[name], gradient), name


@needs_the_trap
@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered")
def test_without_the_remedy_evaluating_a_4_bit_model_breaks_it(spring: Callable[[bool], Trap]) -> None:
    """If this fails bitsandbytes has changed: see whether keep_weights_unpacked is needed any more."""
    trap = spring(False)
    assert trap.after.weights != trap.before.weights
    assert (trap.eval_logps - trap.before.logps).abs().max() > 1e-3
    lowest = next(name for name in trap.before.gradients if "layers.0" in name and "q_proj.lora_B" in name)
    true, found = trap.before.gradients[lowest], trap.after.gradients[lowest]
    cosine = torch.nn.functional.cosine_similarity(true.flatten(), found.flatten(), dim=0)
    assert cosine < 0.9


# --- what is saved for whoever serves the model ---------------------------------------------


def test_what_is_saved_stops_where_an_answer_ends(folder: Path, tmp_path: Path) -> None:
    """Where the template ends a turn with a token of its own, the tokenizer and generation know it."""
    tokenizer = load_tokenizer(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}assistant\n{% endif %}"
    )
    end, eos = tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.eos_token_id
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 3], "top_p": 0.9}')
    encoder = open_encoder(folder, tokenizer)
    assert encoder.stop_ids == sorted({1, 3, end, eos})
    save_tokenizer(tokenizer, encoder, tmp_path / "saved", folder)
    saved = load_tokenizer(tmp_path / "saved")
    assert (saved.eos_token_id, tokenizer.eos_token_id) == (end, eos)
    assert saved.chat_template == tokenizer.chat_template
    config = transformers.GenerationConfig.from_pretrained(tmp_path / "saved")
    assert (config.eos_token_id, config.top_p) == (encoder.stop_ids, 0.9)
    again = open_encoder(tmp_path / "saved", saved)
    exchange = [[{"role": "user", "content": "q"}], [[{"role": "assistant", "content": "a"}]]]
    assert again.encode(*exchange) == encoder.encode(*exchange)


def test_a_tokenizer_whose_template_writes_its_eos_token_keeps_it(folder: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<|im_end|>{{ eos_token }}{% endfor %}"
    save_tokenizer(tokenizer, open_encoder(folder, tokenizer), tmp_path / "saved", folder)
    assert load_tokenizer(tmp_path / "saved").eos_token == tokenizer.eos_token
