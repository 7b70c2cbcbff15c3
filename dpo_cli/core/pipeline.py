"""The graph of stages: what each one reads and writes, as dvc.yaml has it.

One table serves the command line, ``dpo-cli init``, the repository's own dvc.yaml and the test
that holds them equal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_cli.core import paths

_TRAIN_STEPS = paths.report_dir("train") / "steps.tsv"
_REWARD_STEPS = paths.report_dir("reward") / "steps.tsv"
_SFT_STEPS = paths.report_dir("sft") / "steps.tsv"
_SAMPLES = paths.report_dir("evaluate") / "samples.jsonl"
_PAIRS = paths.report_dir("evaluate") / "pairs.csv"
_MARGINS = paths.report_dir("evaluate") / "margins.csv"


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
        reports: Other files it writes under reports/, committed and not cached.
        more_examples: Further command lines for its help.
    """

    name: str
    summary: str
    example: str
    params: tuple[str, ...]
    inputs: tuple[Path, ...]
    output: Path | None
    metrics: bool = True
    reports: tuple[Path, ...] = ()
    more_examples: tuple[str, ...] = ()

    @property
    def command(self) -> str:
        """Its name on the command line."""
        return self.name.replace("_", "-")


STAGES: tuple[Stage, ...] = (
    Stage(
        name="base",
        summary="Lock the base model's identity; build the model where it is the embedded one.",
        example="DPO_MODEL_PATH=~/models/Qwen2.5-0.5B dpo-cli base",
        params=("model",),
        inputs=(),
        output=paths.BASE,
        metrics=False,
    ),
    Stage(
        name="convert_sft",
        summary="Convert instruction data to train and eval tables; list every row left out.",
        example="dpo-cli convert-sft --set data.sft.path=data/raw/mine.jsonl",
        params=("data",),
        inputs=(paths.RAW,),
        output=paths.SFT_DATA,
        reports=(paths.rejects_file("convert_sft"), paths.checks_file("convert_sft")),
    ),
    Stage(
        name="convert_preferences",
        summary="Convert preference data to train and eval tables; list every row left out.",
        example="dpo-cli convert-preferences --json",
        params=("data",),
        inputs=(paths.RAW,),
        output=paths.PREFERENCE_DATA,
        reports=(paths.rejects_file("convert_preferences"), paths.checks_file("convert_preferences")),
    ),
    Stage(
        name="sft",
        summary="Fine-tune on instructions; the result is DPO's start and its reference.",
        example="dpo-cli sft --set sft.method=none",
        params=("model", "sft"),
        inputs=(paths.BASE, paths.SFT_DATA),
        output=paths.SFT_MODEL,
        reports=(paths.rejects_file("sft"), _SFT_STEPS),
    ),
    Stage(
        name="precompute_ref",
        summary="Score every answer with the reference model once, so that training needs no copy of it.",
        example="dpo-cli precompute-ref --set runtime.max_tokens_per_microbatch=16384",
        params=("model", "reference"),
        inputs=(paths.BASE, paths.SFT_MODEL, paths.PREFERENCE_DATA),
        output=paths.REFERENCE,
        reports=(paths.rejects_file("precompute_ref"),),
    ),
    Stage(
        name="train",
        summary="Direct Preference Optimization of a 4-bit QLoRA adapter against the cached reference.",
        example="dpo-cli train --set train.beta=0.5 --set train.loss=ipo",
        params=("model", "reference", "train"),
        inputs=(paths.BASE, paths.SFT_MODEL, paths.PREFERENCE_DATA, paths.REFERENCE),
        output=paths.DPO_MODEL,
        reports=(paths.rejects_file("train"), _TRAIN_STEPS),
    ),
    Stage(
        name="reward",
        summary="Train a reward model on the preferences, as judge and for Best-of-N; off by default.",
        example="dpo-cli reward --set reward.loss=bradley_terry",
        params=("model", "reference", "reward"),
        inputs=(paths.BASE, paths.SFT_MODEL, paths.PREFERENCE_DATA),
        output=paths.REWARD_MODEL,
        reports=(paths.rejects_file("reward"), _REWARD_STEPS),
    ),
    Stage(
        name="evaluate",
        summary="Held-out accuracy, win rate over SFT, KL, and a report to look at.",
        example="dpo-cli evaluate --set evaluate.num_prompts=500",
        more_examples=(
            "dpo-cli evaluate --set evaluate.judge=openai --set evaluate.openai.url=http://127.0.0.1:8080/v1",
            "dpo-cli evaluate --model ~/adapters/another --out evaluations/another",
        ),
        params=("model", "reference", "evaluate"),
        inputs=(
            paths.RAW,  # a votes file
            paths.BASE,
            paths.SFT_DATA,
            paths.PREFERENCE_DATA,
            paths.SFT_MODEL,
            paths.REFERENCE,
            paths.DPO_MODEL,
            paths.REWARD_MODEL,
            *(
                paths.metrics_file(name)
                for name in ("convert_sft", "convert_preferences", "sft", "precompute_ref", "train")
            ),
            _SFT_STEPS,
            _TRAIN_STEPS,
        ),
        output=None,
        reports=(_SAMPLES, _PAIRS, _MARGINS, paths.REPORT_HTML),
    ),
)

_PLOTS: tuple[tuple[str, Mapping[str, Any]], ...] = (
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
    ("margins of held-out pairs", {"x": "margin", "y": {_MARGINS.as_posix(): "share"}, "template": "scatter"}),
)


def dvc_yaml(code: Mapping[str, Sequence[str]] | None = None) -> dict[str, Any]:
    """The content of dvc.yaml.

    Args:
        code: For each stage the modules it depends on, as paths; None in a project whose
            dpo_cli is installed from elsewhere.
    """
    return {
        "stages": {stage.name: _stage_entry(stage, (code or {}).get(stage.name, ())) for stage in STAGES},
        "plots": [{title: dict(options)} for title, options in _PLOTS],
    }


def _stage_entry(stage: Stage, code: Sequence[str]) -> dict[str, Any]:
    entry: dict[str, Any] = {"cmd": f"python -m dpo_cli {stage.command}"}
    if deps := [*(path.as_posix() for path in stage.inputs), *code]:
        entry["deps"] = deps
    entry["params"] = list(stage.params)
    outs: list[Any] = [stage.output.as_posix()] if stage.output else []
    outs += [{path.as_posix(): {"cache": False}} for path in stage.reports]
    if outs:
        entry["outs"] = outs
    if stage.metrics:
        entry["metrics"] = [{paths.metrics_file(stage.name).as_posix(): {"cache": False}}]
    return entry
