"""``dpo-cli bench --card``: a prediction that says that it is one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dpo_cli.dry_run.stub import lacking

pytestmark = pytest.mark.skipif(lacking() is not None, reason=str(lacking()))


def bench(folder: Path, *arguments: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "dpo_cli", "bench", *arguments]
    return subprocess.run(
        line, cwd=folder, env={**os.environ, **(environment or {})}, capture_output=True, text=True, check=False
    )


def test_both_passes_are_predicted_and_nothing_is_written(tmp_path: Path) -> None:
    done = bench(tmp_path, "--card", "rtx-4090", "--shape", "tiny", "--pairs", "8", "--json")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    assert found["is_prediction"]
    train, reference = found["train"], found["precompute_ref"]
    assert (found["compute_dtype"], train["recompute"], train["fits"]) == ("bfloat16", "none", True)
    assert train["kernels"] > reference["kernels"] > 0
    assert train["seconds"] == pytest.approx(8 / train["pairs_per_s"])
    assert train["device_seconds"] == pytest.approx(sum(train["seconds_by_kind"].values()))
    assert list(tmp_path.iterdir()) == []


def test_the_table_says_that_it_is_a_prediction(tmp_path: Path) -> None:
    done = bench(tmp_path, "--card", "t4", "--shape", "tiny", "--pairs", "4", "--pass", "train")
    assert done.returncode == 0, done.stderr
    assert "prediction: train" in done.stdout
    assert "no t4 was used" in done.stdout
    assert "float16" in done.stdout


def test_the_device_of_the_settings_is_of_this_machine(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("runtime: {device: cpu}\n", encoding="utf-8")
    done = bench(tmp_path, "--card", "rtx-4090", "--shape", "tiny", "--pairs", "4", "--pass", "train", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.strip().splitlines()[-1])["compute_dtype"] == "bfloat16"


@pytest.mark.parametrize(("card", "dtype"), [("rtx-4090", "float32"), ("t4", "bfloat16")])
def test_what_no_data_sheet_tells_is_not_predicted(card: str, dtype: str, tmp_path: Path) -> None:
    done = bench(tmp_path, "--card", card, "--shape", "tiny", "--set", f"runtime.compute_dtype={dtype}")
    assert (done.returncode, done.stdout) == (3, "")
    assert f"with --card {card}, got {dtype}" in done.stderr


def test_without_a_compiler_it_says_what_is_missing(tmp_path: Path) -> None:
    done = bench(tmp_path, "--card", "t4", "--shape", "tiny", environment={"CXX": "no-such-compiler"})
    assert (done.returncode, "needs a C++ compiler" in done.stderr) == (6, True)
