"""The settings of a labeling, which lie beside its votes: they decide what is asked, and in which order."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_args

from dpo_cli.core.artifacts import read_json, write_json
from dpo_cli.core.errors import ParamsError
from dpo_cli.labeling.items import Mode

SETTINGS_FILE = "labeling.json"


@dataclass(frozen=True)
class Settings:
    """How items are asked.

    Attributes:
        mode: What is asked of each.
        pairs: Most pairs of one prompt.
        overlap: People who vote on an item; where they disagree, one more.
        repeats: Share of questions that come again, flipped, so that a rater can be compared with himself.
        uncertain: Share of items that are taken from those whose answers have about the same reward, where rewards are
            known; the others are drawn at random.
        seed: Of the order of items, and of the order of the answers, which depends on the item and the rater, too.
    """

    mode: Mode = "pair"
    pairs: int = 1
    overlap: int = 1
    repeats: float = 0.07
    uncertain: float = 0.5
    seed: int = 0


def settle(folder: Path, given: dict[str, Any]) -> Settings:
    """The settings of the votes in a folder: those of its first day, or the given ones, which are kept.

    Args:
        folder: Of the votes.
        given: What the user says, by name; None where he says nothing.

    Raises:
        ParamsError: He says something else than on the first day, or a value is out of range.
        StaleArtifactError: The file is damaged.
    """
    path = folder / SETTINGS_FILE
    said = {name: value for name, value in given.items() if value is not None}
    if not path.exists():
        return _begin(path, Settings(**said))
    stored = read_json(path, "restore it, or name another folder with --out")
    names = [each.name for each in fields(Settings)]
    if not isinstance(stored, dict) or sorted(stored) != sorted(names):
        raise ParamsError(f"{path} must hold {', '.join(names)}; restore it, or name another folder with --out")
    if not any(each.stat().st_size for each in folder.glob("*.jsonl")):
        return _begin(path, Settings(**stored | said))  # nobody has voted
    problems = [
        f"--{name} {value}: the votes in {folder} were begun with {stored[name]}; leave it out, or name another folder"
        " with --out"
        for name, value in said.items()
        if stored[name] != value
    ]
    if problems:
        raise ParamsError(problems)
    settings = Settings(**stored)
    _check(settings)
    return settings


def _begin(path: Path, settings: Settings) -> Settings:
    _check(settings)
    write_json(path, asdict(settings))
    return settings


def _check(settings: Settings) -> None:
    problems = [
        f"--{name} must be {meaning}, got {getattr(settings, name)}"
        for name, meaning, holds in (
            ("mode", "pair, ranking or thumbs", settings.mode in get_args(Mode)),
            ("pairs", "at least 1", settings.pairs >= 1),
            ("overlap", "at least 1", settings.overlap >= 1),
            ("repeats", "a share from 0 to 0.5", 0 <= settings.repeats <= 0.5),
            ("uncertain", "a share from 0 to 1", 0 <= settings.uncertain <= 1),
        )
        if not holds
    ]
    if settings.mode != "pair" and settings.pairs != 1:
        problems.append(f"--pairs has no effect on mode {settings.mode}; leave it out")
    if problems:
        raise ParamsError(problems)
