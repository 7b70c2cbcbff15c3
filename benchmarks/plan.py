"""How far ``dpo-cli plan`` is off: predicted peaks against counted ones of a simulated GPU, or measured on the CPU.

    python benchmarks/plan.py --card rtx-4090        # a step of each case counted without a GPU: needs a C++ compiler
    python benchmarks/plan.py --shapes tiny          # steps on this CPU, each case in a process of its own

A pair of length L is a prompt of L/2 tokens with two answers of L/2. Models have random weights. A step
ends after two micro-batches, which moves no peak: no more is held between them after the second.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Iterator
from typing import Any

from dpo_cli.core.environment import prepare_environment

LENGTHS, BATCHES = (128, 512, 2048), (4, 16, 64)
SHAPES = ("tiny", "qwen2.5-0.5b", "llama-3.1-8b")


def pairs(length: int, number: int, vocabulary: int = 1000) -> list[Any]:
    """Pairs of a length."""
    from dpo_cli.data.tokens import TokenGroup

    rng = random.Random(0)

    def tokens() -> tuple[int, ...]:
        return tuple(rng.randrange(1, vocabulary) for _ in range(length // 2))

    return [TokenGroup(f"{each:04d}", f"{each:04d}", tokens(), (tokens(), tokens())) for each in range(number)]


def task_of(length: int, batch: int) -> Any:
    """DPO on such pairs."""
    from dpo_cli.core.params import TrainParams
    from dpo_cli.core.training_params import LoraParams
    from dpo_cli.dry_run.plan import Task

    settings = TrainParams(batch_size=batch)
    return Task("train", pairs(length, batch), settings, LoraParams(), "nf4", "reference.max_length", "train.lora.r")


def counted(shape: str, task: Any, card: str) -> tuple[float, float]:
    """Predicted and counted bytes on a card."""
    from dpo_cli.core.params import Params, TrainParams
    from dpo_cli.dry_run.counts import Counting
    from dpo_cli.dry_run.device import dry_cuda, prepare_dry_machine
    from dpo_cli.dry_run.model import (
        DryAccumulator,
        dry_model,
        mean_visible_pairs,
        open_dry_scorer,
        take_optimizer_step,
    )
    from dpo_cli.dry_run.plan import plan_training
    from dpo_cli.dry_run.target import that_card
    from dpo_cli.models.device import GPUS
    from dpo_cli.models.shapes import SHAPES as ALL
    from dpo_cli.scoring.recompute import set_recompute
    from dpo_cli.training.objective import PairObjective
    from dpo_cli.training.protocols import Learner

    runtime = Params().runtime
    target = that_card(card, runtime).target
    plan = plan_training(ALL[shape], task, target, runtime)
    counting = Counting()
    with dry_cuda(GPUS[card].capability, target.total_bytes), counting:
        machine = prepare_dry_machine(runtime)
        model = dry_model(ALL[shape], machine, task.quantization, task.lora)
        scorer = open_dry_scorer(model, machine, "shared")
        objective = PairObjective(TrainParams(beta=0.1), {group.id: [-1.0, -2.0] for group in task.groups})
        accumulator = DryAccumulator(Learner(model, scorer, objective), plan.chosen.max_tokens)
        set_recompute(model, plan.chosen.grade)
        model.train()
        batches = scorer.split(task.groups, plan.chosen.max_tokens)[:2]
        groups = [task.groups[index] for indices in batches for index in indices]
        counting.attention_pairs = mean_visible_pairs(scorer, groups, plan.chosen.max_tokens)
        counting.restart()
        for _ in range(2):  # in the second step the optimizer's state is there from the beginning
            _, norm = accumulator.gradient(groups, 0)
            take_optimizer_step([each for each in model.parameters() if each.requires_grad], norm)
    state = plan.counted.adapter_bytes * 2  # take_optimizer_step forgets it
    return plan.peak_bytes, counting.counts.peak_bytes + state + target.process_bytes


def measured(shape: str, length: int, batch: int) -> tuple[float, float]:
    """Predicted and measured bytes on this CPU."""
    from dpo_cli.core.params import Params
    from dpo_cli.dry_run.plan import plan_training
    from dpo_cli.dry_run.target import this_machine
    from dpo_cli.models.shapes import SHAPES as ALL
    from dpo_cli.models.trials import Trial

    found = Trial.start("benchmarks.plan", "--step", json.dumps([shape, length, batch])).result()
    plan = plan_training(
        ALL[shape], task_of(length, batch), this_machine(Params(), embedded=False).target, Params().runtime
    )
    return plan.peak_bytes, found["peak_bytes"]


def step(shape: str, length: int, batch: int) -> None:
    """Measure one case in this process."""
    from dpo_cli.core.params import Params
    from dpo_cli.core.progress import SilentReporter
    from dpo_cli.models.adapters import add_adapter
    from dpo_cli.models.device import prepare_machine
    from dpo_cli.models.load import keep_weights_unpacked, quiet_libraries
    from dpo_cli.models.project import Workplace
    from dpo_cli.models.shapes import random_model
    from dpo_cli.models.trials import say
    from dpo_cli.training.bench import Case, measure_training

    quiet_libraries()
    task, runtime = task_of(length, batch), Params().runtime
    machine = prepare_machine(runtime, embedded=False)
    model = add_adapter(random_model(shape, machine, task.quantization), task.lora, 0)
    keep_weights_unpacked(model)
    work = Workplace("plan", SilentReporter(), runtime, machine)
    scorer, _ = work.scorer(model)
    with scorer:
        batches = scorer.split(task.groups, work.budget().max_tokens)[:2]
        groups = [task.groups[index] for indices in batches for index in indices]
        found = measure_training(Case(model, scorer, groups, len(groups), work, 1))
    say(peak_bytes=found["peak_bytes"], seconds=found["seconds"])


def cases(arguments: argparse.Namespace) -> Iterator[tuple[str, int, int]]:
    """All of them."""
    for shape in arguments.shapes:
        for length in arguments.lengths:
            for batch in arguments.batches:
                yield shape, length, batch


def main() -> None:
    """Print the table as it grows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--card")
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS)
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES)
    parser.add_argument("--step", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    prepare_environment()
    if arguments.step:
        step(*json.loads(arguments.step))
        return
    if arguments.card:
        from dpo_cli.dry_run.stub import load_stub

        load_stub()
    from dpo_cli.models.load import quiet_libraries

    quiet_libraries()
    print("| model | length | batch | predicted, GiB | found, GiB | off | s |\n|---|---|---|---|---|---|---|")
    worst = 0.0
    for shape, length, batch in cases(arguments):
        begun = time.perf_counter()
        if arguments.card:
            predicted, found = counted(shape, task_of(length, batch), arguments.card)
        else:
            predicted, found = measured(shape, length, batch)
        off = predicted / found - 1
        worst = max(worst, abs(off))
        cells = (
            f"{predicted / 2**30:.2f}",
            f"{found / 2**30:.2f}",
            f"{off:+.1%}",
            f"{time.perf_counter() - begun:.0f}",
        )
        print(f"| {shape} | {length} | {batch} | {' | '.join(cells)} |", flush=True)
    print(f"\nworst: {worst:.1%}", file=sys.stderr)


if __name__ == "__main__":
    main()
