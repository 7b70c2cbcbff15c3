"""Blocks in several processes: in order, a few at a time, and none left behind."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path

from dpo_cli.core.errors import MachineError
from dpo_cli.data.blocks import BlockResult, convert_block
from dpo_cli.data.formats.detect import RowReader
from dpo_cli.data.plan import BlockPlan
from dpo_cli.data.reading.base import Block


@contextmanager
def without_collector() -> Iterator[None]:
    """Rows hold no cycles, and looking for them takes a third of the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def convert_blocks(
    plan: BlockPlan, blocks: Iterator[Block], folder: Path, first_index: int, workers: int
) -> Iterator[BlockResult]:
    """Convert blocks, in order, perhaps in other processes; only a few are held at a time."""
    if workers <= 1:
        reader = plan.reader()
        for index, block in enumerate(blocks, start=first_index):
            yield convert_block(plan, block, folder, index, reader)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, _begin_worker, (plan, folder, os.getpid()))
    waiting: deque[Future[BlockResult]] = deque()
    try:
        for index, block in enumerate(blocks, start=first_index):
            with _no_interrupt():
                waiting.append(pool.submit(_convert_in_worker, block, index))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise MachineError(
            f"{plan.path}: a conversion process was killed, perhaps for lack of memory; set runtime.workers to 1"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _no_interrupt() -> Iterator[None]:
    """Processes that are started within never hear of Ctrl-C, which is this one's to handle."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_worker: tuple[BlockPlan, Path, RowReader] | None = None


def _begin_worker(plan: BlockPlan, folder: Path, parent: int) -> None:
    """Set up a process of the pool. Ctrl-C is the parent's to handle; without a parent it ends."""
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()
    gc.disable()  # as in without_collector
    _worker = (plan, folder, plan.reader())


def _convert_in_worker(block: Block, index: int) -> BlockResult:
    assert _worker is not None
    plan, folder, reader = _worker
    return convert_block(plan, block, folder, index, reader)
