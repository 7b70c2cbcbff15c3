"""The training loop: one mathematics whatever the memory, and a stop that loses nothing."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from dpo_cli.core import gpu
from dpo_cli.core.errors import Interrupted, MachineError, ParamsError, StaleArtifactError
from dpo_cli.core.params import LoraParams, RuntimeParams, TrainingParams, TrainParams
from dpo_cli.data.tokens import TokenGroup
from dpo_cli.models.adapters import add_adapter
from dpo_cli.models.load import keep_weights_unpacked, load_model
from dpo_cli.scoring.scorer import Scorer
from dpo_cli.training import gate
from dpo_cli.training.checkpoint import best_step, last_checkpoint, out_of_patience
from dpo_cli.training.fit import Fit, count_steps, fit
from dpo_cli.training.gate import check_step_zero
from dpo_cli.training.job import Job
from dpo_cli.training.objective import PairObjective, SftObjective
from dpo_cli.training.optimizer import make_descent, num_warmup_steps
from dpo_cli.training.protocols import Learner, Objective

SETTINGS = TrainParams(learning_rate=5e-3, batch_size=8, epochs=2.0, eval_steps=3)


@pytest.fixture
def policy(tiny_folder: Path, cpu: Any) -> Callable[[], Any]:
    """``policy()``: the tiny model in nf4 with a fresh adapter; every call gives the same weights."""

    def make() -> Any:
        model = add_adapter(load_model(tiny_folder, cpu, quantization="nf4"), LoraParams(r=4, alpha=8.0), seed=0)
        keep_weights_unpacked(model)
        return model

    return make


@pytest.fixture
def pairs(make_groups: Callable[..., list[TokenGroup]]) -> tuple[list[TokenGroup], list[TokenGroup]]:
    """Training pairs, whose number is no multiple of the batch, and held-out pairs."""
    return make_groups(20, seed=1), make_groups(6, seed=2)


def reference(scorer: Scorer, groups: Sequence[TokenGroup]) -> dict[str, list[float]]:
    """Log-probabilities by row id, each pair scored alone."""
    with torch.no_grad():
        return {group.id: scorer.score([group]).logps_BK[0].tolist() for group in groups}


def run_dpo(
    model: Any,
    pairs: tuple[list[TokenGroup], list[TokenGroup]],
    work: Path,
    cpu: Any,
    reporter: Any,
    runtime: RuntimeParams | None = None,
    settings: TrainingParams = SETTINGS,
) -> Fit:
    scorer = Scorer(model, torch.float32)
    train, held_out = pairs
    objective = PairObjective(TrainParams(beta=0.1), reference(scorer, [*train, *held_out]))
    return run(model, scorer, objective, pairs, work, cpu, reporter, runtime, settings)


def run(
    model: Any,
    scorer: Scorer,
    objective: Objective,
    pairs: tuple[list[TokenGroup], list[TokenGroup]],
    work: Path,
    cpu: Any,
    reporter: Any,
    runtime: RuntimeParams | None = None,
    settings: TrainingParams = SETTINGS,
) -> Fit:
    work.mkdir(parents=True, exist_ok=True)
    job = Job("train", work, cpu, runtime or RuntimeParams(), reporter)
    return fit(Learner(model, scorer, objective), *pairs, settings, job)


def adapter(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}


def losses(fitted: Fit, name: str = "loss") -> list[float]:
    return [entry[name] for entry in fitted.history if name in entry]


# --- what is minimized --------------------------------------------------------------------


def test_training_lowers_the_loss_from_ln_2(
    policy: Callable[[], Any], pairs: Any, tmp_path: Path, cpu: Any, reporter: Any
) -> None:
    model = policy()
    before = {name: value.clone() for name, value in model.state_dict().items() if "lora" not in name}
    fitted = run_dpo(model, pairs, tmp_path / "a", cpu, reporter)
    assert fitted.num_steps == 6 == len(losses(fitted))
    assert fitted.first("eval_loss") == pytest.approx(math.log(2), abs=1e-5)
    assert losses(fitted)[0] == pytest.approx(math.log(2), abs=1e-5)
    assert losses(fitted)[-1] < 0.6
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items()), "frozen weights moved"


@pytest.mark.parametrize("budget", [1, 64, 256])
def test_the_token_budget_does_not_change_the_loss_curve(
    budget: int, policy: Callable[[], Any], pairs: Any, tmp_path: Path, cpu: Any, reporter: Any
) -> None:
    curves = {}
    for tokens in (budget, 8192):
        runtime = RuntimeParams(max_tokens_per_microbatch=tokens)
        fitted = run_dpo(policy(), pairs, tmp_path / str(tokens), cpu, reporter, runtime)
        curves[tokens] = [*losses(fitted), *losses(fitted, "eval_loss"), *losses(fitted, "rewards/margins")]
    assert curves[budget] == pytest.approx(curves[8192], rel=1e-5, abs=1e-6)


def test_a_step_takes_the_mean_over_the_pairs_of_its_batch(
    policy: Callable[[], Any], pairs: Any, tmp_path: Path, cpu: Any, reporter: Any
) -> None:
    """One step of RMSprop-free arithmetic: the logged gradient norm is that of the mean loss over the batch."""
    train, held_out = pairs[0][:8], pairs[1]
    settings = SETTINGS.model_copy(update={"max_steps": 1, "warmup_ratio": 0.0, "max_grad_norm": 1e9})
    fitted = run_dpo(
        policy(), (train, held_out), tmp_path, cpu, reporter, RuntimeParams(max_tokens_per_microbatch=40), settings
    )
    model = policy()
    scorer = Scorer(model, torch.float32)
    targets = torch.tensor(list(reference(scorer, train).values()), dtype=torch.float64)
    scores = torch.cat([scorer.score([group]).logps_BK for group in train])
    delta = (scores - targets) @ torch.tensor([1.0, -1.0], dtype=torch.float64)
    (-torch.nn.functional.logsigmoid(0.1 * delta)).mean().backward()
    norm = torch.stack([value.grad.norm() for value in model.parameters() if value.grad is not None]).norm()
    assert fitted.first("grad_norm") == pytest.approx(norm.item(), rel=1e-4)


def test_sft_is_the_mean_over_the_tokens_of_the_batch(
    policy: Callable[[], Any],
    make_groups: Callable[..., list[TokenGroup]],
    tmp_path: Path,
    cpu: Any,
    reporter: Any,
) -> None:
    groups = make_groups(8, completions=1)
    model = policy()
    scorer = Scorer(model, torch.float32)
    with torch.no_grad():
        scores = scorer.score(groups)
    expected = -(scores.logps_BK.sum() / scores.num_tokens_BK.sum()).item()
    runtime = RuntimeParams(max_tokens_per_microbatch=40)
    fitted = run(model, scorer, SftObjective(), (groups, groups), tmp_path, cpu, reporter, runtime)
    assert losses(fitted)[0] == pytest.approx(expected, rel=1e-5)
    assert fitted.first("eval_loss") == pytest.approx(expected, rel=1e-5)


def test_a_tie_counts_one_half(make_groups: Callable[..., list[TokenGroup]]) -> None:
    from dpo_cli.scoring.scorer import Scores

    groups = make_groups(3)
    objective = PairObjective(TrainParams(beta=1.0), {group.id: [0.0, 0.0] for group in groups})
    logps = torch.tensor([[2.0, 1.0], [1.0, 1.0], [0.0, 3.0]], dtype=torch.float64)
    result = objective.losses(groups, Scores(logps, torch.ones(3, 2, dtype=torch.int64), torch.zeros(6)), groups)
    assert result.metrics["rewards/accuracies"].tolist() == [1.0, 0.5, 0.0]
    assert result.metrics["rewards/margins"].tolist() == [1.0, 0.0, -3.0]


def test_a_loss_that_is_no_number_stops_the_run_with_a_remedy(
    policy: Callable[[], Any], pairs: Any, tmp_path: Path, cpu: Any, reporter: Any
) -> None:
    model = policy()
    scorer = Scorer(model, torch.float32)
    groups = [*pairs[0], *pairs[1]]
    objective = PairObjective(TrainParams(beta=0.1), {group.id: [math.nan, 0.0] for group in groups})
    with pytest.raises(ParamsError, match=r"train\.learning_rate is too high"):
        run(model, scorer, objective, pairs, tmp_path, cpu, reporter)


# --- stopping and going on ----------------------------------------------------------------


def test_stopped_and_run_again_it_makes_the_same_bytes(
    policy: Callable[[], Any], pairs: Any, tmp_path: Path, cpu: Any, make_reporter: Any
) -> None:
    whole = policy()
    uninterrupted = run_dpo(whole, pairs, tmp_path / "whole", cpu, make_reporter())

    import os
    import signal

    def stop(done: int) -> None:
        if done == 2:
            os.kill(os.getpid(), signal.SIGINT)

    work = tmp_path / "stopped"
    with pytest.raises(Interrupted, match=r"stopped and saved at step 2 of 6; run it again to go on"):
        run_dpo(policy(), pairs, work, cpu, make_reporter(stop))
    resumed = policy()
    reporter = make_reporter()
    fitted = run_dpo(resumed, pairs, work, cpu, reporter)
    assert reporter.said == ["train: going on from checkpoint-2"]
    assert reporter.meters[0].done == 6
    assert losses(fitted) == losses(uninterrupted)
    assert losses(fitted, "eval_loss") == losses(uninterrupted, "eval_loss")
    for name, value in adapter(whole).items():
        assert torch.equal(adapter(resumed)[name], value), name


def test_killed_between_checkpoints_it_goes_on_from_the_last_one(
    policy: Callable[[], Any], pairs: Any, tmp_path: Path, cpu: Any, make_reporter: Any
) -> None:
    whole = policy()
    run_dpo(whole, pairs, tmp_path / "whole", cpu, make_reporter())

    class Killed(BaseException):
        pass

    def kill(done: int) -> None:
        if done == 4:
            raise Killed

    work = tmp_path / "killed"
    every_step = RuntimeParams(checkpoint_minutes=0.0)
    with pytest.raises(Killed):
        run_dpo(policy(), pairs, work, cpu, make_reporter(kill), every_step)
    last = last_checkpoint(work)
    assert last is not None
    assert last.name == "checkpoint-3"
    (work / "checkpoint-4").mkdir()  # a kill in the middle of a save leaves a folder without its last file
    resumed = policy()
    run_dpo(resumed, pairs, work, cpu, make_reporter(), every_step)
    for name, value in adapter(whole).items():
        assert torch.equal(adapter(resumed)[name], value), name


def test_two_runs_make_the_same_bytes(
    policy: Callable[[], Any], pairs: Any, tmp_path: Path, cpu: Any, reporter: Any
) -> None:
    models = [policy(), policy()]
    for number, model in enumerate(models):
        run_dpo(model, pairs, tmp_path / str(number), cpu, reporter)
    first, second = map(adapter, models)
    assert all(torch.equal(second[name], value) for name, value in first.items())


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


def held_out_losses(fitted: Fit) -> dict[int, float]:
    return {entry["step"]: entry["eval_loss"] for entry in fitted.history if "eval_loss" in entry}


def test_the_weights_of_the_lowest_held_out_loss_are_kept(
    policy: Callable[[], Any], pairs: Any, tmp_path: Path, cpu: Any, make_reporter: Any
) -> None:
    best = policy()
    fitted = run_dpo(best, pairs, tmp_path / "best", cpu, make_reporter(), settings=OVERSHOOTS)
    losses = held_out_losses(fitted)
    assert 0 < fitted.kept_step < fitted.num_steps == fitted.num_planned
    assert losses[fitted.kept_step] == min(losses.values()) == fitted.kept("eval_loss")
    upto = OVERSHOOTS.model_copy(update={"keep": "last", "epochs": 1.0, "max_steps": fitted.kept_step})
    there = policy()
    run_dpo(there, pairs, tmp_path / "there", cpu, make_reporter(), settings=upto)
    assert all(torch.equal(adapter(best)[name], value) for name, value in adapter(there).items())


def test_patience_ends_training(
    policy: Callable[[], Any], pairs: Any, tmp_path: Path, cpu: Any, make_reporter: Any
) -> None:
    whole = run_dpo(policy(), pairs, tmp_path / "whole", cpu, make_reporter(), settings=OVERSHOOTS)
    patient = OVERSHOOTS.model_copy(update={"patience": 2})
    fitted = run_dpo(policy(), pairs, tmp_path / "patient", cpu, make_reporter(), settings=patient)
    assert fitted.num_steps == fitted.kept_step + 4 < fitted.num_planned
    assert held_out_losses(fitted).items() <= held_out_losses(whole).items()
    assert fitted.steps_in_words == f"{fitted.num_steps} of 24 (patience ended); kept: step {fitted.kept_step}"


@pytest.mark.parametrize("killed_before_saving", [True, False])
def test_killed_at_any_step_the_same_best_weights_are_kept(
    killed_before_saving: bool, policy: Callable[[], Any], pairs: Any, tmp_path: Path, cpu: Any, make_reporter: Any
) -> None:
    """Killed at every step in turn, each run goes on from the last one's checkpoint."""
    settings = OVERSHOOTS.model_copy(update={"patience": 2})
    whole = policy()
    uninterrupted = run_dpo(whole, pairs, tmp_path / "whole", cpu, make_reporter(), settings=settings)

    class Killed(BaseException):
        pass

    every_step = RuntimeParams(checkpoint_minutes=0.0)
    work, kills = tmp_path / "killed", 0
    for last in range(1, uninterrupted.num_steps + 1):

        def kill(done: int, last: int = last) -> None:
            if done == last + 1 - killed_before_saving:
                raise Killed

        try:
            run_dpo(policy(), pairs, work, cpu, make_reporter(kill), every_step, settings)
        except Killed:
            kills += 1
    resumed = policy()
    fitted = run_dpo(resumed, pairs, work, cpu, make_reporter(), every_step, settings)
    assert kills >= uninterrupted.num_steps - 1
    assert held_out_losses(fitted) == held_out_losses(uninterrupted)
    assert (fitted.kept_step, fitted.num_steps) == (uninterrupted.kept_step, uninterrupted.num_steps)
    assert all(torch.equal(adapter(resumed)[name], value) for name, value in adapter(whole).items())


