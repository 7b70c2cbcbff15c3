"""Weights of another form, written anew: out of pickles, and the language model within a model of images or sound."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    GenerationConfig,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
)

from dpo_cli.core.errors import MachineError
from dpo_cli.core.progress import Reporter
from dpo_cli.models.device import Machine
from dpo_cli.models.folder import INDEX, PICKLES, read_object, total_size
from dpo_cli.models.load import in_words, load_as_it_is, load_model, load_tokenizer

_NO_PICKLES = {"training_args.bin", "optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "rng_state.pth"}
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json", "generation_config.json",
)  # fmt: skip


def pickles_of(folder: Path) -> list[Path]:
    """The files with a model's pickled weights, by the index where there is one.

    Raises:
        MachineError: The index names a file that is missing or elsewhere.
    """
    index = folder / "pytorch_model.bin.index.json"
    if index.is_file():
        entries = read_object(index).get("weight_map")
        names = sorted({str(name) for name in entries.values()}) if isinstance(entries, dict) else []
        for name in names:
            if Path(name).name != name or not (folder / name).is_file():
                raise MachineError(f"{index} names {name!r}, which is not in {folder}; fetch the whole model")
        if names:
            return [folder / name for name in names]
    if (folder / "pytorch_model.bin").is_file():
        return [folder / "pytorch_model.bin"]
    found = {path for pattern in PICKLES for path in folder.glob(pattern) if path.name not in _NO_PICKLES}
    return sorted(found)


def unpickle(folder: Path, pickles: Sequence[Path], weights: Path, reporter: Reporter) -> None:
    """Write pickled weights as safetensors, each file for itself, with the other files of the model beside them.

    Raises:
        MachineError: A file would run code, is damaged, or holds no weights.
    """
    weights.mkdir()
    places: dict[str, str] = {}
    with reporter.meter("import: reading pickled weights", total_size(pickles), "bytes") as meter:
        for number, path in enumerate(pickles, 1):
            name = f"model-{number:05}-of-{len(pickles):05}.safetensors"
            tensors = _tensors_of_pickle(path)
            if twice := sorted(tensors.keys() & places.keys()):
                raise MachineError(f"{path} holds {twice[0]}, and so does another file; which is the model's?")
            save_file(tensors, weights / name, metadata={"format": "pt"})
            places |= dict.fromkeys(tensors, name)
            meter.advance(path.stat().st_size)
    (weights / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}), encoding="utf-8")
    for name in ("config.json", *TOKENIZER_FILES):
        if (folder / name).is_file():
            shutil.copyfile(folder / name, weights / name)


def _tensors_of_pickle(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of one file, each with memory of its own."""
    try:
        found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a pickle of garbage may raise anything
        if called := re.search(r"\bGLOBAL ([\w.]+)|Unsupported (?:class|operand) ([\w.]+)", str(error)):
            raise MachineError(
                f"{path} is refused: it would run code when it is loaded ({called[1] or called[2]}); plain weights"
                " would not"
            ) from None
        first = " ".join(str(error).split())[:160] or type(error).__name__
        raise MachineError(f"{path} is damaged or not a weights file ({first}); fetch it again") from None
    for key in ("state_dict", "model_state_dict", "model", "module"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict):
        raise MachineError(f"{path} holds {type(found).__name__}, no tensors by name")
    tensors = {str(name): each for name, each in found.items() if isinstance(each, torch.Tensor)}
    if not tensors:
        raise MachineError(f"{path} holds no tensors by name")
    if any(each.layout != torch.strided or each.is_quantized or each.is_meta for each in tensors.values()):
        raise MachineError(f"{path} holds tensors that are sparse or quantized; plain ones are needed")
    if all(name.startswith("module.") for name in tensors):  # as torch's DistributedDataParallel saves them
        tensors = {name.removeprefix("module."): each for name, each in tensors.items()}
    return {name: each.detach().clone(memory_format=torch.contiguous_format) for name, each in tensors.items()}


# --- the text part of a multimodal model --------------------------------------------------

_PLAIN_TEXT = {
    "qwen2_vl_text": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen2_5_omni_text": "qwen2",
    "qwen3_vl_text": "qwen3",
    "qwen3_vl_moe_text": "qwen3_moe",
}
"""Text parts that have no model of their own in transformers, and the family that computes the same of a text."""
_MAX_DIFFERENCE = 1e-3
"""How far the text part's log-probabilities may be from the whole model's on a text, nats, in float32."""
TRIAL = "The quick brown fox jumps over the lazy dog, 1234 times."


