"""What ``dpo-cli doctor`` makes of driver, PyTorch and bitsandbytes, and of a model whose files are not all there."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dpo_cli.core import environment
from dpo_cli.core.checkup import Finding
from dpo_cli.core.params import Params
from dpo_cli.models import doctor, trials
from dpo_cli.models.trials import Trial
from tests.tiny_project import tiny_params

GIB = 2**30
RTX_3060 = {"name": "RTX 3060", "driver_version": "550.54", "power.limit": "170.00", "cuda": "12.4"}
NEWER = RTX_3060 | {"driver_version": "580.65", "cuda": "13.0"}
NO_GPU = {"torch": "2.13.0", "cuda": None, "hip": None, "available": False}
FOUND = {"torch": "2.13.0", "cuda": "13.0", "hip": None, "available": True, "name": "RTX 3060", "capability": [8, 6],
         "kernels": ["sm_80", "sm_90", "sm_120"], "free": 11 * GIB, "total": 12 * GIB}  # fmt: skip


@pytest.mark.parametrize(
    ("tried", "card", "maker", "shell", "status", "found", "remedy"),
    [
        (NO_GPU, {}, "", {}, "plain", "none; PyTorch 2.13.0 computes on the CPU", ""),
        (FOUND, NEWER, "NVIDIA", {}, "good", "RTX 3060, PyTorch 2.13.0, driver 580.65, 11.0 GiB free of 12.0", ""),
        (FOUND | {"free": 5 * GIB}, NEWER, "NVIDIA", {}, "warn", "5.0 GiB free of 12.0: something else", "nvidia-smi"),
        (NO_GPU, NEWER, "NVIDIA", {}, "bad", "it is made for CPUs", "whl/cu130"),
        (NO_GPU, RTX_3060, "NVIDIA", {}, "bad", "it is made for CPUs", "update NVIDIA's driver to 580"),
        (
            NO_GPU | {"cuda": "13.0"},
            RTX_3060,
            "NVIDIA",
            {},
            "bad",
            "needs CUDA 13.0, and driver 550.54",
            "update NVIDIA",
        ),
        (NO_GPU | {"cuda": "13.0"}, NEWER, "NVIDIA", {"CUDA_VISIBLE_DEVICES": "-1"}, "bad", "hides RTX 3060", "unset"),
        (NO_GPU | {"cuda": "13.0", "warning": "unknown error"}, NEWER, "NVIDIA", {}, "bad", "unknown error", "restart"),
        (FOUND | {"capability": [6, 1]}, NEWER, "NVIDIA", {}, "bad", "no kernels for RTX 3060", "whl/cu126"),
        (FOUND | {"capability": [12, 0], "kernels": ["sm_90"]}, NEWER, "NVIDIA", {}, "bad", "no kernels", "whl/cu130"),
        (FOUND | {"capability": [12, 0], "kernels": ["compute_90"]}, NEWER, "NVIDIA", {}, "good", "RTX 3060", ""),
        (NO_GPU, {}, "NVIDIA", {}, "bad", "no driver", "install NVIDIA's driver"),
        (NO_GPU, {}, "AMD", {}, "warn", "an AMD card", "rocm"),
        ({"ended": "exit code 1: ModuleNotFoundError"}, {}, "", {}, "plain", "not tried", ""),
    ],
)
def test_driver_and_pytorch_are_held_against_each_other(
    tried: Any, card: Any, maker: str, shell: Any, status: str, found: str, remedy: str
) -> None:
    finding = doctor.gpu(tried, card, maker, shell)
    assert finding.status == status
    assert found in finding.found
    assert remedy in finding.remedy
    assert bool(finding.remedy) == (status in ("bad", "warn"))


@pytest.mark.parametrize(
    ("said", "status", "found", "remedy"),
    [
        ({"library": "CUDA binary not found"}, "bad", "no library for CUDA 13.0", "--force-reinstall bitsandbytes"),
        ({"error": "CUDA out of memory. Tried"}, "bad", "no memory is left on the GPU", "close other programs"),
        ({"error": "no kernel image is available"}, "bad", "fail: no kernel image", "bitsandbytes"),
        ({"ended": "exit code 1: No module named 'bitsandbytes'"}, "plain", "bitsandbytes is missing", ""),
        ({"ended": "SIGSEGV: nothing was said"}, "bad", "SIGSEGV", "bitsandbytes"),
        ({"device": "cuda:0", "dtype": "bfloat16", "difference": 0.01, "rounding": 0.09}, "good", "cuda:0", ""),
        ({"device": "cpu", "dtype": "float32", "difference": 0.01, "rounding": 0.09}, "bad", "wrong numbers", "pip"),
        ({"device": "cpu", "dtype": "float32", "difference": 0.0, "rounding": 0.6}, "bad", "wrong numbers", "pip"),
    ],
)
def test_what_4_bit_products_may_come_to(said: Any, status: str, found: str, remedy: str) -> None:
    finding = doctor.four_bits(FOUND | said)
    assert finding.status == status
    assert found in finding.found
    assert remedy in finding.remedy


def test_4_bit_products_are_right_here() -> None:
    tried = Trial.start(trials.__name__, "four-bits").result(60)
    assert doctor.four_bits(tried).status == "good", tried
    assert 0.05 < tried["rounding"] < 0.12


def test_a_process_that_dies_is_no_crash() -> None:
    assert "KeyError" in Trial.start(trials.__name__, "nothing").result(60)["ended"]


# --- files, without a network ---------------------------------------------------------------


def opened(params: Params, monkeypatch: pytest.MonkeyPatch, switch: str | None) -> list[Finding]:
    monkeypatch.setitem(environment._given, "HF_HUB_OFFLINE", switch)
    return list(doctor.offline(doctor.start_offline(params).result(60)))


def test_a_model_whose_tokenizer_is_missing(
    project: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    (whole,) = opened(tiny_params(folder), monkeypatch, None)
    assert whole.status == "good"
    assert f"base model {folder}" in whole.found
    assert "HF_HUB_OFFLINE is not set" in whole.found
    for path in folder.glob("*token*"):
        path.unlink()
    (fault,) = opened(tiny_params(folder), monkeypatch, "1")
    assert fault.found == f"{folder}/tokenizer.json is missing, and no other file of a tokenizer is there"
    assert (fault.remedy, fault.exit_code) == ("fetch the whole model", 6)
    (fault,) = opened(tiny_params(folder), monkeypatch, None)
    assert "HF_HUB_OFFLINE is not set in this shell" in fault.found
    assert fault.remedy.endswith("export HF_HUB_OFFLINE=1")


def test_whatever_asks_the_network_is_heard() -> None:
    said = {"opened": ["base model x"], "problems": [], "attempts": ["huggingface.co"], "blocked": ""}
    (fault,) = doctor.offline(said)
    assert fault.status == "bad"
    assert "huggingface.co" in fault.found


def test_the_network_is_gone_in_that_process(tmp_path: Path) -> None:
    code = (
        "import json, socket, urllib.request\n"
        "from dpo_cli.models.trials import _leave_network\n"
        "attempts = []\n_leave_network(attempts)\n"
        "for url in ('http://huggingface.co', 'http://127.0.0.1:9'):\n"
        "    try: urllib.request.urlopen(url, timeout=5)\n"
        "    except OSError: pass\n"
        "print(json.dumps(attempts))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert json.loads(out) == ["huggingface.co", "127.0.0.1"]
