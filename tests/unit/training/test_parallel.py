"""Several processes that share each batch end where one would."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dpo_cli.core.errors import MachineError
from dpo_cli.core.live_log import LIVE_LOG
from dpo_cli.core.params import RuntimeParams
from dpo_cli.data.tokens import TokenGroup
from dpo_cli.training.objective_metrics import PAIR_METRICS
from dpo_cli.training.parallel import ALONE, Replicas, join_replicas
from tests.replica_worker import Worker

ROOT = Path(__file__).parents[3]
SAME = ("curve", "tiny_batches", "instructions")
TOGETHER = (
    *SAME,
    "out_of_memory",
    "unlike_gpus",
    "dropped",
    "stopped",
    "resumed",
    "no_number",
    "other_weights",
    "other_order",
    "locked",
    "left_alone",
)
NUM_STEPS, NUM_HELD_OUT_PASSES = 9, 4
NUM_SUMS = 1 + len(PAIR_METRICS) + 2
"""The loss and the metrics of a pair; the wish to stop and the mark of the batch."""


@pytest.fixture(scope="module")
def alone(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What came of each training in one process: this one."""
    worker = Worker(tiny_folder, tmp_path_factory.mktemp("alone"), ALONE)
    return {name: getattr(worker, name)() for name in SAME}


