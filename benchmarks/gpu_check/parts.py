"""The parts in the order of what they tell, and one of them carried out."""

from __future__ import annotations

import contextlib
import importlib
import platform
import shutil
import subprocess
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.gpu_check import ROOT
from dpo_cli.core.artifacts import digest_files

LIBRARIES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "flash-attn", "trl")


@dataclass(frozen=True)
class Part:
    """A part of the check.

    Attributes:
        function: Module and name below this package.
        limit_s: Seconds after which it is ended.
    """

    function: str
    limit_s: float


PARTS = {
    "stages": Part("pipeline.stages", 80),
    "waits": Part("engine.waits", 40),
    "kernels": Part("engine.kernels", 45),
    "steps": Part("memory.steps", 90),
    "too-little-memory": Part("memory.too_little", 45),
    "margins": Part("engine.margins", 60),
    "float16": Part("pipeline.float16", 45),
    "speed": Part("speed.speed", 80),
    "generation": Part("memory.generation", 45),
    "optimizer": Part("pipeline.optimizer", 45),
    "repeat": Part("pipeline.repeat", 45),
    "load": Part("memory.load", 50),
    "trl": Part("speed.against_trl", 120),
}


def perform(name: str, small: bool, folder: Path, into: Path, *, dies: bool = False) -> None:
    """Carry out a part in this process; its answers go into a JSON file, one after the other."""
    from benchmarks.gpu_check.bench import Bench
    from dpo_cli.models.load import quiet_libraries

    quiet_libraries()
    own = folder / name
    own.mkdir()
    module, _, function = PARTS[name].function.rpartition(".")
    with contextlib.chdir(own):
        bench = Bench(small, own, into, dies=dies)
        getattr(importlib.import_module(f"benchmarks.gpu_check.{module}"), function)(bench)
        bench.save()


def describe() -> dict[str, Any]:
    """Hardware, versions and code: results are of these alone."""
    import torch

    device: dict[str, Any] = {"device": f"{platform.machine()} CPU, no GPU", "has_gpu": torch.cuda.is_available()}
    if torch.cuda.is_available():
        found = torch.cuda.get_device_properties(0)
        device |= {
            "device": found.name,
            "memory_gib": round(found.total_memory / 2**30, 1),
            "capability": list(torch.cuda.get_device_capability(0)),
            "driver": _say("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        }
    code = sorted(
        path.relative_to(ROOT).as_posix()
        for folder in ("dpo_cli", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
    )
    return {
        **device,
        "cuda": torch.version.cuda or torch.version.hip,
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in LIBRARIES},
        "commit": _say("git", "-C", str(ROOT), "rev-parse", "HEAD"),
        "code": digest_files(ROOT, code),
    }


def _version(name: str) -> str | None:
    with contextlib.suppress(PackageNotFoundError):
        return version(name)
    return None


def _say(*command: str) -> str | None:
    """The first line that a program says; None where there is no such program, or it fails."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return (done.stdout.strip().splitlines() or [None])[0] if not done.returncode else None