def test_a_checkpoint_whose_best_weights_are_gone_is_not_gone_on_from(
    policy: Callable[[], Any], pairs: Any, tmp_path: Path, cpu: Any, make_reporter: Any
) -> None:
    every_step = RuntimeParams(checkpoint_minutes=0.0)
    run_dpo(policy(), pairs, tmp_path, cpu, make_reporter(), every_step, OVERSHOOTS)
    assert last_checkpoint(tmp_path, with_best=True) is not None
    for path in tmp_path.glob("best-*.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
    assert last_checkpoint(tmp_path, with_best=True) is None


def test_of_equal_losses_the_earlier_is_best_and_no_number_never() -> None:
    log = [{"step": step, "eval_loss": loss} for step, loss in ((0, math.nan), (2, 0.5), (4, 0.4), (6, 0.4), (8, 0.6))]
    assert best_step([]) is None
    assert best_step(log) == 4
    assert [out_of_patience(log, patience) for patience in (1, 2, 3, None)] == [True, True, False, False]


def test_keep_best_needs_a_step_to_choose(
    policy: Callable[[], Any], pairs: Any, tmp_path: Path, cpu: Any, reporter: Any
) -> None:
    settings = OVERSHOOTS.model_copy(update={"eval_steps": 24})
    with pytest.raises(
        ParamsError, match=r"train\.keep best has nothing to choose from: of 24 steps none but the last"
    ):
        run_dpo(policy(), pairs, tmp_path, cpu, reporter, settings=settings)


# --- TensorBoard --------------------------------------------------------------------------


def test_event_files_hold_every_step_once_after_a_kill(
    policy: Callable[[], Any], pairs: Any, tmp_path: Path, cpu: Any, make_reporter: Any
) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

    class Killed(BaseException):
        pass

    def kill(done: int) -> None:
        if done == 4:
            raise Killed

    work = tmp_path / "train" / "fingerprint"
    runtime = RuntimeParams(checkpoint_minutes=0.0, tensorboard=True)
    with pytest.raises(Killed):
        run_dpo(policy(), pairs, work, cpu, make_reporter(kill), runtime)
    fitted = run_dpo(policy(), pairs, work, cpu, make_reporter(), runtime)
    found = accumulator.EventAccumulator(str(tmp_path / "tensorboard" / "train-fingerprint"))
    found.Reload()
    assert [event.step for event in found.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    assert [event.value for event in found.Scalars("train/loss")] == pytest.approx(losses(fitted))
    assert {event.step: event.value for event in found.Scalars("eval/loss")} == pytest.approx(held_out_losses(fitted))


def test_without_the_package_event_files_are_refused(
    policy: Callable[[], Any], pairs: Any, tmp_path: Path, cpu: Any, reporter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(MachineError, match=r"runtime\.tensorboard needs the package tensorboard; run: pip install"):
        run_dpo(policy(), pairs, tmp_path / "train" / "x", cpu, reporter, RuntimeParams(tensorboard=True))


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


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("optimizer", ["adamw", "rmsprop"])
def test_every_schedule_and_optimizer_trains(
    schedule: str, optimizer: str, policy: Callable[[], Any], pairs: Any, tmp_path: Path, cpu: Any, reporter: Any
) -> None:
    changes = {"schedule": schedule, "optimizer": optimizer, "warmup_ratio": 0.34}
    fitted = run_dpo(policy(), pairs, tmp_path, cpu, reporter, settings=SETTINGS.model_copy(update=changes))
    rates = losses(fitted, "learning_rate")
    assert rates[0] == 0  # the rate rises from 0
    assert max(rates) == pytest.approx(5e-3)
    assert (rates[-1] == pytest.approx(5e-3)) == (schedule == "constant")
    assert losses(fitted)[-1] < losses(fitted)[0]


def test_an_optimizer_of_cuda_is_refused_on_the_cpu() -> None:
    settings = SETTINGS.model_copy(update={"optimizer": "paged_adamw_8bit"})
    with pytest.raises(MachineError, match=r"train\.optimizer paged_adamw_8bit needs CUDA"):
        make_descent(torch.nn.Linear(1, 1), settings, 8, torch.device("cpu"), "train")


def test_on_a_gpu_kernels_are_loaded_before_memory_is_full_which_moves_nothing(
    tiny_folder: Path,
    pairs: Any,
    tmp_path: Path,
    cpu: Any,
    make_reporter: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def train(name: str) -> tuple[dict[str, torch.Tensor], list[tuple[int, bool]]]:
        model = add_adapter(load_model(tiny_folder, cpu, quantization="nf4"), LoraParams(r=4, dropout=0.3), seed=0)
        keep_weights_unpacked(model)
        scorer = Scorer(model, torch.float32, "padded", 1 << 20)
        objective = PairObjective(TrainParams(beta=0.1), reference(scorer, [*pairs[0], *pairs[1]]))
        seen, score = [], scorer.score

        def noted(groups: Sequence[TokenGroup], **asked: Any) -> Any:
            seen.append((max(group.longest for group in groups), torch.is_grad_enabled()))
            return score(groups, **asked)

        monkeypatch.setattr(scorer, "score", noted)
        runtime = RuntimeParams(recompute="none", checkpoint_minutes=60.0, max_tokens_per_microbatch=1024)
        run(model, scorer, objective, pairs, tmp_path / name, cpu, make_reporter(), runtime)
        return adapter(model), seen

    expected, without = train("cpu")
    monkeypatch.setattr(gpu, "GPU_TYPES", ("cuda", "cpu"))
    found, seen = train("gpu")
    assert seen == [(sorted(group.longest for group in pairs[0])[1], True), *without]
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


# --- the step-0 gate ----------------------------------------------------------------------


@pytest.mark.parametrize("budget", [16, 4096])
def test_the_gate_lets_the_reference_through(budget: int, policy: Callable[[], Any], pairs: Any) -> None:
    model = policy()
    scorer = Scorer(model, torch.float32)
    objective = PairObjective(TrainParams(beta=0.1), reference(scorer, pairs[0]))
    seen = check_step_zero(model, scorer, objective, pairs[0], budget)
    assert seen.loss == pytest.approx(math.log(2), abs=1e-5)
    assert seen.max_abs_margin <= 1e-4
    assert seen.num_pairs == 20


def test_rounding_is_measured_on_few_pairs_the_longest_among_them(
    policy: Callable[[], Any], make_groups: Callable[..., list[TokenGroup]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes a pass for each two answers and one for each by itself, at every start on a GPU."""
    groups = make_groups(64, completion_lengths=(1, 40))
    scorer = Scorer(policy(), torch.bfloat16)
    scored: list[list[TokenGroup]] = []
    score = Scorer.score
    monkeypatch.setattr(Scorer, "score", lambda self, groups, **asked: (scored.append(groups), score(self, groups))[1])
    with torch.no_grad():
        assert gate._batch_noise(scorer, groups) > 0
    assert len(scored) == 16 + 2 * 16
    assert max(group.longest for batch in scored for group in batch) == max(group.longest for group in groups)


@pytest.mark.parametrize("value", [0.01, -3.0, math.nan, math.inf])
def test_the_gate_stops_a_cache_of_another_graph_and_names_the_row(
    value: float, policy: Callable[[], Any], pairs: Any
) -> None:
    model = policy()
    scorer = Scorer(model, torch.float32)
    logps = reference(scorer, pairs[0])
    row = pairs[0][7].id
    logps[row] = [logps[row][0] + value, logps[row][1]]
    objective = PairObjective(TrainParams(beta=0.1), logps)
    with pytest.raises(StaleArtifactError, match=r"differ before the first step.*run: dpo-cli precompute-ref") as error:
        check_step_zero(model, scorer, objective, pairs[0], 4096)
    assert row in str(error.value)


def test_live_dropout_does_not_blind_the_gate(tiny_folder: Path, cpu: Any, pairs: Any) -> None:
    lora = LoraParams(r=4, alpha=8.0, dropout=0.5)
    model = add_adapter(load_model(tiny_folder, cpu, quantization="none"), lora, seed=0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    scorer = Scorer(model.eval(), torch.float32)
    objective = PairObjective(TrainParams(beta=1.0), reference(scorer, pairs[0]))
    assert check_step_zero(model, scorer, objective, pairs[0], 4096).max_abs_margin <= 1e-4


@pytest.mark.parametrize("budget", [16, 64, 4096])
def test_a_right_cache_in_bfloat16_passes_at_any_budget(budget: int, policy: Callable[[], Any], pairs: Any) -> None:
    model = policy()
    scorer = Scorer(model, torch.bfloat16)
    with torch.no_grad():  # as precompute-ref scores: single answers, many together
        singles = [
            TokenGroup(group.id, group.group, group.prompt, (completion,))
            for group in pairs[0]
            for completion in group.completions
        ]
        logps = scorer.score(singles).logps_BK[:, 0].view(-1, 2).tolist()
    cached = {group.id: row for group, row in zip(pairs[0], logps, strict=True)}
    objective = PairObjective(TrainParams(beta=0.1), cached)
    check_step_zero(model, scorer, objective, pairs[0], budget)
    cached[pairs[0][3].id][0] += 1.0
    with pytest.raises(StaleArtifactError):
        check_step_zero(model, scorer, objective, pairs[0], budget)


@pytest.fixture
def narrow(policy: Callable[[], Any], pairs: Any) -> Callable[..., Any]:
    """``narrow(noise, gap)``: the gate in bfloat16, told how much is rounding, on a cache that is off by gaps."""

    def check(noise: float, gap: Callable[[int], float], monkeypatch: pytest.MonkeyPatch) -> Any:
        model = policy()
        scorer = Scorer(model, torch.bfloat16)
        monkeypatch.setattr(gate, "_batch_noise", lambda *_: noise)
        logps = reference(scorer, pairs[0])
        off = {id: [value + gap(index) for value in row] for index, (id, row) in enumerate(logps.items())}
        return check_step_zero(model, scorer, PairObjective(TrainParams(beta=0.1), off), pairs[0], 4096)

    return check


def test_differences_that_lean_to_one_side_are_no_rounding(
    narrow: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fifth of a nat is within what a noisy model is allowed, but not in the same direction for every pair."""
    narrow(0.1, lambda index: (-1) ** index * 0.2, monkeypatch)
    with pytest.raises(StaleArtifactError, match=r"by -0\.2 nats an answer on average \(allowed 0\.05\)"):
        narrow(0.1, lambda index: 0.2, monkeypatch)


def test_a_noisy_model_does_not_deafen_the_gate(narrow: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    seen = narrow(1.0, lambda index: (-1) ** index * 0.3, monkeypatch)
    assert "a difference of 4 between policy and reference would have to be allowed; no more than 0.5 was" in seen.doubt
    with pytest.raises(StaleArtifactError, match=r"by 0\.6 nats in row .* \(allowed 0\.5\)"):
        narrow(1.0, lambda index: 0.6 if index == 3 else 0.0, monkeypatch)
    assert narrow(0.01, lambda index: 0.0, monkeypatch).doubt is None


def test_killed_after_the_last_step_it_trains_no_step_more(
    policy: Callable[[], Any], pairs: Any, tmp_path: Path, cpu: Any, make_reporter: Any
) -> None:
    settings = SETTINGS.model_copy(update={"max_steps": 4, "epochs": 1.0})  # ends in the middle of an epoch
    every_step = RuntimeParams(checkpoint_minutes=0.0)
    first = policy()
    fitted = run_dpo(first, pairs, tmp_path, cpu, make_reporter(), every_step, settings)
    again = policy()
    refitted = run_dpo(again, pairs, tmp_path, cpu, make_reporter(), every_step, settings)
    assert losses(refitted) == losses(fitted)
    assert losses(refitted, "eval_loss") == losses(fitted, "eval_loss")
    for name, value in adapter(first).items():
        assert torch.equal(adapter(again)[name], value), name
