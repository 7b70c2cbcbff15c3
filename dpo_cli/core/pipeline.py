"""The graph of stages: what each one reads and writes, as dvc.yaml has it.

One table serves the command line, ``dpo-cli init``, the repository's own dvc.yaml and the test
that holds them equal.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_cli.core import paths

Options = Mapping[str, Any]
_SFT_STEPS, _TRAIN_STEPS, _PPO_STEPS = (paths.report_dir(stage) / "steps.tsv" for stage in ("sft", "train", "ppo"))


def _table(stage: str, name: str, x: str | None, y: str, title: str, **options: str) -> tuple[Path, Options]:
    """A table of a stage, and how DVC draws it."""
    return paths.report_dir(stage) / name, {**({"x": x} if x else {}), "y": y, **options, "title": title}


def _points(name: str, x: str, y: str, title: str, **options: str) -> tuple[Path, Options]:
    return _table("evaluate", name, x, y, title, **options, template="scatter")


@dataclass(frozen=True)
class Stage:
    """One stage of the pipeline.

    Attributes:
        name: Its name in dvc.yaml, in metrics and in paths.
        summary: What it does, one line.
        example: A command line worth showing in its help.
        params: Sections of params.yaml that it reads.
        inputs: What other stages or the user made and it reads.
        output: The folder it makes; None where it only reports.
        metrics: Whether it writes reports/<name>/metrics.json.
        plots: Tables that it writes under reports/, committed to git, each with how DVC draws it.
        lists: Files with a row for each row of the data, kept by DVC: they may be as large as the data.
        pages: What it draws of the files of other stages. Neither metric nor plot, so DVC keeps no run of it in its
            cache: it is made again in seconds.
        more_examples: Further command lines for its help.
        is_always_run: Whether DVC runs it at every repro: it looks outside of the project, where DVC does not, and
            finds out by itself whether anything changed.
        is_kept: Whether DVC leaves what is in its output in place when it runs it.
    """

    name: str
    summary: str
    example: str
    params: tuple[str, ...]
    inputs: tuple[Path, ...]
    output: Path | None
    metrics: bool = True
    plots: tuple[tuple[Path, Options], ...] = ()
    lists: tuple[Path, ...] = ()
    pages: tuple[Path, ...] = ()
    more_examples: tuple[str, ...] = ()
    is_always_run: bool = False
    is_kept: bool = False

    @property
    def kept_by_dvc(self) -> tuple[Path, ...]:
        """What it makes that lies in DVC's cache and not in git."""
        return (*([self.output] if self.output else []), *self.lists)

    @property
    def made(self) -> tuple[Path, ...]:
        """All that it makes."""
        metrics = (paths.metrics_file(self.name),) if self.metrics else ()
        return (*self.kept_by_dvc, *metrics, *(path for path, _ in self.plots), *self.pages)

    @property
    def module(self) -> str:
        """The module that does it."""
        return f"dpo_cli.stages.{self.name}"

    @property
    def command(self) -> str:
        """Its name on the command line."""
        return self.name.replace("_", "-")


