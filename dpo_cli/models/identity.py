"""What a model is: its name and the digests of its files, never its path.

``models/base/model.lock.json`` holds the identity of the base model. Every later stage checks
the directory that it loads against it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dpo_cli.core import paths
from dpo_cli.core.artifacts import digest_json, sha256_file, write_json
from dpo_cli.core.errors import MachineError, ParamsError, StaleArtifactError
from dpo_cli.core.manifest import BASE, Manifest

_PATTERNS = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt")


def model_files(folder: Path) -> list[str]:
    """Names of the files that make a model: weights, configuration and tokenizer."""
    found = {path.name for pattern in _PATTERNS for path in folder.glob(pattern) if path.is_file()}
    return sorted(found - {BASE.name})


def lock_model(folder: Path, name: str, revision: str, on_bytes: Callable[[int], None]) -> dict[str, Any]:
    """The identity of a model directory: its name, its revision, and SHA-256 of each file."""
    return {"name": name, "revision": revision, "files": lock_files(folder, model_files(folder), on_bytes)}


def lock_files(folder: Path, names: Iterable[str], on_bytes: Callable[[int], None] = lambda _: None) -> dict[str, str]:
    """SHA-256 of files of a folder, by name."""
    return {name: _digest(folder / name, on_bytes) for name in names}


def changed_files(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Names of files that are new, gone or of another content."""
    return sorted(name for name in {*before, *now} if before.get(name) != now.get(name))


@dataclass(frozen=True)
class ModelFacts:
    """What stages ask of a model before they load it.

    Attributes:
        context_length: The longest sequence it knows positions for, tokens; None where it does not say.
        num_rows: Rows of its embedding: token ids are below it.
        layers: Names of the layers that can have an adapter, numbers as ``*``.
        tied_layers: Those among them that share their weights.
    """

    context_length: int | None
    num_rows: int
    layers: list[str]
    tied_layers: list[str]


@dataclass(frozen=True)
class BaseLock:
    """What models/base/model.lock.json holds.

    Attributes:
        identity: Name, revision, and SHA-256 of each file: all that a result depends on.
        settings: Section model of params.yaml as the model was verified with.
        facts: What verification found and stages ask for.
        adapter: SHA-256 of each file of the adapter that stands in for SFT; empty where there is none.
    """

    identity: dict[str, Any]
    settings: dict[str, Any]
    facts: ModelFacts
    adapter: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The model's name."""
        return self.identity["name"]

    @property
    def revision(self) -> str:
        """The user's label for its version."""
        return self.identity["revision"]

    @property
    def files(self) -> dict[str, str]:
        """SHA-256 of each file, by name."""
        return self.identity["files"]

    def write(self, folder: Path) -> None:
        """Write it into a folder."""
        settings = self.settings | {"name": self.name, "revision": self.revision}
        made_of = {"adapter": self.adapter} if self.adapter else {}
        BASE.write(folder, Manifest(made_of, self.files, {"model": settings}, facts=asdict(self.facts)))


def read_base_lock() -> BaseLock:
    """The lock of the base model.

    Raises:
        StaleArtifactError: Stage base has not run, or what it wrote is damaged.
    """
    manifest = BASE.read()
    try:
        settings, facts = dict(manifest.settings["model"]), ModelFacts(**manifest.facts)
        identity = {"name": settings["name"], "revision": settings["revision"], "files": manifest.files}
        is_sound = isinstance(facts.num_rows, int) and isinstance(facts.context_length, int | None)
        if not is_sound or not all(isinstance(name, str) for name in (*facts.layers, *facts.tied_layers)):
            raise ValueError("facts")
        return BaseLock(identity, settings, facts, dict(manifest.made_of.get("adapter", {})))
    except (KeyError, TypeError, ValueError):
        raise StaleArtifactError(f"{paths.BASE / BASE.name} is damaged; {BASE.remedy(paths.BASE)}") from None


def read_lock() -> dict[str, Any]:
    """The locked identity of the base model.

    Raises:
        StaleArtifactError: Stage base has not run, or what it wrote is damaged.
    """
    return read_base_lock().identity


def refuse_beyond_context(context: int | None, max_length: int, name: str) -> None:
    """Refuse a length for which the model knows no positions.

    Raises:
        ParamsError: With both figures.
    """
    if context is not None and max_length > context:
        raise ParamsError(f"params.yaml: {name} must be <= {context}, the model's context, got {max_length}")


def base_digest() -> str:
    """One digest of the base model's identity."""
    return digest_json(read_lock())


def verify_model(folder: Path, lock: dict[str, Any]) -> None:
    """Check that a directory holds the locked model.

    Raises:
        StaleArtifactError: A file is missing, new, or has another content.
    """
    remedy = f"put the locked model back, or lock this one with: dpo-cli base ({(paths.BASE / BASE.name).as_posix()})"
    now, locked = set(model_files(folder)), set(lock["files"])
    for name in sorted(now ^ locked):
        state = "is missing" if name in locked else "is new"
        raise StaleArtifactError(f"{folder / name} {state}: not the model that was locked; {remedy}")
    for name, expected in lock["files"].items():
        if _digest(folder / name) != expected:
            raise StaleArtifactError(f"{folder / name} has changed since the model was locked; {remedy}")


def _digest(path: Path, on_bytes: Callable[[int], None] = lambda _: None) -> str:
    """SHA-256 of a file, remembered by its path, size and times of change: weights are large.

    Of the two times only that of the inode cannot be set back.
    """
    memory_path = paths.scratch_root() / "digests.json"
    try:
        memory = json.loads(memory_path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        memory = {}
    memory = memory if isinstance(memory, dict) else {}
    stat = path.stat()
    key, stamp = str(path.resolve()), [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
    match memory.get(key):
        case [*known, str(digest)] if known == stamp:
            on_bytes(stat.st_size)
            return digest
    digest = sha256_file(path, on_bytes)
    memory[key] = [*stamp, digest]
    try:
        write_json(memory_path, memory)
    except OSError as error:
        raise MachineError(f"{memory_path} cannot be written: {error.strerror}") from None
    return digest
