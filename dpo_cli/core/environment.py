"""Offline and quiet: set before any library that might open a socket or print is imported."""

from __future__ import annotations

import logging
import os

_SWITCHES = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "DVC_NO_ANALYTICS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def prepare_environment() -> None:
    """Turn off downloads and telemetry for this process and its children, and notes at import."""
    os.environ.update(_SWITCHES)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
