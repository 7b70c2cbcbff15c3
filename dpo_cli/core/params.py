"""The one schema of params.yaml: every setting with its meaning, unit, range and default.

The defaults suit a real model of a few billion parameters on one consumer GPU; the embedded project's params.yaml
overrides some of them (:mod:`dpo_cli.core.params_text`). Files of their own have section data, sections reward and ppo
(:mod:`dpo_cli.core.training_params`), reading a file (:mod:`dpo_cli.core.load_params`) and what settings must not say
together (:mod:`dpo_cli.core.params_checks`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, Field

from dpo_cli.core.data_params import DataParams, Policy, Section, StrictPolicy, param
from dpo_cli.core.judges import JUDGES, RuleName
from dpo_cli.core.training_params import LORA, TIES, LoraParams, PpoParams, RewardParams, TrainingParams
from dpo_cli.losses.catalogue import LOSSES, learns_log_ratio

EMBEDDED = "embedded"
"""The value of model.name that stands for the model built by this package."""

WORLD_HELD_OUT = 0.3
"""The embedded model never reads a prompt whose split position is below this, so eval_fraction may go up to it."""

if TYPE_CHECKING:
    LossName = str
    PairwiseName = str
    JudgeName = str
else:  # the catalogues say which there are
    JudgeName = Literal[("none", *JUDGES)]
    LossName = Literal[tuple(LOSSES)]
    PairwiseName = Literal[tuple(name for name, loss in LOSSES.items() if not (loss.is_ranking or loss.is_unpaired))]


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
    template_options: dict[str, Any] = param({}, "Extra variables for the chat template: {enable_thinking: false}.")
    system: Literal["keep", "fold"] = param(
        "keep",
        "keep: system turns go to the chat template as they are; fold: their text goes before the user's turn, for"
        " templates that take no system turn.",
    )
    seed: int = param(0, "Seed of the embedded model's weights and text.", ge=0, le=2**32 - 1)
    pretrain_steps: int = param(
        900, "Steps for which the embedded model is pretrained.", unit="optimizer steps", ge=1, le=10**6
    )


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
        "Share of flipped labels that cdpo, robust, exo_pair, aot, aot_unpaired, cpo, simpo and alphapo assume.",
        ge=0,
        lt=0.5,
    )
    gamma: float = param(0.0, "Target margin of simpo and alphapo.", unit="nats", ge=0, le=1000)
    discopop_tau: float = param(0.05, "Temperature of the blend in discopop.", ge=1e-3, le=1)
    unlikelihood_alpha: float = param(1.0, "Weight of the rejected answer in unlikelihood; at 0 it is sft.", ge=0, le=1)
    dpop_lambda: float = param(
        50.0, "Weight of dpop's penalty on chosen answers that become less likely.", gt=0, le=1e6
    )
    rdpo_alpha: float = param(0.0, "What r_dpo takes from the reward for each token.", unit="1/token", ge=0, le=1000)
    beta_dpo_alpha: float = param(
        0.6,
        "Share by which beta_dpo raises beta for each nat of a batch's mean margin above the usual one.",
        gt=0,
        le=100,
    )
    alphapo_alpha: float = param(0.25, "Shape of the reward in alphapo; at 0 it is simpo.", ge=-10, le=10)
    rpo_eta: float = param(
        1.0, "Margin that rpo_bwd_kl wants for a difference of 1 in the scores.", unit="nats", gt=0, le=1e6
    )
    desirable_weight: float = param(1.0, "Weight of a good answer in kto.", gt=0, le=1000)
    undesirable_weight: float = param(
        1.0,
        "Weight of a bad answer in kto. The paper advises that all good answers together weigh 1 to 1.5 times as much"
        " as all bad ones.",
        gt=0,
        le=1000,
    )
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
        "The margin must exceed this factor times the difference of the answers' scores in the data (ODPO, Amini et"
        " al. 2024); 0: scores are not read.",
        ge=0,
        le=1e6,
    )
    ties: Literal["average", "groups"] = TIES
    lora: LoraParams | None = LORA

    @property
    def losses(self) -> dict[LossName, float]:
        """The objectives with their weights."""
        return {**self.loss} if isinstance(self.loss, dict) else {self.loss: 1.0}

    @property
    def learns_log_ratio(self) -> bool:
        """Whether beta log(pi / ref), summed over tokens, is the reward that it learns."""
        return learns_log_ratio(self.losses, self.divergence, self.ld_alpha)


Opponent = Literal["sft", "chosen"]

_TEMPLATE = (
    "What it is asked: dialogue, dialogue-zh, summary or summary-concise (the paper's C), or a file of text with"
    " {prompt}, {a} and {b}."
)


class HfJudgeParams(Section):
    """A language model on this machine as judge; its directory is runtime.judge_path."""

    name: str = param("", "Your label for it. Change it with the model: DVC sees this, and not the directory.")
    template: str = param("dialogue", _TEMPLATE)
    quantization: Literal["nf4", "none"] = param("none", "How its weights are held.")
    chat_template: str = param("auto", "Its chat template, as model.chat_template.")


class OpenAiJudgeParams(Section):
    """A language model behind an OpenAI-compatible server as judge; a key is taken from DPO_JUDGE_API_KEY alone."""

    url: str = param("", "Its address, such as http://127.0.0.1:8080/v1.")
    model: str | None = param(None, "Name of the model; null: the only one that the server has.")
    template: str = param("dialogue", _TEMPLATE)
    allowed_hosts: list[str] = param([], "Hosts besides this machine to which prompts and answers may be sent.")
    timeout_s: float = param(120.0, "How long an answer may take.", unit="seconds", gt=0, le=86400)
    parallel: int = param(4, "Requests in flight at a time.", ge=1, le=64)
    extra: dict[str, Any] = param(
        {}, "Extra fields of every request: {chat_template_kwargs: {enable_thinking: false}}."
    )


class VotesJudgeParams(Section):
    """A file of people's votes on these very answers as judge; dpo-cli rating-sheet writes what they fill in."""

    file: str = param("", "CSV or parquet under data/raw, where DVC sees a change.")
    rule: Literal["share", "majority"] = param("share", "A win is the share of the votes, or what most of them say.")
    kind: str | None = param(None, "Only votes of raters of this kind, such as human; null: all.")


