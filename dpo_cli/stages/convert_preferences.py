"""Stage convert_preferences: preference data from a raw file to data/preference."""

from __future__ import annotations

from typing import Any

from dpo_cli.core import paths
from dpo_cli.core.params import Params
from dpo_cli.core.progress import Reporter
from dpo_cli.stages.conversion import convert_stage


def run(params: Params, reporter: Reporter) -> dict[str, Any]:
    """Write data/preference/{train,eval}.parquet and the list of rows that were left out.

    Where K answers are ranked, {train,eval}.ranking.parquet hold the rankings.

    Raises:
        ParamsError: A source does not lie under data/raw, or a setting has no effect.
        DataError: A file cannot be read or converted; nothing is written then.
    """
    return convert_stage("convert_preferences", params.data.preference_sources, params, paths.PREFERENCE_DATA, reporter)
