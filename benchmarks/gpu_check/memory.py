"""How much memory a step, an answer and a load take, and what happens where there is too little."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu_check import ROOT
from benchmarks.gpu_check.bench import GIB, Bench, Policy, train
from dpo_cli.core.errors import MachineError
from dpo_cli.core.params import TrainParams
from dpo_cli.dry_run.model import DryAccumulator
from dpo_cli.evaluation.decoding import Decoding
from dpo_cli.evaluation.generation import PromptTokens, sample_answers
from dpo_cli.models.device import (
    forget_peak_memory,
    free_memory_bytes,
    peak_memory_bytes,
    prepare_machine,
    release_memory,
)
from dpo_cli.models.load import load_model
from dpo_cli.models.shapes import random_model
from dpo_cli.scoring.budget import TokenBudget
from dpo_cli.scoring.layout import lay_out
from dpo_cli.scoring.recompute import GRADES
from dpo_cli.training.memory import choose_memory, kept_bytes
from dpo_cli.training.objective import PairObjective
from dpo_cli.training.protocols import Learner

NUM_PAIRS = 18
"""As long as those of HH harmless they make about 3,900 tokens, nearly all that goes through at once."""


def steps(bench: Bench) -> None:
    """A step of the largest model in each grade of recompute: peak against the estimate and the dry run, seconds."""
    policy = bench.policy("llama-3.1-8b")
    model, scorer = policy.model, policy.scorer
    groups = bench.pairs(policy, NUM_PAIRS)
    objective = PairObjective(TrainParams(), {group.id: [-50.0, -60.0] for group in groups})
    kept = kept_bytes(model, scorer, groups)
    counts: dict[str, subprocess.Popen[str]] = {}
    measured: dict[str, int] = {}
    for grade in GRADES:
        runtime = bench.runtime(recompute=grade)
        plan = choose_memory(model, scorer, groups, len(groups), policy.work(runtime))
        batches = scorer.split(groups, plan.max_tokens)
        tokens = max(lay_out([groups[index] for index in each], scorer.layout).num_tokens for each in batches)
        estimate = kept.of(grade, tokens)
        question = f"Peak of a step over {bench.shape('llama-3.1-8b')} in nf4, recompute {grade}, {tokens} tokens?"
        expected = f"estimate, {estimate / GIB:.2f} GiB, is 0.9 to 1.2 times of it"
        if estimate > free_memory_bytes(scorer.device):
            refused = f"too little memory: {free_memory_bytes(scorer.device) / GIB:.1f} GiB are free"
            bench.check(question, expected, "", None, refused=refused)
            continue
        if bench.on_gpu:
            counts[grade] = _count_dry(bench.shape("llama-3.1-8b"), len(groups), plan.max_tokens, grade)
        step = _step(Learner(model, scorer, objective), plan.max_tokens, groups)
        step()
        base = torch.cuda.memory_allocated() if bench.on_gpu else 0
        forget_peak_memory(scorer.device)
        seconds = bench.seconds(step, 2)
        measured[grade] = peak = peak_memory_bytes(scorer.device)
        reserved = torch.cuda.max_memory_reserved() / GIB if bench.on_gpu else 0.0
        seen = f"{(peak - base) / GIB:.2f} GiB, {peak / GIB:.2f} in all, {reserved:.2f} reserved; {seconds:.3g} s"
        bench.check(question, expected, seen, bench.at_size(0.9 <= estimate / max(1, peak - base) <= 1.2))
    for grade, counting in counts.items():
        out, said = counting.communicate()
        counted = _peak_of(out)
        bench.check(
            f"The same peak, recompute {grade}, against the dry run's count?",
            "within 10%",
            f"measured {measured[grade] / GIB:.2f} GiB, counted {counted / GIB:.2f}" if counted else "",
            bench.at_size(counted is not None and abs(measured[grade] / counted - 1) <= 0.1),
            refused=None if counted else f"no dry run here: {(said.strip().splitlines() or ['it says nothing'])[-1]}",
        )
    chosen = choose_memory(model, scorer, groups, len(groups), policy.work(bench.runtime()))
    _profile(bench, _step(Learner(model, scorer, objective), chosen.max_tokens, groups), chosen.grade)


def _step(learner: Learner[Any], max_tokens: int, groups: Sequence[Any]) -> Callable[[], None]:
    learner.model.train()
    accumulator = DryAccumulator(learner, max_tokens)

    def step() -> None:
        accumulator.gradient(groups, 0)
        learner.model.zero_grad(set_to_none=True)

    return step


def _count_dry(shape: str, num_pairs: int, max_tokens: int, grade: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.cuda_dry_run", "--model", shape, "--grade", grade]
    command += ["--num-pairs", str(num_pairs), "--max-tokens", str(max_tokens)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True)


def _peak_of(out: str) -> float | None:
    with contextlib.suppress(ValueError, KeyError):
        found = json.loads(out)
        return None if found["error"] else float(found["peak_bytes"])
    return None


def _profile(bench: Bench, step: Callable[[], None], grade: str) -> None:
    """Kernels of a step, how long the GPU has none, and what costs the most."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if bench.on_gpu else [])]
    step()
    with profile(activities=activities) as found:
        step()
        bench.wait()
    kind = "CUDA" if bench.on_gpu else "CPU"
    events = [each for each in found.events() or () if str(each.device_type).endswith(kind)]
    question = f"How long is the GPU without work in a step, recompute {grade}?"
    expected = "under 10% of the time: an 8B keeps it busy"
    if not events:
        bench.check(question, expected, "", None, refused="the profiler sees no kernels on this machine")
        return
    spans = sorted((each.time_range.start, each.time_range.end) for each in events)
    busy, end = 0.0, spans[0][0]
    for start, stop in spans:
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    idle = 1 - busy / (end - spans[0][0])
    cost = "self_device_time_total" if bench.on_gpu else "self_cpu_time_total"
    costly = sorted(found.key_averages(), key=lambda each: -getattr(each, cost))[:10]
    bench.figures["ten costliest operations, ms"] = {each.key[:80]: getattr(each, cost) / 1e3 for each in costly}
    bench.check(
        question,
        expected,
        f"{idle:.0%}; {len(events)} kernels and copies in {(end - spans[0][0]) / 1e3:.0f} ms",
        idle < 0.1 if bench.shape("llama-3.1-8b") == "llama-3.1-8b" else None,
    )


