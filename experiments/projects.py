"""The project of one seed: prompts, the reference's answers to them, and pairs of these by a reward that is known."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from ruamel.yaml import YAML

from dpo_cli.core import paths
from dpo_cli.core.artifacts import atomic_path, write_text
from dpo_cli.core.load_params import load_params
from dpo_cli.core.manifest import REFERENCE, REWARD, SFT
from dpo_cli.core.params import Params
from dpo_cli.core.progress import Reporter, SilentReporter
from dpo_cli.evaluation.sampling import sample_files
from experiments.cells import Reward

_PROMPTS = Path("data/prompts.jsonl")
_SAMPLED = Path("data/sampled/prompts.parquet")
_PAIRS = paths.RAW / "preferences.parquet"


def prepare_project(
    settings: Mapping[str, Any], seed: int, prompts: Sequence[str], num_answers: int, known: Reward
) -> None:
    """Make the project of the working directory ready for all cells; what is done already is left as it is.

    Args:
        settings: What its params.yaml says.
        seed: Of the answers that are sampled and of the reward model.
        prompts: All of them; the split holds some out.
        num_answers: Answers of the reference to each.
        known: Scores them; pairs are made of all that differ in it.

    Raises:
        Interrupted: The user asked to stop; what was done is kept.
    """
    with atomic_path(paths.PARAMS) as temporary:
        YAML(typ="safe").dump(settings, temporary)
    reporter = SilentReporter()
    params = load_params(paths.PARAMS, [f"reward.seed={seed}", f"evaluate.seed={seed}"])
    write_text(_PROMPTS, "".join(f"{json.dumps({'prompt': prompt})}\n" for prompt in prompts))
    run_stage("base", params, reporter)
    made = {
        "sft": paths.SFT_MODEL / SFT.name,
        "pairs": _PAIRS,
        "convert_preferences": paths.PREFERENCE_DATA,
        "precompute_ref": paths.REFERENCE / REFERENCE.name,
        "reward": paths.REWARD_MODEL / REWARD.name,
    }
    for stage, path in made.items():
        if path.exists():
            continue
        if stage == "pairs":
            sample_files([_PROMPTS], num_answers, None, _SAMPLED.parent, params, reporter)
            write_scored(known)
        else:
            run_stage(stage, params, reporter)


def run_stage(name: str, params: Params, reporter: Reporter) -> dict[str, Any]:
    """A stage, in this process."""
    return importlib.import_module(f"dpo_cli.stages.{name}").run(params, reporter)


def write_scored(known: Reward) -> None:
    """The sampled answers with their rewards, as preference data of format kwise."""
    table = pq.read_table(_SAMPLED)
    scores = [
        [known(prompt[-1]["content"], answer["content"]) for answer in answers]
        for prompt, answers in zip(table["prompt"].to_pylist(), table["completions"].to_pylist(), strict=True)
    ]
    place = table.schema.get_field_index("scores")
    table = table.set_column(place, table.schema.field("scores").name, pa.array(scores, pa.list_(pa.float64())))
    _PAIRS.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(_PAIRS) as temporary:
        pq.write_table(table, temporary)
