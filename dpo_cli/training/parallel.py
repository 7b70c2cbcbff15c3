"""Several processes that share every optimizer batch, as torchrun starts them.

Each holds the whole model, all data in the same order and the same optimizer state. It scores its
share of the batch; then one flat tensor is summed over all processes, with gradients, loss, metrics
and the wish to stop, and each takes the same optimizer step, its gradients clipped by the first one's norm.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from dpo_cli.core import paths
from dpo_cli.core.artifacts import digest_bytes
from dpo_cli.core.errors import MachineError, is_out_of_memory
from dpo_cli.core.params import RuntimeParams
from dpo_cli.core.progress import Reporter, SilentReporter
from dpo_cli.core.scratch import Scratch, stage_scratch
from dpo_cli.data.tokens import TokenGroup
from dpo_cli.models.device import prepare_machine
from dpo_cli.models.project import Workplace

_PATIENCE = timedelta(hours=1)


@dataclass(frozen=True)
class Replicas:
    """This process among those that train together; without torchrun the only one.

    Whatever waits for another process raises MachineError where that is gone.

    Attributes:
        rank: Its number, from 0. Number 0 is the first: it alone writes and reports.
        size: How many there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes and reports."""
        return self.rank == 0

    def reporter(self, reporter: Reporter) -> Reporter:
        """The reporter for the first process, a silent one for the others."""
        return reporter if self.is_first else SilentReporter()

    def share(self, groups: Sequence[TokenGroup]) -> list[TokenGroup]:
        """This process's part of a batch, in its order; none where there are fewer groups than processes.

        The largest group that is left goes to whoever has the fewest tokens so far.
        """
        if self.size == 1:
            return list(groups)
        sizes = [sum(group.sizes) for group in groups]
        loads = [0] * self.size
        mine = []
        for index in sorted(range(len(groups)), key=lambda index: (-sizes[index], index)):
            rank = loads.index(min(loads))
            loads[rank] += sizes[index]
            if rank == self.rank:
                mine.append(index)
        return [groups[index] for index in sorted(mine)]

    def add_up(self, sums_S: torch.Tensor, parameters: Sequence[torch.nn.Parameter] = ()) -> list[float]:
        """Sum some figures, and the gradients of some parameters in place, over all processes: one exchange.

        A gradient that nobody has stays None. With parameters all of it is summed in float32.

        Args:
            sums_S: Figures, float64 [S].
            parameters: Parameters whose gradients are replaced by their sums.

        Returns:
            The sums [S], read back: the device is waited for once.
        """
        if self.size == 1:
            return sums_S.tolist()
        if not parameters:
            total_S = sums_S.clone()
            self._all_reduce(total_S)
            return total_S.tolist()
        known = torch.tensor([parameter.grad is not None for parameter in parameters], device=sums_S.device)
        parts = [torch.zeros_like(parameter) if parameter.grad is None else parameter.grad for parameter in parameters]
        head = torch.cat([sums_S.float(), known.float()])
        flat = torch.cat([head, *(part.reshape(-1).float() for part in parts)])
        del parts
        self._all_reduce(flat)
        places = flat[len(head) :].split([parameter.numel() for parameter in parameters])
        figures = flat[: len(head)].tolist()
        for parameter, place, owners in zip(parameters, places, figures[len(sums_S) :], strict=True):
            parameter.grad = place.view_as(parameter).to(parameter.dtype) if owners else None
        return figures[: len(sums_S)]

    def agree(self, what: str, value: Any) -> None:
        """Go on only if all processes have the same value.

        Raises:
            MachineError: They have not.
        """
        if self.size == 1:
            return
        values: list[Any] = [None] * self.size
        with _gone_is_an_error():
            dist.all_gather_object(values, value)
        odd = [rank for rank, other in enumerate(values) if other != values[0]]
        if odd:
            raise MachineError(
                f"{self.size} processes were started, and number {odd[0]} differs from the first in {what}"
                f" ({values[odd[0]]}, not {values[0]})"
            )

    def agree_on_parameters(self, when: str, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Go on only if all processes hold the same parameters, to the bit.

        Raises:
            MachineError: They do not.
        """
        if self.size > 1:
            self.agree(f"the parameters {when}", digest_bytes(*map(_bytes, parameters)))

    def from_first(self, value: Any) -> Any:
        """The first process's value, for all."""
        if self.size == 1:
            return value
        values = [value]
        with _gone_is_an_error():
            dist.broadcast_object_list(values, src=0)
        return values[0]

    def take_from_first(self, tensor: torch.Tensor) -> None:
        """Write the first process's numbers into a tensor of the device, in place."""
        if self.size > 1:
            with _gone_is_an_error():
                dist.broadcast(tensor, src=0)

    def wait(self) -> None:
        """Go on when all have come so far."""
        if self.size > 1:
            with _gone_is_an_error():
                dist.barrier()

    def _all_reduce(self, tensor: torch.Tensor) -> None:
        with _gone_is_an_error():
            dist.all_reduce(tensor)


