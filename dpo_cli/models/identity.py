"""What a model is: its name and the digests of its files, never its path.

``models/base/model.lock.json`` holds the identity of the base model. Every later stage checks
the directory that it loads against it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dpo_cli.core import paths
from dpo_cli.core.artifacts import digest_json, read_json, sha256_file, write_json
from dpo_cli.core.errors import MachineError, StaleArtifactError

LOCK_NAME = "model.lock.json"
_PATTERNS = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt")
_BASE_REMEDY = "run: dpo-cli base"
_LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes")


def library_versions() -> dict[str, str]:
    """Versions of the libraries that a log-probability depends on."""
    return {name: version(name) for name in _LIBRARIES}


def model_files(folder: Path) -> list[str]:
    """Names of the files that make a model: weights, configuration and tokenizer."""
    found = {path.name for pattern in _PATTERNS for path in folder.glob(pattern) if path.is_file()}
    return sorted(found - {LOCK_NAME})


def lock_model(folder: Path, name: str, revision: str, on_bytes: Callable[[int], None]) -> dict[str, Any]:
    """The identity of a model directory, as model.lock.json has it."""
    files = {
        file: {"size": (folder / file).stat().st_size, "sha256": _digest(folder / file, on_bytes)}
        for file in model_files(folder)
    }
    return {"name": name, "revision": revision, "files": files}


def read_lock() -> dict[str, Any]:
    """The locked identity of the base model.

    Raises:
        StaleArtifactError: Stage base has not run.
    """
    return read_json(paths.BASE / LOCK_NAME, _BASE_REMEDY)


def base_digest() -> str:
    """One digest of the base model's identity."""
    return digest_json(read_lock())


def verify_model(folder: Path, lock: dict[str, Any]) -> None:
    """Check that a directory holds the locked model.

    Raises:
        StaleArtifactError: A file is missing, new, or has another content.
    """
    lock_path = (paths.BASE / LOCK_NAME).as_posix()
    remedy = f"put the locked model back, or lock this one with: dpo-cli base ({lock_path})"
    now, locked = set(model_files(folder)), set(lock["files"])
    for name in sorted(now ^ locked):
        state = "is missing" if name in locked else "is new"
        raise StaleArtifactError(f"{folder / name} {state}: not the model that was locked; {remedy}")
    for name, expected in lock["files"].items():
        path = folder / name
        if path.stat().st_size != expected["size"] or _digest(path) != expected["sha256"]:
            raise StaleArtifactError(f"{path} has changed since the model was locked; {remedy}")


def _digest(path: Path, on_bytes: Callable[[int], None] = lambda _: None) -> str:
    """SHA-256 of a file, remembered by its path, size and time of change: weights are large."""
    memory_path = paths.scratch_root() / "digests.json"
    try:
        memory = json.loads(memory_path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        memory = {}
    stat = path.stat()
    key, stamp = str(path.resolve()), [stat.st_size, stat.st_mtime_ns]
    entry = memory.get(key)
    if entry and entry[:2] == stamp:
        on_bytes(stat.st_size)
        return entry[2]
    digest = sha256_file(path, on_bytes)
    memory[key] = [*stamp, digest]
    try:
        write_json(memory_path, memory)
    except OSError as error:
        raise MachineError(f"{memory_path} cannot be written: {error.strerror}") from None
    return digest
