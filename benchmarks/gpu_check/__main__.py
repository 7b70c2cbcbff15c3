"""Eight minutes on a GPU: whether the code for it runs, whether it is right, and how fast it is.

    python -m benchmarks.gpu_check [--parts NAME,NAME] [--out FILE.json]

Each part runs in a process of its own and has a limit of time; what it found is in the result file at once, and as a
table beside it. A part that fails, or whose process ends, is recorded with its reason, and the rest goes on. Started
again it does what is missing, as long as hardware, versions and code are the same. On a CPU all parts run on tiny
models, and what needs a GPU says so.

It ends with 0 if nothing failed and nothing differs from what was expected, else with 1.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from benchmarks.gpu_check import ROOT
from benchmarks.gpu_check.parts import PARTS, describe, perform
from dpo_cli.core.artifacts import write_json, write_text
from dpo_cli.core.environment import prepare_environment

SECONDS = 480
LEAST_S = 15
"""No part begins that has less time."""


def main(words: Sequence[str] | None = None) -> int:
    """Run what is missing; the exit code."""
    arguments = _parse(words)
    prepare_environment()
    if arguments.describe:
        print(json.dumps(describe()))
        return 0
    if arguments.perform:
        dies = arguments.plant == arguments.perform
        perform(arguments.perform, arguments.small, arguments.folder, arguments.into, dies=dies)
        return 0
    begun = time.monotonic()
    machine = look()
    small = arguments.small or not machine["has_gpu"]
    machine["models"] = "tiny" if small else "real shapes"
    out = arguments.out or _place_of(machine, small)
    _refuse_place(out)
    found = {} if arguments.again else _recall(out, machine)
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        for name in arguments.parts:
            if found.get(name, {}).get("status") == "done":
                print(f"{name}: done before", file=sys.stderr)
                continue
            left = arguments.seconds - (time.monotonic() - begun)
            if left < LEAST_S:
                found[name] = {"status": "out of time", "reason": "not begun: start it again for the rest"}
            else:
                print(f"{name} ...", file=sys.stderr, flush=True)
                extra = [*(["--small"] if small else []), *(["--plant", name] if name == arguments.plant else [])]
                found[name] = run_part(name, extra, Path(folder), min(left, PARTS[name].limit_s))
            write_json(out, {"machine": machine, "parts": {part: found[part] for part in PARTS if part in found}})
            write_text(out.with_suffix(".md"), table(machine, found))
    print(table(machine, found))
    print(f"{out} and {out.with_suffix('.md')}", file=sys.stderr)
    return int(any(is_wrong(found[name]) for name in arguments.parts))


def _refuse_place(out: Path) -> None:
    """Refuse a place for results that cannot be written to, before minutes have gone by."""
    reason = "it is a folder" if out.is_dir() else None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out.parent).close()
    except OSError as error:
        reason = error.strerror
    if reason is not None:
        raise SystemExit(f"{out}: {reason}; name a file that can be written: --out FILE.json")


def is_wrong(part: Mapping[str, Any]) -> bool:
    """Whether a part did not come to its end, or saw something else than was expected."""
    return part["status"] != "done" or any(each["verdict"] == "differs" for each in part["answers"])


def look() -> dict[str, Any]:
    """The machine, seen by a process that ends before any memory is measured."""
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--describe"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"torch does not start here:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def run_part(name: str, extra: Sequence[str], folder: Path, limit_s: float) -> dict[str, Any]:
    """Run a part in a process of its own; what it found, its status, and why it failed where it did."""
    into, log = folder / f"{name}.json", folder / f"{name}.log"
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--perform", name, "--folder", str(folder)]
    command += ["--into", str(into), *extra]
    begun = time.monotonic()
    with log.open("w", encoding="utf-8") as said:
        process = subprocess.Popen(command, cwd=ROOT, stdout=said, stderr=subprocess.STDOUT, env=_environment())
        try:
            code: int | None = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = None
            _end(process.pid)
            process.wait()
        except KeyboardInterrupt:
            _end(process.pid)
            raise
    part: dict[str, Any] = {"status": "done", "answers": [], "figures": {}}
    if into.is_file():
        part |= json.loads(into.read_text(encoding="utf-8"))
    part["seconds"] = round(time.monotonic() - begun, 1)
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    if code is None:
        part |= {"status": "out of time", "reason": f"ended after {limit_s:.3g} s"}
    elif code:
        part |= {"status": "failed", "reason": f"exit code {code}: {lines[-1] if lines else 'it said nothing'}"}
    if code != 0:
        part["log"] = lines[-40:]
    return part


def _environment() -> dict[str, str]:
    """This process's, with the package in reach."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.environ | {"PYTHONPATH": path}


