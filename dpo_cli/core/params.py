"""The one schema of params.yaml: every knob with its meaning, unit, range and default.

The defaults suit a real model of a few billion parameters on one consumer GPU; the embedded
project's params.yaml overrides some of them (:mod:`dpo_cli.core.params_text`). Validation
collects every problem of a file into one :class:`~dpo_cli.core.errors.ParamsError`.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, Field, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from dpo_cli.core.errors import ParamsError
from dpo_cli.core.evaluate_params import EvaluateParams, idle_evaluate_settings
from dpo_cli.core.sections import Section, differs, param
from dpo_cli.core.text import in_one_line, shown
from dpo_cli.losses.catalogue import LOSSES, SETTINGS, learns_log_ratio, readers

AS_PREFERENCES = "preferences"
"""The value of data.sft.path that stands for the preference data."""

EMBEDDED = "embedded"
"""The value of model.name that stands for the model built by this package."""

WORLD_HELD_OUT = 0.3
"""The embedded model never reads a prompt whose split position is below this, so eval_fraction may go up to it."""


_LARGEST_FILE = 1 << 20
_MOST_VALUES = 10_000
_MOST_PROBLEMS = 20
_LONGEST_TEXT = 10_000
_LONGEST_NAME = 255
_PATHS = (".path", "_path", ".file", ".template")

Column = str | list[str]

if TYPE_CHECKING:
    LossName = str
    PairwiseName = str
else:  # the catalogue says which there are
    LossName = Literal[tuple(LOSSES)]
    PairwiseName = Literal[tuple(name for name, loss in LOSSES.items() if not loss.is_ranking)]

Labels = Literal["first", "second", "tie"]
Roles = Literal["system", "user", "assistant", "tool"]


def _label_keys(labels: Any) -> Any:
    """Labels as YAML reads them, 1 or true, as the texts that they are in the data."""
    if not isinstance(labels, dict):
        return labels
    return {
        str(key).lower() if isinstance(key, bool) else f"{key:.15g}" if isinstance(key, int | float) else key: side
        for key, side in labels.items()
    }


class Source(Section):
    """A source of data: a file, or several of one kind."""

    path: str = Field(
        min_length=1, description="File under data/raw, where DVC sees a change; * and ? stand for several files."
    )
    format: Any = param("auto", "Format of its rows; auto detects it and says what it found.")
    columns: dict[str, Column] = param(
        {}, "Where fields lie that go by other names: {prompt: question}; a.b is b within a; a list makes a list."
    )
    records: str = param("", "Where the list of rows lies, if not at the top: a key, or keys with dots between.")
    roles: dict[str, Roles] = param({}, "Further names of roles: {narrator: system}.")
    labels: Annotated[dict[str, Labels], BeforeValidator(_label_keys)] = param(
        {},
        'What a label means that names the better of two outputs: {"1": first, "0": second}; "<1.5" stands for all'
        " numbers below.",
    )
    unwrap: bool = param(
        False,
        "Texts that are whole conversations as a chat template renders them (ChatML, Llama, Gemma, [INST],"
        " ### Instruction and the like) become messages.",
    )
    weight: float = param(
        1.0,
        "How often a row of it is seen in an epoch: 0.5 takes half of its prompts (a hash decides), 2 takes every row"
        " twice. The eval split is not weighted.",
        gt=0,
        le=100,
    )
    max_rows: int | None = param(None, "Stop after so many rows of it.", unit="rows", ge=1, le=10**12)
    split: Literal["auto", "train", "eval"] = param(
        "auto", "auto: data.eval_fraction of its prompts are held out; else all of it goes to one split."
    )


SftFormat = Literal[
    "auto", "alpaca", "prompt_completion", "messages", "oasst",
    "sharegpt", "pairs", "hh", "implicit", "two_outputs", "kwise",
]  # fmt: skip
PreferenceFormat = Literal["auto", "sharegpt", "pairs", "hh", "implicit", "two_outputs", "kwise", "oasst"]


class SftSource(Source):
    """A source of instruction data."""

    format: SftFormat = param("auto", "Format of its rows; auto detects it and says what it found.")
    turns: Literal["last", "all"] = param(
        "last", "Of a conversation (format messages): its last answer is the example, or every answer is one."
    )


class PreferenceSource(Source):
    """A source of preference data."""

    format: PreferenceFormat = param("auto", "Format of its rows; auto detects it and says what it found.")
    pairs: Literal["all", "adjacent", "best_vs_worst"] = param(
        "all",
        "Pairs made of K ranked answers: all that are not tied, those of neighboring ranks, or the best with the"
        " worst.",
    )
    compare: Literal["last", "first"] = param(
        "last",
        "Of chosen and rejected with several turns each: last takes those that differ in the last answer alone; first"
        " compares the first answers in which they differ, and leaves out what follows.",
    )


class SftData(SftSource):
    """Where the instruction data is."""

    path: str = param(
        "data/raw/instructions.json",
        "File of instruction data under data/raw, where DVC sees a change; * and ? stand for several files."
        " preferences: the preference data, read as data.preferences says, so that its preferred answers are learned.",
        min_length=1,
    )
    also: list[SftSource] = param([], "Further sources: a list of mappings with the settings above.")


class PreferenceData(PreferenceSource):
    """Where the preference data is."""

    path: str = param(
        "data/raw/preferences.json",
        "File of preference data under data/raw; * and ? stand for several files.",
        min_length=1,
    )
    also: list[PreferenceSource] = param([], "Further sources: a list of mappings with the settings above.")


Policy = Literal["drop", "keep", "error"]
StrictPolicy = Literal["drop", "error"]


class DataChecks(Section):
    """What to do with rows that a check finds: drop lists them and leaves them out, keep counts them, error stops."""

    malformed: StrictPolicy = param("drop", "The row does not fit its format: a field missing, not text, no such role.")
    empty_prompt: StrictPolicy = param("drop", "Nothing is asked.")
    empty_completion: Policy = param("drop", "The answer to an instruction is empty.")
    empty_chosen: Policy = param("drop", "The preferred answer is empty.")
    empty_rejected: Policy = param("drop", "The other answer is empty.")
    equal_sides: Policy = param("drop", "Both answers are the same, up to white space around them.")
    tie: StrictPolicy = param("drop", "Neither answer won: no pair can be made.")
    duplicate: Policy = param("drop", "The same prompt and answers came before; the first one stays.")
    contradiction: Policy = param("drop", "The same two answers are there in both orders; drop leaves out both.")
    shared_prompt: Policy = param(
        "drop", "A train row's prompt is in eval, too; only sources with a split of their own can have it."
    )
    score_conflict: Policy = param(
        "keep", "The preferred answer's score is lower than the other's, or the same; keep: the choice counts."
    )
    repeated_prompt: Policy = param("keep", "An earlier row has the same prompt with other answers.")
    prefix_sides: Policy = param("keep", "One answer is the beginning of the other.")
    longer_chosen: Policy = param("keep", "The preferred answer is the longer one: length bias where it is not half.")
    chat_markers: Policy = param("keep", "A text holds marks of chat templates, such as <|im_end|> or Human:.")
    placeholders: Policy = param("keep", "A text holds {{placeholders}}; they are kept as they stand.")
    replacement_characters: Policy = param("keep", "A text holds U+FFFD: it was decoded wrongly once.")
    turn_order: Policy = param(
        "keep", "The prompt has two turns of one role in a row, or a system turn behind the first."
    )
    no_input: Policy = param("keep", "The prompt ends with <noinput> or Noinput, which stands for an empty input.")


class DataParams(Section):
    """What goes in. Read by convert_sft and convert_preferences."""

    sft: SftData = Field(default_factory=SftData, description="Instruction data.")
    preferences: PreferenceData = Field(default_factory=PreferenceData, description="Preference data.")
    eval_fraction: float = param(
        0.1,
        "Share of prompts held out. A hash of the prompt's opening decides, for both files alike: adding rows moves"
        " none.",
        gt=0,
        lt=1,
    )
    split_by: Literal["opening", "prompt"] = param(
        "opening",
        "What is hashed: opening, all up to the first user turn, so that no conversation is on both sides; or the whole"
        " prompt, for conversations that all begin alike.",
    )
    checks: DataChecks = Field(default_factory=DataChecks, description="What is done with rows that a check finds.")

    @property
    def sft_sources(self) -> list[SftSource]:
        """All sources of instructions; where they are the preferences, with the settings of those."""
        if self.sft.path != AS_PREFERENCES:
            return [self.sft, *self.sft.also]
        shared = [source.model_dump(include=set(Source.model_fields)) for source in self.preference_sources]
        return [*map(SftSource.model_validate, shared), *self.sft.also]

    @property
    def preference_sources(self) -> list[PreferenceSource]:
        """All sources of preferences."""
        return [self.preferences, *self.preferences.also]


class ModelParams(Section):
    """Which model is tuned. Read by every stage that loads it."""

    name: str = param(
        EMBEDDED,
        "'embedded' builds a tiny model from code; any other name stands for the directory in runtime.model_path"
        " or the environment variable DPO_MODEL_PATH.",
        min_length=1,
    )
    revision: str = param("", "Your label for the model's version; part of its identity.")
    chat_template: Literal["auto", "plain", "chatml", "alpaca"] = param(
        "auto", "'auto' takes the model's own chat template; a name overrides it, and is needed where it has none."
    )
    template_options: dict[str, Any] = param(
        {}, "What the chat template is told beside the messages: {enable_thinking: false}."
    )
    system: Literal["keep", "fold"] = param(
        "keep",
        "keep: system turns go to the chat template as they are; fold: their text goes before the user's turn, for"
        " templates that take no system turn.",
    )
    seed: int = param(0, "Seed of the embedded model's weights and text.", ge=0, le=2**32 - 1)
    pretrain_steps: int = param(
        900, "Steps for which the embedded model is pretrained.", unit="optimizer steps", ge=1, le=10**6
    )


class LoraParams(Section):
    """Shape of a LoRA adapter (Hu et al. 2021)."""

    r: int = param(16, "Rank of the update.", ge=1, le=4096)
    alpha: float = param(32.0, "Scale of the update: it is multiplied by alpha / r.", gt=0, le=1e5)
    rslora: bool = param(False, "Multiply it by alpha / sqrt(r) instead, for high ranks (rsLoRA, Kalajdzievski 2023).")
    dora: bool = param(
        False,
        "Train the length of each row of the weights apart from its direction (DoRA, Liu et al. 2024). A step takes"
        " longer, and evaluate.scales has no meaning.",
    )
    dropout: float = param(0.0, "Dropout on the adapter's input while training.", ge=0, lt=1)
    target_modules: Annotated[list[str], Field(min_length=1)] = param(
        ["all-linear"], "Names of the layers that get an adapter; all-linear means every linear layer but the head."
    )


class TrainingParams(Section):
    """Knobs that SFT, DPO and the reward model share."""

    learning_rate: float = param(2e-4, "Peak learning rate.", gt=0, le=1)
    batch_size: int = param(
        16,
        "Examples (sft), preference pairs or rankings (train, reward) an optimizer step. It alone decides the"
        " mathematics; memory is bounded by runtime.max_tokens_per_microbatch.",
        ge=1,
        le=10**6,
    )
    epochs: float = param(1.0, "Passes over the training data.", unit="epochs", gt=0, le=10**4)
    max_steps: int | None = param(None, "Steps to train, in place of epochs.", unit="optimizer steps", ge=1, le=10**8)
    schedule: Literal["cosine", "linear", "constant"] = param("cosine", "Learning rate after the warm-up.")
    warmup_ratio: float = param(0.1, "Share of the steps in which the learning rate rises from 0.", ge=0, lt=1)
    optimizer: Literal["adamw", "rmsprop", "paged_adamw_8bit"] = param(
        "adamw", "paged_adamw_8bit is bitsandbytes' and needs CUDA; rmsprop is the DPO paper's."
    )
    weight_decay: float = param(0.0, "Decoupled weight decay; rmsprop takes none.", ge=0, le=10)
    max_grad_norm: float = param(1.0, "Gradients are clipped to this L2 norm.", gt=0, le=1e9)
    eval_steps: int = param(
        50,
        "Held-out loss after every so many steps, besides that before the first and after the last; 0: only those.",
        unit="optimizer steps",
        ge=0,
        le=10**8,
    )
    keep: Literal["last", "best"] = param(
        "last",
        "Whose weights are published: the last step's, or those of the evaluation with the lowest held-out loss.",
    )
    patience: int | None = param(
        None,
        "With keep best, training ends when so many evaluations in a row brought no lower held-out loss; null: never"
        " before its last step.",
        unit="evaluations",
        ge=1,
        le=10**8,
    )
    seed: int = param(0, "Seeds the adapter's start, the order of rows and dropout.", ge=0, le=2**32 - 1)


class TokenChecks(Section):
    """What to do with rows by their tokens: drop lists them and leaves them out, keep counts them, error stops."""

    over_long: StrictPolicy = param("drop", "The row has more than max_length tokens; nothing is ever cut off.")
    lost_eos: Policy = param("drop", "An answer does not end with a token that ends the model's turn.")
    lost_text: Policy = param(
        "drop", "Text of an answer, or of a turn before it, is not among the tokens: the chat template leaves it out."
    )
    doubled_opener: Policy = param("drop", "An answer begins with what the chat template opens before it: <think>.")
    tools_not_shown: Policy = param("drop", "The chat template does not show the row's tools or calls.")
    reasoning_not_shown: Policy = param("drop", "The chat template does not show the reasoning of an answer.")
    double_bos: Policy = param(
        "keep", "The prompt begins with two BOS tokens: the template writes one, the text another."
    )
    double_eos: Policy = param("keep", "An answer's text ends with an end token of its own; one is scored.")


class PairTokenChecks(TokenChecks):
    """The same for rows with several answers."""

    equal_sides: Policy = param("drop", "Two answers are the same token by token.")


class SftParams(TrainingParams):
    """Supervised fine-tuning, which gives the reference model. Read by sft."""

    method: Literal["none", "adapter", "full", "lora", "qlora"] = param(
        "qlora",
        "none: no fine-tuning, the reference is the base; adapter: no fine-tuning, the reference is your LoRA adapter"
        " in runtime.adapter_path (with both, the other settings of this section are not read); full: all weights;"
        " lora: an adapter on the plain model; qlora: an adapter on the model in 4-bit nf4.",
    )
    lora: LoraParams = Field(default_factory=LoraParams, description="The adapter of methods lora and qlora.")
    max_length: int = param(
        1024,
        "Longer rows (prompt + completion) are left out, counted and listed.",
        unit="tokens",
        ge=2,
        le=10**7,
    )
    checks: TokenChecks = Field(default_factory=TokenChecks, description="What is done with rows by their tokens.")


class ReferenceParams(Section):
    """The graph that reference, policy and reward model share. Read by precompute_ref, train, reward and evaluate."""

    quantization: Literal["nf4", "none"] = param(
        "nf4", "How the frozen weights are held: 4-bit nf4 with double quantization, or as they are."
    )
    max_length: int = param(
        1024,
        "Pairs with a longer side (prompt + answer) are left out, counted and listed.",
        unit="tokens",
        ge=2,
        le=10**7,
    )
    rankings: bool = param(
        True,
        "Where the data has rankings, score all their answers, as train.loss plackett_luce needs; false: only those"
        " in pairs.",
    )
    checks: PairTokenChecks = Field(
        default_factory=PairTokenChecks, description="What is done with pairs by their tokens."
    )


class TrainParams(TrainingParams):
    """Direct Preference Optimization. Read by train; evaluate takes beta from what train made."""

    learning_rate: float = param(1e-4, "Peak learning rate.", gt=0, le=1)
    loss: LossName | dict[PairwiseName, Annotated[float, Field(gt=0, le=1e6)]] = param(
        "sigmoid",
        "The objective, or several with their weights: {sigmoid: 1, sft: 0.1}. docs/objectives.md has a table of all:"
        " formula, paper, and when to use which.",
    )
    beta: float = param(0.1, "Strength of the pull towards the reference model.", gt=0, le=1000)
    label_smoothing: float = param(
        0.0,
        "Share of flipped labels that cdpo, robust, exo_pair, aot, aot_unpaired, cpo and simpo assume.",
        ge=0,
        lt=0.5,
    )
    gamma: float = param(0.0, "Margin that simpo asks for.", unit="nats", ge=0, le=1000)
    discopop_tau: float = param(0.05, "Temperature of the blend in discopop.", ge=1e-3, le=1)
    divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"] = param(
        "reverse_kl", "What keeps the policy near the reference (f-DPO, Wang et al. 2023); for losses of the margin."
    )
    divergence_alpha: float = param(
        0.5, "Its coefficient, for divergence alpha: 0 is forward_kl, towards 1 it is reverse_kl.", ge=0, lt=1
    )
    ld_alpha: float | None = param(
        None,
        "LD-DPO (Liu et al. 2024): weight of the tokens that one answer has beyond the other's length; null: not at"
        " all.",
        ge=0,
        lt=1,
    )
    weighting: Literal["none", "wpo"] = param(
        "none", "wpo weighs each pair by how likely it is under the policy (Zhou et al. 2024, eq. 2)."
    )
    margin_scale: float = param(
        0.0,
        "Times the difference of the two answers' scores, in the data, is what the margin must reach (ODPO, Amini et"
        " al. 2024); 0: scores are not read.",
        ge=0,
        le=1e6,
    )
    ties: Literal["average", "groups"] = param(
        "average",
        "Tied answers of a ranking (plackett_luce): the mean over the orders that they allow, or not compared.",
    )
    lora: LoraParams | None = Field(
        default=None,
        description="The adapter's shape where sft makes none (methods none and full); null takes the defaults.",
    )

    @property
    def losses(self) -> dict[LossName, float]:
        """The objectives with their weights."""
        return {**self.loss} if isinstance(self.loss, dict) else {self.loss: 1.0}

    @property
    def learns_log_ratio(self) -> bool:
        """Whether beta log(pi / ref), summed over tokens, is the reward that it learns."""
        return learns_log_ratio(self.losses, self.divergence, self.ld_alpha)


class RewardParams(TrainingParams):
    """The reward model that DPO does without: a head on the SFT model that scores answers. Read by reward."""

    loss: Literal["none", "bradley_terry", "plackett_luce"] = param(
        "none",
        "none: there is no reward model, and the other settings of this section are not read; bradley_terry: from"
        " pairs; plackett_luce: from rankings.",
    )
    learning_rate: float = param(1e-4, "Peak learning rate of adapter and head.", gt=0, le=1)
    ties: Literal["average", "groups"] = param(
        "average",
        "Tied answers of a ranking (plackett_luce): the mean over the orders that they allow, or not compared.",
    )
    lora: LoraParams | None = Field(
        default=None,
        description="The adapter's shape where sft makes none (methods none and full); null takes the defaults.",
    )


class RuntimeParams(Section):
    """This machine. No stage lists it: it never changes a result beyond rounding."""

    device: Literal["auto", "cpu", "cuda"] = param(
        "auto",
        "auto takes CUDA where there is one, but not for the embedded model, which wants no GPU.",
    )
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = param(
        "auto",
        "What products are computed in; auto: bfloat16 on a GPU that has it (compute capability 8.0 and above), float16"
        " with a loss scale on an older one, float32 on the CPU. A part of what a reference cache is kept under.",
    )
    max_gpu_gib: float | None = param(
        None,
        "Memory knob: GPU memory that PyTorch may hold; null: 92% of what is free at the start. Beyond it work goes on"
        " in smaller micro-batches, and never in the system's memory, into which drivers under Windows spill.",
        unit="GiB",
        gt=0,
        le=1e4,
    )
    workers: int | None = param(
        None,
        "Processes that convert large files of JSON lines; null: as many as there are cores for it.",
        ge=1,
        le=1024,
    )
    threads: int | None = param(
        None,
        "CPU threads of torch; null: OMP_NUM_THREADS, or else all physical cores that the process may use. On cores"
        " that others use, too, 1 can be faster.",
        ge=1,
        le=1024,
    )
    max_tokens_per_microbatch: int | None = param(
        None,
        "Memory knob: tokens that go through the model at once, padding included; null: 4096 on a GPU, in training"
        " what is fastest and fits, and 1024 on the CPU, where what fits into its caches is faster. Halved where memory"
        " runs out.",
        unit="tokens",
        ge=1,
        le=10**8,
    )
    layout: Literal["auto", "shared", "padded"] = param(
        "auto",
        "How a prompt and its answers go through the model: the prompt once (shared), or with each answer, in padded"
        " rows. auto tries both on the model and takes the cheaper one that is right.",
    )
    head_mib: int | None = param(
        None,
        "Memory knob: logits that are held at once; null: 256 on a GPU, 32 on the CPU.",
        unit="MiB",
        ge=1,
        le=2**20,
    )
    recompute: Literal["auto", "none", "elementwise", "layers"] = param(
        "auto",
        "What the backward pass computes again to save memory: nothing, all but matrix products and attention, or"
        " whole layers. auto takes the fastest that fits into free memory.",
    )
    checkpoint_minutes: float = param(
        10.0, "Work that a kill may cost; 0 saves after every step.", unit="minutes", ge=0, le=1e6
    )
    tensorboard: bool = param(
        False,
        "Write event files for TensorBoard while sft, train and reward train, below .scratch/tensorboard; needs the"
        " package tensorboard.",
    )
    model_path: str | None = Field(
        default=None,
        description="Directory of the base model in Hugging Face layout with safetensors weights;"
        " the environment variable DPO_MODEL_PATH goes before it.",
    )
    adapter_path: str | None = Field(
        default=None,
        description="Directory of the adapter that sft.method adapter goes on with, as PEFT saves it; the environment"
        " variable DPO_ADAPTER_PATH goes before it.",
    )
    judge_path: str | None = Field(
        default=None,
        description="Directory of the model that evaluate.judge hf asks, in the same layout; the environment variable"
        " DPO_JUDGE_PATH goes before it.",
    )


class Params(Section):
    """All of params.yaml."""

    data: DataParams = Field(default_factory=DataParams)
    model: ModelParams = Field(default_factory=ModelParams)
    sft: SftParams = Field(default_factory=SftParams)
    reference: ReferenceParams = Field(default_factory=ReferenceParams)
    train: TrainParams = Field(default_factory=TrainParams)
    reward: RewardParams = Field(default_factory=RewardParams)
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
    if path.stat().st_size > _LARGEST_FILE:
        raise ParamsError(f"{path} is larger than {_LARGEST_FILE >> 20} MiB: no settings; write it anew")
    try:
        tree = _read_yaml(path.read_text(encoding="utf-8-sig"), str(path))
    except UnicodeDecodeError as error:
        raise ParamsError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise ParamsError(f"{path} must hold sections (data, model, ...), got {type(tree).__name__}")
    for override in overrides:
        _apply_override(tree, override)
    return parse_params(tree, source=path.name)


def parse_overrides(overrides: Sequence[str]) -> Params:
    """The defaults with ``section.key=value`` overrides, where there is no params.yaml.

    Raises:
        ParamsError: A value is wrong.
    """
    tree: dict[str, Any] = {}
    for override in overrides:
        _apply_override(tree, override)
    return parse_params(tree, source="--set")


def apply_overrides(values: Mapping[str, Any], overrides: Sequence[str]) -> tuple[dict[str, Any], Params]:
    """Settings by dotted path with ``section.key=value`` overrides of them, and all settings that they make.

    Raises:
        ParamsError: A value is wrong; the message lists every problem.
    """
    tree: dict[str, Any] = {}
    for setting, value in values.items():
        node = tree
        *parents, name = setting.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    for override in overrides:
        _apply_override(tree, override)
    params = parse_params(tree, source="--set")
    given = [path for path, _ in iter_settings() if path in values or _value_at(tree, path) is not None]
    return {path: _value_at(params.model_dump(), path) for path in given}, params


def _value_at(tree: Any, path: str) -> Any:
    for part in path.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


def parse_params(tree: Mapping[str, Any], source: str = "params.yaml") -> Params:
    """Validate a mapping of sections.

    Raises:
        ParamsError: With one line for every problem.
    """
    try:
        params = Params.model_validate(tree)
    except ValidationError as error:
        found = [problem for problem in error.errors() if not _is_of_another_type(problem)]
        problems = list(dict.fromkeys(f"{source}: {explain(problem)}" for problem in found))
        more = len(problems) - _MOST_PROBLEMS
        raise ParamsError([*problems[:_MOST_PROBLEMS], *([f"{source}: and {more} more"] if more > 0 else [])]) from None
    impossible = [f"{source}: {problem}" for problem in _impossible_texts(params.model_dump(), "")]
    if impossible:
        raise ParamsError(impossible[:_MOST_PROBLEMS])
    dead = [f"{source}: {problem}" for problem in _contradictions(params)]
    if dead:
        raise ParamsError(dead)
    return params


def _read_yaml(text: str, where: str) -> Any:
    try:
        if "&" in text:  # anchors: what a few lines of aliases spell out may fill any memory
            num_values = _count_values(YAML(typ="safe", pure=True).compose(text), {})
            if num_values > _MOST_VALUES:
                raise ParamsError(
                    f"{where}: with its aliases spelled out it holds more than {_MOST_VALUES} values; write them out"
                )
        return YAML(typ="safe").load(text)
    except (YAMLError, ValueError, RecursionError, OverflowError) as error:
        raise ParamsError(f"{where}{_yaml_place(error)}") from error


def _count_values(node: Any, counts: dict[int, float]) -> float:
    """Values under a YAML node, those of an alias each time that it is used; infinite where it holds itself."""
    if id(node) not in counts:
        counts[id(node)] = math.inf  # while it is being counted
        inner = getattr(node, "value", None)
        parts = (
            [part for entry in inner for part in (entry if isinstance(entry, tuple) else (entry,))]
            if (isinstance(inner, list))
            else []
        )
        counts[id(node)] = 1 + sum(_count_values(part, counts) for part in parts)
    return counts[id(node)]


def _yaml_place(error: Exception) -> str:
    if isinstance(error, MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f", line {mark.line + 1}, column {mark.column + 1}: not valid YAML: {error.problem}"
    return f": not valid YAML: {in_one_line((str(error) or type(error).__name__).splitlines()[0])}"


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    parts = key.strip().split(".")
    if not separator or len(parts) < 2 or not all(parts):
        meant = [path for path, _ in iter_settings() if separator and path.rpartition(".")[2] == key.strip()]
        hint = f"; did you mean {' or '.join(f'{path}={text}' for path in meant[:3])}?" if meant else ""
        raise ParamsError(f"--set takes section.key=value, got {shown(override)}{hint}")
    value = _read_yaml(text, f"--set {key}")
    node = tree
    for part in parts[:-1]:
        if node.get(part) is None:
            node[part] = {}
        node = node[part]
        if not isinstance(node, dict):
            raise ParamsError(f"--set {key}: {part} is a value, not a section")
    node[parts[-1]] = value


_BOUNDS = {
    "greater_than": (">", "gt"),
    "greater_than_equal": (">=", "ge"),
    "less_than": ("<", "lt"),
    "less_than_equal": ("<=", "le"),
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


_NOISE = ("LoraParams", "str", "list[str]", "[key]")
"""What pydantic adds to the place of a problem where a value may be of several types."""


def _is_type(part: str | int) -> bool:
    return isinstance(part, str) and part.startswith(("literal[", "dict["))


def _is_of_another_type(problem: Any) -> bool:
    """Whether a problem of a name or a mapping is that it is not the other one of them."""
    kinds = [str(part) for part in problem["loc"] if _is_type(part)]
    is_mapping = isinstance(problem["input"], dict)
    return bool(kinds) and problem["loc"][-1] == kinds[-1] and kinds[-1].startswith("dict[") != is_mapping


def bound_text(bound: float) -> str:
    """A bound of a setting as a user would write it: whole numbers in full."""
    return str(int(bound)) if float(bound).is_integer() and abs(bound) < 1e15 else f"{bound:g}"


def explain(problem: Any, section: type[BaseModel] | None = None) -> str:
    """One pydantic problem of a section as *where must what, got what*."""
    location = [part for part in problem["loc"] if part not in _NOISE and not _is_type(part)]
    where = ".".join(str(part) for part in location)
    kind, context, got = problem["type"], problem.get("ctx", {}), problem["input"]
    if "columns" in location and kind in ("string_type", "list_type"):
        return f"{where} must be text or a list of texts, got {shown(got)}"
    if kind == "missing":
        return f"{where} is missing"
    if kind == "extra_forbidden":
        return _unknown_key(location, section or Params)
    if kind in _BOUNDS:
        sign, name = _BOUNDS[kind]
        return f"{where} must be {sign} {bound_text(context[name])}, got {shown(got)}"
    if kind == "literal_error":
        return f"{where} must be one of {context['expected']}, got {shown(got)}"
    if kind in _TYPES:
        return f"{where} must be {_TYPES[kind]}, got {shown(got)}"
    return f"{where}: {problem['msg'][0].lower()}{problem['msg'][1:]}, got {shown(got)}"


def _unknown_key(location: Sequence[Any], model: type[BaseModel]) -> str:
    *parents, name = (str(part) for part in location)
    for parent in parents:
        if parent.isdigit():  # a place in a list of sections
            continue
        model = _section_in(model.model_fields[parent].annotation)
    prefix = "".join(f"{parent}." for parent in parents)
    elsewhere = [f"{path}" for path, _ in iter_settings() if path.rpartition(".")[2] == name]
    if elsewhere:
        return f"{prefix}{name} is not a setting; did you mean {elsewhere[0]}?"
    close = difflib.get_close_matches(name, model.model_fields, n=1, cutoff=0.5)
    if close:
        return f"{prefix}{name} is not a setting; did you mean {prefix}{close[0]}?"
    return f"{prefix}{name} is not a setting; there are {', '.join(prefix + field for field in model.model_fields)}"


def _section_in(annotation: Any) -> type[BaseModel]:
    """The section in the type of a field: itself, one that may be null, or a list of them."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(argument for argument in get_args(annotation) if issubclass(argument, BaseModel))


