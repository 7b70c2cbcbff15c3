"""A model as a GGUF file: tensors under llama.cpp's names, and what it reads of the configuration.

Only families whose files are held against llama.cpp by a test are written; any other is refused by its name.
The names: package gguf. The order of rows of rotary layers and what the keys mean: llama.cpp's convert_hf_to_gguf.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dpo_cli.core.errors import MachineError
from dpo_cli.core.progress import Reporter
from dpo_cli.exporting.gguf_tokenizer import Vocabulary

FAMILIES = ("llama", "qwen2", "qwen3")
"""Families that are written, by transformers' names, which are llama.cpp's as well."""
KINDS = ("f16", "q8_0", "q4_0", "q4_1")
"""Types that the package gguf quantizes to."""
_INSTALL = "GGUF files need the package gguf: pip install 'dpo-cli[gguf]'"


@dataclass(frozen=True)
class Layout:
    """How a model's tensors are called and ordered in a GGUF file.

    Attributes:
        architecture: The family, in llama.cpp's words.
        names: llama.cpp's name of a tensor by transformers'.
        heads: Heads of the rotary layers whose rows llama.cpp has in another order, by the end of their names.
    """

    architecture: str
    names: Mapping[str, str]
    heads: Mapping[str, int]

    def rows(self, name: str, values: np.ndarray) -> np.ndarray:
        """The rows of a tensor, or of a LoRA's B, in llama.cpp's order: both halves of a rotation side by side."""
        heads = next((number for end, number in self.heads.items() if name.endswith(end)), None)
        if heads is None:
            return values
        halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
        return halves.swapaxes(1, 2).reshape(values.shape)

    def rows_back(self, name: str, values: np.ndarray) -> np.ndarray:
        """The rows of a file in transformers' order."""
        places = self.rows(name, np.arange(values.shape[0]))
        return values[np.argsort(places)]


def layout_of(config: Any, names: Sequence[str]) -> Layout:
    """Where each of a model's tensors goes.

    Args:
        config: Its configuration.
        names: Its tensors, by transformers' names.

    Raises:
        MachineError: Its family is not known, or it has something that the family has not.
    """
    kind = config.model_type
    if kind not in FAMILIES:
        raise MachineError(
            f"GGUF: the family {kind!r} is not written; {', '.join(FAMILIES)} are. Take --to merged-nf4 or merged, and"
            " convert that with llama.cpp's convert_hf_to_gguf.py; its result is not checked here"
        )
    try:
        import gguf
    except ImportError:
        raise MachineError(_INSTALL) from None
    _refuse_unknown(config)
    architecture = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == kind)
    known = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    found = {}
    for name in names:
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stem, _, end = name.rpartition(".")
        place = known.get_name(stem)
        if place is None or end not in ("weight", "bias") or (kind != "qwen2" and end == "bias"):
            raise MachineError(f"GGUF: {name} has no place in a file of the family {kind}")
        found[name] = f"{place}.{end}"
    heads = {}
    if kind == "llama":
        heads = {"q_proj.weight": config.num_attention_heads, "k_proj.weight": config.num_key_value_heads}
    return Layout(kind, found, heads)


def _refuse_unknown(config: Any) -> None:
    """Refuse what llama.cpp would compute in another way, or leave out.

    Raises:
        MachineError: With the setting of the configuration.
    """
    rope = _rope(config)
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    for name, value, is_known in (
        ("hidden_act", config.hidden_act, config.hidden_act == "silu"),
        ("rope_parameters", rope.get("rope_type"), rope.get("rope_type", "default") in ("default", "linear", "llama3")),
        ("partial_rotary_factor", rope.get("partial_rotary_factor"), rope.get("partial_rotary_factor", 1.0) == 1.0),
        ("layer_types", sorted(kinds), kinds == {"full_attention"}),
        ("pretraining_tp", getattr(config, "pretraining_tp", 1), getattr(config, "pretraining_tp", 1) in (None, 1)),
    ):
        if not is_known:
            raise MachineError(f"GGUF: config.json says {name} = {value}, which is not written for {config.model_type}")


