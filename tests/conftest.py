"""Shared by all tests: one torch thread, no network, and the small things that tests are made of.

Torch is imported by the fixtures and tests that need it, never by this file.
"""

from __future__ import annotations

import gc
import os
import random
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from dpo_cli.core.environment import prepare_environment
from dpo_cli.core.progress import Status
from dpo_cli.data.tokens import TokenGroup

prepare_environment()
os.environ.setdefault("OMP_NUM_THREADS", "1")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what runs in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)

for _profile, _examples in (("here", 25), ("ci", 50)):
    settings.register_profile(_profile, deadline=None, derandomize=True, database=None, max_examples=_examples)
settings.load_profile("ci" if os.environ.get("CI") else "here")

_ROOT = Path(__file__).parent
_TIERS = {
    "real": "real",
    "cuda_dry_run": "dry_run",
    "e2e": "e2e",
    "parity": "parity",
    "theory": "model",
    "unit/models": "model",
    "unit/scoring": "model",
    "unit/training": "model",
    "unit": "unit",
    "contract": "unit",
    "property": "unit",
}
"""The tier of the tests in each folder, the slowest tier first; of two folders the inner one counts."""
_SLOWEST_FIRST = list(dict.fromkeys(_TIERS.values()))


def _tier(path: Path) -> str:
    folder = path.relative_to(_ROOT).parent
    return next(_TIERS[name] for name in map(Path.as_posix, (folder, *folder.parents)) if name in _TIERS)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test with the tier of its folder, and put the slow tiers first, so that no process waits at the end."""
    for item in items:
        item.add_marker(_tier(item.path))
    items.sort(key=lambda item: _SLOWEST_FIRST.index(_tier(item.path)))


def pytest_sessionstart() -> None:
    """Look for no garbage while tests are collected, which takes a quarter of that time."""
    gc.disable()


def pytest_collection_finish() -> None:
    """Nor ever after among what they have imported."""
    gc.freeze()
    gc.enable()


_FOREIGN = ("CI", "DVC_ROOT", "DVC_STAGE", "DPO_MODEL_PATH", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK", "LOCAL_RANK")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """One torch thread, where torch is loaded at all."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_foreign_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the caller's shell says of DVC and models is not part of a test."""
    for name in _FOREIGN:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty project folder, which is the working directory."""
    folder = tmp_path / "project"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


# --- reporting ----------------------------------------------------------------------------


class RecordedMeter:
    """A piece of long work, as it was reported."""

    def __init__(self, label: str, total: int, unit: str, on_advance: Callable[[int], None] | None) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.done = 0
        self.notes: list[str] = []
        self._on_advance = on_advance

    def advance(self, amount: int) -> None:
        self.done += amount
        if self._on_advance is not None:
            self._on_advance(self.done)

    def note(self, text: str) -> None:
        self.notes.append(text)


class RecordingReporter:
    """A Reporter that keeps all it is told; ``on_advance`` is called with what a meter has done so far."""

    def __init__(self, on_advance: Callable[[int], None] | None = None) -> None:
        self.said: list[str] = []
        self.warned: list[str] = []
        self.meters: list[RecordedMeter] = []
        self.tables: dict[str, list[tuple[str, str]]] = {}
        self._on_advance = on_advance

    def say(self, text: str) -> None:
        self.said.append(text)

    def warn(self, text: str) -> None:
        self.warned.append(text)

    @contextmanager
    def meter(self, label: str, total: int, unit: str) -> Iterator[RecordedMeter]:
        meter = RecordedMeter(label, total, unit, self._on_advance)
        self.meters.append(meter)
        yield meter

    def table(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        self.tables[title] = list(rows)

    def verdict(self, headline: str, status: Status, rows: Sequence[tuple[Status, str, str]]) -> None:
        self.tables[headline] = [row[1:] for row in rows]


@pytest.fixture
def reporter() -> RecordingReporter:
    """A Reporter that records."""
    return RecordingReporter()


@pytest.fixture(scope="session")
def make_reporter() -> type[RecordingReporter]:
    """For tests that act while work is under way: ``make_reporter(on_advance)``."""
    return RecordingReporter


# --- token groups -------------------------------------------------------------------------


@pytest.fixture(scope="session")
def make_groups() -> Callable[..., list[TokenGroup]]:
    """``make_groups(count, ...)``: random token groups with different ids and uneven lengths."""

    def make(
        count: int,
        *,
        vocabulary: int = 100,
        completions: int = 2,
        prompt_lengths: tuple[int, int] = (2, 12),
        completion_lengths: tuple[int, int] = (1, 9),
        seed: int = 0,
    ) -> list[TokenGroup]:
        rng = random.Random(f"groups {seed}")

        def tokens(lengths: tuple[int, int]) -> tuple[int, ...]:
            return tuple(rng.randrange(3, vocabulary) for _ in range(rng.randint(*lengths)))

        return [
            TokenGroup(
                id=f"row-{seed}-{number:04d}",
                group=f"prompt-{seed}-{number:04d}",
                prompt=tokens(prompt_lengths),
                completions=tuple(tokens(completion_lengths) for _ in range(completions)),
            )
            for number in range(count)
        ]

    return make


# --- models -------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """The embedded model's tokenizer."""
    from dpo_cli.models.embedded import build_tokenizer

    return build_tokenizer()


@pytest.fixture(scope="session")
def make_llama() -> Callable[..., Any]:
    """``make_llama(vocabulary, seed=0, **changes)``: a tiny random llama, sharp enough to tell tokens apart."""

    def make(vocabulary: int, seed: int = 0, **changes: Any) -> Any:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        settings_: dict[str, Any] = {
            "vocab_size": vocabulary,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "tie_word_embeddings": True,
            "initializer_range": 0.1,
            "pad_token_id": 0,
            "eos_token_id": 1,
            "bos_token_id": None,
        }
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**(settings_ | changes))).eval()

    return make


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any, make_llama: Callable[..., Any]) -> Path:
    """Directory of a tiny random llama with the embedded tokenizer; not to be changed."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    make_llama(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def cpu() -> Any:
    """The CPU in float32, as a Machine."""
    import torch

    from dpo_cli.models.device import Machine

    return Machine(torch.device("cpu"), torch.float32)
