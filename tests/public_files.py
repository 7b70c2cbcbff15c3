"""Public data files that tests read; they are no part of the repository.

They lie in shared/data beside the clone, or where DPO_PUBLIC_DATA says. public_files.tsv names the repository, commit
and part that each comes from, and its digest.
"""

from __future__ import annotations

import csv
import os
from pathlib import Path

import pytest

_TESTS = Path(__file__).parent
PUBLIC_DATA = Path(os.environ.get("DPO_PUBLIC_DATA") or _TESTS.parents[1] / "shared" / "data")

needs_public_data = pytest.mark.skipif(
    not PUBLIC_DATA.is_dir(),
    reason=f"{PUBLIC_DATA} is missing: put the files of tests/public_files.tsv there, or set DPO_PUBLIC_DATA",
)


def digests() -> dict[str, str]:
    """SHA-256 of each file by its path under the folder."""
    with (_TESTS / "public_files.tsv").open(encoding="utf-8", newline="") as file:
        return {row["file"]: row["sha256"] for row in csv.DictReader(file, delimiter="\t")}
