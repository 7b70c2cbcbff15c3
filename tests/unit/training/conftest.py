"""What the tests of training share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def policy(tiny_folder: Path) -> Callable[..., Any]:
    """``policy(dropout=0.0)``: the tiny model in nf4 with a fresh adapter; every call gives the same weights."""
    from tests.small_training import make_policy

    return lambda dropout=0.0: make_policy(tiny_folder, dropout)


@pytest.fixture
def lab(policy: Callable[..., Any], tmp_path: Path, make_reporter: Any) -> Any:
    """Policies, a folder and reporters."""
    from tests.small_training import Lab

    return Lab(policy, tmp_path, make_reporter)
