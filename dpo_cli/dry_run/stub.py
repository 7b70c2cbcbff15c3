"""The stub that lends a CPU build of PyTorch a CUDA device; compiled and loaded before torch is imported."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from dpo_cli.core.errors import MachineError

_SOURCE = Path(__file__).with_name("stub.cpp")
_COMPILERS = ("c++", "g++", "clang++")


def compiler() -> str | None:
    """A C++ compiler: ``$CXX``, or the first of the usual names that is there."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else _COMPILERS
    return next((found for name in names if (found := shutil.which(name))), None)


def lacking() -> str | None:
    """What a dry run lacks on this machine; None where it has all."""
    if _has_cuda():
        return None if _has_driver() else "this PyTorch was built for CUDA and finds no driver: take its CPU build"
    return None if compiler() else "it needs a C++ compiler: install g++, or set CXX"


def load_stub() -> None:
    """Compile the stub and load it, a matter of two seconds; do nothing where torch comes with CUDA itself.

    Raises:
        MachineError: There is no C++ compiler, or it cannot compile the stub.
    """
    if (reason := lacking()) is not None:
        raise MachineError(f"the code for CUDA cannot be run dry: {reason}")
    found = compiler()
    if _has_cuda() or found is None:
        return
    if "torch" in sys.modules:
        raise RuntimeError("torch was imported before the stub for a dry run was loaded")
    torch = _torch_folder()
    with tempfile.TemporaryDirectory(prefix="dpo-cli-stub-") as folder:
        library = Path(folder) / "stub.so"
        command = [
            *(found, "-std=c++20", "-O0", "-shared", "-fPIC", str(_SOURCE), "-o", str(library)),
            *(f"-I{torch / 'include'}", f"-L{torch / 'lib'}", f"-Wl,-rpath,{torch / 'lib'}", "-lc10", "-ltorch_cpu"),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise MachineError(f"{found} cannot compile {_SOURCE}: {done.stderr.strip().splitlines()[0]}")
        for needed in (torch / "lib").glob("libgomp*"):
            ctypes.CDLL(str(needed), mode=ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def _torch_folder() -> Path:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise MachineError("torch is not installed")
    return Path(spec.origin).parent


def _has_cuda() -> bool:
    return any((_torch_folder() / "lib").glob("*torch_cuda*"))


def _has_driver() -> bool:
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    return True
