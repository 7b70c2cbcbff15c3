"""Offline before anything else."""

from __future__ import annotations

import os

import pytest

from dpo_cli.core.environment import prepare_environment


def test_downloads_and_telemetry_are_off_even_where_they_were_on(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "0")
    monkeypatch.delenv("HF_HUB_DISABLE_TELEMETRY", raising=False)
    prepare_environment()
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY")
    assert {os.environ[name] for name in names} == {"1"}
