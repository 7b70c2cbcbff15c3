"""The log of a training while it runs: a line a step on the disk, for those who watch it.

The log that counts is in the checkpoints; when a run goes on from one, this file begins anew with what is in there.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import psutil

LIVE_LOG = "log.jsonl"
"""In the scratch folder of a run."""
_CLOCK_S = 2.0
"""By so much the time at which a process began may be off."""


class LiveLog:
    """Writes the log as it comes.

    Args:
        folder: The run's scratch folder.
        num_steps: Optimizer steps in all.
        history: The log so far, one entry a logged event.
    """

    def __init__(self, folder: Path, num_steps: int, history: Iterable[Mapping[str, Any]]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        head = {"num_steps": num_steps, "pid": os.getpid(), "host": platform.node(), "begun": time.time()}
        self._file = (folder / LIVE_LOG).open("wb", buffering=0)
        self._file.write(b"".join(orjson.dumps(each, option=orjson.OPT_APPEND_NEWLINE) for each in (head, *history)))

    def add(self, entry: Mapping[str, Any]) -> None:
        """One logged event; it is on the disk when this returns."""
        self._file.write(orjson.dumps({**entry, "time": time.time()}, option=orjson.OPT_APPEND_NEWLINE))

    def close(self) -> None:
        """Nothing more comes."""
        self._file.close()


@dataclass(frozen=True)
class LiveRun:
    """What the log of a run says.

    Attributes:
        num_steps: Optimizer steps in all.
        pid: Of the process that wrote it, on ``host``.
        host: The machine's name.
        begun: When the process began to train, seconds since the epoch.
        entries: One a logged event: numbers by name, ``step`` among them, and ``time``, seconds since the epoch, where
            this process logged it.
    """

    num_steps: int
    pid: int
    host: str
    begun: float
    entries: list[dict[str, Any]]

    @property
    def is_running(self) -> bool:
        """Whether the process is there; of one on another machine that is not known, and taken for granted."""
        if self.host != platform.node():
            return True
        try:
            process = psutil.Process(self.pid)
            return process.status() != psutil.STATUS_ZOMBIE and process.create_time() <= self.begun + _CLOCK_S
        except psutil.NoSuchProcess:
            return False


def read_live_log(path: Path) -> LiveRun | None:
    """Read a log that may still be written to: a last line that is cut off is left out.

    Returns:
        None where there is none, or it has not begun.
    """
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
        head, *entries = map(orjson.loads, lines)
        return LiveRun(**head, entries=entries)
    except (OSError, ValueError, TypeError):
        return None
