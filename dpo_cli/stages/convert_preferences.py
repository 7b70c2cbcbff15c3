"""Stage convert_preferences: preference data from a raw file to data/preference."""

from __future__ import annotations

from typing import Any

from dpo_cli.core import paths
from dpo_cli.core.params import Params
from dpo_cli.core.progress import Reporter
from dpo_cli.data.checks import check_preference
from dpo_cli.data.convert import Kind, convert_stage
from dpo_cli.data.formats import PREFERENCE_FORMATS
from dpo_cli.data.schema import PREFERENCE_SCHEMA


def run(params: Params, reporter: Reporter) -> dict[str, Any]:
    """Write data/preference/{train,eval}.parquet and the list of rows that were left out.

    Raises:
        DataError: The file cannot be read or converted; nothing is written then.
    """
    source = params.data.preferences
    return convert_stage(
        "convert_preferences",
        source.path,
        Kind(PREFERENCE_FORMATS, check_preference, PREFERENCE_SCHEMA),
        source.format,
        params.data.eval_fraction,
        paths.PREFERENCE_DATA,
        reporter,
    )
