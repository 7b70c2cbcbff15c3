"""The loop by itself: the order of data, and data that the policy makes while it is trained."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.utils.data import RandomSampler

from dpo_cli.core.artifacts import remove
from dpo_cli.core.errors import StaleArtifactError
from dpo_cli.core.params import RuntimeParams, TrainParams
from dpo_cli.core.training_params import LoraParams
from dpo_cli.data.tokens import TokenGroup
from dpo_cli.models.adapters import add_adapter
from dpo_cli.models.load import load_model
from dpo_cli.models.project import Workplace
from dpo_cli.scoring.scorer import Scorer, Scores, Statistics
from dpo_cli.training.accumulation import Limits
from dpo_cli.training.checkpoint import last_checkpoint, load_checkpoint, save_checkpoint
from dpo_cli.training.fit import Shuffled, make_descent
from dpo_cli.training.loop import Course, Data, Loop
from dpo_cli.training.parallel import Job
from dpo_cli.training.protocols import BatchSource, GroupLosses, Learner
from tests.small_training import Killed, kill_at

SETTINGS = TrainParams(learning_rate=1e-2, schedule="constant", warmup_ratio=0.0)


def test_every_epoch_has_each_item_once_in_an_order_of_its_own() -> None:
    items = list(range(10))
    source = Shuffled(items, 4, seed=7)
    epochs = [[source.batch(3 * epoch + place) for place in range(3)] for epoch in range(3)]
    assert [[len(batch) for batch in epoch] for epoch in epochs] == [[4, 4, 2]] * 3
    orders = [[item for batch in epoch for item in batch] for epoch in epochs]
    assert all(sorted(order) == items for order in orders)
    assert orders[0] != orders[1]
    sampler = RandomSampler(items, generator=torch.Generator().manual_seed(7 + 1))
    assert orders[1] == list(sampler), "as accelerate seeds torch's sampler"
    assert Shuffled(items, 4, seed=7).batch(5) == epochs[1][2], "a run that goes on skips nothing"


# --- rollouts -----------------------------------------------------------------------------

NUM_PROMPTS, LENGTH, EPOCHS, BATCH_SIZE = 64, 12, 2, 32
ROUND = EPOCHS * NUM_PROMPTS // BATCH_SIZE
"""Optimizer steps on the same answers."""


class Rollouts(BatchSource[TokenGroup]):
    """Answers that the policy draws at the beginning of each round; rewarded are tokens below 50."""

    def __init__(self, model: Any, scorer: Scorer) -> None:
        self._model, self._scorer = model, scorer
        self._groups: list[TokenGroup] = []
        self.old_logps: dict[str, float] = {}
        self.advantages: dict[str, float] = {}
        self.rewards: list[float] = []

    def batch(self, step: int) -> Sequence[TokenGroup]:
        if step % ROUND == 0:
            self._draw(step // ROUND)
        generator = torch.Generator().manual_seed(step // (ROUND // EPOCHS))
        order = torch.randperm(NUM_PROMPTS, generator=generator).tolist()
        place = step % (ROUND // EPOCHS) * BATCH_SIZE
        return [self._groups[index] for index in order[place : place + BATCH_SIZE]]

    @torch.no_grad()
    def _draw(self, number: int) -> None:
        self._model.eval()
        generator = torch.Generator().manual_seed(number)
        tokens = torch.arange(3, 3 + NUM_PROMPTS)[:, None]
        for _ in range(LENGTH):
            probabilities = self._model(input_ids=tokens).logits[:, -1].softmax(-1)
            tokens = torch.cat([tokens, torch.multinomial(probabilities, 1, generator=generator)], 1)
        rows = tokens.tolist()
        self._take_up([TokenGroup(f"{number} {row[0]}", str(row[0]), (row[0],), (tuple(row[1:]),)) for row in rows])
        logps = self._scorer.score(self._groups).logps_BK[:, 0].tolist()
        self.old_logps = {group.id: logp for group, logp in zip(self._groups, logps, strict=True)}

    def _take_up(self, groups: list[TokenGroup]) -> None:
        self._groups = groups
        found = torch.tensor([[float(token < 50) for token in group.completions[0]] for group in groups]).mean(1)
        self.rewards.append(found.mean().item())
        found = (found - found.mean()) / (found.std() + 1e-6)
        self.advantages = {group.id: value for group, value in zip(groups, found.tolist(), strict=True)}

    def state(self) -> Mapping[str, Any]:
        return {"groups": [vars(group) for group in self._groups], "old_logps": self.old_logps}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._take_up([TokenGroup(**group) for group in state["groups"]])
        self.old_logps = state["old_logps"]


class Clipped:
    """PPO's clipped objective, an answer as one action (Schulman et al. 2017, eq. 7)."""

    is_coupled = False
    statistics: Statistics = "none"
    metric_names: Sequence[str] = ("ratio",)

    def __init__(self, rollouts: Rollouts) -> None:
        self._rollouts = rollouts

    def weight(self, groups: Sequence[TokenGroup]) -> float:
        return float(len(groups))

    def losses(self, groups: Sequence[TokenGroup], scores: Scores, step: Sequence[TokenGroup]) -> GroupLosses:
        old = torch.tensor([self._rollouts.old_logps[group.id] for group in groups], dtype=torch.float64)
        advantages = torch.tensor([self._rollouts.advantages[group.id] for group in groups], dtype=torch.float64)
        ratios = (scores.logps_BK[:, 0] - old).exp()
        gains = torch.minimum(ratios * advantages, ratios.clamp(0.8, 1.2) * advantages)
        return GroupLosses(-gains, {"ratio": ratios.detach()})


