"""What ``dpo-cli doctor`` looks at without torch: packages, git, DVC, disks, memory, the clock, and Windows around it.

Each check gives findings of one line; a fault has a remedy of one line, too.
"""

from __future__ import annotations

import configparser
import errno
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dpo_cli.core import paths
from dpo_cli.core.environment import available_memory_bytes, is_wsl, usable_cores
from dpo_cli.core.errors import DISK_FULL, DpoCliError, MachineError, first_line
from dpo_cli.core.progress import Status

GIB = 2**30


@dataclass(frozen=True)
class Finding:
    """What a check found.

    Attributes:
        name: What was looked at.
        status: ``bad`` for a fault, ``warn`` for what may become one, ``good``, or ``plain`` for a fact.
        found: What there is, one line.
        remedy: What to do about it, one line; empty where nothing is wrong.
        exit_code: With which the command ends where this is a fault.
    """

    name: str
    status: Status
    found: str
    remedy: str = ""
    exit_code: int = MachineError.exit_code


def quoted(*words: str) -> str:
    """A command line that a shell takes as it is."""
    return shlex.join(words)


def pip(*arguments: str) -> str:
    """A command that installs something for this very interpreter."""
    return f"run: {quoted(sys.executable, '-m', 'pip', 'install', *arguments)}"


def system() -> Finding:
    """The machine in words."""
    name = f"{platform.system()} {platform.release()}{' (WSL)' if is_wsl() else ''}"
    python = f"Python {platform.python_version()} ({sys.executable})"
    return Finding("system", "plain", f"dpo-cli {version('dpo-cli')}, {python}, {name}, {usable_cores()} cores")


# --- packages -------------------------------------------------------------------------------

_SHOWN = ("torch", "transformers", "peft", "bitsandbytes", "dvc")


def packages() -> Iterator[Finding]:
    """Those that dpo-cli requires, held against what is installed."""
    from packaging.requirements import Requirement

    required = [Requirement(line) for line in requires("dpo-cli") or ()]
    required = [each for each in required if each.marker is None or each.marker.evaluate({"extra": ""})]
    faults = 0
    for each in required:
        try:
            installed = version(each.name)
        except PackageNotFoundError:
            installed = ""
        if installed and each.specifier.contains(installed, prereleases=True) and _can_be_found(each.name):
            continue
        faults += 1
        found = f"{each.name} {installed}, and {each.specifier} is needed" if installed else f"{each.name} is missing"
        yield Finding("packages", "bad", found, pip(*(["--force-reinstall"] if installed else []), str(each)))
    if not faults:
        named = ", ".join(f"{name} {version(name)}" for name in _SHOWN)
        yield Finding("packages", "good", f"{named}; all {len(required)} as required")


def _can_be_found(name: str) -> bool:
    """Whether a package of which there is a record is there itself; only those whose module has the same name."""
    return name not in _SHOWN or find_spec(name) is not None


# --- git and DVC ----------------------------------------------------------------------------


def run(*command: str, timeout_s: float = 8.0) -> subprocess.CompletedProcess[str]:
    """A short command; raises what subprocess does."""
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout_s)


def git(*, in_project: bool) -> Finding:
    """Whether git is there, and what it says of the project."""
    if shutil.which("git") is None:
        return Finding(
            "git", "bad", "git is not installed; DVC needs it", "install it: apt install git, or https://git-scm.com"
        )
    try:
        named = run("git", "--version").stdout.strip().removeprefix("git version ")
        if not in_project:
            return Finding("git", "good", named)
        state = run("git", "--no-optional-locks", "status", "--porcelain", "--untracked-files=no")
        head = run("git", "rev-parse", "--short", "HEAD")
    except (OSError, subprocess.TimeoutExpired) as error:
        return Finding("git", "bad", f"git cannot be run: {first_line(error)}", "install git anew")
    here = str(Path.cwd())
    if "dubious ownership" in state.stderr:
        remedy = f"run: {quoted('git', 'config', '--global', '--add', 'safe.directory', here)}"
        return Finding("git", "bad", f"the project belongs to another user, so git {named} refuses it", remedy)
    if state.returncode and "not a git repository" not in state.stderr:
        words = state.stderr.strip().partition("\n")[0]
        return Finding("git", "bad", f"git {named} fails: {words}", "run: git status")
    if state.returncode:
        remedy = "run: git init && git add --all && git commit -m project"
        return Finding("git", "bad", f"{here} is in no git repository, which DVC needs", remedy)
    if head.returncode:
        remedy = "run: git add --all && git commit -m project"
        return Finding("git", "warn", f"{named}; nothing is committed, so dvc exp run does not work", remedy)
    changed = len(state.stdout.splitlines())
    found = f"{changed} files changed since the last commit" if changed else "all is committed"
    return Finding("git", "good", f"{named}; {found} ({head.stdout.strip()})")


