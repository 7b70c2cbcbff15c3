"""All stages with every branch on that is for GPUs alone, on the CPU: 16 bits, one varlen call a layer, GPU memory.

What a kernel computes is not seen here; that the stages go together is.
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dpo_cli.core import environment, paths
from dpo_cli.core.errors import Interrupted
from dpo_cli.core.params import Params
from dpo_cli.models.device import Machine, prepare_machine
from dpo_cli.scoring import attention, varlen
from tests.slow_kernel import slow_kernel
from tests.tiny_project import CONVERTED, run_stages, tiny_params, write_raw

MIB, GIB = 2**20, 2**30
CARD = {
    "mem_get_info": (23 * GIB, 24 * GIB),
    "memory_allocated": 3 * MIB,
    "memory_reserved": 5 * MIB,
    "max_memory_allocated": 768 * MIB,
    "max_memory_reserved": 1024 * MIB,
    "get_per_process_memory_fraction": 0.9,
    "set_per_process_memory_fraction": None,
    "reset_peak_memory_stats": None,
    "get_device_name": "a GPU",
}
"""What torch.cuda says of a card that is not there."""


@pytest.fixture(scope="module", params=[(8, 6), (7, 5)], ids=["bfloat16", "float16"])
def dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    """What the CPU, taken for a GPU of a compute capability, computes in."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(environment, "GPU_TYPES", ("cuda", "cpu"))
        patch.setattr(attention, "VARLEN_DEVICES", ("cpu",))
        patch.setattr(varlen, "VARLEN_KERNELS", {"absent": lambda: None, "slow": lambda: slow_kernel})
        for name, value in {**CARD, "get_device_capability": request.param}.items():
            patch.setattr(torch.cuda, name, lambda *_, value=value: value)
        varlen._choose.cache_clear()
        yield torch.bfloat16 if request.param >= (8, 0) else torch.float16
    varlen._choose.cache_clear()


def make_params(tiny_folder: Path, **evaluate: Any) -> Params:
    settings = {"judge": "reward-model", "num_prompts": 6, "max_new_tokens": 8, "temperatures": [], "scales": [0.5]}
    training = {"max_steps": 6}
    return tiny_params(tiny_folder, sft=training, train=training, reward=training, evaluate={**settings, **evaluate})


def test_all_stages_and_a_second_evaluation(
    dtype: torch.dtype,
    project: Path,
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make_reporter: Callable[..., Any],
) -> None:
    params = make_params(tiny_folder)
    assert prepare_machine(params.runtime, embedded=False) == Machine(torch.device("cpu"), dtype)
    write_raw()
    run_stages(params, make_reporter(), *CONVERTED, "sft", "precompute_ref")
    adapters = []
    for name, kill in (("whole", False), ("killed", True)):
        monkeypatch.chdir(shutil.copytree(project, tmp_path / name))
        if kill:

            def stop(done: int) -> None:
                if done == 3:
                    os.kill(os.getpid(), signal.SIGINT)

            with pytest.raises(Interrupted, match="stopped and saved at step 3 of 6"):
                run_stages(params, make_reporter(stop), "train")
            kept = {path.parent.name for path in Path(".scratch/train").glob("*/checkpoint-*/state.json")}
            assert kept == {"checkpoint-1", "checkpoint-3"}
        reporter = make_reporter()
        trained = run_stages(params, reporter, "train")
        assert any("going on from checkpoint-3" in line for line in reporter.said) == kill
        assert any("attention by slow; not absent: not installed" in line for line in reporter.said)
        adapters.append((paths.DPO_MODEL / "adapter_model.safetensors").read_bytes())
    assert adapters[0] == adapters[1], "a run that was killed ends as one that was not"
    assert trained["step0_max_abs_margin"] <= 0.05
    assert trained["peak_mem_gib"] == 0.75
    assert trained["peak_mem_reserved_gib"] == 1.0
    assert ("peak memory", "0.75 GiB in tensors, 1.00 GiB taken for them") in reporter.tables["train"]
    run_stages(params, make_reporter(), "reward")
    first = run_stages(params, make_reporter(), "evaluate")
    other = make_params(tiny_folder, temperature=0.3, temperatures=[0.3, 1.3], scales=[2.0])
    again = run_stages(other, make_reporter(), "evaluate")
    assert first["num_judged"] == again["num_judged"] == 6
    assert again["kl"] == pytest.approx(first["kl"], abs=1e-12), "the same answers at temperature 1"
