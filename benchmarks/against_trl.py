"""Our training step and reference pass against TRL's DPOTrainer, on one CPU thread, as ratios within one run.

    python benchmarks/against_trl.py [--out FILE] [--regimes 0.42,harmless-base] [--vocabularies 1024] [--runs 3]
    python benchmarks/against_trl.py --model DIR [--regimes harmless-base] [--device cuda]

Both tools load the same saved llama (4 layers of width 256, random weights) with the same LoRA adapter, get the same
token ids, reference log-probabilities and pairs per optimizer step in the same order, and train with AdamW in float32.
With ``--model`` they load that model in 4-bit nf4 with double quantization in its place, and the adapter is float32 in
both: TRL's trainer makes it bfloat16 by itself, and is given its numbers back, so that the two compute the same. Both
leave bitsandbytes' repacking of weights off, which on some processors loses the gradient.
Each tool runs in a process of its own, and they take turns. No figures are printed unless the loss of every step and
every reference log-probability agree.

TRL runs in several configurations. ``default`` is DPOConfig as it comes, but for what the comparison needs: float32,
no gradient checkpointing, cached references, nothing saved or reported. ``best`` has its data sorted by length within
each optimizer step (and over all data for the reference pass), no logging, and as many pairs a forward as a short
calibration finds fastest (the fewest, where it hardly matters). ``largest`` is ``best`` with all pairs of a step in one
forward, which fits, and is slower on a CPU. ``compact`` is ``best`` with a patch that no option of TRL's gives: its
head scores the answers' tokens only, as it does on a GPU; on a CPU it scores every position. ``best`` runs beside
ours in every run; the others are spread over the runs, once each.

Times are CPU time of the process, which with one thread is the time that passes on an idle machine. Of the optimizer
steps all but the first are timed; the reference pass after a small batch. Peak memory is the most that was resident
above what the process held when model and data were loaded.

With ``--device cuda`` both compute in bfloat16 on the GPU. Times are those that pass until it has done its work, and
peak memory is what PyTorch's tensors took of it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.comparison.cases import (
    ADVERSARIAL,
    BFLOAT16_TOLERANCES,
    FEW_PAIRS,
    HARMLESS,
    HARMLESS_FILE,
    LARGE_VOCABULARY,
    MANY_PAIRS,
    PAIRS_A_STEP,
    PASSES,
    REGIMES,
    TOLERANCE,
    Case,
    Outcome,
    prepare,
    tell,
)
from benchmarks.comparison.ours import run_ours
from benchmarks.comparison.theirs import (
    BEST,
    COMPACT,
    DEFAULT,
    FIXED_PAIRS,
    LARGEST,
    calibrate,
    run_trl,
)

OURS = "ours"
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**36)}
"""Has glibc keep freed memory. By default it gives every large block back, and TRL's head at a large vocabulary spends
half of its time on the page faults of getting it again."""

REFUSED = "no figures"
COLUMNS = (
    "| regime | V | TRL | time, TRL / ours | TRL, pairs/s | ours, pairs/s | memory, TRL / ours | TRL peak, MiB"
    " | ours peak, MiB | TRL process, MiB | ours process, MiB | difference |"
)


def run_side(side: str, job: dict[str, Any]) -> Any:
    """Run this script in a process of its own for one side; what it found.

    Raises:
        SystemExit: It failed; what it said is shown.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    environment |= {"HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment |= {"TORCHDYNAMO_DISABLE": "0"} | KEEP_MEMORY  # what a side compiles is compiled
    command = [sys.executable, __file__, "--side", side, "--job", json.dumps(job, default=str)]
    process = subprocess.run(command, capture_output=True, text=True, env=environment)
    if process.returncode:
        raise SystemExit(f"{side} failed:\n{process.stderr[-4000:]}")
    return json.loads(process.stdout.splitlines()[-1])


def do_job(side: str, job: dict[str, Any]) -> Any:
    """What the process of a side does."""
    import transformers

    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    cases = [
        Case(**{**case, "folder": Path(case["folder"]), "model": case["model"] and Path(case["model"])})
        for case in job["cases"]
    ]
    if side == "prepare":
        return prepare(cases)
    if side == "calibrate":
        return calibrate(cases[0])
    if side == OURS:
        return asdict(run_ours(cases[0]))
    return asdict(run_trl(cases[0], side, job["pairs_a_forward"]))


@dataclass(frozen=True)
class Meeting:
    """A run of TRL beside a run of ours."""

    trl: Outcome
    ours: Outcome

    def differences(self, what: str) -> list[tuple[float, str]]:
        """By how many nats the two differ, and where."""
        if what == "step":
            both = zip(self.trl.losses, self.ours.losses, strict=True)
            return [(abs(theirs - ours), f"the loss of step {n}") for n, (theirs, ours) in enumerate(both, 1)]
        return [
            (abs(theirs - ours), f"{answer} of pair {n}")
            for n, rows in enumerate(zip(self.trl.logps, self.ours.logps, strict=True), 1)
            for answer, theirs, ours in zip(("chosen", "rejected"), *rows, strict=True)
        ]


def spread(values: Sequence[float]) -> str:
    """Median, and least and largest where there are several."""
    ends = f"[{min(values):.2f}, {max(values):.2f}]" if len(values) > 1 else "[one run]"
    return f"{statistics.median(values):.2f} {ends}"


def table_row(case: Case, config: str, what: str, meetings: Sequence[Meeting]) -> str:
    """A line of a table; no figures where the two do not agree."""
    found = [difference for meeting in meetings for difference in meeting.differences(what)]
    worst, where = max(found, key=lambda item: math.inf if math.isnan(item[0]) else item[0])
    start = f"| {case.regime} | {case.vocabulary} | {config}"
    if not worst <= case.tolerance(what):
        nothing = " |" * (COLUMNS.count("|") - start.count("|") - 3)
        return f"{start} | {REFUSED}: {where} differs |{nothing} {worst:.1e} |"
    trl, ours = [meeting.trl for meeting in meetings], [meeting.ours for meeting in meetings]
    rates = [case.num_timed / statistics.median(found.seconds[what] for found in side) for side in (trl, ours)]
    peaks = [statistics.median(found.mib[what] for found in side) for side in (trl, ours)]
    processes = [statistics.median(outcome.process_mib for outcome in side) for side in (trl, ours)]
    ratio = spread([meeting.trl.seconds[what] / meeting.ours.seconds[what] for meeting in meetings])
    return (
        f"{start} | {ratio} | {rates[0]:.2f} | {rates[1]:.2f} | {peaks[0] / peaks[1]:.2f} | {peaks[0]:.0f}"
        f" | {peaks[1]:.0f} | {processes[0]:.0f} | {processes[1]:.0f} | {worst:.1e} |"
    )


def compare(case: Case, arguments: argparse.Namespace) -> tuple[dict[str, list[str]], float]:
    """Have the sides take turns at a case; lines of both tables, and the least CPU share."""
    job = {"cases": [asdict(case)]}
    fastest = run_side("calibrate", job)
    others = [side for side in arguments.sides if side != BEST]
    meetings: dict[str, list[Meeting]] = {side: [] for side in arguments.sides}

    def outcome(side: str) -> Outcome:
        pairs = dict.fromkeys(PASSES, FIXED_PAIRS[side]) if side in FIXED_PAIRS else fastest
        found = Outcome(**run_side(side, job | {"pairs_a_forward": pairs}))
        tell(f"{case.regime} {case.vocabulary} {side}: step {case.num_timed / found.seconds['step']:.2f} pairs/s")
        return found

    for run in range(arguments.runs):
        before = outcome(BEST) if BEST in arguments.sides else None
        ours = outcome(OURS)
        if before:
            meetings[BEST].append(Meeting(before, ours))
        for side in others[run :: arguments.runs]:
            meetings[side].append(Meeting(outcome(side), ours))
    lines: dict[str, list[str]] = {what: [] for what in PASSES}
    for side, met in meetings.items():
        for what in PASSES:
            pairs = FIXED_PAIRS.get(side, fastest[what])
            if met:
                lines[what].append(table_row(case, f"{side}, {pairs}", what, met))
                tell(lines[what][-1])
    everyone = [found for met in meetings.values() for meeting in met for found in (meeting.trl, meeting.ours)]
    return lines, min(found.cpu_share for found in everyone)


def processor() -> str:
    """The CPU's name."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


_ON_CPU = ("float32", "CPU time", "what was resident")


def gpu_name() -> str:
    """The GPU's name, as a process says it that ends at once."""
    command = [sys.executable, "-c", "import torch; print(torch.cuda.get_device_name())"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def heading(arguments: argparse.Namespace) -> list[str]:
    """What was measured, where, and with which versions."""
    on_gpu = arguments.device != "cpu"
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "trl", "datasets"))
    kept = " ".join(f"{name}={value}" for name, value in KEEP_MEMORY.items())
    machine = (
        f"Command: `{shlex.join(['python', 'benchmarks/against_trl.py', *sys.argv[1:]])}`."
        f" {gpu_name() if on_gpu else processor()}, one thread, Python {platform.python_version()}, {packages}. Memory"
        f" allocator of both tools: glibc's with {kept}."
    )
    model = "Llama of 4 layers of width 256" if arguments.model is None else f"{arguments.model.name} in nf4"
    dtype, times, held = ("bfloat16", "those that passed", "what tensors took") if on_gpu else _ON_CPU
    limits = " and ".join(f"{limit:g}" for limit in BFLOAT16_TOLERANCES.values()) if on_gpu else f"{TOLERANCE:g}"
    method = (
        f"{model} with LoRA (rank 16, all linear layers), {dtype}, {PAIRS_A_STEP} pairs an"
        f" optimizer step, {arguments.runs} runs with a process of its own for each tool. The number after a"
        " configuration of TRL's is its pairs a forward pass. A ratio above 1 means that ours is faster, or holds less:"
        f" median [min, max] of neighboring runs. Times are {times}. Peak is {held} above model and data,"
        " process is all of it. Difference is the largest of any step's loss, or of any answer's log-probability, in"
        f" nats; above {limits} there are no figures."
    )
    title = f"# Training step and reference pass against TRL, {'GPU' if on_gpu else 'CPU'}"
    return [title, "", *textwrap.wrap(machine, 120), "", *textwrap.wrap(method, 120)]


