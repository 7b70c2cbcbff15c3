"""The training loop: transformers.Trainer, fed with token groups instead of padded tensors.

``batch_size`` groups make an optimizer step, and that alone decides the mathematics. Inside
the step the groups are split into micro-batches by a token budget, gradients are summed over
them and divided once by the weight of the whole batch, so a memory setting never changes a
result beyond rounding. Nothing is read back from the device before the last of them. Where memory
runs out, the budget is halved and the step done again, with the same groups and random state.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments

from dpo_cli.core.errors import MachineError, ParamsError
from dpo_cli.core.params import TrainingParams
from dpo_cli.data.tokenise import TokenGroup
from dpo_cli.models.device import Machine
from dpo_cli.scoring.budget import TokenBudget, is_out_of_memory
from dpo_cli.scoring.scorer import Scores
from dpo_cli.training.objective import GroupScorer, Objective

_OPTIMIZERS = {"adamw": "adamw_torch", "rmsprop": "rmsprop", "paged_adamw_8bit": "paged_adamw_8bit"}
_SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


_LOSS = ""
_Means = tuple[float, dict[str, float]]
"""A loss, divided by the objective's weight, and metrics, by the number of groups."""


@dataclass(frozen=True)
class _RandomState:
    """Where the random streams of CPU and GPU are."""

    cpu: torch.Tensor
    cuda: torch.Tensor | None

    @classmethod
    def of(cls, device: torch.device) -> _RandomState:
        """As they are now."""
        return cls(torch.get_rng_state(), torch.cuda.get_rng_state() if device.type == "cuda" else None)

    def restore(self) -> None:
        """Go back to there."""
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda)


@dataclass(frozen=True)
class Plan:
    """How long a training is.

    Attributes:
        num_steps: Optimizer steps in all.
        num_warmup_steps: Of them with a rising learning rate.
    """

    num_steps: int
    num_warmup_steps: int

    @classmethod
    def of(cls, params: TrainingParams, num_groups: int) -> Plan:
        """The plan for so many groups."""
        steps = params.max_steps or math.ceil(params.epochs * math.ceil(num_groups / params.batch_size))
        return cls(steps, round(params.warmup_ratio * steps))


