"""The engine on a GPU: real shapes with random weights in nf4, within eight minutes.

    python benchmarks/gpu.py --out benchmarks/results/engine_gpu.md

For each shape: ``dpo-cli bench`` in a process of its own, on pairs as long as those of HH harmless, in every layout,
and the largest margin before the first step in bfloat16. Before them the variable-length kernels are held against the
definition. Where there is no GPU, ``--shapes tiny`` runs all of it small on the CPU and says so.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import torch

from dpo_cli.core.gpu import is_gpu
from dpo_cli.core.params import LoraParams, RuntimeParams
from dpo_cli.models.adapters import add_adapter
from dpo_cli.models.device import Machine, prepare_machine
from dpo_cli.models.load import keep_weights_unpacked
from dpo_cli.models.shapes import random_model
from dpo_cli.scoring.layout import LAYOUTS, LayoutName
from dpo_cli.scoring.regimes import random_pairs
from dpo_cli.scoring.scorer import MAX_READ_SHARE, Scorer
from dpo_cli.scoring.varlen import VARLEN_KERNELS, reason_against

SECONDS = 450
MIB = 2**20
HEAD_SIZES = (32, 64, 96, 128, 256)
HEADS = ((4, 2), (14, 2))
"""Heads of queries, and of keys and values: two and seven a key's."""
GPU_SHAPES = ["qwen2.5-0.5b", "qwen2.5-1.5b", "llama-3.2-3b", "llama-3.1-8b"]


def kernels(machine: Machine) -> list[str]:
    """Which kernels are there, and whether they align, slide and cap as they must."""
    lines = []
    for name, make in VARLEN_KERNELS.items():
        kernel = make()
        if kernel is None:
            lines.append(f"* {name}: not there")
            continue
        for head_size, heads, window, softcap in product(HEAD_SIZES, HEADS, (None, 8), (None, 30.0)):
            reason = reason_against(kernel, machine.device, machine.compute_dtype, head_size, window, softcap, heads)
            what = f"head size {head_size}, {heads[0]} heads on {heads[1]}"
            what += (", window" if window else "") + (", soft cap" if softcap else "")
            lines.append(f"* {name}, {what}: {reason or 'right'}")
    return lines


@torch.no_grad()
def step_zero_margins(shape: str, machine: Machine) -> str:
    """How far log-probabilities of the training layout are from padded ones, nats: what a step-0 margin may be."""
    model = add_adapter(random_model(shape, machine, "nf4"), LoraParams(), 0)
    keep_weights_unpacked(model)
    base: Any = model.get_base_model()
    groups = random_pairs("harmless", 16, base.config.vocab_size)
    results: dict[LayoutName, torch.Tensor] = {}
    for name in LAYOUTS:
        with Scorer(model, machine.compute_dtype, name) as scorer:
            scorer.max_read_share = MAX_READ_SHARE  # as the probe finds for these
            found = torch.zeros(len(groups), 2, dtype=torch.float64)
            for indices in scorer.split(groups, 4096):
                found[indices] = scorer.score([groups[index] for index in indices]).logps_BK.cpu()
            results[name] = found
    del model, base  # the next shape runs in a process of its own and needs the room
    gc.collect()
    torch.cuda.empty_cache()
    margins = {name: (found - results["padded"]).diff(dim=1).abs().max().item() for name, found in results.items()}
    return ", ".join(f"{name} {margin:.3g}" for name, margin in margins.items() if name != "padded")


def bench(shape: str, layout: LayoutName, num_pairs: int, seconds: float) -> dict[str, Any] | str:
    """The figures of one ``dpo-cli bench``, or why there are none."""
    command = [sys.executable, "-m", "dpo_cli", "bench", "--shape", shape, "--regime", "harmless", "--json"]
    command += ["--pairs", str(num_pairs), "--turns", "3", "--set", f"runtime.layout={layout}"]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return "out of time"
    lines = ended.stdout.strip().splitlines()
    if ended.returncode or not lines:
        return (ended.stderr.strip().splitlines() or ["no output"])[-1]
    return json.loads(lines[-1])


def row(shape: str, layout: str, name: str, figures: dict[str, Any]) -> str:
    """One line of the table."""
    found = figures[name]
    sheet = "" if found["mfu_datasheet"] is None else f" / {found['mfu_datasheet']:.1%}"
    return (
        f"| {shape} | {name} | {layout} | {found['pairs_per_s']:.2f} | {found['logical_tokens_per_s']:.0f} |"
        f" {found['packed_tokens_per_s']:.0f} | {found['padding_share']:.1%} | {found['mfu']:.1%}{sheet} |"
        f" {found['peak_bytes'] / MIB:.0f} | {found['least_bytes'] / MIB:.0f} | {found['recompute']} |"
    )


def main() -> None:
    """Measure, and write the result file as it grows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="result file; left out: only printed")
    parser.add_argument("--shapes", nargs="+", default=GPU_SHAPES)
    parser.add_argument("--layouts", nargs="+", default=["shared", "padded"], choices=LAYOUTS)
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="no shape is begun beyond this")
    arguments = parser.parse_args()
    begun = time.monotonic()
    machine = prepare_machine(RuntimeParams(), embedded=False)
    device, on_gpu = machine.device, is_gpu(machine.device)
    hardware = torch.cuda.get_device_name(device) if on_gpu else f"{platform.machine()} CPU, no GPU"
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "bitsandbytes"))
    lines = [f"# The engine on {hardware}", "", f"`python benchmarks/gpu.py {' '.join(sys.argv[1:])}`", "", versions]
    lines += ["", "## Variable-length kernels against the definition", ""]
    lines += kernels(machine) if on_gpu else ["* not tried: no GPU"]
    lines += ["", "## Passes", "", "MFU: of a product in the same run / of the datasheet. Memory in MiB.", ""]
    columns = ["shape", "pass", "layout", "pairs/s", "logical tokens/s", "packed tokens/s", "padding", "MFU"]
    columns += ["peak", "least", "recompute"]
    lines += [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    notes = ["", "## Largest step-0 margin against the padded layout, nats", ""]
    for shape in arguments.shapes:
        for layout in arguments.layouts:
            left = arguments.seconds - (time.monotonic() - begun)
            if left < 30:
                notes.append(f"* {shape}, {layout}: not begun, out of time")
                continue
            figures = bench(shape, layout, arguments.pairs, left)
            if isinstance(figures, str):
                notes.append(f"* {shape}, {layout}: no figures: {figures}")
            else:
                lines += [row(shape, layout, name, figures) for name in ("precompute_ref", "train")]
        if arguments.seconds - (time.monotonic() - begun) > 30:
            notes.append(f"* {shape}, {machine.dtype_name}: {step_zero_margins(shape, machine)}")
        text = "\n".join([*lines, *notes, ""])
        if arguments.out:
            arguments.out.write_text(text, encoding="utf-8")
        print(text, flush=True)


if __name__ == "__main__":
    main()
