"""A training on fixed data as a stage's settings describe it: memory is planned, the loop runs, and what came of it."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, TypeVar

import torch
from transformers import get_scheduler

from dpo_cli.core.environment import is_gpu
from dpo_cli.core.errors import MachineError, ParamsError
from dpo_cli.core.training_params import DescentParams, TrainingParams
from dpo_cli.data.tokenize import TokenTable
from dpo_cli.data.tokens import TokenGroup
from dpo_cli.models.device import Machine, memory_metrics
from dpo_cli.scoring.budget import TokenBudget
from dpo_cli.scoring.probe import LayoutChoice
from dpo_cli.scoring.recompute import Recompute
from dpo_cli.training.accumulation import Limits, LossScale
from dpo_cli.training.loop import Course, Data, Descent, Loop, diverged
from dpo_cli.training.memory import choose_memory
from dpo_cli.training.parallel import Job
from dpo_cli.training.protocols import BatchSource, Learner

Item = TypeVar("Item")
Scored = TypeVar("Scored")

_BUDGET = "token_budget.json"
_LOSS_SCALE = "loss_scale.json"


@dataclass(frozen=True)
class Fit:
    """A finished training.

    Attributes:
        num_steps: Optimizer steps that were taken, in all runs together.
        num_planned: Optimizer steps that there would have been without an early stop.
        kept_step: The step whose weights the model has now; 0 is before the first.
        history: The log, one entry a logged event.
        groups_per_s: Groups trained a second of this run's steps, by all processes, held-out passes included.
        recompute: What the backward pass computed again.
        max_tokens: Tokens of a micro-batch, as it was at the end.
    """

    num_steps: int
    num_planned: int
    kept_step: int
    history: list[dict[str, Any]]
    groups_per_s: float
    recompute: Recompute
    max_tokens: int

    def metrics(
        self, unit: str, tables: Sequence[TokenTable], machine: Machine, layout: LayoutChoice
    ) -> dict[str, Any]:
        """What every training reports.

        Args:
            unit: What is trained on: rows, pairs or groups.
            tables: What was trained on, and what was held out.
            machine: Where.
            layout: How it went through the model.
        """
        train, held_out = tables
        tokens = fmean(group.num_logical_tokens for group in train.groups)
        return {
            f"num_{unit}": len(train.groups),
            "num_eval": len(held_out.groups),
            "num_rejected": len(train.rejects) + len(held_out.rejects),
            "num_steps": self.num_steps,
            "kept_step": self.kept_step,
            "loss": self.last("loss"),
            "eval_loss_start": self.first("eval_loss"),
            "eval_loss": self.kept("eval_loss"),
            f"{unit}_per_s": self.groups_per_s,
            "logical_tokens_per_s": self.groups_per_s * tokens,
            **memory_metrics(machine),
            "recompute": self.recompute,
            "max_tokens_per_microbatch": self.max_tokens,
            **layout.metrics(),
        }

    def last(self, name: str) -> float:
        """The last logged value of a metric."""
        return next(entry[name] for entry in reversed(self.history) if name in entry)

    def first(self, name: str) -> float:
        """The first logged value of a metric."""
        return next(entry[name] for entry in self.history if name in entry)

    def kept(self, name: str) -> float:
        """The value of a held-out metric at the step that is kept."""
        return next(
            entry[name] for entry in reversed(self.history) if name in entry and entry["step"] == self.kept_step
        )

    @property
    def steps_in_words(self) -> str:
        """How many steps there were, and whose weights are kept."""
        words = str(self.num_steps)
        if self.num_steps < self.num_planned:
            words += f" of {self.num_planned} (patience ended)"
        return words if self.kept_step == self.num_steps else f"{words}; kept: step {self.kept_step}"


class Shuffled(BatchSource[Item]):
    """Fixed data in epochs, each in an order of its own; the last batch of an epoch may be a short one.

    Args:
        items: All there is.
        batch_size: Items of a step.
        seed: The order of epoch ``e`` is the permutation that torch draws with ``seed + e``.
    """

    def __init__(self, items: Sequence[Item], batch_size: int, seed: int) -> None:
        self._items = items
        self._batch_size = batch_size
        self._seed = seed
        self._epoch = -1
        self._order: list[int] = []

    def batch(self, step: int) -> Sequence[Item]:
        """The items of a step."""
        epoch, place = divmod(step, -(-len(self._items) // self._batch_size))
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self._seed + epoch)
            self._epoch, self._order = epoch, torch.randperm(len(self._items), generator=generator).tolist()
        start = place * self._batch_size
        return [self._items[index] for index in self._order[start : start + self._batch_size]]


def count_steps(params: TrainingParams, num_groups: int) -> int:
    """Optimizer steps that so many groups take."""
    return params.max_steps or math.ceil(params.epochs * math.ceil(num_groups / params.batch_size))


def fit(
    learner: Learner[Scored],
    train: Sequence[TokenGroup],
    held_out: Sequence[TokenGroup],
    params: TrainingParams,
    job: Job,
) -> Fit:
    """Train the marked parameters of a model in place, from the last checkpoint in the job's folder if there is one.

    Args:
        learner: The model, what scores groups with it, and what is minimized.
        train: Training data.
        held_out: Groups for the held-out loss, taken before the first step and along the way.
        params: Settings of the training.
        job: Where it works.

    Raises:
        Interrupted: The user asked to stop, any of the processes; a checkpoint is in the job's folder.
        MachineError: Another process is gone, or has other parameters.
        ParamsError: The loss is no number any more, or keep best has nothing to choose from.
    """
    work, replicas = job.work, job.replicas
    section, reporter, device = work.command, work.reporter, work.machine.device
    num_steps = count_steps(params, len(train))
    keeps_best = params.keep == "best"
    if keeps_best and params.eval_steps >= num_steps:
        raise ParamsError(
            f"params.yaml: {section}.keep best has nothing to choose from: of {num_steps} steps none but the last"
            f" is measured with {section}.eval_steps {params.eval_steps}; set that below {num_steps}"
        )
    descent = make_descent(learner.model, params, num_steps, device, section)
    groups_a_step = math.ceil(params.batch_size / replicas.size)
    chosen = choose_memory(learner.model, learner.scorer, train, groups_a_step, work)
    memory = job.folder / (_BUDGET if replicas.is_first else f"{replicas.rank}_{_BUDGET}")
    budget = TokenBudget(chosen.max_tokens, section, reporter, memory)
    loss_scale = LossScale(work, job.folder / _LOSS_SCALE)
    loss_scale.value = replicas.from_first(loss_scale.value)
    if is_gpu(device):
        _warm_up(learner, train)
    data = Data(Shuffled(train, params.batch_size, params.seed), held_out)
    course = Course(num_steps, params.seed, params.eval_steps, keeps_best, params.patience)
    loop = Loop(learner, data, descent, course, Limits(budget, loss_scale), job)
    loop.run()
    fitted = Fit(
        loop.step,
        num_steps,
        loop.kept_step,
        loop.history,
        groups_per_s=loop.num_groups / max(loop.elapsed_s, 1e-9),
        recompute=chosen.grade,
        max_tokens=budget.max_tokens,
    )
    if not math.isfinite(fitted.kept("eval_loss")):
        raise diverged(section, "held-out loss", fitted.kept("eval_loss"), loop.kept_step, params.learning_rate)
    if keeps_best and loop.kept_step == 0:
        reporter.warn(
            f"{section}: no step brought the held-out loss below that of the start, so the start is kept; lower"
            f" {section}.learning_rate, now {params.learning_rate:g}"
        )
    return fitted


def _warm_up(learner: Learner[Scored], groups: Sequence[TokenGroup]) -> None:
    """Score two short groups, forward and backward, and forget it.

    CUDA loads a kernel when it is first used, and libraries make their handles: that takes memory which is not
    PyTorch's, and where it is lacking then, bitsandbytes ends the process.
    """
    model, scorer, objective = learner.model, learner.scorer, learner.objective
    model.train()
    short = sorted(groups, key=lambda group: (group.longest, group.id))[:2]
    objective.losses(short, scorer.score(short, statistics=objective.statistics), short).losses_B.sum().backward()
    model.zero_grad(set_to_none=True)


# --- optimizer and schedule ------------------------------------------------------------------

_SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}
_NOT_DECAYED = re.compile(r"bias|layernorm|rmsnorm|(?:^|[._])norm(?:$|\.)")
_ADAM: dict[str, Any] = {"betas": (0.9, 0.999), "eps": 1e-8}


def make_descent(
    model: torch.nn.Module, params: DescentParams, num_steps: int, device: torch.device, section: str
) -> Descent:
    """The optimizer that the settings name, over all trainable parameters, and its schedule.

    Args:
        model: Holds the parameters.
        params: Settings of the training.
        num_steps: Optimizer steps in all.
        device: Where the model is.
        section: Name of the stage, for messages.

    Raises:
        MachineError: The optimizer needs CUDA and there is none.
    """
    if params.optimizer == "paged_adamw_8bit" and device.type == "cpu":
        raise MachineError(f"{section}.optimizer paged_adamw_8bit needs CUDA; set it to adamw")
    optimizer = _optimizer(model, params)
    num_warmup = num_warmup_steps(params, num_steps)
    schedule = get_scheduler(_SCHEDULES[params.schedule], optimizer, num_warmup, num_steps)
    return Descent(optimizer, schedule, params.max_grad_norm)


def num_warmup_steps(params: DescentParams, num_steps: int) -> int:
    """Steps, of so many in all, with a rising learning rate."""
    return round(params.warmup_ratio * num_steps)


def _optimizer(model: torch.nn.Module, params: DescentParams) -> torch.optim.Optimizer:
    layer_norms = {id(own) for module in model.modules() if isinstance(module, torch.nn.LayerNorm)
                   for own in module.parameters()}  # fmt: skip
    groups: list[dict[str, Any]] = [{"params": [], "weight_decay": decay} for decay in (params.weight_decay, 0.0)]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_plain = id(parameter) in layer_norms or _NOT_DECAYED.search(name.lower()) is not None
            groups[is_plain]["params"].append(parameter)
    if params.optimizer == "rmsprop":
        return torch.optim.RMSprop(groups, lr=params.learning_rate)
    if params.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=params.learning_rate, **_ADAM)
    from bitsandbytes.optim.adamw import AdamW  # it looks for CUDA, which takes a second
    from bitsandbytes.optim.optimizer import GlobalOptimManager

    manager = GlobalOptimManager.get_instance()
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):  # whose gradients are too uneven for 8 bits
            manager.register_module_override(module, "weight", {"optim_bits": 32})
    return AdamW(groups, lr=params.learning_rate, **_ADAM, optim_bits=8, is_paged=True)
