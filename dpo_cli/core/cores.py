"""How many cores this process may use, which in a container or a batch job are fewer than the machine has."""

from __future__ import annotations

import math
import os
from pathlib import Path

import psutil

_CGROUP = Path("/sys/fs/cgroup")


def usable_cores() -> int:
    """Physical cores that this process may use: by its affinity and its cgroup's quota."""
    logical = psutil.cpu_count() or 1
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else logical
    physical = psutil.cpu_count(logical=False) or logical
    return max(1, int(min(allowed, physical, _quota(_CGROUP))))


def usable_threads() -> int:
    """Threads for one process's products: OMP_NUM_THREADS, or else one a core."""
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    return int(asked) if asked.isdecimal() and int(asked) > 0 else usable_cores()


def _quota(cgroup: Path) -> float:
    """Cores' worth of time that a cgroup, version 2 or 1, allows; infinity where it sets no limit."""
    try:
        quota, period = (cgroup / "cpu.max").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        try:
            quota, period = (
                (cgroup / "cpu" / f"cpu.cfs_{name}_us").read_text(encoding="ascii").strip()
                for name in ("quota", "period")
            )
        except OSError:
            return math.inf
    unlimited = quota in ("max", "-1") or not quota.isdecimal() or not period.isdecimal()
    return math.inf if unlimited else int(quota) / int(period)