def lengths_table(cases: Sequence[Case]) -> list[str]:
    """Mean tokens of each case."""
    lines = [
        "",
        "| regime | V | timed pairs a run | prompt | chosen | rejected | prompt : answer | lengths |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case in cases:
        pairs = case.make_pairs()[PAIRS_A_STEP:]
        prompt, chosen, rejected = (statistics.mean(len(pair[part]) for pair in pairs) for part in range(3))
        lengths = "equal" if case.regime == ADVERSARIAL else "lognormal"
        if case.regime == HARMLESS:
            real = HARMLESS_FILE.is_file()
            lengths = f"of {HARMLESS_FILE.name}" if real else f"lognormal, since {HARMLESS_FILE.name} is not there"
        lines.append(
            f"| {case.regime} | {case.vocabulary} | {case.num_timed} | {prompt:.0f} | {chosen:.0f} | {rejected:.0f}"
            f" | {2 * prompt / (chosen + rejected):.2f} | {lengths} |"
        )
    return lines


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""

    def some_of(names: Sequence[str]) -> Any:
        def parse_names(text: str) -> list[str]:
            chosen = text.split(",")
            if unknown := set(chosen) - set(names):
                raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: not one of {', '.join(names)}")
            return chosen

        return parse_names

    regimes = [*REGIMES, ADVERSARIAL]
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--regimes", type=some_of(regimes), default=regimes, help=f"of {', '.join(regimes)}")
    parser.add_argument(
        "--vocabularies", type=lambda text: [int(size) for size in text.split(",")], default=[1024, 32768]
    )
    parser.add_argument("--model", type=Path, help="a model directory to load in nf4, in place of small random models")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="cuda: with --model alone")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--pairs", type=int, help="timed pairs a run; 48, and 32 at large vocabularies")
    sides = [BEST, LARGEST, DEFAULT, COMPACT]
    parser.add_argument("--sides", type=some_of(sides), default=sides, help=f"TRL's: of {', '.join(sides)}")
    parser.add_argument("--out", type=Path, help="write the tables to a file, too")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    if arguments.device != "cpu" and arguments.model is None:
        parser.error("--device cuda needs --model: the small random models show nothing of a GPU")
    if arguments.model is not None:
        config = json.loads((arguments.model / "config.json").read_text(encoding="utf-8"))
        arguments.vocabularies = [config.get("text_config", config)["vocab_size"]]
    return arguments