def iter_settings(model: type[BaseModel] = Params, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """All settings as ``(dotted path, pydantic field)``, in the order of the schema."""
    for name, field in model.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield from iter_settings(annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


# --- contradictions and settings without effect --------------------------------------------------------------


def _idle_columns(params: Params) -> list[str]:
    """Settings of sources that say what is known already."""
    found = []
    if params.data.sft.path == AS_PREFERENCES:
        found += [
            f"data.sft.{name} has no effect with data.sft.path {AS_PREFERENCES}; data.preferences says how it is read"
            for name in differs(params.data.sft, *(SftSource.model_fields.keys() - {"path"}))
        ]
    for section, first in (("data.sft", params.data.sft), ("data.preferences", params.data.preferences)):
        for index, source in enumerate([first, *first.also]):
            where = section if index == 0 else f"{section}.also.{index - 1}"
            found += [
                f"{where}.columns.{field} has no effect: it names itself"
                for field, key in source.columns.items()
                if field == key
            ]
            if isinstance(source, SftSource) and source.turns == "all" and source.format not in ("auto", "messages"):
                found.append(f"{where}.turns has no effect with format {source.format}; messages reads it")
            if source.weight != 1 and source.split == "eval":
                found.append(f"{where}.weight has no effect with split eval: only train rows are weighted")
            if source.labels and source.format not in ("auto", "two_outputs"):
                found.append(f"{where}.labels has no effect with format {source.format}; two_outputs reads it")
            if (
                isinstance(source, PreferenceSource)
                and source.compare == "first"
                and source.format in ("kwise", "oasst")
            ):
                found.append(f"{where}.compare has no effect with format {source.format}; it has single answers")
            if (
                isinstance(source, PreferenceSource)
                and source.pairs != "all"
                and source.format not in ("auto", "kwise", "oasst", "pairs", "sharegpt")
            ):
                found.append(
                    f"{where}.pairs has no effect with format {source.format}; kwise, oasst, pairs and sharegpt read it"
                )
    return found


def _idle_objective_settings(train: TrainParams) -> list[str]:
    """Settings of the objective that the chosen one does not read, or that it needs and does not get."""
    found = []
    if not train.losses:
        return ["train.loss must name at least one objective, got {}"]
    called = " and ".join(train.losses)
    for setting in differs(train, *SETTINGS):
        if not any(setting in LOSSES[name].reads for name in train.losses):
            named = readers(setting)
            verb = "reads" if len(named) == 1 else "read"
            found.append(f"train.{setting} has no effect with train.loss {called}; {_listed(named)} {verb} it")
    for name in train.losses:
        found += [
            f"train.loss {name} needs train.{setting} > 0{_AT_ZERO.get(name, '')}"
            for setting in LOSSES[name].needs
            if not differs(train, setting)
        ]
    if differs(train, "divergence_alpha") and train.divergence != "alpha":
        found.append(f"train.divergence_alpha has no effect with train.divergence {train.divergence}; alpha reads it")
    coupled = [name for name in train.losses if LOSSES[name].is_coupled]
    if coupled and len(train.losses) > 1:
        found.append(f"train.loss {coupled[0]} compares sorted pairs and cannot be mixed with others")
    if coupled and train.batch_size == 1:
        found.append(f"train.loss {coupled[0]} compares the pairs of a step: train.batch_size must be > 1, got 1")
    return found


def _idle_adapter_settings(params: Params) -> list[str]:
    """Settings of the adapters that change nothing, or that another setting cannot go with."""
    sft, reward = params.sft, params.reward
    policy, lora = ("sft.lora", sft.lora) if sft.method in ("lora", "qlora") else ("train.lora", params.train.lora)
    adapters = {policy: lora}
    if reward.loss != "none":
        adapters["reward.lora"] = reward.lora
    found = [
        f"{name}.rslora has no effect with {name}.r 1"
        for name, adapter in adapters.items()
        if adapter is not None and adapter.rslora and adapter.r == 1
    ]
    if lora is not None and lora.dora and params.evaluate.scales:
        found.append(
            f"evaluate.scales cannot go with {policy}.dora true: a multiple of what DoRA changed is no such adapter;"
            " set it to []"
        )
    return found


_AT_ZERO = {"cdpo": "; at 0 it is the sigmoid loss", "robust": "; at 0 it is the sigmoid loss"}


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _impossible_texts(value: Any, where: str) -> Iterator[str]:
    """Texts that no file, name or column can have, in any setting."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _impossible_texts(key, f"{where} (a key)") if isinstance(key, str) else ()
            yield from _impossible_texts(inner, f"{where}.{key}" if where else str(key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _impossible_texts(inner, f"{where}.{index}")
    elif isinstance(value, str):
        if "\0" in value:
            yield f"{where} holds a NUL byte, got {shown(value)}"
        elif len(value) > _LONGEST_TEXT:
            yield f"{where} must have at most {_LONGEST_TEXT} characters, got {len(value)}"
        elif max(len(part.encode(errors="replace")) for part in value.split("/")) > _LONGEST_NAME and where.endswith(
            _PATHS
        ):
            yield f"{where} holds a name that is longer than the {_LONGEST_NAME} bytes of a file's, got {shown(value)}"


_TOLD_ANYWAY = (
    "messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "bos_token", "eos_token",
    "pad_token", "unk_token",
)  # fmt: skip


def _contradictions(params: Params) -> list[str]:
    """Settings that contradict each other, and settings that were moved from their default for nothing."""
    found: list[str] = []
    model, sft, train, reward = params.model, params.sft, params.train, params.reward
    if model.name == EMBEDDED:
        if params.runtime.model_path is not None:
            found.append("runtime.model_path has no effect with model.name embedded; give the model a name of its own")
        if model.chat_template != "auto":
            found.append("model.chat_template has no effect with model.name embedded; leave it at auto")
        if model.template_options:
            found.append(
                "model.template_options has no effect with model.name embedded, whose chat template reads none"
            )
    else:
        found += [
            f"model.{name} has no effect with model.name {model.name}; only the embedded model is built here"
            for name in differs(model, "seed", "pretrain_steps")
        ]
    if params.evaluate.judge == "world" and params.data.eval_fraction > WORLD_HELD_OUT:
        found.append(
            f"data.eval_fraction must be <= {WORLD_HELD_OUT:g} with evaluate.judge world, got"
            f" {params.data.eval_fraction:g}: the embedded model has read the other prompts"
        )
    for name, value in model.template_options.items():
        if name in _TOLD_ANYWAY:
            found.append(f"model.template_options.{name} has no effect: the chat template is told that anyway")
        elif not name.isidentifier():
            found.append(f"model.template_options.{name} is no name of a variable in a chat template")
        elif not isinstance(value, bool | int | float | str):
            found.append(f"model.template_options.{name} must be true, false, a number or text, got {shown(value)}")
    found += idle_evaluate_settings(params.evaluate)
    if params.runtime.adapter_path is not None and sft.method != "adapter":
        found.append(f"runtime.adapter_path has no effect with sft.method {sft.method}; adapter reads it")
    if params.runtime.max_gpu_gib is not None and params.runtime.device == "cpu":
        found.append("runtime.max_gpu_gib has no effect with runtime.device cpu; set it to null")
    if params.runtime.judge_path is not None and params.evaluate.judge != "hf":
        found.append(f"runtime.judge_path has no effect with evaluate.judge {params.evaluate.judge}; judge hf reads it")
    found += _idle_columns(params)
    if sft.method == "full":
        found += [f"sft.{name} has no effect with sft.method full" for name in differs(sft, "lora")]
    for name, section in (("train", train), ("reward", reward)):
        if name == "reward" and reward.loss == "none":
            continue
        if section.lora is not None and sft.method in ("adapter", "lora", "qlora"):
            found.append(
                f"{name}.lora has no effect with sft.method {sft.method}: {name} goes on with the adapter of sft"
            )
    found += _idle_adapter_settings(params)
    found += _idle_objective_settings(train)
    if "plackett_luce" in train.losses and not params.reference.rankings:
        found.append("train.loss plackett_luce needs reference.rankings true")
    if reward.loss == "bradley_terry" and differs(reward, "ties"):
        found.append("reward.ties has no effect with reward.loss bradley_terry; plackett_luce reads it")
    for name, section in (("sft", sft), ("train", train), ("reward", reward)):
        if (name == "sft" and sft.method in ("none", "adapter")) or (name == "reward" and reward.loss == "none"):
            continue
        if section.max_steps is not None and differs(section, "epochs"):
            found.append(f"{name}.epochs has no effect beside {name}.max_steps; drop one of them")
        if section.optimizer == "rmsprop" and section.weight_decay != 0:
            found.append(f"{name}.weight_decay has no effect with {name}.optimizer rmsprop")
        if section.keep == "best" and section.eval_steps == 0:
            found.append(
                f"{name}.keep best has no effect with {name}.eval_steps 0: no step before the last is measured"
            )
        if section.keep == "last" and section.patience is not None:
            found.append(f"{name}.patience has no effect with {name}.keep last; best reads it")
    return found