# --- too little of it ---------------------------------------------------------------------


def too_little(bench: Bench) -> None:
    """Training under bounds that are too tight, where it should go on in smaller micro-batches.

    A process that bitsandbytes ended has no answer for the bound: the part fails then, with bitsandbytes' words.
    """
    policy = bench.policy("qwen2.5-1.5b")
    groups = bench.pairs(policy, 32)
    objective = PairObjective(TrainParams(), {group.id: [-50.0, -60.0] for group in groups})
    for spare in (3.0, 1.5, 0.75):
        release_memory()
        bound = None
        if bench.on_gpu:
            bound = torch.cuda.memory_allocated() / GIB + spare
            prepare_machine(bench.runtime(max_gpu_gib=bound), embedded=False)
        tight = bench.runtime(max_gpu_gib=bound, max_tokens_per_microbatch=4096, recompute="none")
        with _where_memory_ends() as places:
            try:
                work = Path(f"spare-{spare:g}")
                fitted = train(policy, objective, groups, work, tight, max_steps=2, batch_size=16)
                ended, seen = True, f"ended well with {fitted.max_tokens} tokens at once"
            except MachineError as error:
                ended, seen = "a single prompt" in str(error), str(error)[:100]
        where = ", ".join(f"{place} ({count}x)" for place, count in places.most_common(4))
        bench.check(
            f"Training with {spare:g} GiB over the weights, no recompute, 4,096 tokens?",
            "goes on with fewer tokens, or says that a single pair does not fit",
            f"{seen}; memory ended in {where or 'no place'}",
            ended,
        )


@contextlib.contextmanager
def _where_memory_ends() -> Iterator[Counter[str]]:
    """Where PyTorch found no more memory, by the innermost line of Python that is not PyTorch's."""
    places: Counter[str] = Counter()
    attach = getattr(torch._C, "_cuda_attach_out_of_memory_observer", None)

    def note(*_: Any) -> None:
        frames = [frame for frame in traceback.extract_stack()[:-1] if "/torch/" not in frame.filename]
        # threads of autograd have no frame where an operation is PyTorch's own
        place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "PyTorch's backward pass"
        places[place] += 1

    if attach is not None:
        attach(note)
    yield places