def start_dvc(*, in_project: bool) -> subprocess.Popen[str] | None:
    """Ask DVC for the project's state, or its version, in a process that :func:`dvc` waits for; None without DVC."""
    if find_spec("dvc") is None:
        return None
    asked = ("status", "--json") if in_project else ("--version",)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DVC_STAGE")}
    return subprocess.Popen(
        [sys.executable, "-m", "dvc", *asked],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def dvc(process: subprocess.Popen[str] | None, timeout_s: float, *, in_project: bool) -> Finding:
    """Whether DVC is there, and which stages it would run."""
    if process is None:
        return Finding("dvc", "plain", "not asked: its package is missing")
    try:
        out, said = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return Finding("dvc", "warn", f"dvc status took longer than {timeout_s:.0f} s", "run: dvc status")
    named = version("dvc")
    if not in_project and process.returncode == 0:
        return Finding("dvc", "good", named)
    try:
        changed = json.loads(out)
    except ValueError:
        lines = (said.strip() or out).strip().splitlines() or ["nothing was said"]
        words = next((line for line in lines if line.startswith("ERROR:")), lines[-1])
        is_locked = "lock" in words.lower()
        remedy = "wait for the other dvc to end, or end it" if is_locked else "run: dvc status"
        return Finding("dvc", "bad", f"{named}: {words.removeprefix('ERROR: ').strip()}", remedy)
    stale = [stage for stage, why in changed.items() if why != ["always changed"] and ":" not in stage]
    if not stale:
        return Finding("dvc", "good", f"{named}; all stages are up to date")
    return Finding("dvc", "plain", f"{named}; dpo-cli repro would run {', '.join(stale)}")


def _dvc_settings() -> dict[str, str]:
    """Section cache of DVC's configuration, with ``dir`` absolute; a repository's own file counts most."""
    home = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    found: dict[str, str] = {}
    for file in (home / "dvc" / "config", Path(".dvc/config"), Path(".dvc/config.local")):
        parser = configparser.ConfigParser(interpolation=None)
        with suppress(configparser.Error, OSError, UnicodeDecodeError):
            parser.read_string(re.sub(r"(?m)^\s+", "", file.read_text(encoding="utf-8")))
        if parser.has_section("cache"):
            here = dict(parser["cache"])
            if "dir" in here:
                here["dir"] = str((file.parent / Path(here["dir"]).expanduser()).resolve())
            found |= here
    return found


def dvc_cache() -> Path:
    """Where DVC keeps this project's files."""
    return Path(_dvc_settings().get("dir") or ".dvc/cache")


def links() -> Finding:
    """How DVC puts a file of its cache into the project: without a copy if the file systems can."""
    wanted = [kind.strip() for kind in _dvc_settings().get("type", "reflink,copy").strip("\"'").split(",")]
    cache = _existing(dvc_cache())
    try:
        with tempfile.TemporaryDirectory(dir=cache) as there, tempfile.TemporaryDirectory(dir=".", prefix=".") as here:
            source = Path(there) / "file"
            source.write_bytes(b"x" * 4096)
            kinds = [kind for kind in wanted if _can_link(kind, source, Path(here) / kind)]
    except OSError:  # said by disks()
        return Finding("dvc links", "plain", "not tried: the folder of DVC's cache cannot be written")
    if not kinds:
        remedy = "run: dvc config cache.type reflink,copy"
        return Finding(
            "dvc links", "bad", f"cache.type {','.join(wanted)} cannot link from {cache} into the project", remedy
        )
    what = {"copy": "copies, so data and models take their space twice"}.get(kinds[0], f"{kinds[0]}s, no copies")
    return Finding("dvc links", "good", what)


_FICLONE = 0x40049409


def _can_link(kind: str, source: Path, target: Path) -> bool:
    try:
        if kind == "hardlink":
            os.link(source, target)
        elif kind == "symlink":
            target.symlink_to(source.resolve())
        elif kind == "reflink":
            import fcntl  # not on Windows

            with source.open("rb") as old, target.open("wb") as new:
                fcntl.ioctl(new, _FICLONE, old.fileno())
        return kind in ("copy", "hardlink", "symlink", "reflink")
    except (OSError, ImportError):
        return False


# --- disks, memory, clock -------------------------------------------------------------------

_CACHE = "DVC's cache"
_FULL_GIB = 0.5
_SCARCE_GIB = 4.0


def disks(*, in_project: bool) -> Iterator[Finding]:
    """Whether files can be written where stages write them, and how much room there is."""
    places = {"temporary files": Path(tempfile.gettempdir())}
    if in_project:
        places = {"project": Path.cwd(), "half-done work": paths.scratch_root(), _CACHE: dvc_cache()} | places
    free: dict[int, tuple[float, list[str]]] = {}
    faults = 0
    for name, folder in places.items():
        where = _existing(folder).resolve()
        error = _try_to_write(where)
        if error is not None and error.errno not in DISK_FULL:
            faults += 1
            remedy = f"run: {quoted('chmod', '-R', 'u+w', str(where))}"
            if error.errno == errno.EROFS:
                elsewhere = "; or another cache: dvc cache dir DIR" if name == _CACHE else ""
                remedy = f"mount it writable: {quoted('mount', '-o', 'remount,rw', _mount_of(where))}{elsewhere}"
            yield Finding("disk", "bad", f"{where} ({name}) cannot be written: {error.strerror}", remedy)
            continue
        left = 0.0 if error is not None else shutil.disk_usage(where).free / GIB
        before, names = free.get(where.stat().st_dev, (left, []))
        free[where.stat().st_dev] = (min(left, before), [*names, name])
    for left, names in free.values():
        if left < _SCARCE_GIB:
            faults += 1
            remedy = "free some space; dvc gc --workspace deletes from DVC's cache what nothing uses"
            status: Status = "bad" if left < _FULL_GIB else "warn"
            yield Finding("disk", status, f"{left:.1f} GiB left for {', '.join(names)}", remedy)
    if not faults:
        yield Finding(
            "disk", "good", "; ".join(f"{left:.0f} GiB free for {', '.join(each)}" for left, each in free.values())
        )


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next((each for each in (folder, *folder.absolute().parents) if each.is_dir()), Path("/"))


def _mount_of(folder: Path) -> str:
    return str(next((each for each in (folder, *folder.parents) if each.is_mount()), folder))


def _try_to_write(folder: Path) -> OSError | None:
    """What the system says to a file of 1 MiB."""
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".dpo-cli-doctor-", suffix=".tmp") as file:
            file.write(b"\1" * 2**20)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error
    return None


