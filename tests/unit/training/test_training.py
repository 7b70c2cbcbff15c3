"""The training loop: one mathematics whatever the memory, and a stop that loses nothing."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from dpo_cli.core import environment
from dpo_cli.core.errors import Interrupted, MachineError, ParamsError
from dpo_cli.core.live_log import LIVE_LOG, read_live_log
from dpo_cli.core.params import TrainParams
from dpo_cli.core.training_params import TrainingParams
from dpo_cli.data.tokens import TokenGroup
from dpo_cli.scoring.scorer import Scorer, Scores
from dpo_cli.training.checkpoint import best_step, last_checkpoint, out_of_patience
from dpo_cli.training.fit import Fit, count_steps, make_descent, num_warmup_steps
from dpo_cli.training.objective import PairObjective, SftObjective
from dpo_cli.training.protocols import Learner
from tests.small_training import Groups, Killed, Lab, adapter, kill_at, logged, reference, same_bytes, stop_at, train

SETTINGS = TrainParams(learning_rate=5e-3, batch_size=8, epochs=2.0, eval_steps=3)
EVERY_STEP = {"checkpoint_minutes": 0.0}


@pytest.fixture(scope="module")
def pairs(make_groups: Callable[..., list[TokenGroup]]) -> Groups:
    """Training pairs, whose number is no multiple of the batch, and held-out pairs."""
    return make_groups(20, seed=1), make_groups(6, seed=2)


def run_dpo(
    model: Any,
    pairs: Groups,
    folder: Path,
    reporter: Any,
    settings: TrainingParams = SETTINGS,
    loss: Any = "sigmoid",
    **runtime: Any,
) -> Fit:
    scorer = Scorer(model, torch.float32)
    objective = PairObjective(TrainParams(loss=loss, beta=0.1), reference(scorer, [*pairs[0], *pairs[1]]))
    return train(Learner(model, scorer, objective), pairs, folder, reporter, settings, **runtime)


class Run:
    """A finished training, its adapter and the folder it was in."""

    def __init__(self, policy: Any, pairs: Groups, folder: Path, reporter: Any, settings: TrainingParams) -> None:
        model = policy()
        self.before = {name: value.clone() for name, value in model.state_dict().items() if "lora" not in name}
        self.fitted = run_dpo(model, pairs, folder, reporter, settings, **EVERY_STEP)
        self.adapter, self.after, self.folder = adapter(model), model.state_dict(), folder


@pytest.fixture(scope="module")
def whole(policy: Any, pairs: Groups, tmp_path_factory: pytest.TempPathFactory, make_reporter: Any) -> Run:
    """An undisturbed run."""
    return Run(policy, pairs, tmp_path_factory.mktemp("whole"), make_reporter(), SETTINGS)


# --- what is minimized --------------------------------------------------------------------


def test_training_lowers_the_loss_from_ln_2(whole: Run) -> None:
    losses, rates = logged(whole.fitted, "loss"), logged(whole.fitted, "learning_rate")
    assert whole.fitted.num_steps == 6 == len(losses)
    assert whole.fitted.first("eval_loss") == pytest.approx(math.log(2), abs=1e-5)
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert losses[-1] < 0.6
    assert (rates[0], rates[1]) == (0, SETTINGS.learning_rate), "one step of warm-up"
    assert all(torch.equal(whole.after[name], value) for name, value in whole.before.items()), "frozen weights moved"


def test_a_step_takes_the_mean_over_the_pairs_of_its_batch(lab: Lab, pairs: Groups, reporter: Any) -> None:
    """One step of RMSprop-free arithmetic: the logged gradient norm is that of the mean loss over the batch."""
    batch = pairs[0][:8]
    settings = SETTINGS.model_copy(update={"max_steps": 1, "warmup_ratio": 0.0, "max_grad_norm": 1e9})
    fitted = run_dpo(lab.policy(), (batch, pairs[1]), lab.folder, reporter, settings, max_tokens_per_microbatch=40)
    model = lab.policy()
    scorer = Scorer(model, torch.float32)
    targets = torch.tensor(list(reference(scorer, batch).values()), dtype=torch.float64)
    scores = torch.cat([scorer.score([group]).logps_BK for group in batch])
    delta = (scores - targets) @ torch.tensor([1.0, -1.0], dtype=torch.float64)
    (-torch.nn.functional.logsigmoid(0.1 * delta)).mean().backward()
    norm = torch.stack([value.grad.norm() for value in model.parameters() if value.grad is not None]).norm()
    assert fitted.first("grad_norm") == pytest.approx(norm.item(), rel=1e-4)


def test_sft_is_the_mean_over_the_tokens_of_the_batch(
    lab: Lab, make_groups: Callable[..., list[TokenGroup]], reporter: Any
) -> None:
    groups = make_groups(8, completions=1)
    model = lab.policy()
    scorer = Scorer(model, torch.float32)
    with torch.no_grad():
        scores = scorer.score(groups)
    expected = -(scores.logps_BK.sum() / scores.num_tokens_BK.sum()).item()
    learner = Learner(model, scorer, SftObjective())
    settings = SETTINGS.model_copy(update={"max_steps": 1})
    fitted = train(learner, (groups, groups), lab.folder, reporter, settings, max_tokens_per_microbatch=40)
    assert [*logged(fitted, "loss"), fitted.first("eval_loss")] == pytest.approx([expected] * 2, rel=1e-5)


def test_a_tie_counts_one_half(make_groups: Callable[..., list[TokenGroup]]) -> None:
    groups = make_groups(3)
    objective = PairObjective(TrainParams(beta=1.0), {group.id: [0.0, 0.0] for group in groups})
    logps = torch.tensor([[2.0, 1.0], [1.0, 1.0], [0.0, 3.0]], dtype=torch.float64)
    result = objective.losses(groups, Scores(logps, torch.ones(3, 2, dtype=torch.int64), torch.zeros(6)), groups)
    assert result.metrics["rewards/accuracies"].tolist() == [1.0, 0.5, 0.0]
    assert result.metrics["rewards/margins"].tolist() == [1.0, 0.0, -3.0]


def test_a_loss_that_is_no_number_stops_the_run_with_a_remedy(lab: Lab, pairs: Groups, reporter: Any) -> None:
    model = lab.policy()
    groups = [*pairs[0], *pairs[1]]
    objective = PairObjective(TrainParams(beta=0.1), {group.id: [math.nan, 0.0] for group in groups})
    learner = Learner(model, Scorer(model, torch.float32), objective)
    with pytest.raises(ParamsError, match=r"train\.learning_rate is too high"):
        train(learner, pairs, lab.folder, reporter, SETTINGS)


# --- stopping and going on ----------------------------------------------------------------


def test_stopped_and_run_again_it_makes_the_same_bytes(lab: Lab, whole: Run, pairs: Groups) -> None:
    with pytest.raises(Interrupted, match=r"stopped and saved at step 2 of 6; run it again to resume"):
        run_dpo(lab.policy(), pairs, lab.folder, lab.reporter(stop_at(2)))
    resumed, reporter = lab.policy(), lab.reporter()
    fitted = run_dpo(resumed, pairs, lab.folder, reporter)
    assert reporter.said == ["train: going on from checkpoint-2"]
    assert reporter.meters[0].done == 6
    assert logged(fitted, "loss", "eval_loss") == logged(whole.fitted, "loss", "eval_loss")
    assert same_bytes(adapter(resumed), whole.adapter)


def test_a_loss_that_knows_the_steps_before_knows_them_when_it_goes_on(lab: Lab, pairs: Groups) -> None:
    whole, resumed = lab.policy(), lab.policy()
    fitted = run_dpo(whole, pairs, lab.folder / "whole", lab.reporter(), loss="beta_dpo")
    with pytest.raises(Interrupted):
        run_dpo(lab.policy(), pairs, lab.folder / "stopped", lab.reporter(stop_at(3)), loss="beta_dpo")
    assert run_dpo(resumed, pairs, lab.folder / "stopped", lab.reporter(), loss="beta_dpo").history == fitted.history
    assert same_bytes(adapter(resumed), adapter(whole))
    margins = logged(fitted, "rewards/margins")
    assert len(set(margins)) > 3, "all margins alike would prove nothing"


def test_killed_between_checkpoints_it_goes_on_from_the_last_one_and_event_files_hold_every_step_once(
    lab: Lab, whole: Run, pairs: Groups
) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    work = lab.folder / "train" / "fingerprint"
    with pytest.raises(Killed):
        run_dpo(lab.policy(), pairs, work, lab.reporter(kill_at(4)), tensorboard=True, **EVERY_STEP)
    last = last_checkpoint(work)
    assert last is not None
    assert last.name == "checkpoint-3"
    (work / "checkpoint-4").mkdir()  # a kill in the middle of a save leaves a folder without its last file
    resumed = lab.policy()
    fitted = run_dpo(resumed, pairs, work, lab.reporter(), tensorboard=True, **EVERY_STEP)
    assert same_bytes(adapter(resumed), whole.adapter)
    found = accumulator.EventAccumulator(str(lab.folder / "tensorboard" / "train-fingerprint"))
    found.Reload()
    assert [event.step for event in found.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    assert [event.value for event in found.Scalars("train/loss")] == pytest.approx(logged(fitted, "loss"))
    assert {event.step: event.value for event in found.Scalars("eval/loss")} == pytest.approx(held_out_losses(fitted))


def test_who_watches_reads_every_step_as_it_is_taken_and_once_after_a_kill(lab: Lab, pairs: Groups) -> None:
    with pytest.raises(Killed):
        run_dpo(lab.policy(), pairs, lab.folder, lab.reporter(kill_at(4)), checkpoint_minutes=60)
    killed = read_live_log(lab.folder / LIVE_LOG)
    assert killed is not None
    assert (killed.entries[-1]["step"], killed.is_running) == (3, True)  # which was not saved yet
    fitted = run_dpo(lab.policy(), pairs, lab.folder, lab.reporter(), **EVERY_STEP)
    found = read_live_log(lab.folder / LIVE_LOG)
    assert found is not None
    assert [{name: each[name] for name in each if name != "time"} for each in found.entries] == fitted.history


def test_killed_after_the_last_step_it_trains_no_step_more(lab: Lab, pairs: Groups) -> None:
    settings = SETTINGS.model_copy(update={"max_steps": 4, "epochs": 1.0})  # ends in the middle of an epoch
    models = lab.policy(), lab.policy()
    fits = [run_dpo(model, pairs, lab.folder, lab.reporter(), settings, **EVERY_STEP) for model in models]
    assert logged(fits[1], "loss", "eval_loss") == logged(fits[0], "loss", "eval_loss")
    assert same_bytes(*map(adapter, models))


def test_without_the_package_event_files_are_refused(
    lab: Lab, pairs: Groups, reporter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(MachineError, match=r"runtime\.tensorboard needs the package tensorboard; run: pip install"):
        run_dpo(lab.policy(), pairs, lab.folder / "train" / "x", reporter, tensorboard=True)


# --- the best step ------------------------------------------------------------------------

# the rate is too high: the held-out loss falls at first, and then rises
OVERSHOOTS = SETTINGS.model_copy(
    update={
        "learning_rate": 0.02,
        "schedule": "constant",
        "warmup_ratio": 0.0,
        "epochs": 8.0,
        "eval_steps": 2,
        "keep": "best",
    }
)
PATIENT = OVERSHOOTS.model_copy(update={"patience": 2})


@pytest.fixture(scope="module")
def overshot(policy: Any, pairs: Groups, tmp_path_factory: pytest.TempPathFactory, make_reporter: Any) -> Run:
    """All of its steps, of which one in the middle is the best."""
    return Run(policy, pairs, tmp_path_factory.mktemp("overshot"), make_reporter(), OVERSHOOTS)


@pytest.fixture(scope="module")
def patient(policy: Any, pairs: Groups, tmp_path_factory: pytest.TempPathFactory, make_reporter: Any) -> Run:
    """The same, until patience ended."""
    return Run(policy, pairs, tmp_path_factory.mktemp("patient"), make_reporter(), PATIENT)


def held_out_losses(fitted: Fit) -> dict[int, float]:
    return {entry["step"]: entry["eval_loss"] for entry in fitted.history if "eval_loss" in entry}


def test_the_weights_of_the_lowest_held_out_loss_are_kept(
    lab: Lab, overshot: Run, pairs: Groups, reporter: Any
) -> None:
    fitted = overshot.fitted
    losses = held_out_losses(fitted)
    assert 0 < fitted.kept_step < fitted.num_steps == fitted.num_planned
    assert losses[fitted.kept_step] == min(losses.values()) == fitted.kept("eval_loss")
    upto = OVERSHOOTS.model_copy(update={"keep": "last", "epochs": 1.0, "max_steps": fitted.kept_step})
    there = lab.policy()
    run_dpo(there, pairs, lab.folder, reporter, upto)
    assert same_bytes(adapter(there), overshot.adapter)


def test_patience_ends_training(overshot: Run, patient: Run) -> None:
    fitted = patient.fitted
    assert fitted.num_steps == fitted.kept_step + 4 < fitted.num_planned
    assert held_out_losses(fitted).items() <= held_out_losses(overshot.fitted).items()
    assert fitted.steps_in_words == f"{fitted.num_steps} of 24 (patience ended); kept: step {fitted.kept_step}"
    assert same_bytes(patient.adapter, overshot.adapter)


@pytest.mark.parametrize("killed_before_saving", [True, False])
def test_killed_at_some_steps_the_same_best_weights_are_kept(
    lab: Lab, killed_before_saving: bool, patient: Run, pairs: Groups
) -> None:
    """At the first step, at the best one, at the one after that, and at the last: each run goes on from the last one's.

    Killed before it saved, it measures and keeps the best weights once more.
    """
    kept, last = patient.fitted.kept_step, patient.fitted.num_steps
    for step in (1, kept, kept + 1, last):
        with pytest.raises(Killed):
            killed = lab.reporter(kill_at(step + (not killed_before_saving)) if step < last else kill_at(last))
            run_dpo(lab.policy(), pairs, lab.folder, killed, PATIENT, **EVERY_STEP)
    resumed = lab.policy()
    fitted = run_dpo(resumed, pairs, lab.folder, lab.reporter(), PATIENT, **EVERY_STEP)
    assert held_out_losses(fitted) == held_out_losses(patient.fitted)
    assert (fitted.kept_step, fitted.num_steps) == (kept, last)
    assert same_bytes(adapter(resumed), patient.adapter)


def test_a_checkpoint_whose_best_weights_are_gone_is_not_gone_on_from(overshot: Run) -> None:
    assert last_checkpoint(overshot.folder, with_best=True) is not None
    for path in overshot.folder.glob("best-*.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
    assert last_checkpoint(overshot.folder, with_best=True) is None


def test_of_equal_losses_the_earlier_is_best_and_no_number_never() -> None:
    log = [{"step": step, "eval_loss": loss} for step, loss in ((0, math.nan), (2, 0.5), (4, 0.4), (6, 0.4), (8, 0.6))]
    assert best_step([]) is None
    assert best_step(log) == 4
    assert [out_of_patience(log, patience) for patience in (1, 2, 3, None)] == [True, True, False, False]


def test_keep_best_needs_a_step_to_choose(lab: Lab, pairs: Groups, reporter: Any) -> None:
    settings = OVERSHOOTS.model_copy(update={"eval_steps": 24})
    with pytest.raises(
        ParamsError, match=r"train\.keep best has nothing to choose from: of 24 steps none but the last"
    ):
        run_dpo(lab.policy(), pairs, lab.folder, reporter, settings)


# --- settings -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "steps", "warmup"),
    [
        ({}, 6, 1),
        ({"epochs": 0.5}, 2, 0),
        ({"max_steps": 40, "epochs": 1.0}, 40, 4),
        ({"batch_size": 100}, 2, 0),
        ({"warmup_ratio": 0.0}, 6, 0),
    ],
)
def test_the_plan_counts_steps(changes: dict[str, Any], steps: int, warmup: int) -> None:
    settings = SETTINGS.model_copy(update=changes)
    assert (count_steps(settings, 20), num_warmup_steps(settings, steps)) == (steps, warmup)


def test_an_optimizer_of_cuda_is_refused_on_the_cpu() -> None:
    settings = SETTINGS.model_copy(update={"optimizer": "paged_adamw_8bit"})
    with pytest.raises(MachineError, match=r"train\.optimizer paged_adamw_8bit needs CUDA"):
        make_descent(torch.nn.Linear(1, 1), settings, 8, torch.device("cpu"), "train")


def test_on_a_gpu_kernels_are_loaded_before_memory_is_full_which_moves_nothing(
    lab: Lab, pairs: Groups, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = SETTINGS.model_copy(update={"max_steps": 2, "epochs": 1.0})

    def go(name: str) -> tuple[dict[str, torch.Tensor], list[tuple[int, bool]]]:
        model = lab.policy(dropout=0.3)
        scorer = Scorer(model, torch.float32, "padded", 1 << 20)
        objective = PairObjective(TrainParams(beta=0.1), reference(scorer, [*pairs[0], *pairs[1]]))
        seen, score = [], scorer.score

        def noted(groups: Sequence[TokenGroup], **asked: Any) -> Any:
            seen.append((max(group.longest for group in groups), torch.is_grad_enabled()))
            return score(groups, **asked)

        monkeypatch.setattr(scorer, "score", noted)
        runtime: dict[str, Any] = {"recompute": "none", "checkpoint_minutes": 60.0, "max_tokens_per_microbatch": 1024}
        train(Learner(model, scorer, objective), pairs, lab.folder / name, lab.reporter(), settings, **runtime)
        return adapter(model), seen

    expected, without = go("cpu")
    monkeypatch.setattr(environment, "GPU_TYPES", ("cuda", "cpu"))
    found, seen = go("gpu")
    assert seen == [(sorted(group.longest for group in pairs[0])[1], True), *without]
    assert same_bytes(found, expected)
