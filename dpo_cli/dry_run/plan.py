"""Does a project's training fit into memory, and why: counted on a model without numbers, for this machine or a card.

What the weights take follows from the configuration, tensor by tensor. What activations take is counted on two short
rows, as a stage does it, and grows with the tokens of the largest micro-batch that the data can give.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from dpo_cli.core.params import RuntimeParams
from dpo_cli.core.training_params import LoraParams, TrainingParams
from dpo_cli.data.tokens import TokenGroup
from dpo_cli.dry_run.device import dry_cpu, dry_cuda, prepare_dry_machine
from dpo_cli.dry_run.model import dry_model, open_dry_scorer
from dpo_cli.models.device import Machine
from dpo_cli.scoring.layout import LayoutName, num_row_tokens, split_by_tokens
from dpo_cli.scoring.limits import Sizes, left_unquantized
from dpo_cli.scoring.recompute import GRADES, KeptBytes, MemoryPlan, Recompute, StepShape, largest_weight_bytes
from dpo_cli.training.fit import Shuffled
from dpo_cli.training.memory import kept_bytes, num_training_bytes, plan_step, step_shape

GIB = 2**30


@dataclass(frozen=True)
class Target:
    """Where it is to run.

    Attributes:
        name: In words.
        free_bytes: Memory that is free for the whole process.
        limit_bytes: What of it the process may hold: on a GPU less (runtime.max_gpu_gib).
        total_bytes: Memory that there is.
        capability: A GPU's compute capability; None: the CPU.
        is_prediction: Whether it is a card that is not here.
        process_bytes: What a process takes before it has loaded anything: on a GPU CUDA's context, on the CPU Python
            with its libraries.
    """

    name: str
    free_bytes: int
    limit_bytes: float
    total_bytes: int
    process_bytes: int
    capability: tuple[int, int] | None = None
    is_prediction: bool = False

    def pretended(self) -> AbstractContextManager[Any]:
        """Tensors without numbers are on this device within the block."""
        return dry_cpu() if self.capability is None else dry_cuda(self.capability, self.total_bytes)

    def machine(self, runtime: RuntimeParams) -> Machine:
        """Device and dtype; call within :meth:`pretended`."""
        if self.capability is not None:
            return prepare_dry_machine(runtime)
        given = None if runtime.compute_dtype == "auto" else getattr(torch, runtime.compute_dtype)
        return Machine(torch.device("cpu"), given or torch.float32)


@dataclass(frozen=True)
class Task:
    """A training to plan.

    Attributes:
        stage: Its stage.
        groups: What it is trained on.
        settings: Its section of params.yaml.
        lora: Shape of the adapter.
        quantization: How the weights are held.
        length: The setting that bounds the length of its rows.
        rank: The setting of the adapter's rank.
    """

    stage: str
    groups: Sequence[TokenGroup]
    settings: TrainingParams
    lora: LoraParams
    quantization: str
    length: str
    rank: str


@dataclass(frozen=True)
class Counted:
    """A model without numbers, counted.

    Attributes:
        weight_bytes: What its weights take, adapter and scales of 4-bit weights included.
        plain: Tensors that stay in plain numbers though products are made of them, and their bytes.
        training_bytes: Gradients and optimizer state of what is trained.
        adapter_bytes: Numbers of the adapter.
        sizes: As formulas of time need them.
        kept: What activations take.
        layout: How groups go through it.
    """

    weight_bytes: int
    plain: tuple[list[str], int]
    training_bytes: int
    adapter_bytes: int
    sizes: Sizes
    kept: KeptBytes
    layout: LayoutName


@dataclass(frozen=True)
class Plan:
    """What a training takes.

    Attributes:
        task: The training.
        target: Where.
        counted: The model.
        shape: What a step puts through it, as the stage bounds it.
        chosen: Tokens at once, and what is computed again.
        largest: Tokens of the largest micro-batch that the data gives then.
        most_of: Tokens that 99 of a hundred micro-batches have at most.
    """

    task: Task
    target: Target
    counted: Counted
    shape: StepShape
    chosen: MemoryPlan
    largest: int
    most_of: int

    @property
    def activation_bytes(self) -> float:
        """The most that activations take."""
        return self.counted.kept.of(self.chosen.grade, self.largest)

    @property
    def peak_bytes(self) -> float:
        """The most that the process takes at one time."""
        return self.peak_of(self.chosen.grade, self.largest)

    def peak_of(self, grade: Recompute, num_tokens: int) -> float:
        """The same for another way."""
        held = self.target.process_bytes + self.counted.weight_bytes + self.counted.training_bytes
        return held + self.counted.kept.of(grade, num_tokens)

    @property
    def fits(self) -> bool:
        """Whether it may take that."""
        return self.peak_bytes <= self.target.limit_bytes


def plan_training(
    config: Mapping[str, Any], task: Task, target: Target, runtime: RuntimeParams, layout: LayoutName = "shared"
) -> Plan:
    """What a training takes; a second or a few, whatever the model's size.

    Raises:
        MachineError: The model cannot do what runtime.recompute says.
    """
    with target.pretended():
        machine = target.machine(runtime)
        model = dry_model(config, machine, task.quantization, task.lora)
        weight_bytes = _held_bytes(model)
        scorer = open_dry_scorer(model, machine, layout)
        with scorer:
            kept = kept_bytes(model, scorer, task.groups)
            counted = Counted(
                weight_bytes=weight_bytes,
                plain=left_unquantized(model),
                training_bytes=num_training_bytes(model),
                adapter_bytes=4 * sum(each.numel() for each in model.parameters() if each.requires_grad),
                sizes=Sizes.of(model, machine.compute_dtype),
                kept=kept,
                layout=layout,
            )
            shape = step_shape(scorer, task.groups, task.settings.batch_size)
            held = target.process_bytes + counted.weight_bytes + counted.training_bytes
            chosen = plan_step(model, scorer, kept, shape, runtime, target.limit_bytes - held)
            weight, logits, a_row = largest_weight_bytes(model), scorer.head_bytes, scorer.config.vocab_size
    sizes, largest = micro_batches(task, layout, chosen.max_tokens)
    fixed = kept.fixed - max(logits, weight) + max(min(logits, largest * a_row * _BYTES_A_LOGIT), weight)
    most_of = int(np.quantile(sizes, 0.99, method="higher"))
    counted = replace(counted, kept=replace(kept, fixed=fixed))
    return Plan(task, target, counted, shape, chosen, largest, most_of)


_BYTES_A_LOGIT = 6
"""Where hidden states are narrow, beside float32 a narrow copy; they are worked on in place."""
_NUM_STEPS = 100
"""Steps whose micro-batches are looked at."""


def micro_batches(task: Task, layout: LayoutName, max_tokens: int) -> tuple[list[int], int]:
    """Tokens of the micro-batches of some steps, and of the largest one that there can be."""
    size = task.settings.batch_size
    source = Shuffled(range(len(task.groups)), size, task.settings.seed)
    num_steps = -(-len(task.groups) // size)
    steps = [source.batch(step) for step in range(0, num_steps, max(1, num_steps // _NUM_STEPS))]
    sizes = [each for step in steps for each in _split(task, step, layout, max_tokens)]
    longest = heapq.nlargest(size, range(len(task.groups)), key=lambda index: sum(task.groups[index].sizes))
    return sizes, max(*sizes, *_split(task, longest, layout, max_tokens))


def _split(task: Task, step: Sequence[int], layout: LayoutName, max_tokens: int) -> Iterator[int]:
    groups = [task.groups[index] for index in step]
    for indices in split_by_tokens(groups, max_tokens, layout):
        batch = [groups[index] for index in indices]
        if layout == "padded":
            longest = max(group.longest - 1 for group in batch)
            yield longest * sum(len(group.completions) for group in batch)
        else:
            yield sum(num_row_tokens(group, layout) for group in batch)


def _held_bytes(model: torch.nn.Module) -> int:
    """Bytes of a model's tensors; those that share their numbers count once."""
    found: dict[int, int] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        parts = [tensor]
        if (state := getattr(tensor, "quant_state", None)) is not None:
            parts += [state.absmax, *([state.state2.absmax] if state.nested else [])]
        for part in parts:
            storage = part.untyped_storage()
            found[storage._cdata] = storage.nbytes()
    return sum(found.values())


