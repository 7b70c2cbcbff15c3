"""The one schema of params.yaml: every knob with its meaning, unit, range and default.

The defaults suit a real model of a few billion parameters on one consumer GPU; the embedded
project's params.yaml overrides some of them (:mod:`dpo_cli.core.params_text`). Validation
collects every problem of a file into one :class:`~dpo_cli.core.errors.ParamsError`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from dpo_cli.core.errors import ParamsError

EMBEDDED = "embedded"
"""The value of model.name that stands for the model built by this package."""

WORLD_HELD_OUT = 0.3
"""The embedded model never reads a prompt whose split position is below this, so eval_fraction may go up to it."""


def knob(default: Any, doc: str, *, unit: str = "", **constraints: Any) -> Any:
    """A field of the schema: its default, what it means, and its unit."""
    return Field(default, description=doc, json_schema_extra={"unit": unit} if unit else None, **constraints)


class Section(BaseModel):
    """Base of all sections: unknown keys refused, no silent conversion of types, immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class SftSource(Section):
    """Where the instruction data is."""

    path: str = knob(
        "data/raw/instructions.json", "File of instruction data, under data/raw so that DVC sees a change."
    )
    format: Literal["auto", "alpaca"] = knob("auto", "Format of its rows; auto detects it and says what it found.")


class PreferenceSource(Section):
    """Where the preference data is."""

    path: str = knob("data/raw/preferences.json", "File of preference data, under data/raw.")
    format: Literal["auto", "pairs", "sharegpt", "hh"] = knob(
        "auto", "Format of its rows; auto detects it and says what it found."
    )


class DataParams(Section):
    """What goes in. Read by convert_sft and convert_preferences."""

    sft: SftSource = Field(default_factory=SftSource, description="Instruction data.")
    preferences: PreferenceSource = Field(default_factory=PreferenceSource, description="Preference data.")
    eval_fraction: float = knob(
        0.1,
        "Share of prompts held out. A hash of the prompt's opening decides, for both files alike: adding rows moves"
        " none.",
        gt=0,
        lt=1,
    )


class ModelParams(Section):
    """Which model is tuned. Read by every stage that loads it."""

    name: str = knob(
        EMBEDDED,
        "'embedded' builds a tiny model from code; any other name stands for the directory in runtime.model_path"
        " or the environment variable DPO_MODEL_PATH.",
        min_length=1,
    )
    revision: str = knob("", "Your label for the model's version; part of its identity.")
    chat_template: Literal["auto", "plain", "chatml", "alpaca"] = knob(
        "auto", "'auto' takes the model's own chat template; a name overrides it, and is needed where it has none."
    )
    seed: int = knob(0, "Seed of the embedded model's weights and text.", ge=0)
    pretrain_steps: int = knob(900, "Steps for which the embedded model is pretrained.", unit="optimizer steps", ge=1)


class LoraParams(Section):
    """Shape of a LoRA adapter (Hu et al. 2021)."""

    r: int = knob(16, "Rank of the update.", ge=1)
    alpha: float = knob(32.0, "Scale of the update: it is multiplied by alpha / r.", gt=0)
    dropout: float = knob(0.0, "Dropout on the adapter's input while training.", ge=0, lt=1)
    target_modules: Annotated[list[str], Field(min_length=1)] = knob(
        ["all-linear"], "Names of the layers that get an adapter; all-linear means every linear layer but the head."
    )


