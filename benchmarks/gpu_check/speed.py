"""Pairs a second and MFU of both passes, against the prediction for the card and against TRL."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from typing import Any

import torch

from benchmarks.gpu_check import ROOT
from benchmarks.gpu_check.bench import Bench, RecordingReporter
from benchmarks.gpu_check.memory import saved_model
from dpo_cli.core.errors import MachineError
from dpo_cli.core.load_params import parse_overrides
from dpo_cli.models.device import GPUS, gpu_called, release_memory
from dpo_cli.training.bench import PASSES, BenchOptions, measure

LARGE, SMALL = "llama-3.1-8b", "qwen2.5-0.5b"
CASES: tuple[tuple[str, tuple[str, ...]], ...] = (
    (LARGE, ()),
    (SMALL, ()),
    (LARGE, ("runtime.layout=padded",)),
    (LARGE, ("runtime.max_gpu_gib=12",)),
)
"""Shapes, and settings that the prediction is not for."""


def speed(bench: Bench) -> None:
    """``dpo-cli bench`` on shapes of models, what ``bench --card`` predicts of it, and an 8B in 12 GiB."""
    predictions = {shape: _predict(bench, shape) for shape in sorted({bench.shape(wanted) for wanted, _ in CASES})}
    for wanted, settings in CASES[: 1 if bench.small else None]:
        shape = bench.shape(wanted)
        case = " ".join([f"{shape} in nf4", *settings])
        params = parse_overrides([f"runtime.device={'cuda' if bench.on_gpu else 'cpu'}", *settings])
        options = BenchOptions(PASSES, "harmless", shape, 4 if bench.small else 64, 1 if bench.small else 3)
        try:
            figures = measure(options, params, RecordingReporter())
        except MachineError as error:
            bench.check(f"Both passes of {case}?", "they run", str(error), False)
            continue
        bench.figures[case] = figures
        for name in ("train", "precompute_ref"):
            limit, expected = (None, "it runs") if settings else _limit_of(predictions[shape], name)
            speed = figures[name]["pairs_per_s"]
            bench.check(
                f"{name} of {case}, {figures['num_pairs']} pairs as of HH?",
                expected,
                _in_words(figures[name]),
                None if limit is None else bench.at_size(0.5 * limit <= speed <= 1.1 * limit),
            )
        release_memory()


def _in_words(found: dict[str, Any]) -> str:
    sheet = "" if found["mfu_datasheet"] is None else f", {found['mfu_datasheet']:.0%} of the data sheet's"
    return (
        f"{found['pairs_per_s']:.2f} pairs/s, MFU {found['mfu']:.0%} of a product's{sheet}; recompute"
        f" {found['recompute']}, {found['max_tokens_per_microbatch']} tokens at once, peak"
        f" {found['peak_bytes'] / 2**30:.2f} GiB"
    )


def _predict(bench: Bench, shape: str) -> subprocess.Popen[str] | None:
    """Begin a prediction for this GPU; None where its data sheet is not known."""
    gpu = gpu_called(torch.cuda.get_device_name()) if bench.on_gpu else None
    card = next((name for name, known in GPUS.items() if known is gpu), None)
    if card is None:
        return None
    command = [sys.executable, "-m", "dpo_cli", "bench", "--card", card, "--shape", shape, "--pairs", "64", "--json"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True)


_PREDICTED: dict[int, dict[str, Any]] = {}


def _limit_of(prediction: subprocess.Popen[str] | None, name: str) -> tuple[float | None, str]:
    """Pairs a second that are predicted at most, and that in words."""
    if prediction is None:
        return None, "no prediction: the card's data sheet is not known"
    if prediction.pid not in _PREDICTED:
        out, said = prediction.communicate()
        lines = out.strip().splitlines()
        if prediction.returncode or not lines:
            return None, f"no prediction: {(said.strip().splitlines() or ['it says nothing'])[-1]}"
        _PREDICTED[prediction.pid] = json.loads(lines[-1])
    limit = _PREDICTED[prediction.pid][name]["pairs_per_s"]
    return limit, f"half of the predicted {limit:.1f} pairs/s or more"


def against_trl(bench: Bench) -> None:
    """Both on the same model and pairs, each in a process of its own, in turns."""
    question, expected = "Training step against TRL's, same pairs, nf4?", "the same losses, and ours is faster"
    if not bench.on_gpu or bench.small or importlib.util.find_spec("trl") is None:
        bench.check(question, expected, "not run", None, refused="TRL is not installed (extra parity)")
        return
    folder = saved_model(bench, "llama-3.2-3b")
    release_memory()
    command = [sys.executable, str(ROOT / "benchmarks" / "against_trl.py"), "--device", "cuda", "--model", str(folder)]
    command += ["--regimes", "harmless-base", "--sides", "best", "--runs", "2", "--pairs", "64"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    bench.figures["against_trl"] = done.stdout
    for name, ratio, row in _ratios(done.stdout):
        bench.check(f"{question} {name}", expected, row, ratio is not None and ratio > 1)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
        bench.check(question, expected, f"no comparison: {said[:200]}", False)


def _ratios(report: str) -> list[tuple[str, float | None, str]]:
    """The rows of the report's two tables: name of the pass, TRL's time by ours, and the row in words."""
    rows, title = [], ""
    for line in report.splitlines():
        title = line.removeprefix("## ") if line.startswith("## ") else title
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| harmless-base") and title:
            found = re.match(r"[\d.]+", cells[3])
            words = f"TRL / ours {cells[3]} in time, {cells[6]} in memory; pairs/s {cells[4]} and {cells[5]}"
            rows.append((title, float(found[0]) if found else None, words if found else cells[3]))
    return rows
