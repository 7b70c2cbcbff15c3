"""The section evaluate of params.yaml, and which of its settings rest."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import Field

from dpo_cli.core.sections import Section, differs, param

JudgeName = Literal["none", "world", "rule", "reward-model", "hf", "openai", "votes"]
RuleName = Literal["one_sentence", "json_object"]
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
    parallel: int = param(4, "Requests under way at once.", ge=1, le=64)
    extra: dict[str, Any] = param(
        {}, "Fields that every request has besides: {chat_template_kwargs: {enable_thinking: false}}."
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
        "Held-out pairs on which the judge itself is tried: how often it prefers the chosen answer; -1: all.",
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


def _default(setting: str) -> str:
    value = EvaluateParams.model_fields[setting].get_default(call_default_factory=True)
    return f"[{', '.join(value)}]" if isinstance(value, list) else str(value)


def idle_evaluate_settings(evaluate: EvaluateParams) -> list[str]:
    """Settings of section evaluate that have no effect, that lack another one, or that say a thing twice."""
    found = []
    for name in ("hf", "openai", "votes"):
        if name != evaluate.judge:
            found += [
                f"evaluate.{name}.{setting} has no effect with evaluate.judge {evaluate.judge}; judge {name} reads it"
                for setting in differs(getattr(evaluate, name))
            ]
    if evaluate.rule is not None and evaluate.judge != "rule":
        found.append(f"evaluate.rule has no effect with evaluate.judge {evaluate.judge}; judge rule reads it")
    if evaluate.judge == "rule" and evaluate.rule is None:
        found.append(f"evaluate.rule is missing; evaluate.judge rule checks one of {', '.join(get_args(RuleName))}")
    if evaluate.judge == "none":
        found += [
            f"evaluate.{setting} has no effect with evaluate.judge none; set it to {_default(setting)}"
            for setting in differs(evaluate, "opponents", "judge_pairs", "temperatures", "scales")
        ]
    if evaluate.judge == "openai" and not evaluate.openai.url:
        found.append("evaluate.openai.url is missing; give the server's address, such as http://127.0.0.1:8080/v1")
    if evaluate.judge == "votes":
        if not evaluate.votes.file:
            found.append("evaluate.votes.file is missing; dpo-cli rating-sheet makes a file to be filled in")
        found += [
            f"evaluate.{setting} has no effect with evaluate.judge votes: nobody voted on those answers; set"
            f" it to {_default(setting)}"
            for setting in differs(evaluate, "opponents", "judge_pairs", "temperatures", "scales")
        ]
    if "sft" not in evaluate.opponents:
        found.append("evaluate.opponents must hold sft, whose answers are sampled anyway")
    for setting in ("opponents", "temperatures", "scales"):
        values = getattr(evaluate, setting)
        twice = [value for value in dict.fromkeys(values) if values.count(value) > 1]
        found += [f"evaluate.{setting} names {value} twice" for value in twice]
    if 1 in evaluate.scales:
        found.append("evaluate.scales names 1, the model as it is, which is there anyway")
    return found
