"""Whether a directory holds a causal language model that can be tuned here; found before anything is made of it.

Configuration, tensors, tokenizer and chat template are held against each other. Of the weights only headers are
read, unless their numbers are asked for; the model is built on PyTorch's meta device, which holds no numbers. Every
problem is a MachineError of one line, whatever lies in the files.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from dpo_cli.core.artifacts import write_json
from dpo_cli.core.errors import MachineError
from dpo_cli.core.params import ModelParams
from dpo_cli.core.text import shown
from dpo_cli.data.chat import ChatEncoder
from dpo_cli.data.problem import RowProblem
from dpo_cli.data.schema import assistant, user
from dpo_cli.models.adapters import ADAPTER_FILES, adaptable_layers, adapter_size, without_numbers
from dpo_cli.models.folder import (
    Tensor,
    check_model_folder,
    read_object,
    read_tensors,
    weight_files,
)
from dpo_cli.models.identity import ModelFacts
from dpo_cli.models.load import (
    context_length_of,
    in_words,
    load_config,
    load_tokenizer,
    open_encoder,
    own_attention,
)

_IMPORT = "dpo-cli model import SOURCE --out DIR"
_OBJECTS = ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
            "added_tokens.json")  # fmt: skip


@dataclass(frozen=True)
class Weights:
    """What configuration and tensors say of a model; ``unused`` are tensors that are no part of it."""

    model_type: str
    facts: ModelFacts
    unused: tuple[str, ...]


@dataclass(frozen=True)
class VerifiedModel:
    """A model directory that passed every check; notes say what is odd but no error, one sentence each."""

    weights: Weights
    encoder: ChatEncoder
    notes: tuple[str, ...]


def verify_model_folder(folder: Path, model: ModelParams | None = None) -> VerifiedModel:
    """Check a model directory: configuration, tensors, tokenizer and chat template; no number is read.

    ``model`` holds what is set of template and system turns; None: the template is the model's own.

    Raises:
        MachineError: It cannot be tuned; the message names file, tensor or token.
    """
    weights = verify_weights(folder)
    tokenizer = verify_tokenizer(folder)
    encoder = verify_template(folder, tokenizer, model)
    notes = [f"{folder}: {warning}" for warning in encoder.warnings]
    notes += verify_vocabulary(folder, tokenizer, encoder, weights.facts.num_rows)
    if weights.unused:
        names = f"{weights.unused[0]}{f' and {len(weights.unused) - 1} more' if len(weights.unused) > 1 else ''}"
        notes.append(f"{folder}: the weights hold tensors that are no part of the model and are not used: {names}")
    return VerifiedModel(weights, encoder, tuple(notes))


# --- configuration and tensors ------------------------------------------------------------


def verify_weights(folder: Path) -> Weights:
    """Check that configuration and tensors fit each other.

    Raises:
        MachineError: They do not, or it is no causal language model of text.
    """
    check_model_folder(folder)
    raw = read_object(folder / "config.json")
    for name in _OBJECTS:
        if (folder / name).is_file():
            read_object(folder / name)
    tensors = read_tensors(weight_files(folder))
    _refuse_absurd(folder, raw, tensors)
    config = load_config(folder)
    _refuse_other_kinds(folder, raw, config)
    with in_words(f"{folder}: no model can be built of config.json"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            attn_implementation=own_attention(config),
            dtype=torch.float32,
            device_map={"": "meta"},
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    model, loading = loaded
    _refuse_misfits(folder, tensors, loading, [name for name, _ in model.named_parameters()])
    embedding = model.get_input_embeddings()
    layers, tied = adaptable_layers(model)
    return Weights(
        model_type=str(config.model_type),
        facts=ModelFacts(
            context_length=context_length_of(config),
            num_rows=int(embedding.weight.shape[0]),
            layers=sorted({without_numbers(name) for name in layers}),
            tied_layers=sorted({without_numbers(name) for name in tied}),
        ),
        unused=tuple(sorted(loading["unexpected_keys"])),
    )


_NUMBERS = ("F64", "F32", "F16", "BF16")
"""Dtypes, as safetensors names them, that have NaN and infinity; others are passed over."""


def verify_numbers(files: Iterable[Path], on_bytes: Callable[[int], None] = lambda _: None) -> None:
    """Check that no tensor of safetensors files holds NaN or infinity; reads all numbers.

    Args:
        files: Files whose headers were read without an error.
        on_bytes: Called with the number of bytes that were read.

    Raises:
        MachineError: With the first such tensor and their number.
    """
    found: list[str] = []
    for path in files:
        left = path.stat().st_size
        with safe_open(path, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (it is no mapping)
                if str(opened.get_slice(name).get_dtype()) not in _NUMBERS:
                    continue
                tensor = opened.get_tensor(name)
                if tensor.numel() and not all(map(torch.isfinite, tensor.aminmax())):
                    found.append(f"{path}: {name}")
                on_bytes(tensor.nbytes)
                left -= tensor.nbytes
        on_bytes(left)
    if found:
        more = f", and {len(found) - 1} more tensors" if len(found) > 1 else ""
        raise MachineError(f"{found[0]} holds NaN or infinity{more}; fetch the model again")


_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_SIZES = ("hidden_size", "n_embd", "d_model", "vocab_size", "num_attention_heads", "n_head", "n_heads")
_SIZES_OR_LISTS = ("intermediate_size", "num_key_value_heads", "head_dim")
_POSITIONS = ("max_position_embeddings", "n_positions")


def _refuse_absurd(folder: Path, raw: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Refuse figures that cannot be true of these tensors, before anything is built of them."""
    largest = max((size for tensor in tensors.values() for size in tensor.shape), default=0)
    limits = {name: len(tensors) for name in _COUNTS} | dict.fromkeys((*_SIZES, *_SIZES_OR_LISTS), largest)
    for name in (*_COUNTS, *_SIZES, *_POSITIONS, *_SIZES_OR_LISTS):
        value = raw.get(name)
        if value is None:
            continue
        values = value if isinstance(value, list) and value and name in _SIZES_OR_LISTS else [value]
        if not all(isinstance(one, int) and not isinstance(one, bool) and one > 0 for one in values):
            raise MachineError(f"{folder / 'config.json'}: {name} must be a whole number > 0, got {shown(value)}")
    for name, value in raw.items():
        if not isinstance(value, int) or isinstance(value, bool):
            continue
        limit = limits.get(name)
        if limit is None and re.match(r"(num|n)_", name) and name not in _POSITIONS:
            limit = max(largest, len(tensors))
        if limit is not None and value > limit:
            raise MachineError(
                f"{folder / 'config.json'}: {name} is {shown(value)}, but the weights are {len(tensors)} tensors of at"
                f" most {largest} rows or columns; fetch config.json and weights of one model"
            )