# --- the data's lengths ---------------------------------------------------------------------


@dataclass(frozen=True)
class Lengths:
    """Tokens of groups, as they go through the model.

    Attributes:
        median, most_of: Half of them, and 99 of a hundred, have at most so many.
        longest: The most.
        longest_id: Which group that is.
        num_outliers: Groups of more than twice ``most_of``.
        without: The most without those.
        bound: The max_length that leaves them out, tokens of a prompt with an answer.
    """

    median: float
    most_of: float
    longest: int
    longest_id: str
    num_outliers: int
    without: int
    bound: int


_OUTLYING = 2.0


def measure_lengths(groups: Sequence[TokenGroup], layout: LayoutName) -> Lengths:
    """How long groups are, and which are much longer than the others."""
    sizes = np.fromiter((num_row_tokens(group, layout) for group in groups), dtype=np.int64, count=len(groups))
    median, most_of = (float(each) for each in np.quantile(sizes, (0.5, 0.99), method="higher"))
    usual = np.sort(sizes)[: max(1, math.floor(0.99 * len(sizes)))][-1]  # with few groups the 99th is the longest
    outlying = sizes > _OUTLYING * usual
    longest = int(sizes.argmax())
    inside = [group.longest for group, is_out in zip(groups, outlying, strict=True) if not is_out]
    return Lengths(
        median,
        most_of,
        int(sizes[longest]),
        groups[longest].id,
        int(outlying.sum()),
        int(sizes[~outlying].max()),
        max(inside),
    )