def memory() -> Finding:
    """Memory of the machine that is free."""
    import psutil

    total, free = psutil.virtual_memory().total, available_memory_bytes()
    found = f"{free / GIB:.1f} GiB free of {total / GIB:.1f}"
    if free >= _FEW_BYTES:
        return Finding("memory", "good", found)
    largest = max(psutil.process_iter(["name", "memory_info"]), key=_resident, default=None)
    who = f" ({largest.info['name']} holds {_resident(largest) / GIB:.1f} GiB)" if largest else ""
    return Finding("memory", "bad" if free < _FEW_BYTES // 2 else "warn", f"{found}{who}", "close other programs")


_FEW_BYTES = 2 * GIB


def _resident(process: Any) -> int:
    found = process.info["memory_info"]
    return found.rss if found else 0


def clock() -> Finding:
    """Whether the clock is behind files that exist, or differs from that of the disk: DVC goes by times of files."""
    now = time.time()
    known = {Path(__file__): "dpo-cli's own files"}
    known |= {
        path: str(path) for path in (paths.PARAMS, Path("dvc.yaml"), Path("dvc.lock"), paths.RAW) if path.exists()
    }
    latest = max(known, key=lambda path: path.stat().st_mtime)
    ahead = latest.stat().st_mtime - now
    remedy = "set the clock: timedatectl set-ntp true, or in WSL: hwclock -s"
    if ahead > _SECONDS_OFF:
        found = f"the clock says {_in_words(now)}, but {known[latest]} {'are' if 'files' in known[latest] else 'is'}"
        return Finding("clock", "bad", f"{found} from {_in_words(now + ahead)}", remedy)
    with suppress(OSError), tempfile.NamedTemporaryFile(dir=".", prefix=".dpo-cli-doctor-", suffix=".tmp") as file:
        off = Path(file.name).stat().st_mtime - time.time()
        if abs(off) > _SECONDS_OFF:
            return Finding("clock", "warn", f"the disk's clock differs from this machine's by {off:+.0f} s", remedy)
    return Finding("clock", "good", _in_words(now))


_SECONDS_OFF = 60.0


def _in_words(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(seconds))


def windows(*, has_gpu: bool) -> Iterator[Finding]:
    """What Windows does to a machine: spills of the GPU's memory, and slow files."""
    if not is_wsl() and sys.platform != "win32":
        return
    if has_gpu:
        yield Finding(
            "spill",
            "warn",
            "under Windows the driver never runs out of GPU memory: it goes on in the system's, ten times slower",
            "keep runtime.max_gpu_gib at null (92% of what is free), and in NVIDIA's control panel set CUDA - Sysmem"
            " Fallback Policy to Prefer No Sysmem Fallback",
        )
    if is_wsl() and Path.cwd().as_posix().startswith("/mnt/"):
        yield Finding(
            "files",
            "warn",
            f"{Path.cwd()} lies on a disk of Windows, which WSL reads at a tenth of the speed",
            "move the project below your home folder in Linux",
        )


# --- errors as findings ---------------------------------------------------------------------


def faults_of(name: str, error: DpoCliError) -> Iterator[Finding]:
    """What an error says as findings: what stands after the last semicolon of a message is what to do."""
    for problem in error.problems:
        found, separator, remedy = problem.rpartition("; ")
        words = (found, remedy) if separator else (problem, "correct it")
        yield Finding(name, "bad", *words, exit_code=error.exit_code)