def _rope(config: Any) -> dict[str, Any]:
    return dict(getattr(config, "rope_parameters", None) or {})


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def write_model(model: Any, vocabulary: Vocabulary, path: Path, kind: str, *, name: str, reporter: Reporter) -> None:
    """Write a whole model.

    Matrices are of the kind that is asked for, but for rows that its blocks do not divide (float16), and with four bits
    for the embedding and the head, which are of 8 bits. Vectors are of float32.

    Args:
        model: Plain weights of any float dtype.
        vocabulary: What the file says of its tokens.
        path: The file to write.
        kind: One of :data:`KINDS`.
        name: What the model calls itself.
        reporter: Shows progress.

    Raises:
        MachineError: See :func:`layout_of`.
    """
    import gguf

    config = model.config
    tensors = model.state_dict()
    layout = layout_of(config, list(tensors))
    writer = gguf.GGUFWriter(path, layout.architecture)
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind.upper()}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_settings(writer, config)
    vocabulary.add_to(writer)
    parts = {place: (name, _kind_of(place, tensors[name].shape, kind)) for name, place in layout.names.items()}
    divisors = _llama3_divisors(config) if _rope(config).get("rope_type") == "llama3" else None
    for place, (name, type_) in parts.items():
        _announce(writer, place, tensors[name].shape, type_)
    if divisors is not None:
        _announce(writer, "rope_freqs.weight", divisors.shape, gguf.GGMLQuantizationType.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    with reporter.meter(f"export: {path.name}", len(parts), "tensors") as meter:
        for name, type_ in parts.values():
            values = layout.rows(name, tensors[name].detach().float().cpu().numpy())
            writer.write_tensor_data(gguf.quantize(np.ascontiguousarray(values), type_))
            meter.advance(1)
    if divisors is not None:
        writer.write_tensor_data(divisors)
    writer.close()


def _kind_of(place: str, shape: Sequence[int], kind: str) -> Any:
    """The ggml type of a tensor."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if len(shape) == 1:
        return GGMLQuantizationType.F32
    if kind.startswith("q4") and place in ("token_embd.weight", "output.weight"):
        kind = "q8_0"
    found = GGMLQuantizationType[kind.upper()]
    return found if shape[-1] % GGML_QUANT_SIZES[found][0] == 0 else GGMLQuantizationType.F16


def _announce(writer: Any, place: str, shape: Sequence[int], type_: Any) -> None:
    """Put a tensor that is written later into the header."""
    from gguf import GGML_QUANT_SIZES

    number, size = GGML_QUANT_SIZES[type_]
    writer.add_tensor_info(
        place, tuple(shape), np.dtype(np.float32), math.prod(shape) // number * size, raw_dtype=type_
    )


def _add_settings(writer: Any, config: Any) -> None:
    rope = _rope(config)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(_head_dim(config))
    writer.add_rope_freq_base(rope.get("rope_theta", 10000.0))
    if _head_dim(config) * config.num_attention_heads != config.hidden_size:
        writer.add_key_length(_head_dim(config))
        writer.add_value_length(_head_dim(config))
    if rope.get("rope_type") == "linear":
        from gguf import RopeScalingType

        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


def _llama3_divisors(config: Any) -> np.ndarray:
    """By what Llama 3 divides its frequencies, float32: llama.cpp reads them in place of the settings."""
    rope, width = _rope(config), _head_dim(config)
    lengths = 2 * math.pi * rope["rope_theta"] ** (np.arange(0, width, 2) / width)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = np.clip((rope["original_max_position_embeddings"] / lengths - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / rope["factor"] + smooth)).astype(np.float32)


# --- an adapter -----------------------------------------------------------------------------


def write_lora(model: Any, path: Path, base_name: str) -> None:
    """Write the LoRA adapter of a PEFT model, float32, as llama.cpp applies it to the base's GGUF file (``--lora``).

    llama.cpp multiplies B A by alpha / rank. What PEFT multiplies by beyond that (rsLoRA, ranks by layer) goes into B.

    Raises:
        MachineError: It is DoRA, or a layer has no place in the file.
    """
    import gguf
    from peft.tuners.lora import LoraLayer

    from dpo_cli.models.adapters import POLICY

    layers = {
        f"{name.removeprefix('base_model.model.')}.weight": module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }
    config = model.peft_config[POLICY]
    if config.use_dora:
        raise MachineError("GGUF: a DoRA adapter cannot be a GGUF adapter; merge it: --to gguf-q8_0")
    layout = layout_of(model.config, list(layers))
    writer = gguf.GGUFWriter(path, layout.architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(config.lora_alpha))
    writer.add_string("general.base_model.0.name", base_name)
    for name, place in layout.names.items():
        layer: Any = layers[name]
        down, up = (getattr(layer, side)[POLICY].weight.detach().float().cpu().numpy() for side in ("lora_A", "lora_B"))
        up = up * (layer.scaling[POLICY] * down.shape[0] / config.lora_alpha)
        writer.add_tensor(f"{place}.lora_a", np.ascontiguousarray(down))
        writer.add_tensor(f"{place}.lora_b", np.ascontiguousarray(layout.rows(name, up).astype(np.float32)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_lora(path: Path, layout: Layout) -> dict[str, torch.Tensor]:
    """What the adapter of a GGUF file adds to each weight, by transformers' names, rows in transformers' order.

    Raises:
        MachineError: It is damaged, or no adapter.
    """
    from dpo_cli.models.gguf_file import read_header

    file = read_header(path)
    alpha = file.metadata.get("adapter.lora.alpha")
    if file.metadata.get("adapter.type") != "lora" or not isinstance(alpha, float):
        raise MachineError(f"{path} is no LoRA adapter: adapter.type or adapter.lora.alpha is missing")
    tensors = {
        tensor.name: np.fromfile(tensor.file, "<f4", tensor.num_elements, offset=tensor.offset).reshape(tensor.shape)
        for tensor in file.tensors
    }
    found = {}
    for name, place in layout.names.items():
        down, up = (tensors.get(f"{place}.lora_{side}") for side in "ab")
        if down is None or up is None:
            raise MachineError(f"{path} has no adapter for {name}")
        found[name] = torch.from_numpy(layout.rows_back(name, up) @ down * (alpha / down.shape[0]))
    return found