def _refuse_other_kinds(folder: Path, raw: Mapping[str, Any], config: Any) -> None:
    """Refuse models that are no causal language model of text in plain numbers."""
    with in_words(f"{folder}: config.json cannot be used"):
        is_nested = config.get_text_config() is not config
    kind = str(config.model_type)
    if raw.get("quantization_config"):
        method = raw["quantization_config"]
        method = method.get("quant_method") if isinstance(method, dict) else None
        raise MachineError(
            f"{folder}: the weights are quantized already ({method or 'quantization_config in config.json'}); give the"
            " plain ones, which dpo-cli holds in 4-bit by itself (reference.quantization)"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise MachineError(f"{folder}: {kind} is an encoder-decoder; dpo-cli tunes causal language models")
    if is_nested:
        raise MachineError(
            f"{folder}: {kind} holds more than a language model (a part for images or sound); take its text part with:"
            f" {_IMPORT}"
        )
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise MachineError(f"{folder}: {kind} is no causal language model")


def _refuse_misfits(
    folder: Path, tensors: Mapping[str, Tensor], loading: Mapping[str, Any], parameters: Sequence[str]
) -> None:
    """Refuse tensors that are missing, of another shape or kind, or of layers that the configuration does not have."""
    if mismatched := sorted(loading["mismatched_keys"]):
        name, found, expected = mismatched[0]
        more = f" ({len(mismatched)} such tensors)" if len(mismatched) > 1 else ""
        raise MachineError(
            f"{folder}: {name} has the shape {list(found)}, and config.json asks for {list(expected)}{more}; fetch"
            " config.json and weights of one model"
        )
    if missing := sorted(loading["missing_keys"]):
        raise MachineError(
            f"{folder}: the weights lack {missing[0]} ({len(missing)} missing in all); fetch the model again"
        )
    if beyond := sorted(name for name in loading["unexpected_keys"] if re.search(r"\.\d+\.", name)):
        raise MachineError(
            f"{folder}: the weights hold {beyond[0]}, of a layer that config.json does not have ({len(beyond)} such"
            " tensors); fetch config.json and weights of one model"
        )
    if integers := [name for name in sorted(parameters) if name in tensors and tensors[name].dtype[0] in "IU"]:
        raise MachineError(f"{folder}: {integers[0]} is of dtype {tensors[integers[0]].dtype}; plain floats are needed")


# --- tokenizer and template ---------------------------------------------------------------


def verify_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model directory, tried on a word.

    Raises:
        MachineError: It cannot be loaded or used.
    """
    tokenizer = load_tokenizer(folder)
    with in_words(f"{folder}: the tokenizer cannot be used"):
        ids = list(tokenizer("question", add_special_tokens=False)["input_ids"])
        tokenizer.decode(ids)
        if not ids:
            raise MachineError(f"{folder}: the tokenizer makes no token of the word 'question'; fetch it again")
    return tokenizer


def verify_template(folder: Path, tokenizer: Any, model: ModelParams | None = None) -> ChatEncoder:
    """The encoder of a tokenizer and a chat template, tried on one exchange.

    Raises:
        MachineError: The template does not render it, or no token ends the turn.
    """
    try:
        with in_words("the chat template cannot be used"):
            return open_encoder(folder, tokenizer, model)
    except MachineError as error:
        raise MachineError([f"{folder}: {problem}" for problem in error.problems]) from error


def verify_vocabulary(folder: Path, tokenizer: Any, encoder: ChatEncoder, num_rows: int) -> list[str]:
    """Check that the model has a row for each token that can occur.

    Some families ship a special token for images that their text models have no row for. Where nothing
    makes it but its own name in a text, it is noted; such a row of data is left out.

    Returns:
        Notes on such tokens.

    Raises:
        MachineError: An ordinary token has no row, or one that ends, pads or opens texts.
    """
    with in_words(f"{folder}: the tokenizer cannot be used"):
        vocabulary = {str(token): int(number) for token, number in tokenizer.get_vocab().items()}
        added = getattr(tokenizer, "added_tokens_decoder", {})
        special = {number for number, token in added.items() if token.special}
    beyond = sorted((number, token) for token, number in vocabulary.items() if number >= num_rows)
    if not beyond:
        return []
    in_use = {getattr(tokenizer, f"{kind}_token_id", None) for kind in ("bos", "eos", "pad")}
    in_use |= {*encoder.stop_ids, *_ids_of_an_exchange(encoder)}
    reached = [(number, token) for number, token in beyond if number not in special or number in in_use]
    more = f" ({len(beyond)} such tokens)" if len(beyond) > 1 else ""
    if reached:
        number, token = reached[0]
        raise MachineError(
            f"{folder}: the tokenizer's {shown(token)} has the id {number}, and the model's embedding has {num_rows}"
            f" rows{more}; fetch tokenizer and weights of one model"
        )
    number, token = beyond[0]
    return [
        f"{folder}: the model has no row for the special token {shown(token)} (id {number}, {num_rows} rows){more};"
        " rows of data that hold it are left out"
    ]


def _ids_of_an_exchange(encoder: ChatEncoder) -> Sequence[int]:
    question, answer = [user("question")], [assistant("answer")]
    try:
        return [*encoder.encode_prompt(question), *encoder.encode_completion(question, answer)]
    except RowProblem:  # tried already
        return []


# --- an adapter in place of SFT's -----------------------------------------------------------

_CONFIG, _WEIGHTS = ADAPTER_FILES
_WHOLE = ("modules_to_save", "trainable_token_indices", "target_parameters", "layer_replication")
"""Settings of PEFT with which an adapter is more than two matrices beside some layers."""
_CHANGING_STARTS = ("pissa", "olora", "corda", "loftq")
"""Starts of adapters that change the base weights, too."""


def copy_adapter(source: Path, base: Path, built: Path, base_name: str) -> dict[str, Any]:
    """Copy an adapter in PEFT's layout, if it is LoRA and of the base model's shape.

    The base model's name stands in the copy in place of a path.

    Returns:
        How much it trains, as metrics.

    Raises:
        MachineError: It is no plain LoRA adapter, does not fit the model, or holds NaN.
    """
    raw = read_object(source / _CONFIG)
    _refuse_other_adapters(source, raw)
    tensors = read_tensors([source / _WEIGHTS])
    expected, size = _expected(source, base)
    for name in sorted({*expected, *tensors}):
        shape = list(tensors[name].shape) if name in tensors else None
        if shape != expected.get(name):
            has = f"has {shape}" if shape is not None else "lacks it"
            asks = f"asks for {expected[name]}" if name in expected else "has no place for it"
            raise MachineError(
                f"{source / _WEIGHTS}: {name}: the adapter {has}, and the base model with {_CONFIG} {asks}; it is of"
                " another model or damaged"
            )
    verify_numbers([source / _WEIGHTS])
    built.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source / _WEIGHTS, built / _WEIGHTS)
    write_json(built / _CONFIG, raw | {"base_model_name_or_path": base_name, "inference_mode": True})
    return size


def _refuse_other_adapters(source: Path, raw: dict[str, Any]) -> None:
    path = source / _CONFIG
    if raw.get("peft_type") != "LORA":
        raise MachineError(f"{path}: peft_type is {shown(raw.get('peft_type'))}; only LORA can be gone on with")
    if raw.get("task_type") not in (None, "CAUSAL_LM"):
        raise MachineError(f"{path}: task_type is {shown(raw['task_type'])}, not CAUSAL_LM")
    for name in _WHOLE:
        if raw.get(name):
            raise MachineError(
                f"{path}: {name} is set: the adapter holds more than LoRA; merge it into its base, and give the result"
                " as runtime.model_path"
            )
    if raw.get("bias", "none") != "none":
        raise MachineError(f"{path}: bias is {shown(raw['bias'])}: only none can be gone on with; merge the adapter")
    start = raw.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_CHANGING_STARTS):
        raise MachineError(
            f"{path}: init_lora_weights is {shown(start)}, which changed the base weights as well; convert it to plain"
            " LoRA with PEFT (path_initial_model_for_weight_conversion)"
        )


def _expected(source: Path, base: Path) -> tuple[dict[str, list[int]], dict[str, Any]]:
    """Shapes of the tensors that an adapter of this configuration has on the base model; built on no device."""
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    with in_words(f"{source / _CONFIG} does not go with the base model"):
        config: Any = LoraConfig.from_pretrained(str(source))
        config.inference_mode, config.base_model_name_or_path = False, None
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(load_config(base))
        _, tied = adaptable_layers(model)
        adapted: Any = get_peft_model(model, config, low_cpu_mem_usage=True)
        if shared := sorted({*adapted.base_model.targeted_module_names} & {*tied}):
            raise MachineError(
                f"{source / _CONFIG}: it adapts {shared[0]}, which shares its weights with another layer; merging would"
                " change both"
            )
        state = get_peft_model_state_dict(adapted, save_embedding_layers=False)
        return {name: list(tensor.shape) for name, tensor in state.items()}, adapter_size(adapted)