_BEFORE_REPORT = (
    Stage(
        name="base",
        summary="Verify the base model and lock its identity; build the embedded model.",
        example="DPO_MODEL_PATH=~/models/Qwen2.5-0.5B dpo-cli base",
        params=("model",),
        inputs=(),
        output=paths.BASE,
        metrics=False,
        is_always_run=True,
        is_kept=True,
    ),
    Stage(
        name="convert_sft",
        summary="Convert instruction data to train and eval tables; list every row left out.",
        example="dpo-cli convert-sft --set data.sft.path=data/raw/mine.jsonl",
        params=("data",),
        inputs=(paths.RAW,),
        output=paths.SFT_DATA,
        lists=(paths.rejects_file("convert_sft"), paths.checks_file("convert_sft")),
    ),
    Stage(
        name="convert_preferences",
        summary="Convert preference data to train and eval tables; list every row left out.",
        example="dpo-cli convert-preferences --json",
        params=("data",),
        inputs=(paths.RAW,),
        output=paths.PREFERENCE_DATA,
        lists=(paths.rejects_file("convert_preferences"), paths.checks_file("convert_preferences")),
    ),
    Stage(
        name="sft",
        summary="Fine-tune on instructions; the result is DPO's start and its reference.",
        example="dpo-cli sft --set sft.method=none",
        params=("model", "sft"),
        inputs=(paths.BASE, paths.SFT_DATA),
        output=paths.SFT_MODEL,
        plots=(_table("sft", "steps.tsv", "step", "grad_norm", "gradient norm of SFT"),),
        lists=(paths.rejects_file("sft"),),
    ),
    Stage(
        name="sample",
        summary="Sample answers of the SFT model to prompts of your own, to be voted on; off by default.",
        example="dpo-cli sample prompts.jsonl",
        params=("model", "reference", "sample", "evaluate"),
        inputs=(paths.RAW, paths.SFT_MODEL),
        output=paths.SAMPLED,
        metrics=False,
        is_kept=True,  # what the command makes of other files lies there, too
    ),
    Stage(
        name="precompute_ref",
        summary="Score every answer with the reference model once, so that training needs no copy of it.",
        example="dpo-cli precompute-ref --set runtime.max_tokens_per_microbatch=16384",
        params=("model", "reference"),
        inputs=(paths.SFT_MODEL, paths.PREFERENCE_DATA),
        output=paths.REFERENCE,
        lists=(paths.rejects_file("precompute_ref"),),
    ),
    Stage(
        name="train",
        summary="Direct Preference Optimization of a 4-bit QLoRA adapter against the cached reference.",
        example="dpo-cli train --set train.beta=0.5 --set train.loss=ipo",
        params=("model", "reference", "train"),
        inputs=(paths.SFT_MODEL, paths.PREFERENCE_DATA, paths.REFERENCE),
        output=paths.DPO_MODEL,
        plots=(_table("train", "steps.tsv", "step", "grad_norm", "gradient norm of DPO"),),
        lists=(paths.rejects_file("train"),),
    ),
    Stage(
        name="reward",
        summary="Train a reward model on the preferences, as a judge and as the reward of ppo; off by default.",
        example="dpo-cli reward --set reward.loss=bradley_terry",
        params=("model", "reference", "reward"),
        inputs=(paths.SFT_MODEL, paths.PREFERENCE_DATA),
        output=paths.REWARD_MODEL,
        plots=(_table("reward", "steps.tsv", "step", "loss", "loss of the reward model"),),
        lists=(paths.rejects_file("reward"),),
    ),
    Stage(
        name="ppo",
        summary="Reinforcement learning from a reward, the way that DPO replaces: PPO or RLOO; off by default.",
        example="dpo-cli ppo --set ppo.reward=world --set ppo.rounds=5",
        more_examples=("dpo-cli ppo --set ppo.reward=reward-model --set ppo.estimator=rloo --set ppo.target_kl=3",),
        params=("ppo", "evaluate.hf", "evaluate.openai"),
        inputs=(paths.SFT_MODEL, paths.PREFERENCE_DATA, paths.REWARD_MODEL),
        output=paths.PPO_MODEL,
        plots=(_table("ppo", "steps.tsv", "step", "objective/scores", "reward of PPO's answers"),),
        lists=(paths.rejects_file("ppo"),),
    ),
    Stage(
        name="evaluate",
        summary="Is it better than SFT, by how much, how surely: win rates, held-out accuracy, KL, flags.",
        example="dpo-cli evaluate --set evaluate.num_prompts=500",
        more_examples=(
            "dpo-cli evaluate --set evaluate.judge=openai --set evaluate.openai.url=http://127.0.0.1:8080/v1",
            "dpo-cli evaluate --model ~/adapters/another --out evaluations/another",
        ),
        params=("model", "reference", "evaluate"),
        inputs=(
            paths.RAW,  # a votes file
            paths.SFT_DATA,
            paths.PREFERENCE_DATA,
            paths.SFT_MODEL,
            paths.REFERENCE,
            paths.DPO_MODEL,
            paths.REWARD_MODEL,
        ),
        output=None,
        plots=(
            _table("evaluate", paths.SAMPLES, None, "kl", "KL of each answer", y_label="nats"),
            _points("pairs.csv", "margin", "loss", "loss of each held-out pair"),
            _points("margins.csv", "margin", "share", "margins of held-out pairs"),
            _points("reliability.csv", "probability", "accuracy", "reliability of the reward"),
            _table(
                "evaluate",
                "accuracy_by.csv",
                "accuracy",
                "label",
                "accuracy by length and source",
                template="bar_horizontal",
            ),
            _points("temperatures.csv", "temperature", "win_rate", "win rate against temperature"),
            _points("frontier.csv", "kl", "win_rate", "win rate against KL", x_label="nats"),
            _points(
                "length.csv", "length_difference", "win_rate", "win rate against length difference", x_label="tokens"
            ),
        ),
        lists=(paths.report_dir("evaluate") / "votes.csv",),
    ),
)
_REPORTED = [stage for stage in _BEFORE_REPORT if stage.metrics and stage.name not in ("reward", "ppo")]