def main() -> None:
    """Measure and print the tables."""
    arguments = parse()
    if arguments.side:
        print(json.dumps(do_job(arguments.side, arguments.job)))
        return
    if sys.platform != "linux":
        raise SystemExit("peak memory is read from /proc, which only Linux has")
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="against-trl-") as folder:
        cases = []
        for vocabulary in arguments.vocabularies:
            pairs = arguments.pairs or (FEW_PAIRS if vocabulary >= LARGE_VOCABULARY else MANY_PAIRS)
            num_steps = 1 + math.ceil(pairs / PAIRS_A_STEP)
            model = arguments.model and arguments.model.resolve()
            cases += [
                Case(regime, vocabulary, num_steps, Path(folder), model, arguments.device)
                for regime in arguments.regimes
            ]
        run_side("prepare", {"cases": [asdict(case) for case in cases]})
        compared = [compare(case, arguments) for case in cases]
    report = [*heading(arguments), *lengths_table(cases)]
    for what, title in PASSES.items():
        report += ["", f"## {title}", "", COLUMNS, "|" + "---|" * (COLUMNS.count("|") - 1)]
        report += [line for lines, _ in compared for line in lines[what]]
    share = min(share for _, share in compared)
    report += [
        "",
        f"It took {(time.monotonic() - begun) / 60:.0f} minutes; every process had {share:.0%} of a core or more.",
    ]
    text = "\n".join(report) + "\n"
    print(text, end="")
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")
    if f"| {REFUSED}" in text:
        raise SystemExit("the tools do not agree everywhere; see the tables")


if __name__ == "__main__":
    main()
