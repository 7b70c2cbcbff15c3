"""Where everything lies in a project folder: the one home of every path.

Paths are relative to the project folder, which is the working directory of every command
(``-C DIR`` changes into it). dvc.yaml names the same paths; a test holds the two equal.
"""

from __future__ import annotations

import os
from pathlib import Path

PARAMS = Path("params.yaml")

RAW = Path("data/raw")
SFT_DATA = Path("data/sft")
PREFERENCE_DATA = Path("data/preference")
REFERENCE = Path("data/reference")
SAMPLED = Path("data/samples")
VOTES = Path("data/votes")

BASE = Path("models/base")
SFT_MODEL = Path("models/sft")
DPO_MODEL = Path("models/dpo")
REWARD_MODEL = Path("models/reward")
PPO_MODEL = Path("models/ppo")

REPORTS = Path("reports")
REPORT_HTML = REPORTS / "report.html"
FIGURES = REPORTS / "figures"
EVALUATIONS = Path("evaluations")
SAMPLES = "samples.json"
"""In the folder of an evaluation: the answers, a prompt a row."""
MODEL_SETTINGS = "params.json"
"""In a folder of evaluations: what is known of the settings behind it."""


def is_raw(path: Path) -> bool:
    """Whether a path lies under data/raw, where DVC sees a change."""
    return ".." not in path.parts and path.is_relative_to(RAW)


def preference_table(split: str) -> Path:
    """The pairs of a split."""
    return PREFERENCE_DATA / f"{split}.parquet"


def ranking_table(split: str) -> Path:
    """The rankings of a split; there is none where no source has rankings."""
    return PREFERENCE_DATA / f"{split}.ranking.parquet"


def report_dir(stage: str) -> Path:
    """Folder of a stage's metrics, plots and rejected rows."""
    return REPORTS / stage


def metrics_file(stage: str) -> Path:
    """The stage's metrics, one JSON object under the stage's name."""
    return report_dir(stage) / "metrics.json"


def rejects_file(stage: str) -> Path:
    """One JSON line for every row that the stage left out."""
    return report_dir(stage) / "rejects.jsonl"


def checks_file(stage: str) -> Path:
    """What each check of the data found: count, rate and the first rows."""
    return report_dir(stage) / "checks.json"


def scratch_root() -> Path:
    """Half-done work, ignored by git and DVC.

    Under DVC it lies in the main workspace, so that experiments in temporary folders share it.
    """
    return project_root() / ".scratch"


def project_root() -> Path:
    """The project folder that the user sees.

    It is the working directory, but where DVC runs an experiment in a temporary folder; that copy has another place,
    and what lies outside of the project is not in it.
    """
    return Path(os.environ.get("DVC_ROOT", "."))


def from_root(given: str) -> Path:
    """A directory or file that a setting names, absolute: a relative one is meant from the project folder."""
    return (project_root() / Path(given).expanduser()).resolve()