@pytest.fixture
def reinforce(tiny_folder: Path, cpu: Any) -> Callable[..., tuple[Loop[Scores], Rollouts, Any]]:
    """``reinforce(folder, reporter, num_steps)``: a training that makes its data itself, not begun yet."""

    def make(folder: Path, reporter: Any, num_steps: int) -> tuple[Loop[Scores], Rollouts, Any]:
        folder.mkdir(exist_ok=True)
        lora = LoraParams(r=4, alpha=8.0, dropout=0.1)
        model = add_adapter(load_model(tiny_folder, cpu, quantization="none"), lora, seed=0)
        scorer = Scorer(model, torch.float32)
        rollouts = Rollouts(model, scorer)
        job = Job(Workplace("rlhf", reporter, RuntimeParams(checkpoint_minutes=0.0), cpu), folder)
        limits = Limits.of(job.work, 256)
        descent = make_descent(model, SETTINGS, num_steps, cpu.device, "rlhf")
        learner = Learner(model, scorer, Clipped(rollouts))
        return Loop(learner, Data(rollouts), descent, Course(num_steps), limits, job), rollouts, model

    return make


def test_a_policy_is_trained_on_what_it_writes_itself(reinforce: Any, tmp_path: Path, reporter: Any) -> None:
    loop, rollouts, _ = reinforce(tmp_path / "a", reporter, 15 * ROUND)
    loop.run()
    assert len(rollouts.rewards) == 15
    assert sum(rollouts.rewards[-5:]) > 1.2 * sum(rollouts.rewards[:5])
    firsts = [entry["ratio"] for entry in loop.history if (entry["step"] - 1) % ROUND == 0]
    assert firsts == pytest.approx([1.0] * 15, abs=0.5), "dropout alone is between them"
    assert all("eval_loss" not in entry for entry in loop.history)
    assert loop.kept_step == loop.step == 15 * ROUND