@pytest.fixture(scope="module")
def both(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """What came of each training in each of two processes that shared it."""
    folder = tmp_path_factory.mktemp("both")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = []
    for rank in range(2):
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {name: str(value) for name, value in (numbers | meeting).items()}
        environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        line = [sys.executable, "-m", "tests.replica_worker", str(tiny_folder), str(folder), *TOGETHER]
        running.append(
            subprocess.Popen(line, cwd=ROOT, env=os.environ | environment, stderr=subprocess.PIPE, text=True)
        )
    try:
        for process in running:
            _, stderr = process.communicate(timeout=800)
            assert process.returncode == 0, stderr
    finally:
        for process in running:
            process.kill()
    return {name: [torch.load(path) for path in sorted(folder.glob(f"{name}.*.pt"))] for name in TOGETHER}


def curve(outcome: dict[str, Any], name: str) -> list[float]:
    return [entry[name] for entry in outcome["history"] if name in entry]


def same_bytes(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return all(torch.equal(value, second["adapter"][name]) for name, value in first["adapter"].items())


# --- the same mathematics -----------------------------------------------------------------


@pytest.mark.parametrize("name", SAME)
def test_two_processes_end_where_one_does(name: str, alone: dict[str, Any], both: dict[str, list[Any]]) -> None:
    first, second = both[name]
    assert (first["error"], second["error"]) == (None, None)
    losses = curve(alone[name], "loss")
    assert len(losses) >= 7
    assert losses[-1] != pytest.approx(losses[0], rel=1e-2), "a curve that does not move proves little"
    for metric in ("loss", "eval_loss", "grad_norm", "rewards/margins"):
        assert curve(first, metric) == pytest.approx(curve(alone[name], metric), rel=1e-5, abs=1e-6), metric
    accuracies = [curve(each, "eval_rewards/accuracies")[1:] for each in (first, alone[name])]
    assert accuracies[0] == accuracies[1], (
        "before the first step margins are 0 to rounding, and their signs say nothing"
    )
    assert set(first["adapter"]) == set(alone[name]["adapter"])
    for key, value in alone[name]["adapter"].items():
        difference = (first["adapter"][key] - value).norm() / value.norm()
        assert difference <= 1e-5, key
    assert same_bytes(first, second)
    assert first["history"] == second["history"]


def test_memory_that_runs_out_in_one_process_is_its_own_affair(
    alone: dict[str, Any], both: dict[str, list[Any]]
) -> None:
    first, second = both["out_of_memory"]
    assert curve(second, "loss") == pytest.approx(curve(alone["curve"], "loss"), rel=1e-5)
    assert same_bytes(first, second)
    assert first["files"] == ["1_token_budget.json", LIVE_LOG]
    assert first["sizes"] == both["curve"][0]["sizes"], "what is done again is not exchanged"


def test_gradients_are_clipped_by_the_first_ones_norm(both: dict[str, list[Any]]) -> None:
    first, second = both["unlike_gpus"]
    assert (first["error"], second["error"]) == (None, None)
    assert same_bytes(first, second)
    assert curve(first, "grad_norm") == curve(second, "grad_norm")
    assert min(curve(first, "grad_norm")) > 1e-3, "all of them were clipped"


def test_a_step_is_one_exchange(alone: dict[str, Any], both: dict[str, list[Any]]) -> None:
    assert alone["curve"]["sizes"] == []
    for outcome in both["curve"]:
        numbers = sum(value.numel() for value in outcome["adapter"].values())
        step = numbers + len(outcome["adapter"]) + NUM_SUMS + 1  # and how many gradients are no numbers
        assert outcome["sizes"].count(step) == NUM_STEPS
        assert outcome["sizes"].count(NUM_SUMS) == NUM_HELD_OUT_PASSES
        assert len(outcome["sizes"]) == NUM_STEPS + NUM_HELD_OUT_PASSES


# --- stopping and going on ----------------------------------------------------------------


def test_a_stop_that_one_process_hears_of_stops_all_after_the_same_step(both: dict[str, list[Any]]) -> None:
    for outcome in both["stopped"]:
        assert outcome["error"] == "Interrupted: train: stopped and saved at step 3 of 9; run it again to resume"
        assert outcome["files"] == ["checkpoint-3", LIVE_LOG]


def test_stopped_and_run_again_they_make_the_same_bytes(both: dict[str, list[Any]]) -> None:
    """With dropout: each process draws the numbers that it would have drawn."""
    whole, resumed = both["dropped"][0], both["resumed"]
    for outcome in resumed:
        assert outcome["history"] == whole["history"]
        assert same_bytes(outcome, whole)
        assert len(outcome["sizes"]) < len(both["dropped"][0]["sizes"])


# --- what goes wrong ----------------------------------------------------------------------


def test_a_loss_that_is_no_number_stops_all(both: dict[str, list[Any]]) -> None:
    for outcome in both["no_number"]:
        assert "ParamsError: params.yaml: train.learning_rate is too high" in outcome["error"]


def test_processes_that_differ_do_not_train(both: dict[str, list[Any]]) -> None:
    for outcome in both["other_weights"]:
        assert "number 1 differs from the first in the parameters before the first step" in outcome["error"]
    for outcome in both["other_order"]:
        assert outcome["error"] == "MachineError: the processes do not hold the same batch; this is a bug"


def test_a_stage_that_runs_already_is_refused_by_all(both: dict[str, list[Any]]) -> None:
    for outcome in both["locked"]:
        assert outcome["inside"]
        assert "another train of this project is running" in outcome["error"]


def test_who_is_left_alone_says_so(both: dict[str, list[Any]]) -> None:
    [outcome] = both["left_alone"]
    assert "another process of this run is gone" in outcome["error"]


# --- shares -------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "size"), [(0, 2), (1, 2), (2, 3), (7, 1), (7, 3), (64, 8)])
def test_every_group_is_in_one_share_and_shares_are_even(
    count: int, size: int, make_groups: Callable[..., list[TokenGroup]]
) -> None:
    groups = make_groups(count)
    shares = [Replicas(rank, size).share(groups) for rank in range(size)]
    assert sorted(group.id for share in shares for group in share) == [group.id for group in groups]
    for share in shares:
        assert share == sorted(share, key=groups.index), "in their order"
    tokens = [sum(len(group.prompt) + sum(map(len, group.completions)) for group in share) for share in shares]
    largest = max((len(group.prompt) + sum(map(len, group.completions)) for group in groups), default=0)
    assert max(tokens) - min(tokens) <= largest


# --- meeting ------------------------------------------------------------------------------


def test_alone_nothing_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    with join_replicas(RuntimeParams(), embedded=False) as replicas:
        assert replicas is ALONE
    assert not torch.distributed.is_initialized()


def test_torchrun_of_one_process_meets_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate takes torchrun's variables for several processes; the group that it looks for is there."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with join_replicas(RuntimeParams(device="cpu"), embedded=False) as replicas:
        assert replicas == ALONE
        assert torch.distributed.is_initialized()
    assert not torch.distributed.is_initialized()


def test_several_machines_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(MachineError, match="on several machines"), join_replicas(RuntimeParams(), embedded=False):
        pass


def test_under_dvc_a_stage_stays_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("DVC_STAGE", "train")
    with join_replicas(RuntimeParams(), embedded=False) as replicas:
        assert replicas is ALONE
        assert os.environ["WORLD_SIZE"] == "2", "so that the stage is refused"
