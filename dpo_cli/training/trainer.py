"""The training loop: transformers.Trainer, fed with token groups instead of padded tensors.

``batch_size`` groups make an optimizer step, and that alone decides the mathematics. Inside
the step the groups are split into micro-batches by a token budget, gradients are summed over
them and divided once by the weight of the whole batch, so a memory setting never changes a
result beyond rounding. Nothing is read back from the device before the last of them. Where memory
runs out, the budget is halved and the step done again, with the same groups and random state.

Where several processes train together, each takes its share of the batch in this way, and its
sums and gradients are added up over all of them once a step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments

from dpo_cli.core.artifacts import digest_bytes, digest_json
from dpo_cli.core.errors import MachineError, ParamsError, is_out_of_memory
from dpo_cli.core.gpu import is_gpu
from dpo_cli.core.interrupts import StopRequest
from dpo_cli.core.params import TrainingParams
from dpo_cli.data.tokenise import TokenGroup
from dpo_cli.models.device import Machine
from dpo_cli.models.lora import cast_adapters
from dpo_cli.scoring.budget import TokenBudget
from dpo_cli.scoring.scorer import Scores
from dpo_cli.training.callbacks import ProgressCallback
from dpo_cli.training.loss_scale import LossScale
from dpo_cli.training.objective import GroupScorer, Objective
from dpo_cli.training.replicas import ALONE, Replicas

_OPTIMIZERS = {"adamw": "adamw_torch", "rmsprop": "rmsprop", "paged_adamw_8bit": "paged_adamw_8bit"}
_SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


_LOSS, _INFINITE = "", "infinite"
_Means = tuple[float, dict[str, float]]
"""A loss, divided by the objective's weight, and metrics, by the number of groups."""


@dataclass(frozen=True)
class RandomState:
    """Where the random streams of CPU and GPU are."""

    cpu: torch.Tensor
    cuda: torch.Tensor | None

    @classmethod
    def of(cls, device: torch.device) -> RandomState:
        """As they are now."""
        return cls(torch.get_rng_state(), torch.cuda.get_rng_state() if is_gpu(device) else None)

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


def diverged(section: str, what: str, value: float, step: int, learning_rate: float) -> ParamsError:
    """The error for a loss that is no number any more."""
    return ParamsError(
        f"params.yaml: {section}.learning_rate is too high: the {what} became {value} at step {step};"
        f" lower it, now {learning_rate:g}"
    )


