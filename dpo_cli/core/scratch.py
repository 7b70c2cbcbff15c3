"""Half-done work that survives a kill, and the lock that keeps two runs apart.

A stage keeps checkpoints in ``.scratch/<stage>/<fingerprint>/``, where the fingerprint stands
for everything its result depends on. A later run with the same fingerprint goes on from
there; a run with another one never reads it. DVC deletes a stage's outputs before it runs
the stage, so nothing that must survive may lie in them.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from dpo_cli.core import paths
from dpo_cli.core.errors import MachineError
from dpo_cli.core.interrupts import stop_asked


@dataclass(frozen=True)
class Scratch:
    """The folder of one stage's half-done work for one fingerprint."""

    folder: Path

    def build_folder(self) -> Path:
        """An empty folder to build the stage's output in."""
        folder = self.folder / "out"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder

    def clear(self) -> None:
        """Delete it: the output is published."""
        shutil.rmtree(self.folder, ignore_errors=True)


@contextmanager
def stage_scratch(stage: str, fingerprint: str) -> Iterator[Scratch]:
    """The stage's scratch folder under an exclusive lock.

    It is left as it is when the block ends; call :meth:`Scratch.clear` on success.

    Raises:
        MachineError: The same stage runs already in this project.
    """
    root = paths.scratch_root() / stage
    root.mkdir(parents=True, exist_ok=True)
    lock = FileLock(root / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise MachineError(
            f"{root / 'lock'}: another {stage} of this project is running; wait for it to end, or stop it"
        ) from None
    try:
        folder = root / fingerprint
        folder.mkdir(exist_ok=True)
        yield Scratch(folder)
    finally:
        lock.release()


def die_with_parent() -> None:
    """Under DVC, stop (and save) when ``dvc`` is gone.

    DVC neither locks a stage nor kills it: killed alone, it would leave the trainer running
    and start a second one at the next ``dvc repro``.
    """
    if "DVC_STAGE" not in os.environ or sys.platform == "win32":
        return
    import psutil

    shells = {"sh", "bash", "dash", "zsh", "fish", "ksh"}
    watched = []
    for ancestor in psutil.Process().parents():
        watched.append(ancestor)
        if ancestor.name() not in shells:
            break

    def alive(process: psutil.Process) -> bool:
        try:
            return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return False

    def watch() -> None:
        while all(alive(ancestor) for ancestor in watched):
            time.sleep(0.5)
        if not stop_asked():  # a signal to all of us has asked already, and a second one would not let it save
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="die-with-parent", daemon=True).start()
