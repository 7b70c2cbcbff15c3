"""What a pass would take on a GPU that is not there: counted, and held against its sheet (Williams et al. 2009)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from dpo_cli.core.errors import ParamsError
from dpo_cli.core.params import Params, TrainParams
from dpo_cli.core.progress import Reporter
from dpo_cli.core.training_params import LoraParams
from dpo_cli.data.tokens import TokenGroup
from dpo_cli.dry_run.counts import Counting, Counts
from dpo_cli.dry_run.device import dry_cuda, prepare_dry_machine, read_backs_give_zeros
from dpo_cli.dry_run.model import DryAccumulator, dry_model, mean_visible_pairs, open_dry_scorer, take_optimizer_step
from dpo_cli.models.device import BFLOAT16_SINCE, GPUS, Gpu, Machine, token_budget
from dpo_cli.models.load import quiet_libraries
from dpo_cli.models.project import Workplace
from dpo_cli.models.shapes import REGIMES, SHAPES, random_pairs
from dpo_cli.scoring.budget import TokenBudget
from dpo_cli.scoring.limits import Sizes, Work, least_operations
from dpo_cli.scoring.recompute import Recompute
from dpo_cli.scoring.reference import missing_groups, score_groups, tokens_at_once
from dpo_cli.scoring.scorer import Scorer
from dpo_cli.training.bench import work_of
from dpo_cli.training.memory import choose_memory
from dpo_cli.training.objective import PairObjective
from dpo_cli.training.protocols import Learner

CONTEXT_BYTES = 1 << 29
"""Memory that CUDA itself takes: what was seen is 0.4 to 0.5 GiB."""
_GIB = 2**30


REACHED_SHARE = 0.85
"""Share of the data sheet's operations and bandwidth that large products and copies are taken to reach."""
KERNEL_S = 4e-6
"""Seconds that even the smallest kernel is taken to need on the device."""
HOST_S: dict[Recompute, float] = {"none": 25e-6, "elementwise": 55e-6, "layers": 37e-6}
"""Seconds of Python and PyTorch that the host is taken to need for a kernel: what a layer took on one core of a server
without a GPU, divided by its kernels. By what is computed again, since PyTorch asks at each operation there.
"""


@dataclass(frozen=True)
class PredictionOptions:
    """What to predict: passes, on a card of GPUS, of a model of SHAPES and so many pairs of REGIMES."""

    which: tuple[str, ...]
    card: str
    shape: str
    regime: str
    num_pairs: int


def predict_speed(options: PredictionOptions, params: Params, reporter: Reporter) -> dict[str, Any]:
    """Count the passes on a device that is not there, and print how long they take at the least on the card.

    Raises:
        ParamsError: The data sheet's operations are not of the compute dtype.
        MachineError: runtime.max_gpu_gib is more than the card has.
    """
    quiet_libraries()
    gpu = GPUS[options.card]
    counting = Counting()
    memory = gpu.memory_gib * _GIB - CONTEXT_BYTES
    figures: dict[str, Any] = {
        "is_prediction": True,
        "card": options.card,
        "model": options.shape,
        "quantization": params.reference.quantization,
        "regime": f"{options.regime}: {REGIMES[options.regime].meaning}",
        "num_pairs": options.num_pairs,
        "datasheet_tflops": gpu.tflops,
        "datasheet_gb_per_s": gpu.bandwidth,
        "torch": torch.__version__,
    }
    with dry_cuda(gpu.capability, memory, lambda: counting.live_bytes), counting:
        machine = prepare_dry_machine(params.runtime)
        _refuse_unknown_speed(options.card, gpu, machine)
        figures["compute_dtype"] = machine.dtype_name
        lora = params.train.lora or LoraParams()
        model = dry_model(SHAPES[options.shape], machine, params.reference.quantization, lora)
        scorer = open_dry_scorer(model, machine, "shared" if params.runtime.layout == "auto" else params.runtime.layout)
        groups = random_pairs(options.regime, options.num_pairs, scorer.config.vocab_size)
        sizes = Sizes.of(model, machine.compute_dtype)
        for name in options.which:
            count = _count_reference if name == "precompute-ref" else _count_training
            found, work = count(model, scorer, groups, params, counting, reporter)
            prediction = predict(counting.counts.launches, gpu, found["recompute"])
            found |= _figures(prediction, counting.counts, gpu, work, sizes, train=name == "train")
            figures[name.replace("-", "_")] = found
            reporter.table(f"prediction: {name}", _rows(found, figures, gpu))
    return figures


def _refuse_unknown_speed(card: str, gpu: Gpu, machine: Machine) -> None:
    known = ["float16"] if gpu.capability < BFLOAT16_SINCE else ["bfloat16", "float16"]
    if machine.dtype_name not in known:
        raise ParamsError(
            f"runtime.compute_dtype must be {' or '.join(known)} with --card {card}, got {machine.dtype_name}: how"
            " fast the card multiplies others is not known; set it to auto"
        )


def _count_reference(
    model: Any, scorer: Scorer, groups: list[TokenGroup], params: Params, counting: Counting, reporter: Reporter
) -> tuple[dict[str, Any], Work]:
    budget = TokenBudget(token_budget(params.runtime, scorer.device), "bench", reporter)
    model.eval()
    by_prompt = missing_groups(groups, (), budget.max_tokens)
    at_once = tokens_at_once(budget.max_tokens, scorer.device)
    counting.attention_pairs = mean_visible_pairs(scorer, by_prompt, at_once)
    counting.restart()
    with read_backs_give_zeros(lambda _: None):
        for _ in score_groups(scorer, by_prompt, budget):
            pass
    found = {"recompute": "none", "max_tokens_per_microbatch": budget.max_tokens}
    return found, work_of(scorer, [by_prompt], at_once)