def test_killed_within_a_round_it_goes_on_with_the_same_answers(
    reinforce: Any, tmp_path: Path, make_reporter: Any
) -> None:
    whole, _, expected = reinforce(tmp_path / "whole", make_reporter(), 3 * ROUND)
    whole.run()

    with pytest.raises(Killed):
        reinforce(tmp_path / "killed", make_reporter(kill_at(ROUND + 3)), 3 * ROUND)[0].run()
    resumed, rollouts, found = reinforce(tmp_path / "killed", make_reporter(), 3 * ROUND)
    resumed.run()
    assert resumed.first_step == ROUND + 2
    assert len(rollouts.rewards) == 2, "those of the checkpoint, and one round more"
    assert resumed.history == whole.history
    assert all(math.isfinite(entry["loss"]) for entry in resumed.history)
    trained = dict(expected.named_parameters())
    assert all(torch.equal(value, trained[name]) for name, value in found.named_parameters())


# --- what a machine that lost its power leaves --------------------------------------------


def saved_twice(folder: Path) -> dict[str, torch.nn.Parameter]:
    """The values of step 2, with checkpoints of steps 1 and 2 in the folder."""
    trained = {"a": torch.nn.Parameter(torch.zeros(3)), "b": torch.nn.Parameter(torch.zeros(2))}
    for step in (1, 2):
        with torch.no_grad():
            trained["a"].fill_(step)
        save_checkpoint(folder, trained, step, [{"step": step}], {"source": {}})
    return trained


@pytest.mark.parametrize("name", ["state.json", "weights.safetensors", "rest.pt"])
@pytest.mark.parametrize("keep", [0, -1])
def test_a_checkpoint_that_is_cut_off_gives_way_to_the_one_before(tmp_path: Path, name: str, keep: int) -> None:
    trained = saved_twice(tmp_path)
    file = tmp_path / "checkpoint-2" / name
    file.write_bytes(file.read_bytes()[:keep])
    found = last_checkpoint(tmp_path)
    assert found == tmp_path / "checkpoint-1"
    assert load_checkpoint(found, trained) == ([{"step": 1}], {"source": {}})
    assert trained["a"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("text", ["[]", '"a"', '{"version": 2, "history": null}'])
def test_a_log_of_another_form_is_no_checkpoint(tmp_path: Path, text: str) -> None:
    saved_twice(tmp_path)
    (tmp_path / "checkpoint-2" / "state.json").write_text(text, encoding="utf-8")
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-1"


@pytest.mark.parametrize("step", [2, 3])
def test_a_file_in_place_of_a_checkpoint_goes_when_the_next_one_is_saved(tmp_path: Path, step: int) -> None:
    trained = saved_twice(tmp_path)
    remove(place := tmp_path / "checkpoint-2")
    place.touch()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-1"
    save_checkpoint(tmp_path, trained, step, [], {})
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-1", f"checkpoint-{step}"}


@pytest.mark.parametrize(
    "values", [{"a": torch.ones(3)}, {"a": torch.ones(4), "b": torch.ones(2)}, {"a": torch.ones(3), "c": torch.ones(2)}]
)
def test_a_checkpoint_of_other_weights_is_refused_with_its_remedy(
    tmp_path: Path, values: dict[str, torch.Tensor]
) -> None:
    trained = saved_twice(tmp_path)
    save_file(values, tmp_path / "checkpoint-2" / "weights.safetensors")
    with pytest.raises(StaleArtifactError, match=r"weights.safetensors is damaged .*; delete .*, then run it again$"):
        load_checkpoint(tmp_path / "checkpoint-2", trained)


@pytest.mark.parametrize("rest", [[1], LoraParams()])
def test_a_checkpoint_of_another_state_is_refused_with_its_remedy(tmp_path: Path, rest: Any) -> None:
    trained = saved_twice(tmp_path)
    torch.save(rest, tmp_path / "checkpoint-2" / "rest.pt")
    with pytest.raises(StaleArtifactError, match=r"checkpoint-2 is damaged"):
        load_checkpoint(tmp_path / "checkpoint-2", trained)
