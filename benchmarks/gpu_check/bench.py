"""What each part works with: the machine, where its answers go, models of known shapes, the product's own steps."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from dpo_cli.core.artifacts import write_json
from dpo_cli.core.params import RuntimeParams, TrainParams
from dpo_cli.core.progress import Meter, SilentReporter
from dpo_cli.core.training_params import LoraParams
from dpo_cli.data.tokens import TokenGroup
from dpo_cli.models.adapters import add_adapter
from dpo_cli.models.device import Machine, prepare_machine
from dpo_cli.models.load import keep_weights_unpacked
from dpo_cli.models.project import Workplace
from dpo_cli.models.shapes import random_model, random_pairs
from dpo_cli.scoring.probe import open_scorer
from dpo_cli.scoring.scorer import Scorer
from dpo_cli.training.fit import Fit, fit
from dpo_cli.training.parallel import Job
from dpo_cli.training.protocols import Learner

GIB = 2**30

Verdict = Literal["ok", "differs", "noted", "needs a GPU", "not possible here"]
"""``noted``: nothing was expected. ``differs``: something else was."""


@dataclass(frozen=True)
class Answer:
    """What was asked of the machine, and what it said."""

    question: str
    expected: str
    seen: str
    verdict: Verdict


class RecordingReporter(SilentReporter):
    """A reporter that keeps the lines, and notes beside a meter, that it is told.

    ``on_advance`` is told how far work with a meter has come.
    """

    def __init__(self, on_advance: Callable[[int], None] | None = None) -> None:
        self.lines: list[str] = []
        self.notes: list[str] = []
        self.on_advance = on_advance or (lambda done: None)

    def say(self, text: str) -> None:
        """Keep it, and show it in the part's log."""
        self.lines.append(text)
        print(text, file=sys.stderr, flush=True)

    warn = say

    def meter(self, label: str, total: int, unit: str) -> AbstractContextManager[Meter]:
        """Work under way."""
        return _counting(self)

    def last(self, words: str) -> str:
        """The last line with these words in it; empty where there is none."""
        return next((line for line in reversed(self.lines) if words in line), "")


class _Count:
    def __init__(self, reporter: RecordingReporter) -> None:
        self._done, self._reporter = 0, reporter

    def advance(self, amount: int) -> None:
        self._done += amount
        self._reporter.on_advance(self._done)

    def note(self, text: str) -> None:
        self._reporter.notes.append(text)


@contextmanager
def _counting(reporter: RecordingReporter) -> Iterator[Meter]:
    yield _Count(reporter)


@dataclass(frozen=True)
class Policy:
    """A model of a known shape with random weights and a trainable adapter."""

    model: Any
    scorer: Scorer
    machine: Machine
    reporter: RecordingReporter

    def work(self, runtime: RuntimeParams) -> Workplace:
        """Where it is trained and measured."""
        return Workplace("gpu-check", self.reporter, runtime, self.machine)


class Bench:
    """A part's surroundings.

    Args:
        small: Whether all is done with tiny models.
        folder: For files; it is the working directory, and other parts of the same run have it, too.
        into: JSON file that holds the answers as they come, so that a crash leaves those before it.
        dies: Whether the process is to end after its first answer, as bitsandbytes ends it where memory runs out.

    Attributes:
        figures: Numbers for the result file, beside the answers.
    """

    def __init__(self, small: bool, folder: Path, into: Path, *, dies: bool = False) -> None:
        self.small = small
        self.folder = folder
        self.figures: dict[str, Any] = {}
        self._into = into
        self._dies = dies
        self._answers: list[Answer] = []
        self.on_gpu = torch.cuda.is_available()

    def check(self, question: str, expected: str, seen: str, holds: bool | None, *, refused: str | None = None) -> None:
        """Keep an answer, which counts on a GPU alone.

        Args:
            question: What was asked.
            expected: What should be seen.
            seen: What was.
            holds: Whether it is what was expected; None where that is open.
            refused: Why it cannot be seen on this machine.
        """
        verdict: Verdict = "noted" if holds is None else "ok" if holds else "differs"
        if not self.on_gpu:
            verdict = "needs a GPU"
        elif refused is not None:
            verdict, seen = "not possible here", refused
        self._answers.append(Answer(question, expected, seen, verdict))
        self.save()
        if self._dies:
            os._exit(1)

    def at_size(self, holds: bool) -> bool | None:
        """The same, and open where models are tiny, of which sizes and times say nothing."""
        return None if self.small else holds

    def save(self) -> None:
        """Write answers and figures."""
        write_json(self._into, {"answers": [asdict(each) for each in self._answers], "figures": self.figures})

    def shape(self, wanted: str) -> str:
        """The shape of a model, or a smaller one where the GPU is too small; tiny where all is."""
        if self.small or not self.on_gpu:
            return "tiny"
        is_large = wanted == "llama-3.1-8b"
        return "llama-3.2-3b" if is_large and torch.cuda.mem_get_info()[1] < 10 * GIB else wanted

    def runtime(self, **settings: Any) -> RuntimeParams:
        """Settings of this machine."""
        return RuntimeParams(device="cuda" if self.on_gpu else "cpu", **settings)

    def policy(self, wanted: str, *, quantization: str = "nf4", **settings: Any) -> Policy:
        """A model of a shape, opened as the stages open one."""
        runtime, reporter = self.runtime(**settings), RecordingReporter()
        machine = prepare_machine(runtime, embedded=False)
        model = add_adapter(random_model(self.shape(wanted), machine, quantization), LoraParams(), 0)
        keep_weights_unpacked(model)
        scorer, _ = open_scorer(model, machine.compute_dtype, runtime, reporter, "gpu-check")
        return Policy(model, scorer, machine, reporter)

    def pairs(self, policy: Policy, num_pairs: int) -> list[TokenGroup]:
        """Pairs as long as those of HH harmless; a few short ones where all is small."""
        if not self.small:
            return random_pairs("harmless", num_pairs, policy.scorer.config.vocab_size)
        return [
            replace(pair, prompt=pair.prompt[:32], completions=tuple(answer[:16] for answer in pair.completions))
            for pair in random_pairs("harmless", min(num_pairs, 4), policy.scorer.config.vocab_size)
        ]

    def wait(self) -> None:
        """Until the GPU has done what it was told."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], Any], turns: int = 3) -> float:
        """The fastest of some turns, after one that warms up."""
        times = []
        for _ in range(turns + 1):
            self.wait()
            begun = time.perf_counter()
            work()
            self.wait()
            times.append(time.perf_counter() - begun)
        return min(times[1:])


def train(
    policy: Policy,
    objective: Any,
    groups: Sequence[TokenGroup],
    work: Path,
    runtime: RuntimeParams,
    **settings: Any,
) -> Fit:
    """Train as the stage does; goes on from a checkpoint in ``work``."""
    work.mkdir(parents=True, exist_ok=True)
    settings = {"batch_size": 8, "schedule": "constant", "warmup_ratio": 0.0, **settings}
    learner = Learner(policy.model, policy.scorer, objective)
    return fit(learner, groups, groups[:2], TrainParams(**settings), Job(policy.work(runtime), work))


def adapter_of(model: torch.nn.Module) -> torch.Tensor:
    """All trainable numbers of a model in one row, float32 on the CPU."""
    return torch.cat([each.detach().float().cpu().flatten() for each in model.parameters() if each.requires_grad])