# --- answers ------------------------------------------------------------------------------


def generation(bench: Bench) -> None:
    """64 answers of 128 tokens, and what stays on the GPU when the model is given up."""
    before = torch.cuda.memory_allocated() if bench.on_gpu else 0
    policy: Policy | None = bench.policy("llama-3.1-8b")
    assert policy is not None
    held = (torch.cuda.memory_allocated() if bench.on_gpu else 1) - before
    prompts = [PromptTokens(group.id, group.prompt) for group in bench.pairs(policy, 64)]
    num_tokens = 24 if bench.small else 128  # fewer are not worth a record
    forget_peak_memory(policy.scorer.device)
    begun = time.perf_counter()
    with policy.reporter.meter("", len(prompts), "answers") as meter:
        answers = sample_answers(
            policy.model.eval(),
            prompts,
            Decoding(1.0, num_tokens, (1,), 0, "policy"),
            budget=TokenBudget(4096, "gpu-check", policy.reporter),
            autocast_dtype=policy.machine.compute_dtype,
            meter=meter,
        )
    seconds = time.perf_counter() - begun
    made = sum(len(each.tokens) for each in answers.values())
    peak = peak_memory_bytes(policy.scorer.device) / GIB
    bench.check(
        f"How fast are {len(prompts)} answers of {num_tokens} tokens?",
        "open",
        f"{made / seconds:.0f} tokens/s, {num_tokens / seconds:.1f} steps/s if in one batch; peak {peak:.2f} GiB",
        None,
    )
    note = next(iter(policy.reporter.notes), None)
    bench.check(
        "How are answers decoded?",
        "from a step that CUDA recorded",
        note or ("from a step that CUDA recorded" if bench.on_gpu else "by transformers' generate, as on every CPU"),
        None if bench.small else note is None,
    )
    gc.disable()
    policy = None
    kept = (torch.cuda.memory_allocated() if bench.on_gpu else 0) - before
    gc.enable()
    release_memory()
    left = (torch.cuda.memory_allocated() if bench.on_gpu else 0) - before
    bench.check(
        "What of a 4-bit model stays on the GPU that nothing refers to?",
        "under 2% once garbage is collected",
        f"{kept / held:.0%} before, {left / held:.1%} after",
        left / held < 0.02,
    )


# --- loading ------------------------------------------------------------------------------


def saved_model(bench: Bench, wanted: str) -> Path:
    """The directory of a random model of a shape, made when it is first asked for."""
    folder = bench.folder.parent / bench.shape(wanted)
    if not folder.is_dir():
        machine = prepare_machine(bench.runtime(), embedded=False)
        random_model(bench.shape(wanted), machine, "none").save_pretrained(folder)
        release_memory()
    return folder


def load(bench: Bench) -> None:
    """A checkpoint of 16 bits is loaded in nf4, of which no whole 16-bit copy should be on the GPU."""
    folder = saved_model(bench, "llama-3.2-3b")
    machine = prepare_machine(bench.runtime(), embedded=False)
    plain = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    before = torch.cuda.memory_allocated() if bench.on_gpu else 0
    forget_peak_memory(machine.device)
    begun = time.perf_counter()
    model = load_model(folder, machine, quantization="nf4")
    seconds = time.perf_counter() - begun
    held = (torch.cuda.memory_allocated() if bench.on_gpu else 0) - before
    extra = peak_memory_bytes(machine.device) - before - held
    reserved = torch.cuda.max_memory_reserved() / GIB if bench.on_gpu else 0.0
    bench.check(
        f"Loading {bench.shape('llama-3.2-3b')} in nf4: memory beside what it holds at the end?",
        f"under a quarter of its {plain / GIB:.1f} GiB in 16 bits",
        f"{extra / GIB:.2f} GiB beside {held / GIB:.2f}, {reserved:.2f} reserved; {seconds:.1f} s",
        bench.at_size(extra < plain / 4),
    )
    del model
