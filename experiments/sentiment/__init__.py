"""Controlled sentiment (Rafailov et al. 2023, section 6.1), on film reviews from a grammar."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments.grid import Experiment
from experiments.sentiment.film import build_film_model, prefixes, reward


def _model(work: Path, grid: dict[str, Any]) -> Path:
    """The film model, pretrained once; it serves all seeds."""
    folder = work / "film"
    if not (folder / "tokenizer.json").is_file():
        build_film_model(folder, grid["pretrain_steps"])
    return folder


EXPERIMENT = Experiment("sentiment", "Controlled sentiment on film reviews", reward, prefixes, _model)