STAGES = (
    *_BEFORE_REPORT,
    Stage(
        name="report",
        summary="What all stages found as one page to look at, and its figures.",
        example="dpo-cli report",
        params=(),
        inputs=(
            *(paths.metrics_file(stage.name) for stage in _REPORTED),
            *(path for stage in _REPORTED for path, _ in stage.plots),
        ),
        output=None,
        metrics=False,
        pages=(paths.REPORT_HTML, paths.FIGURES),
    ),
)

_PLOTS: tuple[tuple[str, Options], ...] = (
    (
        "loss of DPO",
        {"x": "step", "y": {_TRAIN_STEPS.as_posix(): ["loss", "eval_loss"]}, "y_label": "loss"},
    ),
    (
        "implicit rewards",
        {
            "x": "step",
            "y": {_TRAIN_STEPS.as_posix(): ["rewards/chosen", "rewards/rejected"]},
            "y_label": "nats",
        },
    ),
    (
        "accuracy of the implicit reward",
        {"x": "step", "y": {_TRAIN_STEPS.as_posix(): ["rewards/accuracies", "eval_rewards/accuracies"]}},
    ),
    (
        "loss of SFT",
        {"x": "step", "y": {_SFT_STEPS.as_posix(): ["loss", "eval_loss"]}, "y_label": "nats a token"},
    ),
    ("KL of PPO", {"x": "step", "y": {_PPO_STEPS.as_posix(): ["objective/kl"]}, "y_label": "nats an answer"}),
)


_HELD_BY = {"model": (paths.BASE, paths.SFT_MODEL), "reference": (paths.REFERENCE,)}
"""Sections that stand in the manifest of an artifact. That of models/sft names the base model, too."""


def dvc_yaml() -> dict[str, Any]:
    """The content of dvc.yaml, for this repository as for any project.

    It names no code: what made a thing stands in its manifest.
    """
    return {
        "stages": {stage.name: _stage_entry(stage) for stage in STAGES},
        "plots": [{title: dict(options)} for title, options in _PLOTS],
    }


def _stage_entry(stage: Stage) -> dict[str, Any]:
    entry: dict[str, Any] = {"cmd": f"python -m dpo_cli {stage.command}"}
    if stage.is_always_run:
        entry["always_changed"] = True
    if deps := [path.as_posix() for path in stage.inputs]:
        entry["deps"] = deps
    # a section that is in the manifest of an input is not named again: DVC sees it change there
    if params := [name for name in stage.params if not set(_HELD_BY.get(name, ())) & set(stage.inputs)]:
        entry["params"] = params
    kept = [path.as_posix() for path in stage.kept_by_dvc]
    outs: list[Any] = [{path: {"persist": True}} for path in kept] if stage.is_kept else kept
    outs += [{path.as_posix(): {"cache": False}} for path in stage.pages]
    if outs:
        entry["outs"] = outs
    if stage.metrics:
        entry["metrics"] = [{paths.metrics_file(stage.name).as_posix(): {"cache": False}}]
    if stage.plots:
        entry["plots"] = [{path.as_posix(): {"cache": False, **options}} for path, options in stage.plots]
    return entry