def build_text_part(weights: Path, config: Any, built: Path, reporter: Reporter) -> None:
    """Save the language model within a model of images or sound, and check that it says the same of a text.

    Raises:
        MachineError: It has no language model of a known family, or one that computes something else by itself.
    """
    text_config = _text_config(weights, config)
    auto: Any = next(
        (
            auto
            for auto, mapping in (
                (AutoModelForImageTextToText, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING),
                (AutoModelForMultimodalLM, MODEL_FOR_MULTIMODAL_LM_MAPPING),
                (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING),
            )
            if type(config) in mapping
        ),
        None,
    )
    if auto is None:
        raise MachineError(f"{weights}: {config.model_type} is not a model that generates text")
    tokenizer = load_tokenizer(weights)
    own = weights / "chat_template.json"
    if not tokenizer.chat_template and own.is_file():
        tokenizer.chat_template = read_object(own).get("chat_template")
    ids = torch.tensor([list(tokenizer(TRIAL)["input_ids"])])
    reporter.say(f"import: loading {config.model_type} as a whole, to take its language model out of it")
    with in_words(f"{weights}: the model cannot be loaded"), torch.inference_mode():
        whole = load_as_it_is(weights, auto, config=config, dtype="auto").eval()
        expected = whole(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float().log_softmax(-1)
        decoder, head = whole.get_decoder(), whole.get_output_embeddings()
        text_config.tie_word_embeddings = head.weight.data_ptr() == decoder.get_input_embeddings().weight.data_ptr()
        text_config.dtype = whole.dtype
    with in_words(f"{weights}: its language model is not that of {text_config.model_type}"):
        with torch.device("meta"):
            alone: Any = AutoModelForCausalLM.from_config(text_config, dtype=whole.dtype)
        alone.base_model.load_state_dict(decoder.state_dict(), assign=True)
        if text_config.tie_word_embeddings:
            alone.tie_weights()
        else:
            alone.get_output_embeddings().load_state_dict(head.state_dict(), assign=True)
        if (weights / "generation_config.json").is_file():
            alone.generation_config = GenerationConfig.from_pretrained(weights, local_files_only=True)
    alone.save_pretrained(built)
    dtype = whole.dtype
    del whole, decoder, head, alone
    save_checked_tokenizer(tokenizer, built, text_config)
    again = load_model(built, Machine(torch.device("cpu"), dtype), quantization="none")
    with in_words(f"{weights}: its language model cannot be run by itself"), torch.inference_mode():
        found = again(input_ids=ids).logits.float().log_softmax(-1)
    difference = float((found - expected).abs().amax())
    allowed = _MAX_DIFFERENCE if dtype == torch.float32 else 100 * _MAX_DIFFERENCE
    if not difference <= allowed:
        raise MachineError(
            f"{weights}: the language model of {config.model_type}, taken out, gives log-probabilities {difference:.3g}"
            " nats from those of the whole model on the same text: it cannot be used by itself"
        )
    reporter.say(f"import: the language model by itself is within {difference:.2g} nats of the whole model on a text")


def _text_config(weights: Path, config: Any) -> Any:
    """The configuration of the language model within, with the whole's special tokens."""
    text = config.get_text_config()
    if type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        family = _PLAIN_TEXT.get(text.model_type)
        if family is None:
            raise MachineError(
                f"{weights}: the language model of {config.model_type} ({text.model_type}) is of no family that can be"
                " used by itself"
            )
        values = text.to_dict()
        values.pop("model_type")
        for part in ("rope_parameters", "rope_scaling"):
            if isinstance(rope := values.get(part), dict):  # of a text all three axes are equal
                values[part] = {key: value for key, value in rope.items() if not key.startswith("mrope")}
        text = CONFIG_MAPPING[family].from_dict(values)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if getattr(text, name, None) is None:
            setattr(text, name, getattr(config, name, None))
    return text


def save_checked_tokenizer(tokenizer: Any, built: Path, config: Any) -> None:
    """Save a tokenizer that makes the same ids after it was loaded again.

    Raises:
        MachineError: It does not.
    """
    for name in ("is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(name, None)
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if isinstance(limit, int):
        tokenizer.model_max_length = limit
    tokenizer.save_pretrained(built)
    texts = (TRIAL, "  Straße, 北京 and 👍🏽\n\n\tdef f(x): return x**2  ", "<|im_start|><bos></s>[INST]")
    again = load_tokenizer(built)
    for text in texts:
        if list(tokenizer(text)["input_ids"]) != list(again(text)["input_ids"]):
            raise MachineError(f"{built}: the tokenizer makes other tokens of {text!r} once it was saved")
