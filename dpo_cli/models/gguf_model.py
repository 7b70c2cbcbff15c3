"""A causal language model and its tokenizer out of a GGUF file.

transformers dequantizes it, but reads no scaled rotary embedding, no soft cap and no attention scale from the file,
takes GPT-2's word boundaries for most vocabularies, and leaves a quantizer on the model with which it cannot be saved.
So what the file says is put into the configuration, its numbers are counted against those of the model, and a tokenizer
whose rules are not known is refused.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from dpo_cli.core.errors import MachineError
from dpo_cli.core.progress import Reporter
from dpo_cli.models.gguf_file import GgufFile, write_gguf
from dpo_cli.models.load import in_words

_VOCABULARY = ("tokens", "scores", "token_type", "merges", "precompiled_charsmap")
_NEED_VOCABULARY = ("qwen35", "qwen35moe", "lfm2")
"""Architectures whose reader in transformers asks for the vocabulary's length; it reads it fast."""


def model_of_gguf(file: GgufFile, folder: Path, dtype: torch.dtype, reporter: Reporter) -> tuple[Any, tuple[str, ...]]:
    """Dequantize a model.

    ``folder`` takes a copy of the file without its vocabulary.

    Returns:
        The model, as if it had been loaded from an ordinary folder, and what the file says and nobody reads, one
        sentence each.

    Raises:
        MachineError: Its architecture is not known, or the file is not what its metadata says.
    """
    _refuse_absurd(file)
    slim = folder / "weights.gguf"
    keep = file.architecture in _NEED_VOCABULARY
    without = () if keep else tuple(f"tokenizer.ggml.{name}" for name in _VOCABULARY)
    with reporter.meter("import: reading the file", sum(each.num_bytes for each in file.tensors), "bytes") as meter:
        write_gguf(file, slim, without, meter.advance)
    known = f"{file.path}: no model can be made of architecture {file.architecture!r}"
    with in_words(known):
        config = AutoConfig.from_pretrained(folder, gguf_file=slim.name, local_files_only=True)
    with in_words(f"{file.path}: its metadata makes no configuration"):
        config, notes = _complete(config, file)
        with torch.device("meta"):
            empty: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    _refuse_unplaced(file, empty)
    reporter.say(f"import: dequantizing {len(file.tensors)} tensors, which may take minutes")
    with in_words(known):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            gguf_file=slim.name,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    slim.unlink()
    model, loading = loaded
    if missing := sorted(loading["missing_keys"]):
        raise MachineError(f"{file.path}: the file has no numbers for {missing[0]} ({len(missing)} missing in all)")
    # another model with the same tensors: this one carries a quantizer, and with it cannot be saved
    empty.load_state_dict(model.state_dict(), assign=True)
    empty.tie_weights()
    return empty.eval(), tuple(notes)


# --- the file against itself --------------------------------------------------------------

_ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Tensors that are no weights: they belong into the configuration."""


def _refuse_absurd(file: GgufFile) -> None:
    """Refuse a number of layers or rows that the tensors do not bear out, before anything is built of it."""
    if file.architecture == "clip":
        raise MachineError(f"{file.path} holds the image part of a model; give the GGUF file of its language model")
    if file.shape_of("token_embd.weight") is None:
        raise MachineError(
            f"{file.path} has no tensor token_embd.weight: its architecture {file.architecture!r} is no language model"
            " that can be imported"
        )
    layers = {int(name[1]) for tensor in file.tensors if (name := re.match(r"blk\.(\d+)\.", tensor.name))}
    said = file.of_architecture("block_count")
    if said != len(layers) or layers != set(range(len(layers))):
        raise MachineError(
            f"{file.path}: its metadata declares {str(said)[:40]} layers, but it has tensors for {len(layers)}"
        )
    largest = max(size for tensor in file.tensors for size in tensor.shape)
    for key in ("embedding_length", "feed_forward_length", "attention.head_count", "attention.key_length", "vocab_size",
                "expert_count"):  # fmt: skip
        value = file.of_architecture(key)
        if isinstance(value, int | float) and not 0 <= value <= largest:
            raise MachineError(
                f"{file.path}: {file.architecture}.{key} is {str(value)[:40]}, and no tensor has more than {largest}"
                " rows or columns"
            )


def _refuse_unplaced(file: GgufFile, empty: Any) -> None:
    """Refuse a file with more or fewer numbers than the model that transformers builds of its metadata."""
    named = {name for name, _ in empty.named_parameters(remove_duplicate=False)}
    buffers = sum(each.numel() for name, each in empty.state_dict().items() if name not in named)
    expected = sum(each.numel() for each in empty.parameters()) + buffers
    found = sum(tensor.num_elements for tensor in file.tensors if tensor.name not in _ROPE_TENSORS)
    if found != expected:
        raise MachineError(
            f"{file.path} holds {found} numbers, and the model of architecture {file.architecture!r} that transformers"
            f" makes of its metadata takes {expected}: it would not be the same model; take the model's original folder"
        )


# --- the configuration --------------------------------------------------------------------

_ATTRIBUTES = {
    "context_length": ("max_position_embeddings",),
    "attention.key_length": ("head_dim",),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", "norm_eps", "layer_norm_eps", "layer_norm_epsilon"),
    "attention.layer_norm_epsilon": ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon"),
    "attention.sliding_window": ("sliding_window",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "router_logit_softcapping": ("router_logit_softcapping",),
    "feed_forward_length": ("intermediate_size",),
    "expert_feed_forward_length": ("moe_intermediate_size",),
}
"""Keys of the metadata and the attribute that says the same in a configuration: the first of them that there is."""
_TAKEN = {
    "block_count", "embedding_length", "attention.head_count", "attention.head_count_kv", "attention.value_length",
    "vocab_size", "expert_count", "expert_used_count", "rope.freq_base", "rope.dimension_count", "rope.scaling.type",
    "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.attn_factor", "rope.scaling.finetuned",
    "rope.scale_linear", "rope.scaling.yarn_log_multiplier", "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow", "attention.causal", "tensor_data_layout",
}  # fmt: skip
_LARGEST_GEMMAS = {"gemma2": 46, "gemma3": 62}
"""Layers of those that divide the attention scores by the width of a head's share, not by the head's own."""


def _complete(config: Any, file: GgufFile) -> tuple[Any, list[str]]:
    """A configuration with all that the file says, and sentences on what no attribute takes."""
    notes = []
    for key in sorted(file.metadata):
        name = key.removeprefix(f"{file.architecture}.")
        if name == key or name in _TAKEN:
            continue
        attribute = next((each for each in _ATTRIBUTES.get(name, ()) if hasattr(config, each)), None)
        value = file.metadata[key]
        if (file.architecture == "gemma4" and name == "attention.key_length") or isinstance(value, list):
            continue  # by kind of layer; transformers has read it
        if attribute is not None:
            setattr(config, attribute, value)
        elif name not in _ATTRIBUTES:
            notes.append(f"{key} = {str(value)[:40]} is in the file, and nothing of the configuration takes it")
    for name, kind in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):  # the family's default is another model's
        setattr(config, f"{name}_token_id", file.metadata.get(f"tokenizer.ggml.{kind}_token_id"))
    config.vocab_size = (file.shape_of("token_embd.weight") or (0,))[0]
    if layers := _LARGEST_GEMMAS.get(file.architecture):
        heads = config.num_attention_heads
        is_largest = config.num_hidden_layers == layers
        config.query_pre_attn_scalar = config.hidden_size // heads if is_largest else config.head_dim
    _scale_rope(config, file)
    values = config.to_dict()
    values.pop("_model_name_or_path", None)
    return type(config).from_dict(values), notes


def _scale_rope(config: Any, file: GgufFile) -> None:
    """Put the scaling of the rotary embedding into a configuration.

    Raises:
        MachineError: It is of a kind that is not known.
    """
    rope = getattr(config, "rope_parameters", None)
    if not isinstance(rope, dict):
        return
    rope = rope.get("full_attention", rope)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    turned = file.of_architecture("rope.dimension_count")
    if isinstance(turned, int) and turned != head_dim and file.architecture != "gemma4":
        rope["partial_rotary_factor"] = config.partial_rotary_factor = turned / head_dim
    if (base := file.of_architecture("rope.freq_base")) is not None:
        rope["rope_theta"] = base
    original = file.of_architecture("rope.scaling.original_context_length")
    if file.shape_of("rope_freqs.weight"):
        rope.update(_llama3(file, rope["rope_theta"], turned or head_dim))
        return
    if file.shape_of("rope_factors_long.weight"):
        factors = {part: _numbers(file, f"rope_factors_{part}.weight") for part in ("long", "short")}
        rope.update(rope_type="longrope", **{f"{part}_factor": each.tolist() for part, each in factors.items()})
        rope["original_max_position_embeddings"] = original or config.max_position_embeddings
        config.original_max_position_embeddings = rope["original_max_position_embeddings"]
        if (attention := file.of_architecture("rope.scaling.attn_factor")) is not None:
            rope["attention_factor"] = attention
        return
    kind = file.of_architecture("rope.scaling.type")
    factor = file.of_architecture("rope.scaling.factor") or file.of_architecture("rope.scale_linear")
    if (kind in (None, "none") and not file.of_architecture("rope.scale_linear")) or factor in (None, 0.0, 1.0):
        return
    if kind in (None, "linear"):
        rope.update(rope_type="linear", factor=factor)
    elif kind == "yarn" and original:
        rope.update(rope_type="yarn", factor=factor, original_max_position_embeddings=original)
    else:
        raise MachineError(f"{file.path}: its rotary embedding is scaled by {kind!r}, of which not enough is known")


def _llama3(file: GgufFile, base: float, width: int) -> dict[str, Any]:
    """Llama 3's scaling, whose settings the file does not have but their effect: a divisor for each frequency."""
    divisors = _numbers(file, "rope_freqs.weight")
    low, high, original = 1.0, 4.0, 8192
    factor = float(divisors.max())
    lengths = 2 * math.pi * base ** (np.arange(0, width, 2) / width)
    smooth = np.clip((original / lengths - low) / (high - low), 0, 1)
    if divisors.shape != lengths.shape or not np.allclose(divisors, 1 / ((1 - smooth) / factor + smooth), rtol=1e-4):
        raise MachineError(
            f"{file.path}: its rotary embedding is scaled (rope_freqs.weight) in another way than Llama 3's; take the"
            " model's original folder"
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def _numbers(file: GgufFile, name: str) -> np.ndarray:
    """A small tensor of float32."""
    tensor = next(each for each in file.tensors if each.name == name)
    if tensor.kind != 0:
        raise MachineError(f"{file.path}: {name} is not of float32")
    return np.fromfile(tensor.file, "<f4", tensor.num_elements, offset=tensor.offset).astype(np.float64)


# --- the tokenizer ------------------------------------------------------------------------

_GPT2_WORDS = {
    "gpt-2", "phi-2", "jina-es", "jina-de", "gigachat", "jina-v2-es", "jina-v2-de", "a.x-4.0", "mellum", "mpt", "olmo",
    "jais", "trillion", "granite-docling",
}  # fmt: skip
"""Pre-tokenizers, in llama.cpp's words, that cut a text into words as GPT-2 does."""
_SINGLE_DIGITS = {"starcoder", "refact", "command-r", "smollm", "codeshell", "exaone", "minerva-7b"}
"""Those that cut every digit off before."""
_WHOLE_WORDS = {
    "llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano", "tekken",
}  # fmt: skip
"""Those that take a word that is a token as that token, whatever the merges make of it."""


def tokenizer_of_gguf(file: GgufFile, full: Path) -> Any:
    """The tokenizer that a file describes; ``full`` is a file with the whole metadata, its vocabulary too.

    Raises:
        MachineError: There is none, or its rules are not known.
    """
    kind, pre = file.metadata.get("tokenizer.ggml.model"), file.metadata.get("tokenizer.ggml.pre")
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens:
        raise MachineError(f"{file.path} holds no vocabulary; give the folder of its tokenizer with --tokenizer DIR")
    for name in ("bos", "eos", "unknown", "padding", "eot"):
        number = file.metadata.get(f"tokenizer.ggml.{name}_token_id")
        if number is not None and not (isinstance(number, int) and 0 <= number < len(tokens)):
            raise MachineError(
                f"{file.path}: tokenizer.ggml.{name}_token_id is {str(number)[:40]}, and there are {len(tokens)} tokens"
            )
    with in_words(f"{file.path}: no tokenizer can be made of its vocabulary"):
        tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(
            full.absolute().parent, gguf_file=full.name, local_files_only=True
        )
        backend = tokenizer.backend_tokenizer
        if kind == "gpt2" and isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel):
            if pre in _SINGLE_DIGITS:
                words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
                digits = pre_tokenizers.Digits(individual_digits=True)
                backend.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
            elif pre not in _GPT2_WORDS:
                raise MachineError(
                    f"{file.path}: how its vocabulary cuts a text into words ({pre or 'no tokenizer.ggml.pre'}) is not"
                    " known; give the folder of the model's own tokenizer with --tokenizer DIR"
                )
        if kind == "llama" and isinstance(backend.pre_tokenizer, pre_tokenizers.Metaspace):
            _space_as_llama(backend, prefixed=file.metadata.get("tokenizer.ggml.add_space_prefix", True))
        if pre in _WHOLE_WORDS:
            backend.model.ignore_merges = True
        if len(tokenizer) > len(tokens):
            tokenizer = _without_additions(tokenizer, len(tokens))
    if len(tokenizer) != len(tokens):
        raise MachineError(
            f"{file.path}: of its {len(tokens)} tokens a tokenizer of {len(tokenizer)} was made; give the folder of the"
            " model's own tokenizer with --tokenizer DIR"
        )
    return tokenizer


def _without_additions(tokenizer: Any, num_tokens: int) -> Any:
    """A tokenizer without the tokens of its family that are not in the file, such as Llama's ``<s>``."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend["added_tokens"] = [token for token in backend["added_tokens"] if token["id"] < num_tokens]
    backend["post_processor"] = None
    kept = ("bos_token", "eos_token", "unk_token", "pad_token", "chat_template", "add_bos_token", "add_eos_token")
    given = {name: tokenizer.init_kwargs.get(name) for name in kept}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(backend)), **given)


def _space_as_llama(backend: Any, *, prefixed: bool) -> None:
    """Write blanks as llama.cpp does: each as one mark, and where the file asks for it one more before every text.

    transformers writes one before the first word, unless a blank is there, whatever the file says.
    """
    marks = normalizers.Replace(pattern=" ", content="\u2581")
    backend.pre_tokenizer = None
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), marks]) if prefixed else marks
    blanks = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*blanks, decoders.Strip(" ", 1, 0)] if prefixed else blanks)