ALONE = Replicas()


@dataclass(frozen=True)
class Job:
    """What a training is told of its surroundings.

    Attributes:
        work: Where it computes; its command is the stage, and the section of its settings.
        folder: Where checkpoints are kept, and found again.
        replicas: The processes that share each batch; the first one saves, and all end with the same parameters.
    """

    work: Workplace
    folder: Path
    replicas: Replicas = ALONE


@contextmanager
def join_replicas(runtime: RuntimeParams, *, embedded: bool) -> Iterator[Replicas]:
    """Meet the processes that torchrun started on this machine; they part when the block ends.

    Under DVC nobody is met, and the stage refuses to run as several.

    Args:
        runtime: This machine.
        embedded: Whether the model is the embedded one.

    Raises:
        MachineError: They are on several machines, do not all have a device of the same kind, or do not meet.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if "DVC_STAGE" in os.environ or not (size > 1 or dist.is_torchelastic_launched()):
        yield ALONE
        return
    if int(os.environ.get("LOCAL_WORLD_SIZE", size)) != size:
        raise MachineError(f"{size} processes were started on several machines; a stage runs on one")
    _stay_on_loopback()
    has_nccl = torch.cuda.is_available() and dist.is_nccl_available()
    with _gone_is_an_error():
        dist.init_process_group("cpu:gloo,cuda:nccl" if has_nccl else "gloo", timeout=_PATIENCE)
    try:
        replicas = Replicas(dist.get_rank(), size)
        kind = prepare_machine(runtime, embedded=embedded).device.type
        replicas.agree("runtime.device; start no more processes than there are GPUs", kind)
        yield replicas
    finally:
        dist.destroy_process_group()


def open_accelerator(device: torch.device) -> Accelerator:
    """What prepares an optimizer for this device and for the processes that have met.

    It is told of no mixed precision: a scorer computes in the machine's dtype by itself.

    Raises:
        MachineError: The GPUs' driver cannot have them work together.
    """
    AcceleratorState._reset_state(reset_partial_state=True)  # a training before this one may have had another device
    try:
        return Accelerator(cpu=device.type == "cpu", mixed_precision="no")
    except NotImplementedError as error:
        raise MachineError(str(error)) from None


@contextmanager
def shared_scratch(stage: str, fingerprint: str, replicas: Replicas) -> Iterator[Scratch]:
    """The stage's scratch folder: the first process holds its lock, the others come in after it.

    Raises:
        MachineError: The same stage runs already in this project, or the processes have different inputs.
    """
    replicas.agree("what the stage reads", fingerprint)
    with ExitStack() as stack:
        scratch, problem = Scratch(paths.scratch_root() / stage / fingerprint), None
        if replicas.is_first:
            try:
                scratch = stack.enter_context(stage_scratch(stage, fingerprint))
            except MachineError as error:
                problem = str(error)
        if (problem := replicas.from_first(problem)) is not None:
            raise MachineError(problem)
        yield scratch


def _bytes(parameter: torch.nn.Parameter) -> bytes:
    return parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _stay_on_loopback() -> None:
    names = [name for _, name in socket.if_nameindex() if name.startswith("lo")]
    if names:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", names[0])
        os.environ.setdefault("NCCL_SOCKET_IFNAME", names[0])


@contextmanager
def _gone_is_an_error() -> Iterator[None]:
    """What torch says when another process is not there, as an error of ours."""
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        reason = str(error).splitlines()[0]
        raise MachineError(f"another process of this run is gone; what it said comes before this ({reason})") from error
