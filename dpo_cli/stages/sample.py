"""Stage sample: answers of the SFT model to the user's prompts, to be voted on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dpo_cli.core import paths
from dpo_cli.core.environment import importing
from dpo_cli.core.errors import DataError
from dpo_cli.core.params import Params
from dpo_cli.core.progress import Reporter


def run(params: Params, reporter: Reporter) -> dict[str, Any]:
    """Write a table a file of prompts into data/samples, and leave what else is there; nothing with sample.prompts [].

    Raises:
        DataError: A file is not under data/raw, cannot be read, or has a row without a prompt.
        StaleArtifactError: models/base or models/sft is missing or stale.
        Interrupted: The user asked to stop; what was sampled is kept.
    """
    paths.SAMPLED.mkdir(parents=True, exist_ok=True)
    files = [Path(path) for path in params.sample.prompts]
    for path in files:
        if not paths.is_raw(path):
            raise DataError(
                f"params.yaml: sample.prompts: {path} is not under data/raw, where DVC sees a change; move it"
            )
    if not files:
        reporter.table("sample", [("prompts", "none: nothing is sampled (sample.prompts)")])
        return {}
    with importing():
        from dpo_cli.evaluation.sampling import sample_files
    return sample_files(files, params.sample.answers, None, paths.SAMPLED, params, reporter, params.sample.top_p)