class EvaluateParams(Section):
    """Is it better, by how much, and at what cost. Read by evaluate."""

    judge: JudgeName = param(
        "none",
        "Who compares the answers: world is the embedded world's known reward; rule is evaluate.rule; reward-model is"
        " what stage reward made of the same preferences; hf a language model on this machine; openai one behind a"
        " server; votes a file of people's votes; none: no win rate.",
    )
    rule: RuleName | None = param(
        None,
        "What the judge rule checks of each answer: one_sentence (short, and without a preamble) or json_object (and"
        " nothing around it).",
    )
    hf: HfJudgeParams = Field(default_factory=HfJudgeParams, description="The judge hf.")
    openai: OpenAiJudgeParams = Field(default_factory=OpenAiJudgeParams, description="The judge openai.")
    votes: VotesJudgeParams = Field(default_factory=VotesJudgeParams, description="The judge votes.")
    opponents: list[Opponent] = param(
        ["sft"], "Whose answers the policy's are compared with: the SFT model's (always), and the data's chosen ones."
    )
    judge_pairs: int = param(
        0,
        "Held-out pairs on which the judge itself is tested: how often it prefers the chosen answer; -1: all.",
        unit="pairs",
        ge=-1,
        le=10**9,
    )
    num_prompts: int = param(128, "Held-out prompts to answer, at most; 0: all.", unit="prompts", ge=0, le=10**9)
    temperature: float = param(1.0, "Sampling temperature of the compared answers; 0: greedy.", ge=0, le=100)
    temperatures: list[Annotated[float, Field(ge=0, le=100)]] = param(
        [], "Sampling temperatures of the curve of win rates, such as [0, 0.25, 0.5, 0.75, 1]; []: no curve."
    )
    scales: list[Annotated[float, Field(gt=0, le=100)]] = param(
        [],
        "Further points of the frontier of KL and win rate: the model with this multiple of what training changed,"
        " such as [0.25, 0.5, 0.75, 1.5].",
    )
    max_new_tokens: int = param(256, "Longest answer.", unit="tokens", ge=1, le=10**6)
    bootstrap_draws: int = param(2000, "Draws behind each interval, clustered by prompt.", ge=100, le=10**6)
    confidence: float = param(0.95, "Coverage of the intervals.", gt=0.5, lt=1)
    seed: int = param(0, "Seeds sampling and bootstrap.", ge=0, le=2**32 - 1)


