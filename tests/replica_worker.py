"""Trainings as one of several processes, for tests: ``python -m tests.replica_worker MODEL FOLDER [NAME]...``.

Runs the trainings named, or all, and writes what came of each to ``FOLDER/NAME.RANK.pt``.
"""

from __future__ import annotations

import os
import random
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dpo_cli.core.environment import prepare_environment
from dpo_cli.core.errors import DpoCliError, MachineError
from dpo_cli.core.params import RuntimeParams, TrainParams
from dpo_cli.data.tokens import TokenGroup
from dpo_cli.models.load import quiet_libraries
from dpo_cli.scoring.scorer import Scorer, Scores
from dpo_cli.training.objective import PairObjective, SftObjective
from dpo_cli.training.parallel import Replicas, join_replicas, shared_scratch
from dpo_cli.training.protocols import Learner
from tests import small_training
from tests.conftest import RecordingReporter
from tests.small_training import adapter, make_policy, reference

SETTINGS = TrainParams(learning_rate=5e-3, batch_size=8, epochs=3.0, eval_steps=4)
"""Nine steps of 20 pairs; the last batch of each epoch is a short one."""


def make_pairs(count: int, seed: int) -> list[TokenGroup]:
    """Random pairs of uneven lengths."""
    rng = random.Random(seed)

    def tokens(least: int, most: int) -> tuple[int, ...]:
        return tuple(rng.randrange(3, 100) for _ in range(rng.randint(least, most)))

    return [
        TokenGroup(f"{seed}-{row:03d}", f"{seed}-{row:03d}", tokens(2, 30), (tokens(1, 9), tokens(1, 9)))
        for row in range(count)
    ]