def _count_training(
    model: Any, scorer: Scorer, groups: list[TokenGroup], params: Params, counting: Counting, reporter: Reporter
) -> tuple[dict[str, Any], Work]:
    size = params.train.batch_size
    work = Workplace("bench", reporter, params.runtime, Machine(scorer.device, scorer.compute_dtype))
    chosen = choose_memory(model, scorer, groups, size, work)
    budget = TokenBudget(chosen.max_tokens, "bench", reporter)
    steps = [groups[begin : begin + size] for begin in range(0, len(groups), size)]
    objective = PairObjective(TrainParams(beta=0.1), {group.id: [-1.0, -2.0] for group in groups})
    accumulator = DryAccumulator(Learner(model, scorer, objective), budget.max_tokens)
    model.train()
    counting.attention_pairs = mean_visible_pairs(scorer, groups, budget.max_tokens)
    counting.restart()
    for step in steps:
        _, norm = accumulator.gradient(step, 0)
        take_optimizer_step([parameter for parameter in model.parameters() if parameter.requires_grad], norm)
    found = {"recompute": chosen.grade, "max_tokens_per_microbatch": budget.max_tokens}
    return found, work_of(scorer, steps, budget.max_tokens)


def _figures(
    prediction: Prediction, counts: Counts, gpu: Gpu, work: Work, sizes: Sizes, *, train: bool
) -> dict[str, Any]:
    total = counts.total
    least = least_operations(sizes, work, train=train)
    return {
        "seconds": prediction.seconds,
        "device_seconds": prediction.device_s,
        "host_seconds": prediction.host_s,
        "pairs_per_s": work.num_groups / prediction.seconds,
        "logical_tokens_per_s": work.logical_tokens / prediction.seconds,
        "packed_tokens_per_s": work.tokens / prediction.seconds,
        "mfu_datasheet": least / prediction.seconds / (gpu.tflops * 1e12),
        "kernels": total.kernels,
        "bytes": total.bytes,
        "flops": total.flops,
        "seconds_by_kind": dict(sorted(prediction.by_kind.items(), key=lambda item: -item[1])),
        "peak_bytes": counts.peak_bytes + CONTEXT_BYTES,
        "fits": counts.peak_bytes + CONTEXT_BYTES <= gpu.memory_gib * _GIB,
    }


def _rows(found: dict[str, Any], figures: dict[str, Any], gpu: Gpu) -> list[tuple[str, str]]:
    seconds = found["seconds"]
    kinds = ", ".join(f"{kind} {each / found['device_seconds']:.0%}" for kind, each in found["seconds_by_kind"].items())
    bound = "the host" if found["host_seconds"] > found["device_seconds"] else "the GPU"
    return [
        (
            "a prediction",
            f"no {figures['card']} was used: kernels counted without one, at {REACHED_SHARE:.0%} of {gpu.tflops:g}"
            f" TFLOP/s and {gpu.bandwidth:g} GB/s; those that a GPU tries out before use are taken to be right",
        ),
        ("model", f"{figures['model']}, {figures['quantization']}, {figures['compute_dtype']}"),
        ("pairs", f"{figures['num_pairs']}, {figures['regime']}"),
        ("speed", f"at most about {found['pairs_per_s']:.1f} pairs/s, {seconds:.3g} s in all, bound by {bound}"),
        ("packed tokens", f"{found['packed_tokens_per_s']:.0f} tokens/s through the model"),
        ("micro-batch", f"{found['max_tokens_per_microbatch']} tokens, recompute {found['recompute']}"),
        (
            "counted",
            f"{found['kernels']} kernels, {found['bytes'] / 1e9:.0f} GB, {found['flops'] / 1e12:.1f} TFLOP",
        ),
        ("GPU time", f"{found['device_seconds']:.3g} s: {kinds}"),
        ("host time", f"{found['host_seconds']:.3g} s at {HOST_S[found['recompute']] * 1e6:.0f} us a kernel"),
        ("MFU", f"{found['mfu_datasheet']:.1%} of the datasheet's"),
        (
            "peak memory",
            f"{found['peak_bytes'] / _GIB:.1f} of {gpu.memory_gib} GiB"
            + ("" if found["fits"] else ": DOES NOT FIT; lower runtime.max_tokens_per_microbatch"),
        ),
    ]


# --- how long it takes ----------------------------------------------------------------------


@dataclass(frozen=True)
class Prediction:
    """Seconds of counted work.

    Attributes:
        by_kind: Seconds on the device, by kind of kernel.
        host_s: Seconds on the host, which works ahead of the device as far as it can.
    """

    by_kind: dict[str, float]
    host_s: float

    @property
    def device_s(self) -> float:
        """Seconds on the device."""
        return sum(self.by_kind.values())

    @property
    def seconds(self) -> float:
        """Whichever is slower."""
        return max(self.device_s, self.host_s)


def predict(launches: Iterable[tuple[str, int, int]], gpu: Gpu, recompute: Recompute = "none") -> Prediction:
    """Each kernel, of a kind, bytes and operations, takes as long as its operations or its bytes do."""
    operations_a_second = REACHED_SHARE * gpu.tflops * 1e12
    bytes_a_second = REACHED_SHARE * gpu.bandwidth * 1e9
    by_kind: dict[str, float] = defaultdict(float)
    number = 0
    for kind, moved, flops in launches:
        by_kind[kind] += max(flops / operations_a_second, moved / bytes_a_second, KERNEL_S)
        number += 1
    return Prediction(dict(by_kind), number * HOST_S[recompute])
