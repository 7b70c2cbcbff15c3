"""Loading causal language models from a directory: safetensors only, no code from it, no network."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_cli.core.artifacts import write_json
from dpo_cli.core.environment import importing
from dpo_cli.core.errors import MachineError, ParamsError, is_out_of_memory, says_out_of_memory
from dpo_cli.core.params import ModelParams
from dpo_cli.data.chat import ChatEncoder
from dpo_cli.data.schema import assistant, user
from dpo_cli.models.device import Machine
from dpo_cli.models.folder import check_model_folder, read_object, words_of

if TYPE_CHECKING:  # torch and transformers take seconds to import: functions do it that use them
    import torch


def quiet_libraries() -> None:
    """Keep the libraries' own bars and notes off the terminal; what matters we say ourselves."""
    with importing():
        import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", module=r"(transformers|peft|bitsandbytes|torch)\.")


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model directory.

    Raises:
        MachineError: There is none, or it needs code from the directory.
    """
    from transformers import AutoTokenizer

    with in_words(f"{folder}: the tokenizer cannot be loaded"):
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def open_encoder(folder: Path, tokenizer: Any, model: ModelParams | None = None) -> ChatEncoder:
    """The chat encoder of a model directory, which stops where the model's own settings say, too.

    ``model`` holds what is set of template and system turns; None: the template is the model's own.

    Raises:
        MachineError: Tokenizer and chat template cannot be used together.
        ParamsError: A setting has no effect.
    """
    model = model or ModelParams()
    return ChatEncoder(
        tokenizer,
        model.chat_template,
        options=model.template_options,
        system=model.system,
        end_ids=_end_ids(folder),
    )


_GENERATION_CONFIG = "generation_config.json"
_OF_THE_LIBRARY = ("_from_model_config", "transformers_version")


def _end_ids(folder: Path) -> list[int]:
    """The end tokens that a model's settings name, those for generation before those of the model."""
    for name in (_GENERATION_CONFIG, "config.json"):
        found = read_object(folder / name).get("eos_token_id") if (folder / name).is_file() else None
        listed = found if isinstance(found, list) else [found]
        if ids := [token for token in listed if type(token) is int]:
            return ids
    return []


def save_tokenizer(tokenizer: Any, encoder: ChatEncoder, folder: Path, base: Path) -> None:
    """Save what whoever serves the model needs to write prompts as in training, and to stop where an answer ends.

    That is the tokenizer with the chat template that was used, its EOS token the one that ends a
    turn, and the settings for generation with all end tokens; the base model's other settings stay.
    """
    served = copy.deepcopy(tokenizer)
    served.chat_template = encoder.template
    exchange = [user("question"), assistant("answer")]
    text = served.apply_chat_template(exchange, tokenize=False)
    served.eos_token = served.convert_ids_to_tokens(encoder.end_id)
    if served.apply_chat_template(exchange, tokenize=False) != text:  # it writes the EOS token elsewhere, too
        served.eos_token = tokenizer.eos_token
    served.save_pretrained(folder)
    own = base / _GENERATION_CONFIG
    settings = read_object(own) if own.is_file() else {}
    settings = {name: value for name, value in settings.items() if name not in _OF_THE_LIBRARY}
    pad = {} if served.pad_token_id is None else {"pad_token_id": served.pad_token_id}
    write_json(folder / _GENERATION_CONFIG, {**pad, **settings, "eos_token_id": encoder.stop_ids})


_CHANGING_ROPE = ("longrope", "dynamic")


def context_length(folder: Path) -> int | None:
    """The longest sequence the model knows positions for, where its configuration says so.

    Some rotary embeddings turn all positions of a batch differently once any text in it is longer than
    the model was first trained on. Up to there a text's numbers are its own, so that is the limit.
    """
    return context_length_of(load_config(folder))


def context_length_of(config: Any) -> int | None:
    """The same of a configuration, whose text part counts."""
    config = config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    by_layer = [part for part in rope.values() if isinstance(part, dict)] or [rope]
    for part in by_layer:
        if part.get("rope_type") in _CHANGING_ROPE and limit is not None:
            limit = min(limit, part.get("original_max_position_embeddings") or limit)
    return limit


def load_config(folder: Path) -> Any:
    """The configuration of a model directory.

    Raises:
        MachineError: It cannot be used, or needs code from the directory.
    """
    from transformers import AutoConfig

    with in_words(f"{folder}: config.json cannot be used"):
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