class TrainingParams(Section):
    """Knobs that SFT and DPO share."""

    learning_rate: float = knob(2e-4, "Peak learning rate.", gt=0)
    batch_size: int = knob(
        16,
        "Examples (sft) or preference pairs (train) an optimizer step. It alone decides the mathematics;"
        " memory is bounded by runtime.max_tokens_per_microbatch.",
        ge=1,
    )
    epochs: float = knob(1.0, "Passes over the training data.", unit="epochs", gt=0)
    max_steps: int | None = knob(None, "Steps to train, in place of epochs.", unit="optimizer steps", ge=1)
    schedule: Literal["cosine", "linear", "constant"] = knob("cosine", "Learning rate after the warm-up.")
    warmup_ratio: float = knob(0.1, "Share of the steps in which the learning rate rises from 0.", ge=0, lt=1)
    optimizer: Literal["adamw", "rmsprop", "paged_adamw_8bit"] = knob(
        "adamw", "paged_adamw_8bit is bitsandbytes' and needs CUDA; rmsprop is the DPO paper's."
    )
    weight_decay: float = knob(0.0, "Decoupled weight decay; rmsprop takes none.", ge=0)
    max_grad_norm: float = knob(1.0, "Gradients are clipped to this L2 norm.", gt=0)
    eval_steps: int = knob(
        50, "Held-out loss after every so many steps; 0: only at the end.", unit="optimizer steps", ge=0
    )
    seed: int = knob(0, "Seeds the adapter's start, the order of rows and dropout.", ge=0)


class SftParams(TrainingParams):
    """Supervised fine-tuning, which gives the reference model. Read by sft."""

    method: Literal["none", "full", "lora", "qlora"] = knob(
        "qlora",
        "none: the base as it is (the rest of this section rests); full: all weights; lora: an adapter on the"
        " plain model; qlora: an adapter on the model in 4-bit nf4.",
    )
    lora: LoraParams = Field(default_factory=LoraParams, description="The adapter of methods lora and qlora.")
    max_length: int = knob(
        1024, "Longer rows (prompt + completion) are left out, counted and listed.", unit="tokens", ge=2
    )


class ReferenceParams(Section):
    """The graph that reference and policy share. Read by precompute_ref; train and evaluate follow its manifest."""

    quantization: Literal["nf4", "none"] = knob(
        "nf4", "How the frozen weights are held: 4-bit nf4 with double quantisation, or as they are."
    )
    max_length: int = knob(
        1024, "Pairs with a longer side (prompt + answer) are left out, counted and listed.", unit="tokens", ge=2
    )


class TrainParams(TrainingParams):
    """Direct Preference Optimization. Read by train; evaluate takes loss and beta from what train made."""

    learning_rate: float = knob(5e-6, "Peak learning rate.", gt=0)
    loss: Literal["sigmoid", "cdpo", "ipo", "hinge"] = knob(
        "sigmoid",
        "sigmoid: DPO (Rafailov et al. 2023); cdpo: with label noise; ipo: squared, a token (Azar et al. 2023);"
        " hinge: SLiC (Zhao et al. 2023).",
    )
    beta: float = knob(0.1, "Strength of the pull towards the reference model.", gt=0)
    label_smoothing: float = knob(0.0, "Share of flipped labels that cdpo assumes.", ge=0, lt=0.5)
    lora: LoraParams | None = Field(
        default=None,
        description="The adapter's shape where sft makes none (methods none and full); null takes the defaults.",
    )


class EvaluateParams(Section):
    """Is it better, by how much, and at what cost. Read by evaluate."""

    judge: Literal["none", "world"] = knob(
        "none", "Who compares the answers: world is the embedded world's known reward; none: no win rate."
    )
    num_prompts: int = knob(128, "Held-out prompts to answer, at most; 0: all.", unit="prompts", ge=0)
    temperature: float = knob(1.0, "Sampling temperature of the compared answers; 0: greedy.", ge=0)
    max_new_tokens: int = knob(256, "Longest answer.", unit="tokens", ge=1)
    bootstrap_draws: int = knob(2000, "Draws behind each interval, clustered by prompt.", ge=100)
    confidence: float = knob(0.95, "Coverage of the intervals.", gt=0.5, lt=1)
    seed: int = knob(0, "Seeds sampling and bootstrap.", ge=0)