def _count_infinite(parameters: Sequence[torch.nn.Parameter]) -> torch.Tensor:
    """How many parameters have a gradient that is no finite number, float64 [1], on their device."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return torch.zeros(1, dtype=torch.float64, device=parameters[0].device)
    norms = torch.stack(torch._foreach_norm(gradients))  # type: ignore[attr-defined]
    return (~norms.isfinite()).sum(dtype=torch.float64)[None]


class GroupTrainer(Trainer):
    """Trains on token groups with any objective.

    Args:
        model: The model, its trainable parameters marked.
        scorer: Scores groups with that model.
        objective: What is minimized.
        train_groups: Training data.
        held_out: Groups for the held-out loss.
        budget: Tokens of a micro-batch.
        loss_scale: Of the backward pass.
        arguments: From :func:`training_arguments`.
        callbacks: Further callbacks.
        section: Name of the stage, for messages.
        replicas: The processes that share each batch.
        stop: Whether this process was asked to stop.
        agreed_stop: Gets to know, at the same step in all processes, that one of them was asked to stop.
    """

    def __init__(
        self,
        model: Any,
        scorer: GroupScorer[Any],
        objective: Objective[Any],
        train_groups: Sequence[TokenGroup],
        held_out: Sequence[TokenGroup],
        budget: TokenBudget,
        loss_scale: LossScale,
        arguments: TrainingArguments,
        callbacks: list[TrainerCallback],
        section: str,
        *,
        replicas: Replicas = ALONE,
        stop: StopRequest | None = None,
        agreed_stop: StopRequest | None = None,
    ) -> None:
        self._replicas = replicas
        self._stop = stop or StopRequest()
        self._agreed_stop = agreed_stop or StopRequest()
        self._scorer = scorer
        self._objective = objective
        self._budget = budget
        self._loss_scale = loss_scale
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
        if self._replicas.size > 1:  # dropout: each process's own numbers, in a run that went on the same ones
            numbers = digest_json([self.args.seed, self.state.global_step, self._replicas.rank])
            torch.manual_seed(int(numbers[:15], 16))
        weight = self._objective.weight(groups)

        def backward(loss: torch.Tensor) -> None:
            self.accelerator.backward(loss / (weight / self._loss_scale.value))

        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        random_state = RandomState.of(self._scorer.device)
        while True:
            sums_S = self._within_memory(groups, backward)
            total, metrics = self._means(groups, torch.cat([sums_S, _count_infinite(trained)]), trained)
            num_infinite = metrics.pop(_INFINITE)
            if not (num_infinite and math.isfinite(total) and self._loss_scale.halve()):
                break
            model.zero_grad(set_to_none=True)
            random_state.restore()
        self._loss_scale.unscale(trained)
        step = self.state.global_step + 1
        if not math.isfinite(total):
            raise diverged(self._section, "loss", total, step, self.args.learning_rate)
        if num_infinite:
            raise diverged(self._section, "gradient", math.inf, step, self.args.learning_rate)
        self._step_metrics = metrics
        return torch.tensor(total, device=self.args.device)

    @torch.no_grad()
    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Held-out loss and metrics, weighted by example whatever the micro-batches."""
        self.model.eval()  # type: ignore[union-attr]
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, ProgressCallback):
                callback.on_measure()
        groups: list[TokenGroup] = self.eval_dataset  # type: ignore[assignment]
        total, means = self._means(groups, self._within_memory(groups))
        metrics = {"eval_loss": total} | {f"eval_{name}": value for name, value in means.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _within_memory(
        self, groups: list[TokenGroup], each: Callable[[torch.Tensor], None] | None = None
    ) -> torch.Tensor:
        """Add up this process's share in micro-batches; where they do not fit, all of it again in smaller ones."""
        with cast_adapters(self.model, self._scorer.compute_dtype):  # type: ignore[arg-type]
            return self._with_halving(groups, each)

    def _with_halving(self, groups: list[TokenGroup], each: Callable[[torch.Tensor], None] | None) -> torch.Tensor:
        share = self._replicas.share(groups)
        random_state = RandomState.of(self._scorer.device)
        while True:
            batches = self._scorer.split(share, self._budget.max_tokens) if share else []
            try:
                if self._objective.is_coupled:
                    return self._add_up_together(share, batches, each)
                return self._add_up(share, batches, each, groups)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            # out of the except block: the error's traceback holds on to what filled the memory
            self.model.zero_grad(set_to_none=True)  # type: ignore[union-attr]
            random_state.restore()
            self._budget.halve(batches)

    def _add_up(
        self,
        groups: list[TokenGroup],
        batches: list[list[int]],
        each: Callable[[torch.Tensor], None] | None,
        step: Sequence[TokenGroup],
    ) -> torch.Tensor:
        """Loss and metrics summed over micro-batches, float64 [S]; ``each`` gets the summed loss of every one.

        ``groups`` are this process's share of those of the ``step``.
        """
        names = (_LOSS, *self._objective.metric_names)
        sums: dict[str, torch.Tensor] = {}
        for indices in batches:
            batch = [groups[index] for index in indices]
            result = self._objective.losses(
                batch, self._scorer.score(batch, statistics=self._objective.statistics), step
            )
            loss = result.losses_B.sum()
            if each is not None:
                each(loss)
            for name, values in {_LOSS: loss.detach(), **result.metrics}.items():
                sums[name] = sums.get(name, 0.0) + values.sum()
        if not batches:
            return torch.zeros(len(names), dtype=torch.float64, device=self._scorer.device)
        return torch.stack([sums[name] for name in names])

    def _add_up_together(
        self, groups: list[TokenGroup], batches: list[list[int]], each: Callable[[torch.Tensor], None] | None
    ) -> torch.Tensor:
        """The same where a loss is of all groups of the step together.

        The log-probabilities are taken twice: without gradients to see what each of them weighs, then with. So the
        memory is that of a micro-batch.
        """
        states: list[RandomState] = []
        found: list[Scores] = []
        with torch.no_grad():
            for indices in batches:
                states.append(RandomState.of(self._scorer.device))
                found.append(
                    self._scorer.score([groups[index] for index in indices], statistics=self._objective.statistics)
                )
        scores = Scores.join(found)
        in_order = [groups[index] for indices in batches for index in indices]
        with torch.enable_grad():
            read = (scores.logps_BK.requires_grad_(), scores.token_logps_M.requires_grad_())
            result = self._objective.losses(in_order, scores, in_order)
            loss = result.losses_B.sum()
        if each is not None:
            sums_BK, tokens_M = torch.autograd.grad(loss, read, allow_unused=True, materialize_grads=True)
            of_sums = sums_BK.split([*map(len, batches)])
            of_tokens = tokens_M.split([len(one.token_logps_M) for one in found])
            for indices, state, of_sum, of_token in zip(batches, states, of_sums, of_tokens, strict=True):
                state.restore()
                again = self._scorer.score([groups[index] for index in indices])
                each((again.logps_BK * of_sum).sum() + (again.token_logps_M * of_token).sum())
        metrics = {_LOSS: loss.detach(), **result.metrics}
        return torch.stack([metrics[name].sum() for name in (_LOSS, *self._objective.metric_names)])

    def _means(
        self, groups: list[TokenGroup], sums_S: torch.Tensor, parameters: Sequence[torch.nn.Parameter] = ()
    ) -> _Means:
        """Mean loss and metrics of a batch from each process's sums; the gradients are summed with them."""
        values = self._exchange(groups, sums_S, parameters)
        names = [_LOSS, *self._objective.metric_names, *([_INFINITE] if parameters else [])]
        means = {name: value / len(groups) for name, value in zip(names, values, strict=True)}
        return means.pop(_LOSS) * len(groups) / self._objective.weight(groups), means

    def _exchange(
        self, groups: list[TokenGroup], sums_S: torch.Tensor, parameters: Sequence[torch.nn.Parameter]
    ) -> list[float]:
        """The sums [S] over all processes; the one time in a step that they, and the device, are waited for.

        Beside them goes whether anyone was asked to stop, and that all of them hold the same batch.
        """
        if self._replicas.size == 1:
            return sums_S.tolist()
        mark = int(digest_bytes(*(group.id.encode() for group in groups))[:4], 16)  # float32 sums 16 bits exactly
        beside = torch.tensor([self._stop.requested, mark], dtype=sums_S.dtype, device=sums_S.device)
        *values, asked, marks = self._replicas.add_up(torch.cat([sums_S, beside]), parameters)
        if marks != mark * self._replicas.size:
            raise MachineError(f"{self._section}: the processes do not hold the same batch; this is a bug")
        self._agreed_stop.requested = self._agreed_stop.requested or asked > 0
        return values

    def _clip_grad_norm(self, model: Any) -> torch.Tensor | None:
        """Clip gradients by their norm as the first process has it, and give the norm before that.

        On GPUs of different kinds the norm of the same gradients may differ in its last digit, and parameters then,
        too, from step to step more.
        """
        if self._replicas.size == 1:
            return super()._clip_grad_norm(model)
        trained = [parameter for parameter in model.parameters() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in trained])
        self._replicas.take_from_first(norm)
        torch.nn.utils.clip_grads_with_norm_(trained, self.args.max_grad_norm, norm)
        return norm

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