# --- what makes it fit ----------------------------------------------------------------------


@dataclass(frozen=True)
class Change:
    """A change of settings, with what it costs and the peak after it; each holds with those before it."""

    setting: str
    cost: str
    peak_bytes: float
    fits: bool


_COSTS: Mapping[Recompute, str] = {
    "elementwise": "about a tenth more time",
    "layers": "about a third more time",
}
_SMALLEST_BUDGET = 256


def changes(plan: Plan, config: Mapping[str, Any], runtime: RuntimeParams) -> Iterator[Change]:
    """What lowers the peak, the cheapest first, up to the one that makes it fit."""
    target, layout = plan.target, plan.counted.layout

    def largest(max_tokens: int, task: Task = plan.task) -> int:
        return micro_batches(task, layout, max_tokens)[1]

    def change(setting: str, cost: str, peak: float) -> Change:
        return Change(setting, cost, peak, peak <= target.limit_bytes)

    grade, budget = plan.chosen.grade, plan.chosen.max_tokens
    smaller = max(_SMALLEST_BUDGET, plan.shape.longest_group)
    if smaller < plan.largest:
        tokens = next(
            (each for each in _halves(budget, smaller) if plan.peak_of(grade, largest(each)) <= target.limit_bytes),
            smaller,
        )
        found = change(
            f"runtime.max_tokens_per_microbatch={tokens}",
            "a little time: results do not change",
            plan.peak_of(grade, largest(tokens)),
        )
        yield found
        if found.fits:
            return
        budget = tokens
    for higher in GRADES[GRADES.index(grade) + 1 :]:
        found = change(f"runtime.recompute={higher}", _COSTS[higher], plan.peak_of(higher, largest(budget)))
        yield found
        grade = higher
        if found.fits:
            return
    kept = plan.counted.kept
    fitting = int((target.limit_bytes - plan.peak_of(grade, 0)) / kept.per_token[grade])
    too_long = [group.longest for group in plan.task.groups if num_row_tokens(group, layout) > fitting]
    if fitting > 0 and 0 < len(too_long) < len(plan.task.groups):
        bound = min(too_long) - 1
        left = [group for group in plan.task.groups if group.longest <= bound]
        lost = len(plan.task.groups) - len(left)
        if left:
            peak = plan.peak_of(grade, largest(budget, replace(plan.task, groups=left)))
            found = change(f"{plan.task.length}={bound}", f"{lost} of {len(plan.task.groups)} rows are left out", peak)
            yield found
            if found.fits:
                return
    if plan.task.quantization == "none":
        again = plan_training(config, replace(plan.task, quantization="nf4"), target, runtime, layout)
        name = "sft.method=qlora" if plan.task.stage == "sft" else "reference.quantization=nf4"
        found = change(name, "precision of the weights", again.peak_of(grade, largest(budget)))
        yield found
        if found.fits:
            return
        plan = again
    if plan.task.lora.r > 8:
        rank = plan.task.lora.r // 2
        saved = (plan.counted.training_bytes + plan.counted.adapter_bytes) / 2
        peak = plan.peak_of(grade, largest(budget)) - saved
        yield change(f"{plan.task.rank}={rank}", "half of what the adapter can learn", peak)
    yield Change("a smaller model", "what it knows", math.nan, fits=False)


def _halves(budget: int, smallest: int) -> Iterator[int]:
    while budget // 2 >= smallest:
        budget //= 2
        yield budget
