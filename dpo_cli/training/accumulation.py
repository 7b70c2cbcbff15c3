"""Loss and gradient of an optimizer batch, in micro-batches.

The batch alone decides the mathematics. Its groups are split by a token budget, gradients are summed over the pieces
and divided once by the weight of the whole batch, so a memory setting never changes a result beyond rounding. Nothing
is read back from the device before the last of them. Where memory runs out, the budget is halved and all of it done
again, with the same groups and random numbers.

Where several processes train together, each takes its share of the batch in this way, and its sums and gradients are
added up over all of them once a step.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from dpo_cli.core.artifacts import digest_bytes, write_json
from dpo_cli.core.errors import MachineError, is_out_of_memory
from dpo_cli.core.interrupts import StopRequest
from dpo_cli.models.lora import cast_adapters
from dpo_cli.models.project import Workplace
from dpo_cli.scoring.budget import TokenBudget
from dpo_cli.scoring.scorer import Scores
from dpo_cli.training.parallel import ALONE, Replicas
from dpo_cli.training.protocols import Learner

Scored = TypeVar("Scored")
_Backward = Callable[[torch.Tensor], None]
_LOSS = ""
_LOSS_SCALE_AT_START = 2.0**13


class LossScale:
    """The factor that keeps small gradients in float16, which has no number between 0 and 6e-8.

    The loss is multiplied by it before the backward pass, and the gradients of the parameters, float32, are divided by
    it after that. It is a power of two, so nothing is rounded. Where gradients overflow instead it is halved, and the
    step done again. Where products are not computed in float16 it is 1, and never another.

    Source: Micikevicius et al. 2018, Mixed Precision Training, section 3.2.

    Args:
        work: What products are computed in, and who hears when it is halved.
        memory: File that keeps a halved one for the next run of the same work; None: it is not kept.

    Attributes:
        value: The factor, a power of two.
    """

    def __init__(self, work: Workplace, memory: Path | None = None) -> None:
        self._work, self._memory = work, memory
        self.value = 1.0
        if work.machine.compute_dtype == torch.float16:
            self.value = _recall(memory) or _LOSS_SCALE_AT_START

    def unscale(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Divide the parameters' gradients by it, in place."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if self.value != 1 and gradients:
            torch._foreach_div_(gradients, self.value)  # type: ignore[attr-defined]

    def halve(self) -> bool:
        """Take half of it, after gradients overflowed; False where there is nothing to halve."""
        if self.value <= 1:
            return False
        self.value /= 2
        self._work.reporter.say(
            f"{self._work.command}: gradients overflowed float16; repeating the step with loss scale {self.value:.0f}"
        )
        if self._memory is not None:
            write_json(self._memory, {"loss_scale": self.value})
        return True


def _recall(memory: Path | None) -> float | None:
    try:
        return float(json.loads(memory.read_text(encoding="utf-8"))["loss_scale"]) if memory else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


@dataclass(frozen=True)
class Limits:
    """What gives way where a step does not fit: tokens at once into the memory, gradients into float16."""

    budget: TokenBudget
    loss_scale: LossScale

    @classmethod
    def of(cls, work: Workplace, max_tokens: int) -> Limits:
        """Those of a work that no later run goes on with."""
        return cls(TokenBudget(max_tokens, work.command, work.reporter), LossScale(work))


@dataclass(frozen=True)
class Means:
    """What came of a batch.

    Attributes:
        loss: Divided by the objective's weight.
        metrics: Divided by the number of groups.
        num_infinite: Processes whose gradient is no finite number.
    """

    loss: float
    metrics: dict[str, float]
    num_infinite: float = 0.0


class Accumulator(Generic[Scored]):
    """Adds up loss, metrics and gradients of a batch.

    Args:
        learner: The model, with what scores it and what is minimized.
        limits: How much goes through at once.
        stop: Whether this process was asked to stop.
        replicas: The processes that share each batch.

    Attributes:
        anyone_asked_to_stop: Whether one of several processes was, as of the last exchange: the same in all.
    """

    def __init__(self, learner: Learner[Scored], limits: Limits, stop: StopRequest, replicas: Replicas = ALONE) -> None:
        self._model: Any = learner.model
        self._scorer = learner.scorer
        self._objective = learner.objective
        self._trained = [*learner.trained.values()]
        self._budget, self._loss_scale = limits.budget, limits.loss_scale
        self._stop, self._replicas = stop, replicas
        self.anyone_asked_to_stop = False

    def gradient(self, groups: Sequence[Any], seed: int) -> tuple[Means, torch.Tensor]:
        """Add the gradient of a batch's mean loss to the parameters'; ``seed`` is that of dropout.

        Returns:
            What came of the batch, and the L2 norm of the gradient as the first process has it. On GPUs of different
            kinds the norm of the same gradient may differ in its last digit; clipped by their own, parameters would
            differ, too, from step to step more.
        """
        weight = self._objective.weight(groups)

        def backward(loss: torch.Tensor) -> None:
            (loss / (weight / self._loss_scale.value)).backward()

        while True:
            sums_S, norm = self._sums(groups, seed, backward), self._norm()
            is_infinite = (~norm.isfinite()).to(sums_S)[None]
            means = self._means(groups, self._exchange(groups, torch.cat([sums_S, is_infinite]), self._trained))
            if not (means.num_infinite and math.isfinite(means.loss) and self._loss_scale.halve()):
                break
            self._model.zero_grad(set_to_none=True)
        self._loss_scale.unscale(self._trained)
        if self._replicas.size == 1:
            return means, norm / self._loss_scale.value
        norm = self._norm()
        self._replicas.take_from_first(norm)
        return means, norm

    def _norm(self) -> torch.Tensor:
        gradients = [parameter.grad for parameter in self._trained if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients, foreach=True)  # or tensors of a subclass take a kernel each
        return norm.to(self._trained[0].device)

    @torch.no_grad()
    def measure(self, groups: Sequence[Any]) -> Means:
        """Loss and metrics alone."""
        return self._means(groups, self._exchange(groups, self._sums(groups), ()))

    # --- this process's share -------------------------------------------------------------

    def _sums(self, groups: Sequence[Any], seed: int = 0, backward: _Backward | None = None) -> torch.Tensor:
        """Loss and metrics summed over this process's share, float64 [S]; where that does not fit, in smaller ones."""
        share = self._replicas.share(groups)
        with cast_adapters(self._model, self._scorer.compute_dtype):
            while True:
                pieces = self._scorer.split(share, self._budget.max_tokens) if share else []
                batches = [[share[index] for index in piece] for piece in pieces]
                if backward is not None:
                    torch.manual_seed(seed)
                try:
                    if self._objective.is_coupled:
                        return self._add_up_together(batches, seed, backward)
                    return self._add_up(batches, groups, backward)
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error):
                        raise
                # out of the except block: the error's traceback holds on to what filled the memory
                self._model.zero_grad(set_to_none=True)
                self._budget.halve(batches)

    def _add_up(
        self, batches: Sequence[Sequence[Any]], step: Sequence[Any], backward: _Backward | None
    ) -> torch.Tensor:
        """Sums over micro-batches, some or all of those of a ``step``; ``backward`` gets the summed loss of each."""
        sums: dict[str, torch.Tensor] = {}
        for batch in batches:
            result = self._objective.losses(
                batch, self._scorer.score(batch, statistics=self._objective.statistics), step
            )
            loss = result.losses_B.sum()
            if backward is not None:
                backward(loss)
            for name, values in {_LOSS: loss.detach(), **result.metrics}.items():
                sums[name] = sums.get(name, 0.0) + values.sum()
        return self._stack(sums)

    def _add_up_together(self, batches: Sequence[Sequence[Any]], seed: int, backward: _Backward | None) -> torch.Tensor:
        """The same where a loss is of all groups of the step together.

        The log-probabilities are taken twice: without gradients to see what each of them weighs, then with. So the
        memory is that of a micro-batch.
        """
        found: list[Any] = []
        with torch.no_grad():
            for number, batch in enumerate(batches):
                torch.manual_seed(seed + number)
                found.append(self._scorer.score(batch, statistics=self._objective.statistics))
        scores: Any = Scores.join(found)
        in_order = [group for batch in batches for group in batch]
        with torch.enable_grad():
            read = (scores.logps_BK.requires_grad_(), scores.token_logps_M.requires_grad_())
            result = self._objective.losses(in_order, scores, in_order)
            loss = result.losses_B.sum()
        if backward is not None:
            sums_BK, tokens_M = torch.autograd.grad(loss, read, allow_unused=True, materialize_grads=True)
            of_sums = sums_BK.split([*map(len, batches)])
            of_tokens = tokens_M.split([len(one.token_logps_M) for one in found])
            for number, (batch, of_sum, of_token) in enumerate(zip(batches, of_sums, of_tokens, strict=True)):
                torch.manual_seed(seed + number)
                again: Any = self._scorer.score(batch)
                backward((again.logps_BK * of_sum).sum() + (again.token_logps_M * of_token).sum())
        return self._stack({_LOSS: loss.detach(), **{name: value.sum() for name, value in result.metrics.items()}})

    def _stack(self, sums: dict[str, torch.Tensor]) -> torch.Tensor:
        names = (_LOSS, *self._objective.metric_names)
        if not sums:
            return torch.zeros(len(names), dtype=torch.float64, device=self._scorer.device)
        return torch.stack([sums[name] for name in names])

    # --- all processes --------------------------------------------------------------------

    def _exchange(
        self, groups: Sequence[Any], sums_S: torch.Tensor, parameters: Sequence[torch.nn.Parameter]
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
            raise MachineError("the processes do not hold the same batch; this is a bug")
        self.anyone_asked_to_stop = self.anyone_asked_to_stop or asked > 0
        return values

    def _means(self, groups: Sequence[Any], sums: Sequence[float]) -> Means:
        loss, *others = sums
        names = self._objective.metric_names
        metrics = {name: value / len(groups) for name, value in zip(names, others, strict=False)}
        return Means(loss / self._objective.weight(groups), metrics, sum(others[len(names) :]))