class Worker:
    """One process's trainings; each begins with the same weights."""

    def __init__(self, base: Path, folder: Path, replicas: Replicas) -> None:
        self._base = base
        self._folder = folder
        self._replicas = replicas
        self._pairs = make_pairs(20, 1), make_pairs(5, 2)

    def curve(self) -> dict[str, Any]:
        """Preferences."""
        return self._train("curve")

    def tiny_batches(self) -> dict[str, Any]:
        """A pair a step: all but one process have nothing to do, and there is one held-out pair."""
        settings = SETTINGS.model_copy(update={"batch_size": 1, "max_steps": 7})
        return self._train("tiny_batches", settings, held_out=1)

    def instructions(self) -> dict[str, Any]:
        """Losses that are weighted by tokens."""
        return self._train("instructions", sft=True)

    def out_of_memory(self) -> dict[str, Any]:
        """Memory runs out in the last process alone."""
        last = self._replicas.rank == self._replicas.size - 1
        return self._train("out_of_memory", limit=60 if last else None)

    def unlike_gpus(self) -> dict[str, Any]:
        """The last process's norm of the same gradients is off by the last digit."""
        total_norm = torch.nn.utils.get_total_norm

        def off(gradients: Any, **options: Any) -> torch.Tensor:
            norm = total_norm(gradients, **options)
            return torch.nextafter(norm, norm + 1) if self._replicas.rank else norm

        torch.nn.utils.get_total_norm = off
        try:
            return self._train("unlike_gpus", SETTINGS.model_copy(update={"max_grad_norm": 1e-3}))
        finally:
            torch.nn.utils.get_total_norm = total_norm

    def dropped(self) -> dict[str, Any]:
        """Dropout, not stopped."""
        return self._train("dropped", dropout=0.2)

    def stopped(self) -> dict[str, Any]:
        """Dropout, and a signal to the last process alone after its second step."""

        def stop(done: int) -> None:
            if done == 2 and self._replicas.rank == self._replicas.size - 1:
                os.kill(os.getpid(), signal.SIGTERM)

        return self._train("stopped", dropout=0.2, on_advance=stop)

    def resumed(self) -> dict[str, Any]:
        """The one that was stopped, to its end."""
        return self._train("stopped", dropout=0.2)

    def no_number(self) -> dict[str, Any]:
        """One pair has a reference that is no number."""
        return self._train("no_number", nan_row=3)

    def other_weights(self) -> dict[str, Any]:
        """The last process begins with another adapter."""
        return self._train("other_weights", seed=self._replicas.rank)

    def other_order(self) -> dict[str, Any]:
        """The last process has its data in another order."""
        return self._train("other_order", turn=self._replicas.rank)

    def locked(self) -> dict[str, Any]:
        """The stage runs already: a lock that the first process holds before it asks for it."""
        os.chdir(self._folder)
        with shared_scratch("train", "one", self._replicas) as scratch:
            inside = scratch.folder.is_dir()
            try:
                with shared_scratch("train", "two", self._replicas):
                    return {"error": None}
            except MachineError as error:
                return {"inside": inside, "error": str(error)}

    def left_alone(self) -> dict[str, Any]:
        """All but the first process die."""
        if self._replicas.rank:
            os._exit(0)
        try:
            self._replicas.wait()
        except MachineError as error:
            return {"error": str(error)}
        return {"error": None}

    def _train(
        self,
        name: str,
        settings: TrainParams = SETTINGS,
        *,
        held_out: int = 5,
        sft: bool = False,
        dropout: float = 0.0,
        seed: int = 0,
        turn: int = 0,
        nan_row: int | None = None,
        limit: int | None = None,
        on_advance: Callable[[int], None] | None = None,
    ) -> dict[str, Any]:
        model = make_policy(self._base, dropout, seed)
        scorer = Scorer(model, torch.float32)
        train, evaluated = self._pairs[0], self._pairs[1][:held_out]
        train = train[turn:] + train[:turn]
        model.eval()
        logps = reference(scorer, [*train, *evaluated])
        if nan_row is not None:
            logps[train[nan_row].id] = [float("nan")] * 2
        objective = SftObjective() if sft else PairObjective(TrainParams(beta=0.1), logps)
        if limit is not None:
            _run_out_above(scorer, limit)
        work = self._folder / name
        runtime = {"max_tokens_per_microbatch": 200, "checkpoint_minutes": 60.0}
        outcome: dict[str, Any] = {"error": None, "history": []}
        with _counted() as sizes:
            try:
                learner, groups = Learner[Any](model, scorer, objective), (train, evaluated)
                fitted = small_training.train(
                    learner, groups, work, RecordingReporter(on_advance), settings, self._replicas, **runtime
                )
                outcome["history"] = fitted.history
            except DpoCliError as error:
                outcome["error"] = f"{type(error).__name__}: {error}"
        outcome["sizes"] = sizes
        outcome["files"] = sorted(path.name for path in work.iterdir())
        outcome["adapter"] = adapter(model)
        return outcome


@contextmanager
def _counted() -> Iterator[list[int]]:
    """Sizes of the tensors that are summed over the processes."""
    sizes: list[int] = []
    all_reduce = dist.all_reduce

    def counted(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(tensor.numel())
        return all_reduce(tensor, *args, **kwargs)

    dist.all_reduce = counted
    try:
        yield sizes
    finally:
        dist.all_reduce = all_reduce


def _run_out_above(scorer: Any, limit: int) -> None:
    """Let scoring for the training fail where a micro-batch of several pairs is larger."""
    score = scorer.score

    def limited(groups: Sequence[TokenGroup], **asked: Any) -> Scores:
        size = sum(len(group.prompt) + sum(map(len, group.completions)) for group in groups)
        if torch.is_grad_enabled() and size > limit and len(groups) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return score(groups, **asked)

    scorer.score = limited


def main(base: str, folder: str, *names: str) -> None:
    """Run the trainings."""
    prepare_environment()
    quiet_libraries()
    runtime = RuntimeParams(device="cpu")
    torch.set_num_threads(1)
    with join_replicas(runtime, embedded=False) as replicas:
        worker = Worker(Path(base).absolute(), Path(folder).absolute(), replicas)
        for name in names:
            outcome = getattr(worker, name)()
            torch.save(outcome, Path(folder).absolute() / f"{name}.{replicas.rank}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
