"""What the sections of params.yaml that train share, and the two that DPO does not need: reward and ppo."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from dpo_cli.core.data_params import Section, param
from dpo_cli.core.judges import RuleName


class LoraParams(Section):
    """Shape of a LoRA adapter (Hu et al. 2021)."""

    r: int = param(16, "Rank of the update.", ge=1, le=4096)
    alpha: float = param(32.0, "Scale of the update: it is multiplied by alpha / r.", gt=0, le=1e5)
    rslora: bool = param(False, "Multiply it by alpha / sqrt(r) instead, for high ranks (rsLoRA, Kalajdzievski 2023).")
    dora: bool = param(
        False,
        "Train the magnitude of each row of the weights separately from its direction (DoRA, Liu et al. 2024)."
        " A step takes longer, and evaluate.scales has no meaning.",
    )
    dropout: float = param(0.0, "Dropout on the adapter's input while training.", ge=0, lt=1)
    target_modules: Annotated[list[str], Field(min_length=1)] = param(
        ["all-linear"], "Names of the layers that get an adapter; all-linear means every linear layer but the head."
    )


class DescentParams(Section):
    """Settings of every training's steps."""

    learning_rate: float = param(2e-4, "Peak learning rate.", gt=0, le=1)
    schedule: Literal["cosine", "linear", "constant"] = param("cosine", "Learning rate after the warm-up.")
    warmup_ratio: float = param(0.1, "Share of the steps in which the learning rate rises from 0.", ge=0, lt=1)
    optimizer: Literal["adamw", "rmsprop", "paged_adamw_8bit"] = param(
        "adamw", "paged_adamw_8bit is bitsandbytes' and needs CUDA; rmsprop is the DPO paper's."
    )
    weight_decay: float = param(0.0, "Decoupled weight decay; rmsprop takes none.", ge=0, le=10)
    max_grad_norm: float = param(1.0, "Gradients are clipped to this L2 norm.", gt=0, le=1e9)
    seed: int = param(0, "Seeds the adapter's start, the order of rows and dropout.", ge=0, le=2**32 - 1)


class TrainingParams(DescentParams):
    """Settings that SFT, DPO and the reward model share."""

    batch_size: int = param(
        16,
        "Examples (sft), preference pairs or rankings (train, reward) per optimizer step. It alone decides the"
        " mathematics; memory is bounded by runtime.max_tokens_per_microbatch.",
        ge=1,
        le=10**6,
    )
    epochs: float = param(1.0, "Passes over the training data.", unit="epochs", gt=0, le=10**4)
    max_steps: int | None = param(None, "Steps to train, instead of epochs.", unit="optimizer steps", ge=1, le=10**8)
    eval_steps: int = param(
        50,
        "Steps between measurements of the held-out loss; it is always measured before the first step and after"
        " the last. 0: only then.",
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
        "With keep best, end training after this many evaluations in a row without a lower held-out loss; null: never"
        " before its last step.",
        unit="evaluations",
        ge=1,
        le=10**8,
    )


TIES: Any = param(
    "average",
    "Tied answers of a ranking (plackett_luce): the mean over the orders that they allow, or not compared.",
)
LORA: Any = param(None, "Shape of the adapter if sft makes none (methods none and full); null: the defaults.")


class RewardParams(TrainingParams):
    """An optional reward model: a head on the SFT model that scores answers. DPO does not need it. Read by reward."""

    loss: Literal["none", "bradley_terry", "plackett_luce"] = param(
        "none",
        "none: there is no reward model, and the other settings of this section are not read; bradley_terry: from"
        " pairs; plackett_luce: from rankings.",
    )
    learning_rate: float = param(1e-4, "Peak learning rate of adapter and head.", gt=0, le=1)
    ties: Literal["average", "groups"] = TIES
    lora: LoraParams | None = LORA


class PpoParams(DescentParams):
    """Reinforcement learning from a reward, which DPO replaces: PPO, or REINFORCE leave-one-out. Read by ppo."""

    reward: Literal["none", "reward-model", "world", "rule", "hf", "openai"] = param(
        "none",
        "What answers earn. none: there is no such training, and the other settings of this section are not read;"
        " reward-model: what stage reward made; world: the embedded world's known reward; rule: 1 where ppo.rule holds,"
        " else 0; hf, openai: how probably the judge evaluate.hf or evaluate.openai prefers them to the reference's"
        " greedy answer.",
    )
    rule: RuleName | None = param(None, "What reward rule checks, as evaluate.rule does.")
    estimator: Literal["gae", "rloo"] = param(
        "gae",
        "Advantages: gae, generalized advantages with a value head (PPO); rloo, an answer's return less the mean of the"
        " prompt's other answers (REINFORCE leave-one-out).",
    )
    learning_rate: float = param(1e-4, "Peak learning rate.", gt=0, le=1)
    seed: int = param(
        0, "Seeds the adapter's start, the order of prompts, the answers and dropout.", ge=0, le=2**32 - 1
    )
    rounds: int = param(50, "Rounds: prompts are answered, then trained on.", ge=1, le=10**6)
    prompts_a_round: int = param(64, "Prompts that are answered in a round.", ge=1, le=10**6)
    answers: int = param(4, "Answers to each; rloo needs two.", ge=1, le=1024)
    batch_size: int = param(16, "Prompts, with all their answers, an optimizer step.", ge=1, le=10**6)
    epochs: int = param(2, "Passes over a round.", ge=1, le=1000)
    max_new_tokens: int = param(128, "Longest answer.", unit="tokens", ge=1, le=10**6)
    kl_coefficient: float = param(
        0.05, "What a nat from the reference costs, in units of the reward: beta of the objective.", ge=0, le=1000
    )
    target_kl: float | None = param(
        None,
        "KL from the reference that the coefficient is raised or lowered to reach; null: it stays.",
        unit="nats",
        gt=0,
        le=1e4,
    )
    max_step_kl: float | None = param(
        None,
        "A round ends early where the policy is so far from the one that answered, and a further one follows: the"
        " number of steps is what ppo.rounds takes without it; null: never.",
        unit="nats a token",
        gt=0,
        le=100,
    )
    clip: float = param(0.2, "How far a token's probability ratio may leave 1 before it no longer pays.", gt=0, lt=1)
    value_clip: float = param(0.2, "How far a value may move in a round, in units of the reward.", gt=0, le=1e6)
    value_coefficient: float = param(
        0.01,
        "Weight of the value loss (gae). It decides how much of the adapter serves the values; the value head learns as"
        " fast with any.",
        ge=0,
        le=1000,
    )
    gamma: float = param(1.0, "Discount of later rewards (gae).", ge=0, le=1)
    lam: float = param(0.95, "Lambda of gae: 0 trusts the values, 1 the rewards.", ge=0, le=1)
    whiten: bool = param(True, "Bring the advantages of a round to mean 0 and deviation 1.")
    missing_eos_penalty: float = param(
        0.0, "Taken from the reward of an answer that did not end within max_new_tokens.", ge=0, le=1e6
    )
    lora: LoraParams | None = LORA