def training_arguments(
    params: TrainingParams, plan: Plan, machine: Machine, folder: Path, section: str, *, evaluate_at_start: bool
) -> TrainingArguments:
    """Our knobs as transformers' arguments.

    Raises:
        MachineError: The optimizer needs CUDA and there is none.
    """
    on_cpu = machine.device.type == "cpu"
    if params.optimizer == "paged_adamw_8bit" and on_cpu:
        raise MachineError(f"{section}.optimizer paged_adamw_8bit needs CUDA; set it to adamw")
    arguments = TrainingArguments(
        output_dir=str(folder),
        use_cpu=on_cpu,
        per_device_train_batch_size=params.batch_size,
        max_steps=plan.num_steps,
        learning_rate=params.learning_rate,
        lr_scheduler_type=_SCHEDULES[params.schedule],
        warmup_steps=plan.num_warmup_steps,
        optim=_OPTIMIZERS[params.optimizer],
        weight_decay=params.weight_decay,
        max_grad_norm=params.max_grad_norm,
        seed=params.seed,
        data_seed=params.seed,
        eval_strategy="steps",
        eval_steps=params.eval_steps or plan.num_steps,
        eval_on_start=evaluate_at_start,
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        save_total_limit=2,
        report_to="none",
        disable_tqdm=True,
        log_level="error",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        dataloader_num_workers=0,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # one process drives one device; no DataParallel
    return arguments


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint in a folder; its state file is written last."""
    found = {int(path.name.rpartition("-")[2]): path for path in folder.glob("checkpoint-*")}
    for step in sorted(found, reverse=True):
        try:
            json.loads((found[step] / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        return found[step]
    return None


def diverged(section: str, what: str, value: float, step: int, learning_rate: float) -> ParamsError:
    """The error for a loss that is no number any more."""
    return ParamsError(
        f"params.yaml: {section}.learning_rate is too high: the {what} became {value} at step {step};"
        f" lower it, now {learning_rate:g}"
    )


class GroupTrainer(Trainer):
    """Trains on token groups with any objective.

    Args:
        model: The model, its trainable parameters marked.
        scorer: Scores groups with that model.
        objective: What is minimised.
        train_groups: Training data.
        held_out: Groups for the held-out loss.
        budget: Tokens of a micro-batch.
        arguments: From :func:`training_arguments`.
        callbacks: Further callbacks.
        section: Name of the stage, for messages.
    """

    def __init__(
        self,
        model: Any,
        scorer: GroupScorer[Any],
        objective: Objective[Any],
        train_groups: Sequence[TokenGroup],
        held_out: Sequence[TokenGroup],
        budget: TokenBudget,
        arguments: TrainingArguments,
        callbacks: list[TrainerCallback],
        section: str,
    ) -> None:
        self._scorer = scorer
        self._objective = objective
        self._budget = budget
        self._step_metrics: dict[str, float] = {}
        self._section = section
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=list(train_groups),  # type: ignore[arg-type]
            eval_dataset=list(held_out),  # type: ignore[arg-type]
            data_collator=lambda groups: {"groups": groups},
            callbacks=callbacks,
        )
        self.remove_callback(PrinterCallback)

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Accumulate the gradient of one optimizer batch; returns its loss, detached float32 scalar."""
        model.train()
        groups: list[TokenGroup] = inputs["groups"]
        total, metrics = self._within_memory(groups, self._accumulate)
        if not math.isfinite(total):
            raise diverged(self._section, "loss", total, self.state.global_step + 1, self.args.learning_rate)
        self._step_metrics = metrics
        return torch.tensor(total, device=self.args.device)

    @torch.no_grad()
    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Held-out loss and metrics, weighted by example whatever the micro-batches."""
        self.model.eval()  # type: ignore[union-attr]
        groups: list[TokenGroup] = self.eval_dataset  # type: ignore[assignment]
        total, means = self._within_memory(
            groups, self._add_up_together if self._objective.is_coupled else self._add_up
        )
        metrics = {"eval_loss": total} | {f"eval_{name}": value for name, value in means.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _within_memory(
        self, groups: list[TokenGroup], work: Callable[[list[TokenGroup], list[list[int]]], _Means]
    ) -> _Means:
        """Do some work in micro-batches; where they do not fit into memory, all of it again in smaller ones."""
        random_state = _RandomState.of(self._scorer.device)
        while True:
            batches = self._scorer.split(groups, self._budget.max_tokens)
            try:
                return work(groups, batches)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            # out of the except block: the error's traceback holds on to what filled the memory
            self.model.zero_grad(set_to_none=True)  # type: ignore[union-attr]
            random_state.restore()
            self._budget.halve(batches)

    def _accumulate(self, groups: list[TokenGroup], batches: list[list[int]]) -> _Means:
        """Gradients of the mean loss, summed over micro-batches; the mean loss and metrics."""
        weight = self._objective.weight(groups)

        def backward(loss: torch.Tensor) -> None:
            self.accelerator.backward(loss / weight)

        if self._objective.is_coupled and len(batches) > 1:
            return self._accumulate_coupled(groups, batches, backward)
        return self._add_up(groups, batches, backward)

    def _accumulate_coupled(
        self, groups: list[TokenGroup], batches: list[list[int]], backward: Callable[[torch.Tensor], None]
    ) -> _Means:
        """The same for a loss of all groups together: what each log-probability weighs, then its gradient.

        The log-probabilities are taken twice, without and with gradients, so that memory is that of a micro-batch.
        """
        states, scores = [], []
        with torch.no_grad():
            for indices in batches:
                states.append(_RandomState.of(self._scorer.device))
                scores.append(self._scorer.score([groups[index] for index in indices]))
        order = [index for indices in batches for index in indices]
        whole = Scores.join(scores)
        leaf = whole.logps_BK.requires_grad_()
        result = self._objective.losses([groups[index] for index in order], whole, groups)
        (weights_BK,) = torch.autograd.grad(result.losses_B.sum(), leaf)
        begin = 0
        for indices, state in zip(batches, states, strict=True):
            state.restore()
            again = self._scorer.score([groups[index] for index in indices])
            backward((again.logps_BK * weights_BK[begin : begin + len(indices)]).sum())
            begin += len(indices)
        sums = {_LOSS: result.losses_B.detach().sum(), **{name: value.sum() for name, value in result.metrics.items()}}
        return self._means(sums, groups)

    def _add_up(
        self, groups: list[TokenGroup], batches: list[list[int]], each: Callable[[torch.Tensor], None] | None = None
    ) -> _Means:
        """The mean loss and metrics over micro-batches; ``each`` gets the summed loss of every one."""
        sums: dict[str, torch.Tensor] = {}
        for indices in batches:
            batch = [groups[index] for index in indices]
            result = self._objective.losses(batch, self._scorer.score(batch), groups)
            loss = result.losses_B.sum()
            if each is not None:
                each(loss)
            for name, values in {_LOSS: loss.detach(), **result.metrics}.items():
                sums[name] = sums.get(name, 0.0) + values.sum()
        return self._means(sums, groups)

    def _add_up_together(self, groups: list[TokenGroup], batches: list[list[int]]) -> _Means:
        """The same of a loss of all groups together, without gradients."""
        scores = [self._scorer.score([groups[index] for index in indices]) for indices in batches]
        order = [groups[index] for indices in batches for index in indices]
        result = self._objective.losses(order, Scores.join(scores), groups)
        sums = {_LOSS: result.losses_B.sum(), **{name: value.sum() for name, value in result.metrics.items()}}
        return self._means(sums, groups)

    def _means(self, sums: dict[str, torch.Tensor], groups: Sequence[TokenGroup]) -> _Means:
        names = list(sums)
        values = torch.stack([sums[name] for name in names]).tolist()  # the one time that the device is waited for
        means = {name: value / len(groups) for name, value in zip(names, values, strict=True)}
        return means.pop(_LOSS) * len(groups) / self._objective.weight(groups), means

    def load_finished(self, checkpoint: Path) -> None:
        """Take weights and log from the checkpoint of the last step, without training on."""
        self._load_from_checkpoint(str(checkpoint))
        self.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log a step with the objective's metrics beside the loss."""
        if "loss" in logs:
            logs = {**logs, **self._step_metrics}
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted here: Trainer's estimate is for padded tensors."""
        return 0

    def _wrap_model(self, model: Any, training: bool = True, dataloader: Any = None) -> Any:
        """The model as it is: the scorer calls its parts, so no wrapper may stand around it."""
        return model
