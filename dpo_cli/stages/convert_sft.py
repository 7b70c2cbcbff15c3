"""Stage convert_sft: instruction data from a raw file to data/sft."""

from __future__ import annotations

from typing import Any

from dpo_cli.core import paths
from dpo_cli.core.params import Params
from dpo_cli.core.progress import Reporter
from dpo_cli.data.checks import check_sft
from dpo_cli.data.convert import Kind, convert_stage
from dpo_cli.data.formats import SFT_FORMATS
from dpo_cli.data.schema import SFT_SCHEMA


def run(params: Params, reporter: Reporter) -> dict[str, Any]:
    """Write data/sft/{train,eval}.parquet and the list of rows that were left out.

    Raises:
        DataError: The file cannot be read or converted; nothing is written then.
    """
    source = params.data.sft
    return convert_stage(
        "convert_sft",
        source.path,
        Kind(SFT_FORMATS, check_sft, SFT_SCHEMA),
        source.format,
        params.data.eval_fraction,
        paths.SFT_DATA,
        reporter,
    )