def _end(pid: int) -> None:
    """End a process and what it has started."""
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(pid)
        for process in [*parent.children(recursive=True), parent]:
            process.kill()


def _recall(out: Path, machine: Mapping[str, Any]) -> dict[str, Any]:
    """The parts of a result file that are of the same hardware, versions and code; another file is put aside."""
    if not out.is_file():
        return {}
    same = ("device", "driver", "cuda", "python", "versions", "code", "models")
    try:
        before = json.loads(out.read_text(encoding="utf-8"))
        parts = {name: {"answers": [], **part} for name, part in before["parts"].items() if part["status"]}
        what = "of another machine, other versions or other code"
        if all(before["machine"].get(name) == machine.get(name) for name in same):
            return parts
    except (ValueError, KeyError, TypeError, AttributeError):
        what = "no result of this check"
    aside = out.with_suffix(".before.json")
    out.replace(aside)
    print(f"{out} was {what}: it is {aside} now", file=sys.stderr)
    return {}


def _place_of(machine: Mapping[str, Any], small: bool) -> Path:
    """Where results go by themselves: into the repository where they are of a GPU."""
    if small:
        return ROOT / ".scratch" / "gpu_check.json"
    name = re.sub(r"[^a-z0-9]+", "_", machine["device"].lower())
    return ROOT / "benchmarks" / "results" / f"gpu_check_{name}.json"


def table(machine: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """All answers on a page."""
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items() if number)
    card = [machine["device"]]
    if machine["has_gpu"]:
        card += [f"{machine['memory_gib']} GiB", f"driver {machine['driver']}", f"CUDA {machine['cuda']}"]
    lines = [
        f"# GPU check: {machine['device']}",
        "",
        f"{', '.join(card)}; Python {machine['python']}, {versions}; commit {machine['commit'] or 'unknown'}, code"
        f" {machine['code'][:12]}; {machine['models']}. Made by `python -m benchmarks.gpu_check`.",
        "",
        "| part | question | expected | seen | verdict |",
        "|---|---|---|---|---|",
    ]
    for name in (part for part in PARTS if part in found):
        part = found[name]
        if part["status"] != "done":
            lines.append(_row(name, "does it come to its end?", "yes", part["reason"], part["status"]))
        for each in part.get("answers", ()):
            lines.append(_row(name, *(each[key] for key in ("question", "expected", "seen", "verdict"))))
    missing = [name for name in PARTS if name not in found]
    lines += ["", f"Not asked: {', '.join(missing)}." if missing else "All parts were asked.", ""]
    return "\n".join(lines)


def _row(*cells: str) -> str:
    return f"| {' | '.join(cell.replace('|', '/').replace(chr(10), ' ') for cell in cells)} |"


def _parse(words: Sequence[str] | None) -> argparse.Namespace:
    def names(text: str) -> list[str]:
        chosen = text.split(",")
        if unknown := [name for name in chosen if name not in PARTS]:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: not one of {', '.join(PARTS)}")
        return chosen

    def result(text: str) -> Path:
        if (path := Path(text)).suffix != ".json":
            raise argparse.ArgumentTypeError(f"{text}: must end with .json; the table beside it ends with .md")
        return path

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", type=names, default=[*PARTS], help=f"of {', '.join(PARTS)}")
    parser.add_argument("--again", action="store_true", help="repeat what is done, too")
    parser.add_argument("--small", action="store_true", help="tiny models on a GPU, too")
    parser.add_argument("--out", type=result, help="result file, JSON; the table is written beside it")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"for all parts together; {SECONDS}")
    parser.add_argument("--plant", choices=PARTS, metavar="PART", help="end its process after its first answer: a test")
    parser.add_argument("--describe", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--perform", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(words)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("stopped: the parts that ended are kept; started again it does the others", file=sys.stderr)
        sys.exit(130)
