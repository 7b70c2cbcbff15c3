"""How fast the reference pass and training are on this machine, and how far from their limits."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from dpo_cli.core.environment import is_gpu
from dpo_cli.core.errors import DataError, MachineError, is_out_of_memory
from dpo_cli.core.interrupts import StopRequest
from dpo_cli.core.params import EMBEDDED, Params, TrainParams
from dpo_cli.core.progress import Reporter
from dpo_cli.core.training_params import LoraParams
from dpo_cli.data.tokens import TokenGroup
from dpo_cli.models.adapters import add_adapter
from dpo_cli.models.device import Machine, forget_peak_memory, gpu_called, peak_memory_bytes, prepare_machine
from dpo_cli.models.load import keep_weights_unpacked, quiet_libraries
from dpo_cli.models.project import Workplace, open_project
from dpo_cli.models.shapes import REGIMES, random_model, random_pairs
from dpo_cli.scoring.budget import TokenBudget
from dpo_cli.scoring.limits import Sizes, Work, least_bytes, least_operations
from dpo_cli.scoring.recompute import Recompute
from dpo_cli.scoring.reference import missing_groups, score_groups, tokens_at_once
from dpo_cli.scoring.scorer import Scorer
from dpo_cli.training.accumulation import Accumulator, Limits
from dpo_cli.training.memory import choose_memory
from dpo_cli.training.objective import PairObjective, SftObjective
from dpo_cli.training.protocols import Learner

Pass = Literal["precompute-ref", "train"]
PASSES: tuple[Pass, ...] = ("precompute-ref", "train")


@dataclass(frozen=True)
class BenchOptions:
    """What to measure.

    Attributes:
        which: The passes.
        regime: A regime of random pairs; None takes the project's own pairs.
        shape: A shape of a model with random weights; None takes the project's own model.
        num_pairs: Pairs per repetition.
        num_turns: Turns that are timed, after one that is not.
    """

    which: Sequence[Pass]
    regime: str | None
    shape: str | None
    num_pairs: int
    num_turns: int


def measure(options: BenchOptions, params: Params, reporter: Reporter) -> dict[str, Any]:
    """Measure and print; nothing of the project is changed.

    Raises:
        DataError: The project has no pairs within reference.max_length.
        StaleArtifactError: The project's model or data is missing or stale.
        MachineError: There is no such device.
    """
    quiet_libraries()
    machine = prepare_machine(params.runtime, embedded=options.shape is None and params.model.name == EMBEDDED)
    model, groups, what, regime = _subject(options, params, machine, reporter)
    peak = product_flops(machine)
    device = torch.cuda.get_device_name(machine.device) if is_gpu(machine.device) else ""
    gpu = gpu_called(device)
    sheet = gpu.tflops * 1e12 if gpu else None
    figures: dict[str, Any] = {
        "model": what,
        "regime": regime,
        "device": device or f"CPU, {torch.get_num_threads()} threads",
        "compute_dtype": machine.dtype_name,
        "quantization": params.reference.quantization,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "num_pairs": len(groups),
        "product_tflops": peak / 1e12,
        "datasheet_tflops": None if sheet is None else sheet / 1e12,
    }
    work = Workplace("bench", reporter, params.runtime, machine)
    scorer, verdict = work.scorer(model)
    figures |= verdict.metrics()
    case = Case(model, scorer, groups, params.train.batch_size, work, options.num_turns)
    attention = verdict.describe_attention()
    for name in options.which:
        bench = measure_reference if name == "precompute-ref" else measure_training
        found = bench(case)
        achieved = found["least_operations"] / found["seconds"]
        found |= {"mfu": achieved / peak, "mfu_datasheet": achieved / sheet if sheet else None}
        figures[name.replace("-", "_")] = found
        reporter.table(f"bench: {name}", _rows(found, figures, attention))
    return figures


def _subject(
    options: BenchOptions, params: Params, machine: Machine, reporter: Reporter
) -> tuple[Any, list[TokenGroup], str, str]:
    """The model with a trainable adapter, the pairs, and what both are."""
    if options.shape:
        lora = params.train.lora or LoraParams()
        model = add_adapter(
            random_model(options.shape, machine, params.reference.quantization), lora, params.train.seed
        )
        keep_weights_unpacked(model)
        what, groups = f"{options.shape} with random weights", []
    else:
        project = open_project(params, reporter, "bench")
        model = project.policy(params.train.lora, params.train.seed)
        what = params.model.name
        groups = [] if options.regime else list(project.tokenize_pairs("train").groups[: options.num_pairs])
        if not groups and not options.regime:
            raise DataError(
                f"data/preference/train.parquet: no pair within reference.max_length {params.reference.max_length}"
            )
    regime = options.regime or (None if groups else "harmless")
    if regime:
        base: Any = model.get_base_model()
        vocabulary = base.config.get_text_config().vocab_size
        groups = random_pairs(regime, options.num_pairs, vocabulary)
    return model, groups, what, f"{regime}: {REGIMES[regime].meaning}" if regime else "the project's pairs"


@dataclass(frozen=True)
class Case:
    """What is measured."""

    model: Any
    scorer: Scorer
    groups: Sequence[TokenGroup]
    pairs_a_step: int
    work: Workplace
    num_turns: int


# --- the passes ---------------------------------------------------------------------------


def measure_reference(case: Case) -> dict[str, Any]:
    """What precompute-ref does, but for its files."""
    case.model.eval()
    scorer, budget = case.scorer, case.work.budget()
    by_prompt = missing_groups(case.groups, (), budget.max_tokens)

    def turn() -> None:
        for _ in score_groups(scorer, by_prompt, budget):
            pass

    timed = _time(turn, case)
    work = work_of(scorer, [by_prompt], tokens_at_once(budget.max_tokens, scorer.device))
    return _figures(case, timed, work, budget, recompute=None)


def measure_training(case: Case) -> dict[str, Any]:
    """Optimizer steps as train does them, against the model's own log-probabilities; of single answers as sft does."""
    model, scorer, groups, size = case.model, case.scorer, case.groups, case.pairs_a_step
    chosen = choose_memory(model, scorer, groups, size, case.work)
    limits = Limits.of(case.work, chosen.max_tokens)
    model.eval()
    reference: dict[str, list[float]] = {}
    is_single = len(groups[0].completions) == 1
    with torch.no_grad():
        for batch in ([groups[index] for index in indices] for indices in scorer.split(groups, chosen.max_tokens)):
            rows = scorer.score(batch).logps_BK.tolist()
            reference |= {group.id: row for group, row in zip(batch, rows, strict=True)}
    objective: Any = SftObjective() if is_single else PairObjective(TrainParams(beta=0.1), reference)
    learner: Learner[Any] = Learner(model, scorer, objective)
    accumulator = Accumulator(learner, limits, StopRequest())
    trained = [*learner.trained.values()]
    optimizer = torch.optim.AdamW(trained, lr=1e-6)
    steps = [list(groups[begin : begin + size]) for begin in range(0, len(groups), size)]
    model.train()

    def turn() -> None:
        for step in steps:
            _, norm = accumulator.gradient(step, seed=0)
            torch.nn.utils.clip_grads_with_norm_(trained, 1.0, norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    timed = _time(turn, case)
    work = work_of(scorer, steps, limits.budget.max_tokens)
    return _figures(case, timed, work, limits.budget, recompute=chosen.grade)


def _time(turn: Callable[[], None], case: Case) -> tuple[list[float], int]:
    """Seconds of each turn, and the most bytes that were held; one turn warms up."""
    device = case.scorer.device
    times: list[float] = []
    try:
        for number in range(case.num_turns + 1):
            begun = time.perf_counter()
            turn()
            _wait(device)
            times.append(time.perf_counter() - begun)
            if number == 0:
                forget_peak_memory(device)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise MachineError(
            "bench: out of memory; lower runtime.max_tokens_per_microbatch, or set runtime.recompute to layers"
        ) from None
    return times[1:], peak_memory_bytes(device)


def _wait(device: torch.device) -> None:
    """Until the device has done its work."""
    if is_gpu(device):
        torch.cuda.synchronize(device)


def work_of(scorer: Scorer, steps: Sequence[Sequence[TokenGroup]], max_tokens: int) -> Work:
    """What goes through the model where each step is split into micro-batches of so many tokens."""
    batches = [[step[index] for index in indices] for step in steps for indices in scorer.split(step, max_tokens)]
    return Work.of(batches, scorer.layout)


# --- figures ------------------------------------------------------------------------------


def _figures(
    case: Case, timed: tuple[list[float], int], work: Work, budget: TokenBudget, recompute: Recompute | None
) -> dict[str, Any]:
    """Of a pass; of one without a backward pass ``recompute`` is None."""
    (times, peak), train = timed, recompute is not None
    seconds, sizes = statistics.median(times), Sizes.of(case.model, case.scorer.compute_dtype)
    return {
        "seconds": seconds,
        "seconds_min": min(times),
        "seconds_max": max(times),
        "pairs_per_s": len(case.groups) / seconds,
        "logical_tokens_per_s": work.logical_tokens / seconds,
        "packed_tokens_per_s": work.tokens / seconds,
        "padding_share": work.padding / work.tokens,
        "tokens_saved_share": 1 - work.tokens / work.logical_tokens,
        "max_tokens_per_microbatch": budget.max_tokens,
        "recompute": recompute or "none",
        "least_operations": least_operations(sizes, work, train=train),
        "peak_bytes": peak,
        "least_bytes": least_bytes(sizes, work, case.scorer.head_bytes, train=train),
    }


def _rows(found: dict[str, Any], figures: dict[str, Any], attention: str) -> list[tuple[str, str]]:
    mib = 2**20
    sheet = "" if figures["datasheet_tflops"] is None else f"; {found['mfu_datasheet']:.1%} of the datasheet's"
    return [
        ("model", f"{figures['model']}, {figures['quantization']}, {figures['compute_dtype']}"),
        ("pairs", f"{figures['num_pairs']}, {figures['regime']}"),
        ("device", f"{figures['device']}, {figures['product_tflops']:.3g} TFLOP/s in a product"),
        (
            "speed",
            f"{found['pairs_per_s']:.1f} pairs/s [{figures['num_pairs'] / found['seconds_max']:.1f},"
            f" {figures['num_pairs'] / found['seconds_min']:.1f}]",
        ),
        ("logical tokens", f"{found['logical_tokens_per_s']:.0f} tokens/s, each answer with its prompt"),
        ("packed tokens", f"{found['packed_tokens_per_s']:.0f} tokens/s through the model"),
        (
            "layout",
            f"{figures['layout']}: {found['tokens_saved_share']:.1%} of the tokens saved,"
            f" {found['padding_share']:.1%} padding",
        ),
        ("attention", attention),
        ("micro-batch", f"{found['max_tokens_per_microbatch']} tokens, recompute {found['recompute']}"),
        ("MFU", f"{found['mfu']:.1%} of a product's speed on this machine{sheet}"),
        (
            "peak of the process",
            f"{found['peak_bytes'] / mib:.0f} MiB; the least: {found['least_bytes'] / mib:.0f} MiB",
        ),
    ]


def product_flops(machine: Machine) -> float:
    """Operations a second in the best of some large matrix products."""
    size = 8192 if is_gpu(machine.device) else 1024
    left, right = (torch.randn(size, size, device=machine.device, dtype=machine.compute_dtype) for _ in range(2))
    best = float("inf")
    for _ in range(8):
        begun = time.perf_counter()
        torch.mm(left, right)
        _wait(machine.device)
        best = min(best, time.perf_counter() - begun)
    return 2.0 * size**3 / best
