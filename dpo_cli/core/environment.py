"""Offline, quiet and modest: set before any library that might open a socket or print is imported."""

from __future__ import annotations

import gc
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from dpo_cli.core.errors import MachineError
from dpo_cli.core.gpu import let_segments_grow

_SWITCHES = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "DVC_NO_ANALYTICS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def is_first_process() -> bool:
    """Whether this process speaks for those that torchrun started with it; by itself it does."""
    return os.environ.get("RANK", "0") == "0"


def refuse_several_processes() -> None:
    """Refuse to run as several processes.

    Raises:
        MachineError: torchrun started more than this one.
    """
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    if num_processes > 1:
        raise MachineError(
            f"{num_processes} processes were started (WORLD_SIZE); all but sft and train, outside DVC, run as one,"
            " on one device"
        )


def claim_gpu() -> None:
    """Of several processes that torchrun started, let each see the GPU of its own number alone.

    So every library takes the right one by itself. To be called once, before CUDA is looked for.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "LOCAL_RANK" not in os.environ:
        return
    number = os.environ["LOCAL_RANK"]
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        number = dict(enumerate(given.split(","))).get(int(number), "")
    os.environ["CUDA_VISIBLE_DEVICES"] = number


def prepare_environment() -> None:
    """Turn off downloads and telemetry for this process and its children, and notes at import.

    Threads of torch that wait sleep instead of spinning: on cores that are shared, two that spin take twice as long as
    one alone. Torch compiles nothing: bitsandbytes asks for it as it is imported, and loads the compiler, which takes a
    sixth of a stage's start.
    """
    os.environ.update(_SWITCHES)
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    let_segments_grow()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


@contextmanager
def importing() -> Iterator[None]:
    """Import large libraries without looking for garbage among their millions of objects, then or ever after.

    That look takes a quarter of the time in which torch, transformers and peft are imported, and most of a second at
    each full collection later on. To be used before a model is in memory, which would never be collected, either.
    """
    was_on, num_known = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > num_known:
            gc.freeze()
        if was_on:
            gc.enable()
