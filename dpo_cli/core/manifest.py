"""One manifest beside every artifact: what it is, what it was made of, its files, settings and versions.

It is JSON, written last, so that its presence means that the folder is complete::

    {"kind": "dpo", "made_of": {"graph": ..., "data/preference": ...}, "files": {name: sha256},
     "settings": {section: ...}, "versions": {package: version}, "facts": ...}

There is no time and no path in it: equal runs give equal bytes. Whoever uses an artifact checks it: that it was made of
what is there now, and that its files are those that were made.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dpo_cli.core import paths
from dpo_cli.core.artifacts import read_json, sha256_file, write_json
from dpo_cli.core.errors import StaleArtifactError
from dpo_cli.core.text import shown

_LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes")


def library_versions() -> dict[str, str]:
    """Versions of the libraries that a log-probability depends on."""
    return {name: version(name) for name in _LIBRARIES}


def all_versions() -> dict[str, str]:
    """Those, and that of this program."""
    return {"dpo_cli": version("dpo-cli"), **library_versions()}


@dataclass(frozen=True)
class Manifest:
    """What a manifest holds.

    Attributes:
        made_of: Digests or identities of what the artifact was made of, by name.
        files: SHA-256 of each of its files, by name.
        settings: Sections of params.yaml that it was made with.
        versions: Of the program and its libraries.
        facts: What was found while it was made.
    """

    made_of: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=all_versions)
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Artifact:
    """A kind of artifact: where it lies, and what makes it.

    Attributes:
        kind: What it is, as its manifest says.
        folder: Where the project has it.
        name: Of its manifest.
        command: Makes it.
        reads: A setting that its users read: section and name.
    """

    kind: str
    folder: Path
    name: str
    command: str
    reads: tuple[str, str] | None = None

    def remedy(self, folder: Path) -> str:
        """What to do where the one in a folder cannot be used."""
        if folder == self.folder:
            return f"run: dpo-cli {self.command}"
        return f"name a folder that dpo-cli {self.command} made, such as {self.folder.as_posix()}"

    def write(self, folder: Path, manifest: Manifest, files: Iterable[str] = ()) -> None:
        """Write the manifest into a folder that is otherwise complete.

        Args:
            folder: Where the artifact was built.
            manifest: What it says.
            files: Names of the folder's files that it answers for, besides those that it names already.
        """
        found = manifest.files | {name: sha256_file(folder / name) for name in files}
        write_json(folder / self.name, {"kind": self.kind, **asdict(manifest), "files": dict(sorted(found.items()))})

    def read(self, folder: Path | None = None) -> Manifest:
        """The manifest in a folder, by default the project's.

        Raises:
            StaleArtifactError: It is missing, damaged, of another kind or of another version.
        """
        folder = folder or self.folder
        path = folder / self.name
        found = read_json(path, self.remedy(folder))
        try:
            manifest = Manifest(**{name: dict(found[name]) for name in Manifest.__dataclass_fields__})
            if found["kind"] != self.kind:
                raise ValueError(found["kind"])
            if self.reads is not None and self.reads[1] not in manifest.settings[self.reads[0]]:
                raise KeyError(self.reads)
            for name, digest in manifest.files.items():
                if Path(name).name != name or not isinstance(digest, str):
                    raise ValueError(name)
        except (KeyError, TypeError, ValueError):
            raise StaleArtifactError(
                f"{path.as_posix()} is damaged, or of another version of dpo-cli; {self.remedy(folder)}"
            ) from None
        return manifest

    def check(self, made_of: Mapping[str, Any], folder: Path | None = None) -> Manifest:
        """The manifest of an artifact that can be used.

        Args:
            made_of: What must be what it was made of, by name.
            folder: Where it lies; by default the project's.

        Raises:
            StaleArtifactError: See :meth:`read`; or it was made of something else, with all that differs, or a file of
                it is missing or has changed.
        """
        folder = folder or self.folder
        manifest = self.read(folder)
        self.refuse_other(manifest, made_of, folder)
        self.refuse_changed(manifest, folder)
        return manifest

    def refuse_other(self, manifest: Manifest, made_of: Mapping[str, Any], folder: Path) -> None:
        """Refuse an artifact that was made of something else.

        Raises:
            StaleArtifactError: With all that differs.
        """
        different = [
            f"{(folder / self.name).as_posix()}: made of another {name}: {change}; {self.remedy(folder)}"
            for name, now in made_of.items()
            for change in _changes(manifest.made_of.get(name), now)
        ]
        if different:
            raise StaleArtifactError(different)

    def refuse_changed(self, manifest: Manifest, folder: Path) -> None:
        """Refuse an artifact whose files are not those that were made.

        Raises:
            StaleArtifactError: A file is missing or has changed.
        """
        for name, digest in manifest.files.items():
            path = folder / name
            if not path.is_file():
                raise StaleArtifactError(f"{path.as_posix()} is missing; {self.remedy(folder)}")
            if sha256_file(path) != digest:
                raise StaleArtifactError(f"{path.as_posix()} has changed since it was made; {self.remedy(folder)}")


def _changes(was: Any, now: Any) -> list[str]:
    """What differs, in words."""
    if not (isinstance(was, Mapping) and isinstance(now, Mapping)):
        was, now = {"it": was}, {"it": now}
    return [
        f"{name} is {shown(now.get(name))} now, was {shown(was.get(name))}"
        for name in sorted({*was, *now})
        if was.get(name) != now.get(name)
    ]


BASE = Artifact("base", paths.BASE, "model.lock.json", "base")
SFT = Artifact("sft", paths.SFT_MODEL, "sft.json", "sft", ("sft", "method"))
REFERENCE = Artifact("reference", paths.REFERENCE, "manifest.json", "precompute-ref")
DPO = Artifact("dpo", paths.DPO_MODEL, "provenance.json", "train", ("train", "beta"))
REWARD = Artifact("reward", paths.REWARD_MODEL, "reward.json", "reward", ("reward", "loss"))
PPO = Artifact("ppo", paths.PPO_MODEL, "ppo.json", "ppo", ("ppo", "reward"))


def all_files(folder: Path) -> list[str]:
    """Names of a built model's files but its card, which people may edit."""
    return sorted(path.name for path in folder.iterdir() if path.is_file() and path.name != "README.md")
