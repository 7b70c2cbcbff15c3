"""Controlled sentiment on a real language model: SmolLM2-135M goes on with film reviews, and VADER scores them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from dpo_cli.cli.console import ConsoleReporter
from dpo_cli.core import paths
from dpo_cli.core.artifacts import write_text
from dpo_cli.core.errors import ParamsError
from dpo_cli.core.load_params import load_params
from dpo_cli.core.manifest import SFT
from experiments.grid import Experiment
from experiments.projects import run_stage
from experiments.reviews.film_reviews import prefixes, reward, split_reviews

TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'user' %}{{ 'Film review: ' }}{% endif %}{{ message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)
"""A review goes on where its beginning, the prompt, ends."""


def _model(work: Path, grid: dict[str, Any]) -> Path:
    """SmolLM2 after a short fine-tuning on reviews, with which it learns to write one and to end it; for all seeds."""
    folder = work / "reviewer"
    folder.mkdir(exist_ok=True)
    with contextlib.chdir(folder):
        given, own = os.environ.get("DPO_MODEL_PATH"), Path("smollm2")
        if not (paths.SFT_MODEL / SFT.name).is_file():
            if not given:
                raise ParamsError("DPO_MODEL_PATH must name the folder of SmolLM2-135M-Instruct: make real makes it")
            if not own.is_dir():
                _with_template(Path(given), own)
            os.environ["DPO_MODEL_PATH"] = str(own.resolve())
            shutil.copyfile(Path(__file__).parent / "sft.yaml", paths.PARAMS)
            params = load_params(paths.PARAMS, [f"{setting}={value}" for setting, value in grid["sft"].items()])
            rows = [{"prompt": prompt, "completion": rest} for prompt, rest in split_reviews(0, grid["sft_reviews"])]
            write_text(paths.RAW / "reviews.jsonl", "".join(f"{json.dumps(row)}\n" for row in rows))
            for stage in ("base", "convert_sft", "sft"):
                run_stage(stage, params, ConsoleReporter(show_tables=False))
    return folder / paths.SFT_MODEL


def _with_template(source: Path, folder: Path) -> None:
    """A copy of the model's folder with a chat template of its own."""
    building = folder.with_suffix(".building")
    shutil.rmtree(building, ignore_errors=True)
    shutil.copytree(source, building)
    (building / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8", newline="\n")
    building.replace(folder)


EXPERIMENT = Experiment("reviews", "Controlled sentiment on SmolLM2-135M", reward, prefixes, _model, is_gated=False)