class RuntimeParams(Section):
    """This machine. No stage lists it: it never changes a result beyond rounding."""

    device: Literal["auto", "cpu", "cuda"] = knob("auto", "auto takes CUDA where there is one.")
    threads: int = knob(1, "CPU threads of torch. More than one can be slower on a shared machine.", ge=1)
    max_tokens_per_microbatch: int = knob(
        4096, "Memory knob: tokens that go through the model at once, padding included.", unit="tokens", ge=1
    )
    checkpoint_minutes: float = knob(10.0, "Work that a kill may cost; 0 saves after every step.", unit="minutes", ge=0)
    model_path: str | None = Field(
        default=None,
        description="Directory of the base model in Hugging Face layout with safetensors weights;"
        " the environment variable DPO_MODEL_PATH goes before it.",
    )


class Params(Section):
    """All of params.yaml."""

    data: DataParams = Field(default_factory=DataParams)
    model: ModelParams = Field(default_factory=ModelParams)
    sft: SftParams = Field(default_factory=SftParams)
    reference: ReferenceParams = Field(default_factory=ReferenceParams)
    train: TrainParams = Field(default_factory=TrainParams)
    evaluate: EvaluateParams = Field(default_factory=EvaluateParams)
    runtime: RuntimeParams = Field(default_factory=RuntimeParams)


# --- loading ------------------------------------------------------------------------------


