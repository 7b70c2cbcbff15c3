"""The machine to plan for: this one, or a card that is not here."""

from __future__ import annotations

from dataclasses import dataclass

import psutil
import torch

from dpo_cli.core.environment import available_memory_bytes, is_gpu
from dpo_cli.core.params import EMBEDDED, Params, RuntimeParams
from dpo_cli.dry_run.plan import Target
from dpo_cli.dry_run.prediction import CONTEXT_BYTES
from dpo_cli.models.device import GPUS, Machine, prepare_machine, usable_of_gpu
from dpo_cli.models.doctor import read_card
from dpo_cli.training.bench import product_flops


@dataclass(frozen=True)
class Place:
    """Where it is to run.

    Attributes:
        target: Its memory.
        machine: The machine, where it is this one.
        watts: The most that its card takes; None where nothing tells.
    """

    target: Target
    machine: Machine | None
    watts: float | None

    def operations_per_s(self) -> float | None:
        """As fast as this machine multiplies; None for a card that is not here."""
        return None if self.machine is None else product_flops(self.machine)


def that_card(name: str, runtime: RuntimeParams) -> Place:
    """A card of the table of data sheets, with nothing else on it."""
    gpu = GPUS[name]
    total = gpu.memory_gib << 30
    words = f"{name}, {gpu.memory_gib} GiB: a prediction, for no such card was used"
    target = Target(words, total, _limit(total, runtime), total, CONTEXT_BYTES, gpu.capability, is_prediction=True)
    return Place(target, None, None)


def _limit(free_bytes: int, runtime: RuntimeParams) -> float:
    """What a process may hold of a GPU, CUDA's own context included."""
    return CONTEXT_BYTES + usable_of_gpu(free_bytes - CONTEXT_BYTES, runtime.max_gpu_gib)


def this_machine(params: Params, *, embedded: bool) -> Place:
    """What is free here, now.

    Raises:
        MachineError: runtime.device is cuda and there is none.
    """
    machine = prepare_machine(params.runtime, embedded=embedded and params.model.name == EMBEDDED)
    if is_gpu(machine.device):
        free, total = torch.cuda.mem_get_info(machine.device)
        watts = read_card().get("power.limit", "")
        name = torch.cuda.get_device_name(machine.device)
        capability = torch.cuda.get_device_capability(machine.device)
        free += CONTEXT_BYTES  # this process has one, too
        target = Target(name, free, _limit(free, params.runtime), total, CONTEXT_BYTES, capability)
        return Place(target, machine, float(watts) if watts.replace(".", "", 1).isdecimal() else None)
    own = psutil.Process().memory_info().rss
    name = f"this machine's CPU, {torch.get_num_threads()} threads"
    free = available_memory_bytes() + own
    return Place(Target(name, free, free, psutil.virtual_memory().total, own), machine, None)