class SampleParams(Section):
    """Answers of the SFT model to prompts of your own, to be voted on. Read by sample; section evaluate says how."""

    prompts: list[str] = param(
        [],
        "Files of prompts under data/raw, in any format of the data, or folders of votes; []: none, and what dpo-cli"
        " sample FILE made stays.",
    )
    answers: int = param(4, "Answers to each prompt.", ge=1, le=10**4)
    top_p: float = param(
        1.0,
        "Each token is drawn from the fewest likeliest ones that together have this probability (nucleus sampling,"
        " Holtzman et al. 2020); 1: from all.",
        gt=0,
        le=1,
    )


class RuntimeParams(Section):
    """This machine. No stage lists it: it never changes a result beyond rounding."""

    device: Literal["auto", "cpu", "cuda"] = param(
        "auto",
        "auto uses CUDA if available, except for the embedded model, which needs no GPU.",
    )
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = param(
        "auto",
        "What products are computed in; auto: bfloat16 on a GPU that has it (compute capability 8.0 and above), float16"
        " with a loss scale on an older one, float32 on the CPU. Part of the identity of a reference cache.",
    )
    max_gpu_gib: float | None = param(
        None,
        "GPU memory that PyTorch may hold; null: 92% of what is free at the start. Beyond that, work continues"
        " in smaller micro-batches, and never spills into system memory, as Windows drivers do.",
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
        "Tokens that go through the model at once, padding included; null: 4096 on a GPU, in training"
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
        "Logits that are held at once; null: 256 on a GPU, 32 on the CPU.",
        unit="MiB",
        ge=1,
        le=2**20,
    )
    recompute: Literal["auto", "none", "elementwise", "layers"] = param(
        "auto",
        "What the backward pass recomputes to save memory: nothing, all but matrix products and attention, or"
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
        " the environment variable DPO_MODEL_PATH overrides it.",
    )
    adapter_path: str | None = Field(
        default=None,
        description="Directory of the adapter that sft.method adapter starts from, as saved by PEFT; the environment"
        " variable DPO_ADAPTER_PATH overrides it.",
    )
    judge_path: str | None = Field(
        default=None,
        description="Directory of the model that judge hf asks, in the same layout; the environment variable"
        " DPO_JUDGE_PATH overrides it.",
    )


class Params(Section):
    """All of params.yaml."""

    data: DataParams = Field(default_factory=DataParams)
    model: ModelParams = Field(default_factory=ModelParams)
    sft: SftParams = Field(default_factory=SftParams)
    sample: SampleParams = Field(default_factory=SampleParams)
    reference: ReferenceParams = Field(default_factory=ReferenceParams)
    train: TrainParams = Field(default_factory=TrainParams)
    reward: RewardParams = Field(default_factory=RewardParams)
    ppo: PpoParams = Field(default_factory=PpoParams)
    evaluate: EvaluateParams = Field(default_factory=EvaluateParams)
    runtime: RuntimeParams = Field(default_factory=RuntimeParams)


def iter_settings(model: type[BaseModel] = Params, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """All settings as ``(dotted path, pydantic field)``, in the order of the schema."""
    for name, field in model.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield from iter_settings(annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field