@contextmanager
def in_words(what: str) -> Iterator[None]:
    """Whatever a library raises over the files of a model, as an error of one line.

    Raises:
        MachineError: ``what`` with the library's words.
    """
    try:
        yield
    except (MachineError, ParamsError):
        raise
    except BaseException as error:
        # tokenizers is written in Rust, whose panic is no Exception
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise MachineError(f"{what}: {words_of(error)}") from error
        raise


def own_attention(config: Any) -> str | None:
    """The attention that a model must be loaded with, None where transformers' choice will do."""
    return "eager" if getattr(config.get_text_config(), "attn_logit_softcapping", None) else None


def load_model(folder: Path, machine: Machine, *, quantization: str, trainable: bool = False) -> Any:
    """Load a causal LM.

    Args:
        folder: Its directory.
        machine: Device and compute dtype.
        quantization: ``nf4`` for 4-bit weights with double quantization, ``none`` for plain ones.
        trainable: Hold plain weights in float32, for training all of them.

    Returns:
        The model in eval mode with frozen weights and every dropout of its configuration off.

    Raises:
        MachineError: It cannot be loaded.
    """
    with importing():  # peft with them: before a model is in memory
        import peft  # noqa: F401
        import torch
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig  # noqa: F401

        from dpo_cli.scoring.fused import use_fused

    check_model_folder(folder)
    config = load_config(folder)
    for name, value in config.to_dict().items():
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)
    with in_words(f"{folder}: the model cannot be loaded"), _overheard() as heard:
        try:
            model = load_as_it_is(
                folder,
                config=config,
                # the default attention of some versions of transformers leaves a soft cap out in silence
                attn_implementation=own_attention(config),
                dtype=torch.float32 if trainable else machine.compute_dtype,
                quantization_config=nf4(machine.compute_dtype) if quantization == "nf4" else None,
                device_map={"": machine.device},
            )
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) and not says_out_of_memory("".join(heard)):
                raise
            smaller = "take a smaller one" if quantization == "nf4" else "hold it in 4 bits (quantization nf4)"
            raise MachineError(
                f"{folder}: the model does not fit into the memory of {machine.device}; free some, or {smaller}"
            ) from error
    keep_weights_unpacked(model)
    if quantization == "nf4":
        _let_go_of_files(model)
    model.requires_grad_(False)
    use_fused(model, machine.device, machine.compute_dtype)
    return model.eval()


def load_as_it_is(folder: Path, auto: Any = None, **options: Any) -> Any:
    """A model as transformers loads it from safetensors, a causal language model if no other class is given.

    Raises:
        MachineError: The weights lack a tensor: transformers would draw it at random and only log it.
    """
    from transformers import AutoModelForCausalLM

    loaded: Any = (auto or AutoModelForCausalLM).from_pretrained(
        folder,
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        output_loading_info=True,
        **options,
    )
    model, loading = loaded
    if missing := sorted(loading["missing_keys"]):
        raise MachineError(
            f"{folder}: the weights lack {missing[0]} ({len(missing)} missing in all); fetch the model again"
        )
    return model


def nf4(compute_dtype: torch.dtype) -> Any:
    """What holds a model in 4 bits: nf4 with double quantization (Dettmers et al. 2023)."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


@contextmanager
def _overheard() -> Iterator[list[str]]:
    """What transformers logs meanwhile; it goes to no terminal.

    An error while weights are quantized is in its report alone: what it raises then names none.
    """
    heard: list[str] = []
    listener = logging.Handler()
    listener.emit = lambda record: heard.append(record.getMessage())
    logger = logging.getLogger("transformers")
    level, handlers, propagates = logger.level, logger.handlers, logger.propagate
    logger.setLevel(logging.WARNING)
    logger.handlers, logger.propagate = [listener], False
    try:
        yield heard
    finally:
        logger.setLevel(level)
        logger.handlers, logger.propagate = handlers, propagates


def _let_go_of_files(model: torch.nn.Module) -> None:
    """Copy the plain weights of a quantized model that lie in a mapped file.

    As long as one tensor of it is in use, all pages of the file that were read count as the process's memory: four
    times what the quantized weights take.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.device.type == "cpu":
            parameter.data = parameter.data.clone()


def keep_weights_unpacked(model: torch.nn.Module) -> None:
    """Turn off bitsandbytes' repacking of 4-bit weights on CPUs with AVX512-BF16.

    There the first forward in eval mode without gradients would repack each weight in place
    to a bfloat16 layout, and nothing undoes it: later log-probabilities move, training loses
    the gradient through the layer, and a saved model is corrupt.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