def load_params(path: Path, overrides: Sequence[str] = ()) -> Params:
    """Read params.yaml and apply ``section.key=value`` overrides.

    Raises:
        ParamsError: The file is missing or not YAML, or any value in it is wrong; the message
            lists every problem.
    """
    if not path.is_file():
        raise ParamsError(f"{path} is missing; run the command in a project folder, or make one: dpo-cli init DIR")
    try:
        tree = YAML(typ="safe").load(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ParamsError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except (YAMLError, ValueError, RecursionError) as error:
        raise ParamsError(f"{path}{_yaml_place(error)}") from error
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise ParamsError(f"{path} must hold sections (data, model, ...), got {type(tree).__name__}")
    for override in overrides:
        _apply_override(tree, override)
    return parse_params(tree, source=path.name)


def parse_params(tree: Mapping[str, Any], source: str = "params.yaml") -> Params:
    """Validate a mapping of sections.

    Raises:
        ParamsError: With one line for every problem.
    """
    try:
        params = Params.model_validate(tree)
    except ValidationError as error:
        raise ParamsError([f"{source}: {_explain(problem)}" for problem in error.errors()]) from None
    dead = [f"{source}: {problem}" for problem in _contradictions(params)]
    if dead:
        raise ParamsError(dead)
    return params


def _yaml_place(error: Exception) -> str:
    if isinstance(error, MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f", line {mark.line + 1}, column {mark.column + 1}: not valid YAML: {error.problem}"
    return f": not valid YAML: {str(error).splitlines()[0]}"


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    parts = key.strip().split(".")
    if not separator or len(parts) < 2 or not all(parts):
        raise ParamsError(f"--set takes section.key=value, got {override!r}")
    try:
        value = YAML(typ="safe").load(text)
    except (YAMLError, ValueError, RecursionError) as error:
        raise ParamsError(f"--set {key}{_yaml_place(error)}") from error
    node = tree
    for part in parts[:-1]:
        if node.get(part) is None:
            node[part] = {}
        node = node[part]
        if not isinstance(node, dict):
            raise ParamsError(f"--set {key}: {part} is a value, not a section")
    node[parts[-1]] = value


_BOUNDS = {
    "greater_than": "> {gt:g}",
    "greater_than_equal": ">= {ge:g}",
    "less_than": "< {lt:g}",
    "less_than_equal": "<= {le:g}",
}
_TYPES = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "text",
    "bool_type": "true or false",
    "list_type": "a list",
    "model_type": "a section",
    "model_attributes_type": "a section",
    "dict_type": "a section",
}


def _explain(problem: Any) -> str:
    """One pydantic problem as *where must what, got what*."""
    location = [part for part in problem["loc"] if part != "LoraParams"]
    where = ".".join(str(part) for part in location)
    kind, context, got = problem["type"], problem.get("ctx", {}), problem["input"]
    if kind == "extra_forbidden":
        return _unknown_key(location)
    if kind in _BOUNDS:
        return f"{where} must be {_BOUNDS[kind].format(**context)}, got {got!r}"
    if kind == "literal_error":
        return f"{where} must be one of {context['expected']}, got {got!r}"
    if kind in _TYPES:
        return f"{where} must be {_TYPES[kind]}, got {got!r}"
    return f"{where}: {problem['msg'][0].lower()}{problem['msg'][1:]}, got {got!r}"


def _unknown_key(location: Sequence[Any]) -> str:
    *parents, name = (str(part) for part in location)
    model: type[BaseModel] = Params
    for parent in parents:
        annotation = model.model_fields[parent].annotation
        model = LoraParams if annotation == (LoraParams | None) else annotation  # type: ignore[assignment]
    prefix = "".join(f"{parent}." for parent in parents)
    close = difflib.get_close_matches(name, model.model_fields, n=1, cutoff=0.5)
    if close:
        return f"{prefix}{name} is not a setting; did you mean {prefix}{close[0]}?"
    elsewhere = [f"{path}" for path, _ in iter_settings() if path.rpartition(".")[2] == name]
    if elsewhere:
        return f"{prefix}{name} is not a setting; did you mean {elsewhere[0]}?"
    return f"{prefix}{name} is not a setting; there are {', '.join(prefix + field for field in model.model_fields)}"


def iter_settings(model: type[BaseModel] = Params, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """All settings as ``(dotted path, pydantic field)``, in the order of the schema."""
    for name, field in model.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield from iter_settings(annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


# --- contradictions and settings without effect --------------------------------------------------------------


def _differs(section: BaseModel, *names: str) -> list[str]:
    """Those of the named fields that were moved from their defaults."""
    fields = type(section).model_fields
    return [name for name in names if getattr(section, name) != fields[name].get_default(call_default_factory=True)]


def _contradictions(params: Params) -> list[str]:
    """Settings that contradict each other, and settings that were moved from their default for nothing."""
    found: list[str] = []
    model, sft, train = params.model, params.sft, params.train
    if model.name == EMBEDDED:
        if params.runtime.model_path is not None:
            found.append("runtime.model_path has no effect with model.name embedded; give the model a name of its own")
        if model.chat_template != "auto":
            found.append("model.chat_template has no effect with model.name embedded; leave it at auto")
    else:
        found += [
            f"model.{name} has no effect with model.name {model.name}; only the embedded model is built here"
            for name in _differs(model, "seed", "pretrain_steps")
        ]
    if params.evaluate.judge == "world" and params.data.eval_fraction > WORLD_HELD_OUT:
        found.append(
            f"data.eval_fraction must be <= {WORLD_HELD_OUT:g} with evaluate.judge world, got"
            f" {params.data.eval_fraction:g}: the embedded model has read the other prompts"
        )
    if sft.method == "full":
        found += [f"sft.{name} has no effect with sft.method full" for name in _differs(sft, "lora")]
    if train.lora is not None and sft.method in ("lora", "qlora"):
        found.append(f"train.lora has no effect with sft.method {sft.method}: train goes on with the adapter of sft")
    if train.loss == "cdpo":
        if train.label_smoothing == 0:
            found.append("train.loss cdpo needs train.label_smoothing > 0; at 0 it is the sigmoid loss")
    elif train.label_smoothing != 0:
        found.append(f"train.label_smoothing has no effect with train.loss {train.loss}; cdpo reads it")
    for name, section in (("sft", sft), ("train", train)):
        if name == "sft" and sft.method == "none":
            continue
        if section.max_steps is not None and _differs(section, "epochs"):
            found.append(f"{name}.epochs has no effect beside {name}.max_steps; drop one of them")
        if section.optimizer == "rmsprop" and section.weight_decay != 0:
            found.append(f"{name}.weight_decay has no effect with {name}.optimizer rmsprop")
    return found
